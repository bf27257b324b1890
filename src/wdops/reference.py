"""The oracle: every rule in plain float64 TensorFlow, written from its paper and not from the C++.

`RULES` also is where the Python name, the defaults and the documentation of a rule stand; `wdops.ops` takes them from
here. `apply_<rule>` of this module does what `wdops.ops.apply_<rule>` does, slowly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

STEP_DEFAULTS = {
    "grad_scale": 1.0,
    "clip_scale": 1.0,
    "l1": 0.0,
    "l2": 0.0,
    "weight_decay": 0.0,
    "proximal_l1": 0.0,
    "proximal_l2": 0.0,
}

_STEP_DOC = """

    In the order of Keras, with p the variable and `rule` the update above:

        g  = grad_scale * grad
        g  = clip_scale * (g + l1*sign(p) + 2*l2*p)
        p' = p - lr*weight_decay*p - rule(g)
        p' = sign(p') * max(|p'| - lr*proximal_l1, 0) / (1 + 2*lr*proximal_l2)

    float16, bfloat16 and float32 are computed in float32, float64 in float64; subnormal floats count as 0.

    Args:
      var: the `tf.Variable` or `keras.Variable` to update, of dtype float32, float64, bfloat16 or float16, or a list
        of variables, of mixed dtypes if need be. A list is one op.{slots}
      grad: the gradient of each variable: a tensor of its shape and dtype.
      lr: the learning rate. This and every other hyperparameter is a number, a scalar tensor or variable, or a vector
        with one entry for each variable. It is read when the op runs: a new value never retraces.{hypers}
      grad_scale: multiplies the gradient before all else, to unscale a loss or to average. Default 1.
      clip_scale: multiplies the gradient with its penalty, to clip it. Default 1.
      l1, l2: coefficients of the penalty l1*sum|p| + l2*sum(p^2), as in `keras.regularizers.L1L2`: its gradient is
        added to `grad`. sign(0) is 0. PyTorch's coupled `weight_decay` and `tf.nn.l2_loss` are 2*l2. Default 0.
      weight_decay: decoupled decay, times lr, as in Keras and PyTorch's AdamW (not as in TensorFlow Addons, which
        does not multiply by lr). Default 0.
      proximal_l1, proximal_l2: coefficients of the same penalty as a proximal step: lr*proximal_l1 is the threshold
        under which an element becomes an exact 0. Default 0.
      name: of the op.

    Raises:
      ValueError, tf.errors.InvalidArgumentError: lists of unequal length, a shape or dtype that is not the variable's,
        a variable that is listed twice or not initialized, a vector of another length than the list, a negative decay,
        a hyperparameter that is not finite (grad_scale and clip_scale may be NaN, and then so is the result). All is
        checked before anything is written; under `jit_compile=True`, where values are not known, only numbers, lists
        and arrays are found negative, and nothing is found infinite.
"""


@dataclass(frozen=True)
class Rule:
    """One line of `rules.inc`, as Python sees it."""

    name: str
    update: Callable[..., tuple[tf.Tensor, ...]]

    @property
    def slots(self) -> tuple[str, ...]:
        parameters = inspect.signature(self.update).parameters.values()
        return tuple(p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD)[1:]

    @property
    def signature(self) -> inspect.Signature:
        """That of `apply_<rule>`: var, slots, grad, then the hyperparameters by keyword."""
        own = [p for p in inspect.signature(self.update).parameters.values() if p.kind == p.KEYWORD_ONLY]
        step = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d) for n, d in STEP_DEFAULTS.items()]
        tensors = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("var", *self.slots, "grad")]
        name = inspect.Parameter("name", inspect.Parameter.KEYWORD_ONLY, default=None)
        return inspect.Signature([*tensors, *own, *step, name])

    @property
    def summary(self) -> str:
        """The rule's own docstring without its arguments."""
        return (self.update.__doc__ or "").partition("\n    Slots:")[0].rstrip()

    @property
    def doc(self) -> str:
        """The rule's own docstring, with its `Slots:` and `Hyperparameters:` sorted in among those of every step."""
        arguments = (self.update.__doc__ or "").partition("\n    Slots:")[2]
        slots, _, hypers = arguments.partition("\n    Hyperparameters:")
        return self.summary + _STEP_DOC.format(slots=slots.rstrip(), hypers=hypers.rstrip())


RULES: dict[str, Rule] = {}


def rule(update: Callable[..., tuple[tf.Tensor, ...]]) -> Callable[..., tuple[tf.Tensor, ...]]:
    """Enters `update(grad, *slots, *, lr, ...)`, which returns the update and the new slots, as a rule."""
    RULES[update.__name__] = Rule(update.__name__, update)
    return update


@rule
def sgd(grad: tf.Tensor, *, lr: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Gradient descent: the plain step of `keras.optimizers.SGD`.

    rule(g) = lr*g
    """
    return (lr * grad,)


@rule
def momentum(
    grad: tf.Tensor, m: tf.Tensor, *, lr: tf.Tensor, momentum: tf.Tensor = 0.9, nesterov: tf.Tensor = False
) -> tuple[tf.Tensor, ...]:
    """Gradient descent with momentum (Polyak, 1964), and Nesterov's (Sutskever et al., ICML 2013).

        m'      = momentum*m - lr*g
        rule(g) = -m'                       or, with nesterov,  lr*g - momentum*m'

    As in Keras, lr is inside m. PyTorch keeps m' = momentum*m + g and multiplies by lr afterwards, so the two differ
    where lr changes from step to step.

    Slots:
      m: the momentum, like var.
    Hyperparameters:
      momentum: default 0.9.
      nesterov: whether to look ahead. Default False.
    """
    m = momentum * m - lr * grad
    return tf.where(tf.cast(nesterov, tf.bool), lr * grad - momentum * m, -m), m


def _adam_step_size(lr: tf.Tensor, beta1: tf.Tensor, beta2: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
    return lr * tf.sqrt(1 - beta2**step) / (1 - beta1**step)


@rule
def adam(
    grad: tf.Tensor,
    m: tf.Tensor,
    v: tf.Tensor,
    *,
    lr: tf.Tensor,
    beta1: tf.Tensor = 0.9,
    beta2: tf.Tensor = 0.999,
    epsilon: tf.Tensor = 1e-7,
    step: tf.Tensor,
) -> tuple[tf.Tensor, ...]:
    """Adam (Kingma and Ba, arXiv:1412.6980); with `weight_decay` it is AdamW (arXiv:1711.05101).

        m'      = beta1*m + (1 - beta1)*g
        v'      = beta2*v + (1 - beta2)*g^2
        rule(g) = lr * sqrt(1 - beta2^step)/(1 - beta1^step) * m' / (sqrt(v') + epsilon)

    As in Keras, epsilon is the paper's "epsilon hat", added before the bias of v is corrected; PyTorch adds it after,
    and has 1e-8. Keras forms beta^step and 1 - beta2^step in the dtype of the variable, which for float32 is off by
    1e-5 relative in the first steps; here they are made in double.

    Slots:
      m, v: the first and second moment, like var.
    Hyperparameters:
      beta1, beta2: how much of m and v is kept. Default 0.9 and 0.999.
      epsilon: default 1e-7.
      step: the number of this step, from 1 on.
    """
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    return _adam_step_size(lr, beta1, beta2, step) * m / (tf.sqrt(v) + epsilon), m, v


@rule
def amsgrad(
    grad: tf.Tensor,
    m: tf.Tensor,
    v: tf.Tensor,
    vhat: tf.Tensor,
    *,
    lr: tf.Tensor,
    beta1: tf.Tensor = 0.9,
    beta2: tf.Tensor = 0.999,
    epsilon: tf.Tensor = 1e-7,
    step: tf.Tensor,
) -> tuple[tf.Tensor, ...]:
    """AMSGrad (Reddi et al., arXiv:1904.09237), in the form of Keras: Adam with the largest v that was ever seen.

        m'      = beta1*m + (1 - beta1)*g
        v'      = beta2*v + (1 - beta2)*g^2
        vhat'   = max(vhat, v')
        rule(g) = lr * sqrt(1 - beta2^step)/(1 - beta1^step) * m' / (sqrt(vhat') + epsilon)

    Slots:
      m, v, vhat: the first and second moment and the largest second moment, like var.
    Hyperparameters:
      beta1, beta2: how much of m and v is kept. Default 0.9 and 0.999.
      epsilon: default 1e-7.
      step: the number of this step, from 1 on.
    """
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    vhat = tf.maximum(vhat, v)
    return _adam_step_size(lr, beta1, beta2, step) * m / (tf.sqrt(vhat) + epsilon), m, v, vhat


def to_float64(x: Any) -> tf.Tensor:
    """`x` in float64. A bare tf.cast would round a Python number, or a list of them, to float32 on the way."""
    if isinstance(x, (list, tuple)):
        return tf.stack([to_float64(entry) for entry in x]) if x else tf.zeros(0, tf.float64)
    if isinstance(x, (bool, int, float)):
        return tf.constant(float(x), tf.float64)
    x = tf.convert_to_tensor(x)
    if not (x.dtype.is_floating or x.dtype.is_integer or x.dtype.is_bool):
        raise ValueError(f"{x.dtype.name} is no type of numbers")
    return tf.cast(x, tf.float64)


def penalty_gradient(param: tf.Tensor, l1: Any, l2: Any) -> tf.Tensor:
    """The gradient of l1*sum|param| + l2*sum(param^2), in the dtype of `param`."""
    return tf.cast(l1, param.dtype) * tf.sign(param) + tf.cast(2 * l2, param.dtype) * param


def step(rule_name: str, param: Any, slots: Sequence[Any], grad: Any, **hypers: Any) -> tuple[tf.Tensor, ...]:
    """One step of one variable in float64: returns the new param and the new slots, unrounded.

    `param`, `slots` and `grad` are tensors or arrays of any floating dtype; `hypers` are scalars.
    """
    p, g, *slots = (to_float64(x) for x in (param, grad, *slots))
    h = {n: to_float64(x) for n, x in {**STEP_DEFAULTS, **hypers}.items()}
    own = {n: x for n, x in h.items() if n not in STEP_DEFAULTS}
    g = h["clip_scale"] * (h["grad_scale"] * g + penalty_gradient(p, h["l1"], h["l2"]))
    update, *slots = RULES[rule_name].update(g, *slots, **own)
    p = p - h["lr"] * h["weight_decay"] * p - update
    p = tf.sign(p) * tf.maximum(tf.abs(p) - h["lr"] * h["proximal_l1"], 0)
    return p / (1 + 2 * h["lr"] * h["proximal_l2"]), *slots


def as_list(x: Any) -> list[Any]:
    """`x` as a list, if it is not a list or tuple of variables or tensors."""
    return list(x) if isinstance(x, (list, tuple)) else [x]


def _make_apply(rule: Rule) -> Callable[..., None]:
    def apply(*args: Any, **kwargs: Any) -> None:
        given = rule.signature.bind(*args, **kwargs)
        given.apply_defaults()
        arguments = given.arguments.items()
        hypers = {n: to_float64(x) for n, x in arguments if n not in ("var", "grad", "name", *rule.slots)}
        targets = [as_list(given.arguments[n]) for n in ("var", *rule.slots)]
        for i, grad in enumerate(as_list(given.arguments["grad"])):
            scalars = {n: x if len(x.shape) == 0 else x[i] for n, x in hypers.items()}
            param, *slots = (target[i] for target in targets)
            for variable, value in zip((param, *slots), step(rule.name, param, slots, grad, **scalars), strict=True):
                variable.assign(tf.cast(value, variable.dtype))

    return document(apply, rule)


def document(apply: Callable[..., Any], rule: Rule) -> Callable[..., Any]:
    """Gives `apply` the name, signature and docstring of `apply_<rule>`."""
    apply.__name__ = apply.__qualname__ = f"apply_{rule.name}"
    apply.__doc__ = rule.doc
    apply.__signature__ = rule.signature
    return apply


for _rule in RULES.values():
    globals()[f"apply_{_rule.name}"] = _make_apply(_rule)
