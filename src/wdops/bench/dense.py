"""Times the step of a dense layer whose gradient is never formed, and weighs it.

    python benchmarks/dense.py [--rounds N] [--patience SECONDS] [--json FILE]

The update of a 4096 x 4096 kernel from the factors of its gradient, against a matrix product and the fused update; a
whole training step of Dense(4096, "elu") on 32 x 4096 with an L2 regularizer and AdamW, against Keras; the peak memory
of such a step of four layers, in a process of its own each. The rivals must agree before anything is timed.
"""

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from timing import (
    Run,
    loop,
    measure,
    milliseconds,
    parser_of,
    print_machine,
    print_ratios,
    ratio,
    stream_of,
    write_json,
)

import wdops
from wdops.factored import FactoredGradient

N = 4096
BATCHES = (8, 32, 128, 512)
L2 = 1e-4
MEMORY_LAYERS = 4


def update_runs() -> dict[str, Run]:
    """The fused AdamW of one kernel from a product and from its factors, for every batch."""
    p, m, v = (tf.Variable(tf.random.normal([N, N])) for _ in range(3))
    v.assign(tf.abs(v))

    def run_of(batch: int, factored: bool) -> Run:
        x, dz = (tf.Variable(tf.random.normal([batch, N])) for _ in range(2))

        def step() -> None:
            # Read in the step, so that TensorFlow does not make the product once and for all.
            a, b = x.read_value(), dz.read_value()
            grad = FactoredGradient(a, b) if factored else tf.matmul(a, b, transpose_a=True)
            wdops.ops.apply_adam(
                p, m, v, grad, lr=1e-3, beta1=0.9, beta2=0.999, epsilon=1e-7, step=3, l2=L2, weight_decay=0.01
            )

        return loop(step, jit=False)

    runs = {}
    for batch in BATCHES:
        runs[f"product, batch {batch}"] = run_of(batch, factored=False)
        runs[f"factors, batch {batch}"] = run_of(batch, factored=True)
    runs["bare stream, 3 reads and 3 writes"] = stream_of(N * N, (3, 3))
    return runs


def network(module: object, layers: int, size: int) -> keras.Model:
    keras.utils.set_random_seed(0)
    regularizer = keras.regularizers.L2(L2)
    dense = [module.Dense(size, activation="elu", kernel_regularizer=regularizer) for _ in range(layers)]
    return keras.Sequential([keras.Input((size,)), *dense])


def training(way: str, layers: int = 1, size: int = N) -> tuple[keras.Model, Callable[[], None]]:
    """A model, and a step of its training by Keras, by wdops with gradients that are formed, or by their factors."""
    model = network(keras.layers if way == "Keras" else wdops.layers, layers, size)
    optimizer = (keras if way == "Keras" else wdops).optimizers.AdamW(1e-4, weight_decay=0.0)
    optimizer.build(model.trainable_variables)
    if way != "Keras":
        wdops.fold_regularizers(model, optimizer)
    if way == "factors":
        optimizer.factor_gradients(model)
    rng = np.random.default_rng(0)
    x, y = (tf.Variable(rng.normal(size=(32, size)), dtype=tf.float32, trainable=False) for _ in range(2))

    def step() -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2) + tf.add_n(model.losses)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    return model, step


def check_agreement(steps: int = 3) -> None:
    """Raises AssertionError if a rival computes something else than Keras."""
    weights = {}
    for way in ("Keras", "plain gradients", "factors"):
        model, step = training(way, layers=2, size=64)
        loop(step, jit=False)(steps)
        weights[way] = model.get_weights()
    for way, values in weights.items():
        for got, expected in zip(values, weights["Keras"], strict=True):
            assert np.abs(got - expected).max() < 1e-5, way


def peak_bytes(way: str) -> float:
    """The most memory that two steps hold at once, in a process of its own, beyond what it has before them."""
    program = f"import sys; sys.path[:0] = {sys.path!r}; import dense; dense.print_peak({way!r})"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return float(result.stdout.splitlines()[-1])


def print_peak(way: str) -> None:
    def kilobytes(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])

    run = loop(training(way, MEMORY_LAYERS)[1], jit=False)
    # Building a model has a peak of its own, and leaves memory that a step could use unseen.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    before = kilobytes("VmRSS:")
    run(2)
    print((kilobytes("VmHWM:") - before) * 1024)


def main() -> None:
    arguments = parser_of(__doc__, rounds=15).parse_args()
    check_agreement()
    print_machine("ms, and in brackets times the factors")
    seconds = measure(update_runs(), arguments.rounds, arguments.patience)
    print(f"| AdamW of {N} x {N} | product, then update | factors | |\n|---|---|---|---|")
    for batch in BATCHES:
        product, factors = (seconds[f"{way}, batch {batch}"] for way in ("product", "factors"))
        times = f"{milliseconds(product):.2f} | {milliseconds(factors):.2f} | {ratio(product, factors):.2f}"
        print(f"| batch {batch} | {times} |")
    print(f"| bare stream | | {milliseconds(seconds['bare stream, 3 reads and 3 writes']):.2f} | |\n", flush=True)

    runs = {
        "factors": loop(training("factors")[1], jit=False),
        "plain gradients": loop(training("plain gradients")[1], jit=False),
        "Keras, tf.function": loop(training("Keras")[1], jit=False),
        "Keras, jit_compile": loop(training("Keras")[1], jit=True),
    }
    steps = measure(runs, arguments.rounds, arguments.patience)
    print_ratios(f"a training step of Dense({N}, elu, L2) on 32 x {N}, AdamW", steps, to="factors")

    parameters = MEMORY_LAYERS * N * (N + 1)
    peaks = {way: peak_bytes(way) for way in ("factors", "plain gradients", "Keras")}
    print(f"| peak memory of {MEMORY_LAYERS} such layers | MB | bytes a parameter above the factors |\n|---|---|---|")
    for way, peak in peaks.items():
        print(f"| {way} | {peak / 1e6:.0f} | {(peak - peaks['factors']) / parameters:.2f} |")
    write_json(arguments.json, seconds | steps | {"peak bytes": peaks})


if __name__ == "__main__":
    main()
