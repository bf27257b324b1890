"""Times an activation behind a bias, forward and backward with the bias's gradient, beside TensorFlow and XLA.

    python benchmarks/activations.py [--rounds N] [--patience SECONDS] [--isa NAME] [--json FILE] [activation ...]

Each table is one shape in float32: one far larger than the caches, and one that fits in them. The last row is a bare
stream of the same reads and writes: one of each forward, two and one backward. All results
are kept until the next step, so that nothing is left out, and nothing is made in place.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from timing import Run, loop, measure, parser_of, print_machine, print_ratios, stream_of, write_json

import wdops

SHAPES = {"64 M elements": (65536, 1024), "131 k elements": (128, 1024)}
RIVALS: dict[str, Callable[..., Any]] = {"elu": tf.nn.elu, "relu": tf.nn.relu, "leaky_relu": tf.nn.leaky_relu}


def step_of(activate: Callable[..., tf.Tensor], shape: tuple[int, int], jit: bool) -> Run:
    x, grad = (tf.Variable(tf.random.stateless_normal(shape, (0, seed))) for seed in (1, 2))
    bias = tf.Variable(tf.random.stateless_normal(shape[1:], (0, 3)))
    made = [tf.Variable(tf.zeros_like(v)) for v in (x, x, bias)]

    def step() -> None:
        with tf.GradientTape() as tape:
            value = x.read_value()
            tape.watch([value, bias])
            output = activate(value, bias)
        # To assign a tensor is to keep its buffer: no copy, but XLA leaves nothing out.
        for variable, tensor in zip(made, [output, *tape.gradient(output, [value, bias], grad)], strict=True):
            variable.assign(tensor)

    return loop(step, jit)


def main() -> None:
    parser = parser_of(__doc__, rounds=15)
    parser.add_argument("activation", nargs="*", choices=[[], *RIVALS], help="default: all")
    parser.add_argument("--isa", choices=wdops.isa.available(), default=wdops.isa.active(), help="default: the best")
    arguments = parser.parse_args()
    wdops.isa.use(arguments.isa)
    print_machine("ms of forward and backward (and times wdops)")
    results = {}
    for name in arguments.activation or RIVALS:
        ours, theirs = getattr(wdops.ops, name), RIVALS[name]
        for title, shape in SHAPES.items():
            rivals = {
                "wdops": (ours, False),
                "wdops, jit_compile=True": (ours, True),
                "TensorFlow, tf.function": (lambda x, b, f=theirs: f(tf.nn.bias_add(x, b)), False),
                "TensorFlow, jit_compile=True": (lambda x, b, f=theirs: f(tf.nn.bias_add(x, b)), True),
            }
            runs = {rival: step_of(f, shape, jit) for rival, (f, jit) in rivals.items()}
            runs["bare stream"] = stream_of(shape[0] * shape[1], (2, 1), (3, 1))
            seconds = results[f"{name}, {title}"] = measure(runs, arguments.rounds, arguments.patience)
            print_ratios(f"{name}, {title}", seconds, to="wdops")
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
