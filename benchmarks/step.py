"""Times one AdamW step of wdops beside Keras's, TensorFlow's and a bare stream of the same reads and writes.

    python benchmarks/step.py [--rounds N] [--json FILE] [case ...]

All rivals run in turn in every round, so that a drift of the machine meets them alike; the table gives medians, and
the ratio of each to wdops as the median of the ratios within a round.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import wdops

tf.get_logger().setLevel("ERROR")  # every case is a new tf.function, which it takes for retracing

Shapes = list[tuple[int, ...]]
Step = Callable[[int], None]  # runs so many steps

_BERT_LAYER: Shapes = [
    *[(768, 768), (768,)] * 4,
    *[(768,)] * 4,
    (768, 3072),
    (3072,),
    (3072, 768),
    (768,),
]
CASES: dict[str, Shapes] = {
    "64 M in 1 tensor": [(1 << 26,)],
    "BERT-base, 109.5 M in 199": [
        (30522, 768),
        (512, 768),
        (2, 768),
        (768,),
        (768,),
        *_BERT_LAYER * 12,
        (768, 768),
        (768,),
    ],
    "0.83 M in 400": [(64, 64), (64,)] * 200,
}


def stream_of(shapes: Shapes) -> Step:
    """The bare stream over one array of as many elements, on as many threads as TensorFlow's pool has here."""
    source = Path(__file__).with_name("stream.cc")
    library = Path(tempfile.mkdtemp()) / "stream.so"
    subprocess.run(["g++", "-O3", "-shared", "-fPIC", "-pthread", source, "-o", library], check=True)
    stream = ctypes.CDLL(str(library)).stream
    n = sum(int(np.prod(s)) for s in shapes)
    arrays = [np.ones(n, np.float32) for _ in range(4)]
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
    threads = len(os.sched_getaffinity(0))

    def run(times: int, arrays: list[np.ndarray] = arrays) -> None:
        for _ in range(times):
            stream(ctypes.c_int64(n), *pointers, threads)

    return run


def loop(step: Callable[[], None], jit: bool) -> Step:
    """`step` in a loop inside one tf.function: the price of a call from Python is not the step's."""

    @tf.function(jit_compile=jit)
    def run(times: tf.Tensor) -> None:
        for _ in tf.range(times):
            step()

    return lambda times: run(tf.constant(times))


def optimizer_step(optimizer: keras.optimizers.Optimizer, shapes: Shapes, jit: bool) -> Step:
    variables = [keras.Variable(np.ones(s, np.float32)) for s in shapes]
    grads = [tf.constant(np.full(s, 1e-3, np.float32)) for s in shapes]
    optimizer.build(variables)

    return loop(lambda: optimizer.apply(grads, variables), jit)


def resource_apply_adam(shapes: Shapes) -> Step:
    variables = [[tf.Variable(np.ones(s, np.float32)) for _ in range(3)] for s in shapes]
    grads = [tf.constant(np.full(s, 1e-3, np.float32)) for s in shapes]

    def step() -> None:
        for (p, m, v), grad in zip(variables, grads, strict=True):
            tf.raw_ops.ResourceApplyAdam(
                var=p.handle, m=m.handle, v=v.handle, beta1_power=0.9, beta2_power=0.999, lr=1e-3, beta1=0.9,
                beta2=0.999, epsilon=1e-7, grad=grad,
            )  # fmt: skip

    return loop(step, jit=False)


def rivals(shapes: Shapes) -> dict[str, Step]:
    def adamw(module: object) -> keras.optimizers.Optimizer:
        return module.AdamW(1e-3, weight_decay=0.01)

    return {
        "wdops": optimizer_step(adamw(wdops.optimizers), shapes, jit=False),
        "wdops, jit_compile": optimizer_step(adamw(wdops.optimizers), shapes, jit=True),
        "Keras, tf.function": optimizer_step(adamw(keras.optimizers), shapes, jit=False),
        "Keras, jit_compile": optimizer_step(adamw(keras.optimizers), shapes, jit=True),
        "ResourceApplyAdam, no decay": resource_apply_adam(shapes),
        "bare stream": stream_of(shapes),
    }


def measure(runs: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of one step of each rival in each round, after a first call that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    times = {}
    for name, run in runs.items():
        run(1)
        begin = time.perf_counter()
        run(1)
        times[name] = max(1, round(0.1 / (time.perf_counter() - begin)))
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run(times[name])
            seconds[name].append((time.perf_counter() - begin) / times[name])
    return seconds


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", choices=[[], *CASES], help="default: all")
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    parser.add_argument("--json", type=Path, help="also write the seconds of every round to this file")
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    machine = f"{processor()}, {threads} threads, {wdops.isa.active()}, TensorFlow {tf.__version__}"
    print(f"{machine}; ms of a step, and in brackets times wdops\n")
    results = {}
    for case in arguments.case or CASES:
        keras.backend.clear_session()
        seconds = results[case] = measure(rivals(CASES[case]), arguments.rounds)
        print(f"| {case} | |\n|---|---|")
        for name, values in seconds.items():
            ratio = statistics.median(v / w for v, w in zip(values, seconds["wdops"], strict=True))
            print(f"| {name} | {statistics.median(values) * 1e3:.2f} ({ratio:.2f}) |")
        print(flush=True)
    if arguments.json:
        facts = {"processor": processor(), "threads": threads, "isa": wdops.isa.active(), "build": wdops.build_info()}
        arguments.json.write_text(json.dumps({"machine": facts, "seconds": results}, indent=1))


if __name__ == "__main__":
    main()
