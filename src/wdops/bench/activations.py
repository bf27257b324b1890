"""An activation behind a bias, forward and backward with the bias's gradient, beside TensorFlow and XLA.

Each table is one shape in float32: one far larger than the caches, and one that fits in them. All results are kept
until the next step, so that nothing is left out, and nothing is made in place. The bias of a step is the gradient that
the step before made: what does not change from step to step, XLA makes once, ahead of the loop.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from wdops import ops
from wdops.bench.timing import STREAM, Run, Settings, Table, in_turn, loop, stream_of

SHAPES, SHORT_SHAPES = ((65536, 1024), (128, 1024)), ((4096, 1024), (128, 1024))
RIVALS: dict[str, Callable[..., Any]] = {"elu": tf.nn.elu, "relu": tf.nn.relu, "leaky_relu": tf.nn.leaky_relu}
# Forward, one array is read and another written; backward, two and one. The stream writes what it has read, as a write
# to memory fetches it first.
PASSES = ((2, 1), (3, 1))
BYTES = 4 * (2 + 3)


def step_of(activate: Callable[..., tf.Tensor], shape: tuple[int, int], jit: bool) -> Run:
    x = tf.Variable(tf.random.stateless_normal(shape, (0, 1)))
    grad = tf.Variable(tf.random.stateless_normal(shape, (0, 2)) / shape[0])  # for a bias of less than 1
    bias = tf.Variable(tf.random.stateless_normal(shape[1:], (0, 3)))
    made = [*(tf.Variable(tf.zeros_like(x)) for _ in range(2)), bias]

    def step() -> None:
        with tf.GradientTape() as tape:
            value = x.read_value()
            tape.watch([value, bias])
            output = activate(value, bias)
        # To assign a tensor is to keep its buffer: no copy, but XLA leaves nothing out.
        for variable, tensor in zip(made, [output, *tape.gradient(output, [value, bias], grad)], strict=True):
            variable.assign(tensor)

    return loop(step, jit)


def check_agreement() -> None:
    """Raises AssertionError if an output or a gradient is not TensorFlow's."""
    for name, theirs in RIVALS.items():
        x, bias = tf.random.stateless_normal((8, 5), (0, 1)), tf.random.stateless_normal((5,), (0, 2))
        results = []
        for activate in (getattr(ops, name), lambda x, b, f=theirs: f(tf.nn.bias_add(x, b))):
            with tf.GradientTape() as tape:
                tape.watch([x, bias])
                output = activate(x, bias)
            results.append([output, *tape.gradient(output, [x, bias])])
        for got, expected in zip(*results, strict=True):
            tf.debugging.assert_near(got, expected, atol=1e-6, message=name)


def measure(settings: Settings, progress: Callable[[str], None]) -> list[Table]:
    progress("the rivals agree")
    check_agreement()
    tables = []
    for name, theirs in RIVALS.items():
        ours = getattr(ops, name)
        for shape in SHORT_SHAPES if settings.short else SHAPES:
            title, n = f"{name}, {shape[0]} x {shape[1]}", shape[0] * shape[1]
            progress(title)
            rivals = {
                "wdops": (ours, False),
                "wdops, jit_compile=True": (ours, True),
                "TensorFlow, tf.function": (lambda x, b, f=theirs: f(tf.nn.bias_add(x, b)), False),
                "TensorFlow, jit_compile=True": (lambda x, b, f=theirs: f(tf.nn.bias_add(x, b)), True),
            }
            runs = {rival: step_of(f, shape, jit) for rival, (f, jit) in rivals.items()} | {
                STREAM: stream_of(n, *PASSES)
            }
            bytes_per_element = {"wdops": BYTES, STREAM: BYTES}
            tables.append(in_turn(title, runs, settings, elements=n, bytes_per_element=bytes_per_element))
    return tables
