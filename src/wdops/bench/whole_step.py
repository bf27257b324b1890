"""The whole step behind the gradients, on BERT-base: L2 penalty, clipping by the global norm, AdamW, moving average.

The penalty is in the gradient, and its value is there for the loss; AdamW has decoupled decay. PyTorch takes part where
it is installed. Before anything is timed, all rivals step a few small tensors and must agree in every weight, slot,
average and penalty.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from wdops import ops, optimizers
from wdops.bench.timing import (
    BERT_BASE,
    BERT_LAYER,
    STREAM,
    THREADS,
    Run,
    Settings,
    Shapes,
    Table,
    check_changes,
    each_way,
    elements,
    in_turn,
    loop,
    stream_of,
)
from wdops.regularizers import fold_regularizers

try:
    import torch
except ImportError:
    torch = None

LR, WEIGHT_DECAY, L2, CLIPNORM, EMA_MOMENTUM = 1e-3, 0.01, 1e-3, 1.0, 0.99
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-7
# The norms read p and g; the step reads p, g, m, v and the average, and writes all but g.
PASSES = ((2, 0), (5, 4))

Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Rival:
    run: Run
    # The last penalty, then all weights, all first and all second moments, all averages.
    state: Callable[[], Arrays]
    # Undoes what a step does to its gradients.
    restore_grads: Callable[[], None] = lambda: None


def start(shapes: Shapes) -> tuple[Arrays, Arrays]:
    """Weights and gradients; these are in every case here so large that they are clipped."""
    random = np.random.default_rng(0)
    weights, grads = ([random.standard_normal(s, np.float32) for s in shapes] for _ in range(2))
    return weights, grads


def wdops_ops(weights: Arrays, grads: list[tf.Tensor]) -> Callable[[bool], Rival]:
    p, average = ([tf.Variable(w) for w in weights] for _ in range(2))
    m, v = ([tf.Variable(tf.zeros(w.shape)) for w in weights] for _ in range(2))
    iterations = tf.Variable(0, dtype=tf.int64)
    penalty = tf.Variable(0, dtype=tf.float64)

    def step() -> None:
        norms = ops.norms(grads, p, l2=L2)
        penalty.assign(tf.reduce_sum(norms.penalty))
        iterations.assign_add(1)
        ops.apply_adam(
            p,
            m,
            v,
            grads,
            lr=LR,
            beta1=BETA1,
            beta2=BETA2,
            epsilon=EPSILON,
            step=iterations,
            l2=L2,
            clip_scale=CLIPNORM / tf.maximum(tf.norm(norms.norm), CLIPNORM),
            weight_decay=WEIGHT_DECAY,
            average=average,
            # As in Keras, the first average is the weight.
            ema_momentum=tf.where(iterations > 1, tf.constant(EMA_MOMENTUM, tf.float64), 0),
        )

    def state() -> Arrays:
        return [x.numpy() for x in (penalty, *p, *m, *v, *average)]

    return lambda jit: Rival(loop(step, jit), state)


def with_optimizer(
    optimizer: keras.optimizers.Optimizer,
    variables: list[keras.Variable],
    penalty_and_grads: Callable[[list[tf.Variable]], tuple[tf.Tensor, list[tf.Tensor]]],
) -> Callable[[bool], Rival]:
    optimizer.build(variables)
    penalty = tf.Variable(0, dtype=tf.float32)

    def step() -> None:
        value, grads = penalty_and_grads([v.value for v in variables])
        penalty.assign(tf.cast(value, tf.float32))
        optimizer.apply(grads, variables)

    def state() -> Arrays:
        slots = optimizer._momentums, optimizer._velocities, optimizer._model_variables_moving_average
        return [x.numpy() for x in (penalty, *variables, *(x for slot in slots for x in slot))]

    return lambda jit: Rival(loop(step, jit), state)


def adamw(module: object) -> keras.optimizers.Optimizer:
    return module.AdamW(
        LR,
        WEIGHT_DECAY,
        BETA1,
        BETA2,
        EPSILON,
        global_clipnorm=CLIPNORM,
        use_ema=True,
        ema_momentum=EMA_MOMENTUM,
    )


class Regularized(keras.layers.Layer):
    """The weights of a model whose layers have an L2 regularizer each."""

    def build(self, shapes: Shapes) -> None:
        for shape in shapes:
            self.add_weight(shape, regularizer=keras.regularizers.L2(L2))

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x


def wdops_adamw(weights: Arrays, grads: list[tf.Tensor]) -> Callable[[bool], Rival]:
    layer = Regularized()
    layer.build([w.shape for w in weights])
    model = keras.Sequential([layer])
    model.built = True
    model.set_weights(weights)
    optimizer = adamw(optimizers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weight_decay decays the layer as well, which it should here
        fold_regularizers(model, optimizer)

    def penalty_and_grads(variables: list[tf.Variable]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape():  # as in a training step
            return sum(model.losses), grads

    return with_optimizer(optimizer, model.trainable_variables, penalty_and_grads)


def keras_adamw(weights: Arrays, grads: list[tf.Tensor]) -> Callable[[bool], Rival]:
    def penalty_and_grads(variables: list[tf.Variable]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        penalty = L2 * tf.add_n([tf.reduce_sum(tf.square(v)) for v in variables])
        # What autodiff makes of the penalty, with one multiplication less.
        return penalty, [g + 2 * L2 * v for g, v in zip(grads, variables, strict=True)]

    return with_optimizer(adamw(keras.optimizers), [keras.Variable(w) for w in weights], penalty_and_grads)


def torch_adamw(weights: Arrays, grads: Arrays) -> Callable[[bool], Rival]:
    """The fused AdamW with foreach functions around it, in place, because here the gradients are the step's own.

    `way` is "autograd", where the penalty is in the loss and autograd makes its gradient, as a user writes it; "by
    hand", where foreach functions do both; or "scaled", where moreover the fused AdamW scales the gradients by what is
    meant for a loss's scale, which is one pass less than clip_grad_norm_.
    """
    torch.set_num_threads(THREADS)
    params = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    average = [torch.tensor(w) for w in weights]
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.tensor(g)
    own_grads = [p.grad for p in params]
    optimizer = torch.optim.AdamW(params, LR, (BETA1, BETA2), EPSILON, WEIGHT_DECAY, fused=True)
    penalty, taken = torch.zeros(()), 0  # so many steps

    def penalize(way: str) -> None:
        nonlocal penalty
        if way == "autograd":
            loss = L2 * torch.stack([p.square().sum() for p in params]).sum()
            loss.backward()
            penalty = loss.detach()
            return
        with torch.no_grad():
            penalty = L2 * torch.stack(torch._foreach_norm(params)).square().sum()
            torch._foreach_add_(own_grads, params, alpha=2 * L2)

    @torch.no_grad()
    def step(way: str) -> None:
        nonlocal taken
        if way == "scaled":
            optimizer.grad_scale = torch.clamp(torch.nn.utils.get_total_norm(own_grads, foreach=True) / CLIPNORM, min=1)
        else:
            torch.nn.utils.clip_grad_norm_(params, CLIPNORM, foreach=True)
        taken += 1
        # PyTorch adds epsilon behind the bias correction, Keras before it.
        optimizer.param_groups[0]["eps"] = EPSILON / math.sqrt(1 - BETA2**taken)
        optimizer.step()
        optimizer.grad_scale = None
        torch._foreach_lerp_(average, params, 1 - EMA_MOMENTUM if taken > 1 else 1.0)

    def run(times: int, way: str) -> None:
        for _ in range(times):
            penalize(way)
            step(way)

    def state() -> Arrays:
        slots = [[optimizer.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq")]
        return [x.detach().numpy().copy() for x in (penalty, *params, *slots[0], *slots[1], *average)]

    def restore_grads() -> None:
        torch._foreach_copy_(own_grads, [torch.from_numpy(g) for g in grads])

    return lambda way: Rival(lambda times: run(times, way), state, restore_grads)


def rivals(shapes: Shapes, share: bool) -> dict[str, Rival]:
    """All by name, but for the stream. `share` is that of `each_way`."""
    weights, grads = start(shapes)
    tensors = [tf.constant(g) for g in grads]
    made = each_way(lambda: wdops_adamw(weights, tensors), {"wdops": False, "wdops, jit_compile=True": True}, share)
    made |= each_way(
        lambda: wdops_ops(weights, tensors), {"wdops.ops": False, "wdops.ops, jit_compile=True": True}, share
    )
    made |= each_way(
        lambda: keras_adamw(weights, tensors), {"Keras, tf.function": False, "Keras, jit_compile=True": True}, share
    )
    if torch:
        ways = {
            "PyTorch, fused AdamW, foreach clipping and average, penalty by autograd": "autograd",
            "the same with the penalty by foreach functions": "by hand",
            "and clipped within the fused AdamW": "scaled",
        }
        made |= each_way(lambda: torch_adamw(weights, grads), ways, share)
    return made


def check_agreement(steps: int = 3) -> None:
    """Raises AssertionError if a rival computes something else than the first."""
    shapes: Shapes = [(64, 33), (33,), (7, 5)]
    weights, _ = start(shapes)
    zeros = [np.zeros(s, np.float32) for s in shapes]
    origin = [np.zeros(()), *weights, *zeros, *zeros, *weights]
    changes = {}
    for name, rival in rivals(shapes, share=False).items():
        for _ in range(steps):
            rival.restore_grads()
            rival.run(1)
        changes[name] = [after - before for after, before in zip(rival.state(), origin, strict=True)]
    check_changes(changes)


def measure(settings: Settings, progress: Callable[[str], None]) -> list[Table]:
    progress("the rivals agree")
    check_agreement()
    title, shapes = "BERT-base, 109.5 M in 199", BERT_BASE
    if settings.short:
        title, shapes = "a layer of BERT-base, 7.1 M in 16", BERT_LAYER
    progress(title)
    keras.backend.clear_session()
    n = elements(shapes)
    runs = {name: rival.run for name, rival in rivals(shapes, share=True).items()} | {STREAM: stream_of(n, *PASSES)}
    known = ("wdops", "wdops.ops", STREAM)
    bytes_per_element = dict.fromkeys(known, 4 * sum(reads + writes for reads, writes in PASSES))
    return [in_turn(title, runs, settings, elements=n, bytes_per_element=bytes_per_element)]
