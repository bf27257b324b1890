"""A dense layer whose weight gradient is never formed: its AdamW step, a training step, and the memory of one.

The update of a kernel from the factors of its gradient, against a matrix product and the fused update; a whole training
step with an L2 regularizer, against Keras; the peak memory of such a step of four layers, in a process of its own each.
The rivals must agree before anything is timed.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import keras
import numpy as np
import tensorflow as tf

from wdops import layers, ops, optimizers
from wdops.bench import timing
from wdops.bench.timing import Run, Settings, Table, in_its_own_process, in_turn, loop, make_room, stream_of
from wdops.factored import FactoredGradient
from wdops.placement import apart
from wdops.regularizers import fold_regularizers

N, SHORT_N = 4096, 512
BATCHES, SHORT_BATCHES = (8, 32, 128, 512), (8, 128)
TRAINING_BATCH = 32
L2 = 1e-4
MEMORY_LAYERS = 4
FACTORS, PLAIN, KERAS = "wdops, factor_gradients", "wdops", "Keras, tf.function"


def update_runs(n: int, batch: int) -> dict[str, Run]:
    """The fused AdamW of a kernel from the factors of its gradient, and from their product."""
    make_room(n * n)
    p = tf.Variable(tf.random.normal([n, n]))
    # As an optimizer lays them: at distances of powers of two they would be in each other's way.
    m, v = (tf.Variable(apart(value, place)((n, n))) for place, value in enumerate(("zeros", "ones"), 1))
    x, dz = (tf.Variable(tf.random.normal([batch, n])) for _ in range(2))

    def step(factored: bool) -> None:
        # Read in the step, so that TensorFlow does not make the product once and for all.
        a, b = x.read_value(), dz.read_value()
        grad = FactoredGradient(a, b) if factored else tf.matmul(a, b, transpose_a=True)
        ops.apply_adam(p, m, v, grad, lr=1e-3, beta1=0.9, beta2=0.999, epsilon=1e-7, step=3, l2=L2, weight_decay=0.01)

    return {
        "factors": loop(lambda: step(True), jit=False),
        "product, then step": loop(lambda: step(False), jit=False),
        "a bare stream of 3 reads and 3 writes": stream_of(n * n, (3, 3)),
    }


def network(module: ModuleType, count: int, size: int) -> keras.Model:
    keras.utils.set_random_seed(0)
    regularizer = keras.regularizers.L2(L2)
    dense = [module.Dense(size, activation="elu", kernel_regularizer=regularizer) for _ in range(count)]
    return keras.Sequential([keras.Input((size,)), *dense])


def training(way: str, count: int, size: int) -> tuple[keras.Model, Callable[[], None]]:
    """A model, and a step of its training by Keras, by wdops with gradients that are formed, or by their factors."""
    model = network(keras.layers if way == KERAS else layers, count, size)
    optimizer = (keras.optimizers if way == KERAS else optimizers).AdamW(1e-4, weight_decay=0.0)
    optimizer.build(model.trainable_variables)
    if way != KERAS:
        fold_regularizers(model, optimizer)
    if way == FACTORS:
        optimizer.factor_gradients(model)
    rng = np.random.default_rng(0)
    x, y = (tf.Variable(rng.normal(size=(TRAINING_BATCH, size)), dtype=tf.float32, trainable=False) for _ in range(2))

    def step() -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2) + tf.add_n(model.losses)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    return model, step


def check_agreement(steps: int = 3) -> None:
    """Raises AssertionError if a rival computes something else than Keras."""
    weights = {}
    for way in (KERAS, PLAIN, FACTORS):
        model, step = training(way, count=2, size=64)
        loop(step, jit=False)(steps)
        weights[way] = model.get_weights()
    for way, values in weights.items():
        for got, expected in zip(values, weights[KERAS], strict=True):
            assert np.abs(got - expected).max() < 1e-5, way


def peak_bytes(way: str, size: int) -> int:
    return timing.peak_bytes(loop(training(way, MEMORY_LAYERS, size)[1], jit=False))


def measure(settings: Settings, progress: Callable[[str], None]) -> list[Table]:
    progress("the rivals agree")
    check_agreement()
    n = SHORT_N if settings.short else N
    tables = []
    for batch in SHORT_BATCHES if settings.short else BATCHES:
        title = f"AdamW of {n} x {n}, batch {batch}"
        progress(title)
        runs = update_runs(n, batch)
        # p, m and v are read and written; what is formed, is written and read.
        bytes_per_element = dict(zip(runs, (24, 24 + 8, 24), strict=True))
        tables.append(in_turn(title, runs, settings, elements=n * n, bytes_per_element=bytes_per_element))

    ways = (FACTORS, PLAIN, KERAS)
    peak: dict[str, int] = {}
    if not settings.short:
        progress("peak memory")
        with ThreadPoolExecutor() as pool:
            peaks = pool.map(lambda way: in_its_own_process("dense", f"peak_bytes({way!r}, {n})"), ways)
            peak = dict(zip(ways, peaks, strict=True))
    title = f"a training step of Dense({n}, elu, L2) on {TRAINING_BATCH} x {n}"
    progress(title)
    runs = {way: loop(training(way, 1, n)[1], jit=False) for way in ways}
    runs["Keras, jit_compile=True"] = loop(training(KERAS, 1, n)[1], jit=True)
    facts = {"layers": MEMORY_LAYERS, "parameters": MEMORY_LAYERS * n * (n + 1), "peak bytes": peak}
    return [*tables, in_turn(title, runs, settings, elements=n * (n + 1), facts=facts)]
