"""One AdamW step: wdops on each instruction set, Keras, TensorFlow's own op, PyTorch, DeepSpeed, a bare stream.

PyTorch and DeepSpeed take part where they are installed; DeepSpeed compiles its step the first time. Before anything is
timed, all rivals step a few small tensors and must agree in every weight.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from wdops import optimizers
from wdops.bench.timing import (
    BERT_BASE,
    BERT_LAYER,
    GRADS,
    STREAM,
    THREADS,
    WEIGHTS,
    Run,
    Settings,
    Shapes,
    Table,
    check_changes,
    each_way,
    elements,
    in_turn,
    loop,
    make_room,
    normals,
    on_each_isa,
    stream_of,
)

LR, WEIGHT_DECAY, BETA1, BETA2, EPSILON = 1e-3, 0.01, 0.9, 0.999, 1e-7

WDOPS = {"wdops": "tf.function", "wdops, jit_compile=True": "jit_compile"}
KERAS_COMPILED = {"Keras, tf.function": "tf.function", "Keras, jit_compile=True": "jit_compile"}
KERAS = {"Keras, eager": "eager"} | KERAS_COMPILED
RESOURCE_APPLY_ADAM = "ResourceApplyAdam, which has no decay"
# p, m, v and g read, and all but g written. Of XLA and of Keras it is not known.
BYTES = 4 * (4 + 3)


@dataclass(frozen=True)
class Case:
    title: str
    shapes: Shapes
    flushed: bool = False


CASES = [
    Case("64 M in 1 tensor", [(64_000_000,)]),
    Case("BERT-base, 109.5 M in 199", BERT_BASE),
    Case("1 M in 1 tensor, caches flushed", [(1 << 20,)], flushed=True),
    Case("32 k in 1 tensor, cache-resident", [(1 << 15,)]),
]
SHORT_CASES = [
    Case("4 M in 1 tensor", [(4_000_000,)]),
    Case("a layer of BERT-base, 7.1 M in 16", BERT_LAYER),
    *CASES[2:],
]


@dataclass(frozen=True)
class Rival:
    run: Run
    weights: Callable[[], list[np.ndarray]]


def adamw(module: Any, shapes: Shapes) -> Callable[[str], Rival]:
    """Of `module`, keras.optimizers or that of wdops."""
    variables = [keras.Variable(w) for w in normals(shapes, WEIGHTS)]
    grads = list(normals(shapes, GRADS))
    optimizer = module.AdamW(LR, WEIGHT_DECAY, BETA1, BETA2, EPSILON)
    optimizer.build(variables)

    def step() -> None:
        optimizer.apply(grads, variables)

    def eagerly(times: int) -> None:
        for _ in range(times):
            step()

    def way(name: str) -> Rival:
        run = eagerly if name == "eager" else loop(step, jit=name == "jit_compile")
        return Rival(run, lambda: [v.numpy() for v in variables])

    return way


def resource_apply_adam(shapes: Shapes) -> Rival:
    params = [tf.Variable(w) for w in normals(shapes, WEIGHTS)]
    slots = [[tf.Variable(tf.zeros(s)) for s in shapes] for _ in range(2)]
    grads = list(normals(shapes, GRADS))

    def step() -> None:
        for p, m, v, grad in zip(params, *slots, grads, strict=True):
            tf.raw_ops.ResourceApplyAdam(
                var=p.handle, m=m.handle, v=v.handle, beta1_power=BETA1, beta2_power=BETA2, lr=LR, beta1=BETA1,
                beta2=BETA2, epsilon=EPSILON, grad=grad,
            )  # fmt: skip

    return Rival(loop(step, jit=False), lambda: [p.numpy() for p in params])


@functools.cache
def torch_optimizers() -> dict[str, Callable[[list], Any]]:
    """By name, those that are installed; PyTorch has one op for a list of tensors in two ways."""
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    def of_torch(**way: bool) -> Callable[[list], Any]:
        return lambda params: torch.optim.AdamW(params, LR, (BETA1, BETA2), EPSILON, WEIGHT_DECAY, **way)

    found = {"PyTorch, fused": of_torch(fused=True), "PyTorch, foreach": of_torch(foreach=True)}
    if importlib.util.find_spec("deepspeed"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it looks for another, and prints that there is none
        adam = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
        found["DeepSpeedCPUAdam"] = lambda params: adam(params, LR, True, (BETA1, BETA2), EPSILON, WEIGHT_DECAY)
    return found


def torch_adamw(shapes: Shapes) -> Callable[[Callable[[list], Any]], Rival]:
    import torch

    torch.set_num_threads(THREADS)
    params = [torch.nn.Parameter(torch.tensor(w.numpy())) for w in normals(shapes, WEIGHTS)]
    for p, g in zip(params, normals(shapes, GRADS), strict=True):
        p.grad = torch.tensor(g.numpy())

    def way(make: Callable[[list], Any]) -> Rival:
        optimizer = make(params)

        def run(times: int) -> None:
            for _ in range(times):
                optimizer.step()

        return Rival(run, lambda: [p.detach().numpy().copy() for p in params])

    return way


def rivals(shapes: Shapes, share: bool) -> dict[str, Rival]:
    """All by name, but for the stream and the other instruction sets. `share` is that of `each_way`."""
    made = each_way(lambda: adamw(optimizers, shapes), WDOPS, share)
    made |= each_way(lambda: adamw(keras.optimizers, shapes), KERAS, share)
    made[RESOURCE_APPLY_ADAM] = resource_apply_adam(shapes)
    if torch_optimizers():
        made |= each_way(lambda: torch_adamw(shapes), torch_optimizers(), share)
    return made


def check_agreement(steps: int = 3) -> None:
    """Raises AssertionError if a rival computes something else than the first."""
    shapes: Shapes = [(64, 33), (33,), (7, 5)]
    changes = {}
    for name, rival in rivals(shapes, share=False).items():
        before = rival.weights()
        rival.run(steps)
        changes[name] = [new - old for new, old in zip(rival.weights(), before, strict=True)]
    del changes[RESOURCE_APPLY_ADAM]  # without decay it is another step
    check_changes(changes)


def measure(settings: Settings, progress: Callable[[str], None]) -> list[Table]:
    progress("the rivals agree")
    check_agreement()
    tables = []
    for case in SHORT_CASES if settings.short else CASES:
        progress(case.title)
        keras.backend.clear_session()
        n = elements(case.shapes)
        if len(case.shapes) == 1:
            make_room(n)
        runs = {name: rival.run for name, rival in rivals(case.shapes, share=True).items()}
        runs = on_each_isa("wdops", runs["wdops"]) | runs | {STREAM: stream_of(n, (4, 3))}
        known = [name for name in runs if "jit_compile" not in name and not name.startswith("Keras")]
        bytes_per_element = dict.fromkeys(known, BYTES)
        table = in_turn(
            case.title, runs, settings, flushed=case.flushed, elements=n, bytes_per_element=bytes_per_element
        )
        tables.append(table)
    return tables
