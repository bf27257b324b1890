"""Times one AdamW step of wdops beside Keras's, TensorFlow's and a bare stream of the same reads and writes.

python benchmarks/step.py [--rounds N] [--patience SECONDS] [--json FILE] [case ...]
"""

import keras
import numpy as np
import tensorflow as tf
from timing import (
    BERT_BASE,
    Run,
    Shapes,
    elements,
    loop,
    measure,
    parser_of,
    print_machine,
    print_ratios,
    stream_of,
    write_json,
)

import wdops

CASES: dict[str, Shapes] = {
    "64 M in 1 tensor": [(1 << 26,)],
    "BERT-base, 109.5 M in 199": BERT_BASE,
    "0.83 M in 400": [(64, 64), (64,)] * 200,
}


def optimizer_step(optimizer: keras.optimizers.Optimizer, shapes: Shapes, jit: bool) -> Run:
    variables = [keras.Variable(np.ones(s, np.float32)) for s in shapes]
    grads = [tf.constant(np.full(s, 1e-3, np.float32)) for s in shapes]
    optimizer.build(variables)

    return loop(lambda: optimizer.apply(grads, variables), jit)


def resource_apply_adam(shapes: Shapes) -> Run:
    variables = [[tf.Variable(np.ones(s, np.float32)) for _ in range(3)] for s in shapes]
    grads = [tf.constant(np.full(s, 1e-3, np.float32)) for s in shapes]

    def step() -> None:
        for (p, m, v), grad in zip(variables, grads, strict=True):
            tf.raw_ops.ResourceApplyAdam(
                var=p.handle, m=m.handle, v=v.handle, beta1_power=0.9, beta2_power=0.999, lr=1e-3, beta1=0.9,
                beta2=0.999, epsilon=1e-7, grad=grad,
            )  # fmt: skip

    return loop(step, jit=False)


def rivals(shapes: Shapes) -> dict[str, Run]:
    def adamw(module: object) -> keras.optimizers.Optimizer:
        return module.AdamW(1e-3, weight_decay=0.01)

    return {
        "wdops": optimizer_step(adamw(wdops.optimizers), shapes, jit=False),
        "wdops, jit_compile": optimizer_step(adamw(wdops.optimizers), shapes, jit=True),
        "Keras, tf.function": optimizer_step(adamw(keras.optimizers), shapes, jit=False),
        "Keras, jit_compile": optimizer_step(adamw(keras.optimizers), shapes, jit=True),
        "ResourceApplyAdam, no decay": resource_apply_adam(shapes),
        "bare stream": stream_of(elements(shapes), (4, 3)),
    }


def main() -> None:
    parser = parser_of(__doc__, rounds=15)
    parser.add_argument("case", nargs="*", choices=[[], *CASES], help="default: all")
    arguments = parser.parse_args()
    print_machine("ms of a step, and in brackets times wdops")
    results = {}
    for case in arguments.case or CASES:
        keras.backend.clear_session()
        results[case] = measure(rivals(CASES[case]), arguments.rounds, arguments.patience)
        print_ratios(case, results[case], to="wdops")
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
