"""Hundreds and thousands of small tensors, where a step is overhead: AdamW alone, and in the step of a deep network.

The network's step is timed without an optimizer too, so that what the optimizer adds is the difference. The facts tell
the seconds of each first call, which traces and compiles.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from wdops import optimizers
from wdops.bench.step import (
    BYTES,
    KERAS_COMPILED,
    LR,
    WDOPS,
    WEIGHT_DECAY,
    adamw,
    torch_adamw,
    torch_optimizers,
)
from wdops.bench.timing import MOST_TENSORS, STREAM, Run, Settings, Table, each_way, elements, in_turn, stream_of

LAYERS, SHORT_LAYERS = (200, 1000), (5, 25)  # of a kernel and a bias each
UNITS, BATCH = 64, 32
WITHOUT = "forward and backward alone"


def first_calls(runs: dict[str, Run]) -> dict[str, float]:
    """The seconds of one step of each, the first."""
    seconds = {}
    for name, run in runs.items():
        begin = time.perf_counter()
        run(1)
        seconds[name] = time.perf_counter() - begin
    return seconds


def bare_step(layers: int, settings: Settings) -> Table:
    shapes = [(UNITS, UNITS), (UNITS,)] * layers
    n = elements(shapes)
    rivals = each_way(lambda: adamw(optimizers, shapes), WDOPS)
    rivals |= each_way(lambda: adamw(keras.optimizers, shapes), KERAS_COMPILED)
    if torch_optimizers():
        rivals |= each_way(lambda: torch_adamw(shapes), torch_optimizers())
    runs = {
        name: rival.run for name, rival in rivals.items() if "jit_compile" not in name or len(shapes) <= MOST_TENSORS
    }
    runs[STREAM] = stream_of(n, (4, 3))
    facts = {"tensors": len(shapes), "seconds of the first call": first_calls(runs)}
    title = f"AdamW, {n / 1e6:.2f} M in {len(shapes)}"
    known = dict.fromkeys(("wdops", *torch_optimizers(), STREAM), BYTES)
    return in_turn(title, runs, settings, elements=n, bytes_per_element=known, facts=facts)


def training(module: Any, layers: int) -> Run:
    """Steps of a perceptron as deep as `layers`, without an optimizer if `module` is None.

    Each is a call from Python, as in `model.fit`: a function pays in every call for each variable that it captures.
    """
    keras.utils.set_random_seed(0)
    stack = [keras.layers.Dense(UNITS, activation="relu", kernel_initializer="he_normal") for _ in range(layers)]
    # Not a keras.Sequential, which calls itself for every layer, and finds a thousand too deep.
    for layer in stack:
        layer.build((None, UNITS))
    variables = [variable for layer in stack for variable in layer.trainable_variables]
    x, y = (tf.random.stateless_normal((BATCH, UNITS), (0, seed)) for seed in (0, 1))
    if module:
        optimizer = module.AdamW(LR, WEIGHT_DECAY)
        optimizer.build(variables)

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            output = functools.reduce(lambda values, layer: layer(values), stack, x)
            loss = tf.reduce_mean((output - y) ** 2)
        grads = tape.gradient(loss, variables)
        if module:
            optimizer.apply(grads, variables)
        else:  # What nobody takes, TensorFlow leaves out, and half of it where something only waits for it.
            tf.debugging.Assert(tf.math.is_finite(loss), grads)
        return loss

    def run(times: int) -> None:
        for _ in range(times):
            step(x, y)

    return run


def training_step(layers: int, settings: Settings) -> Table:
    modules = {"wdops": optimizers, "Keras": keras.optimizers, WITHOUT: None}
    runs = {name: training(module, layers) for name, module in modules.items()}
    facts = {"tensors": 2 * layers, "seconds of the first call": first_calls(runs)}
    table = in_turn(f"a training step, {2 * layers} tensors", runs, settings, facts=facts)
    added = {
        name: statistics.median(s - w for s, w in zip(table.seconds[name], table.seconds[WITHOUT], strict=True))
        for name in ("wdops", "Keras")
    }
    table.facts["seconds that the optimizer adds"] = added
    return table


def measure(settings: Settings, progress: Callable[[str], None]) -> list[Table]:
    tables = []
    for time_one, title in ((bare_step, "AdamW"), (training_step, "training")):
        for layers in SHORT_LAYERS if settings.short else LAYERS:
            progress(f"{title}, {2 * layers} tensors")
            keras.backend.clear_session()
            tables.append(time_one(layers, settings))
    return tables
