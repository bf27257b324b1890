"""How the benchmarks here time: rivals in turn, loops inside one call, and a bare stream over memory as the yardstick.

All rivals run in turn in every round, so that a drift of the machine meets them alike; tables give medians, and the
ratio of each to another as the median of the ratios within a round.
"""

import argparse
import ctypes
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

import wdops

tf.get_logger().setLevel("ERROR")  # every case is a new tf.function, which it takes for retracing

Shapes = list[tuple[int, ...]]
Run = Callable[[int], None]  # runs so many steps
Seconds = dict[str, list[float]]  # of one step of each rival in each round

_BERT_LAYER: Shapes = [
    *[(768, 768), (768,)] * 4,
    *[(768,)] * 4,
    (768, 3072),
    (3072,),
    (3072, 768),
    (768,),
]
BERT_BASE: Shapes = [
    (30522, 768),
    (512, 768),
    (2, 768),
    (768,),
    (768,),
    *_BERT_LAYER * 12,
    (768, 768),
    (768,),
]
THREADS = len(os.sched_getaffinity(0))  # what TensorFlow's pool takes, too
QUIET = 0.04  # the part of the machine that others may take in a round that counts


def elements(shapes: Shapes) -> int:
    return sum(int(np.prod(s)) for s in shapes)


def loop(step: Callable[[], None], jit: bool) -> Run:
    """`step` in a loop inside one tf.function: the price of a call from Python is not the step's."""

    @tf.function(jit_compile=jit)
    def run(times: tf.Tensor) -> None:
        for _ in tf.range(times):
            step()

    return lambda times: run(tf.constant(times))


@functools.cache
def _stream() -> Callable[..., int]:
    source = Path(__file__).with_name("stream.cc")
    library = Path(tempfile.mkdtemp()) / "stream.so"
    options = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["g++", *options, source, "-o", library], check=True)
    return ctypes.CDLL(str(library)).stream


def stream_of(n: int, *passes: tuple[int, int]) -> Run:
    """The bare stream of a step over n float32 elements: in each pass (reads, writes), that many arrays are read, and
    that many of these written."""
    stream = _stream()
    arrays = [np.ones(n, np.float32) for _ in range(max(reads for reads, _ in passes))]
    pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))

    def run(times: int, arrays: list[np.ndarray] = arrays) -> None:
        for _ in range(times):
            for reads, writes in passes:
                stream(ctypes.c_int64(n), reads, writes, pointers, THREADS)

    return run


class _Others:
    """The part of the machine that other processes take from here on."""

    def __init__(self) -> None:
        self._begin, self._used = time.perf_counter(), self._seconds()

    def part(self) -> float:
        return (self._seconds() - self._used) / (time.perf_counter() - self._begin) / THREADS

    @staticmethod
    def _seconds() -> float:
        """Of all processors since the machine started, but for this process's."""
        user, nice, system, _idle, _iowait, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
        return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def _wait_for_quiet(deadline: float) -> None:
    while time.perf_counter() < deadline:
        others = _Others()
        time.sleep(0.2)
        if others.part() < QUIET:
            return


def measure(runs: dict[str, Run], rounds: int, patience: float) -> Seconds:
    """Times all in turn, after a first call that is not counted.

    A round in which others took a noticeable part of the machine is repeated once they leave off, for as many seconds
    as `patience` says; then the quietest rounds count.
    """
    times = {}
    for name, run in runs.items():
        run(1)
        begin = time.perf_counter()
        run(1)
        times[name] = max(1, round(0.1 / (time.perf_counter() - begin)))
    measured: list[tuple[float, dict[str, float]]] = []  # the others' part, and the seconds of a step
    deadline = time.perf_counter() + patience
    while sum(part < QUIET for part, _ in measured) < rounds:
        if len(measured) >= rounds and time.perf_counter() > deadline:
            break
        _wait_for_quiet(deadline)
        others, seconds = _Others(), {}
        for name, run in runs.items():
            begin = time.perf_counter()
            run(times[name])
            seconds[name] = (time.perf_counter() - begin) / times[name]
        measured.append((others.part(), seconds))
    quietest = sorted(measured, key=lambda of_round: of_round[0])[:rounds]
    if quietest[-1][0] > QUIET:
        print(f"others took up to {quietest[-1][0]:.0%} of the machine in these rounds:", file=sys.stderr)
    return {name: [seconds[name] for _, seconds in quietest] for name in runs}


def milliseconds(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def print_ratios(title: str, seconds: Seconds, to: str) -> None:
    """Milliseconds of each rival and, in brackets, times the rival `to`, as Markdown."""
    print(f"| {title} | |\n|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {milliseconds(values):.2f} ({ratio(values, seconds[to]):.2f}) |")
    print(flush=True)


def parser_of(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    parser.add_argument(
        "--patience", type=float, default=60, help="seconds to wait and repeat rounds that others disturb; default: 60"
    )
    parser.add_argument("--json", type=Path, help="also write the seconds of every round to this file")
    return parser


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def print_machine(unit: str) -> None:
    machine = f"{processor()}, {THREADS} threads, {wdops.isa.active()}, TensorFlow {tf.__version__}"
    print(f"{machine}; {unit}\n", flush=True)


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    if path:
        facts = {"processor": processor(), "threads": THREADS, "isa": wdops.isa.active(), "build": wdops.build_info()}
        path.write_text(json.dumps({"machine": facts, "seconds": results}, indent=1))
