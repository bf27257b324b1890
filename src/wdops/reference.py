"""The oracle: every rule in plain float64 TensorFlow, written from its paper and not from the C++.

`RULES` also is where the Python name, the defaults and the documentation of a rule stand; `wdops.ops` takes them from
here. `apply_<rule>`, `norms` and `global_norm` of this module do what those of `wdops.ops` do, slowly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from wdops.factored import FactoredGradient

# The hyperparameters of every step; None: decay_lr is lr, and without a seed all rounding is to nearest.
STEP_DEFAULTS = {
    "grad_scale": 1.0,
    "accumulation_scale": 1.0,
    "l1": 0.0,
    "l2": 0.0,
    "clip_scale": 1.0,
    "clip_value": 0.0,
    "decay_lr": None,
    "weight_decay": 0.0,
    "proximal_l1": 0.0,
    "proximal_l2": 0.0,
    "ema_momentum": 0.99,
    "ema_overwrite": False,
    "seed": None,
}
GRADIENT_DEFAULTS = {name: STEP_DEFAULTS[name] for name in ("grad_scale", "accumulation_scale", "l1", "l2")}
# What else a call takes; these are no hyperparameters.
CALL_DEFAULTS = {"accumulator": None, "average": None, "scaled_proximal": False, "report_penalty": False, "name": None}

_STEP_DOC = """

    In the order of Keras, with p the variable and `rule` the update above:

        g  = accumulation_scale * (grad_scale*grad + accumulator)           accumulator' = 0
        g  = clip(clip_scale * (g + l1*sign(p) + 2*l2*p), -clip_value, clip_value)
        p' = rule(p - decay_lr*weight_decay*p, g)
        p' = sign(p') * max(|p'| - rate*proximal_l1, 0) / (1 + 2*rate*proximal_l2)
        average' = ema_momentum*average + (1 - ema_momentum)*p'             if ema_overwrite: p' = average'

    float16, bfloat16 and float32 are computed in float32, float64 in float64; subnormal floats count as 0.

    Args:
      var: the `tf.Variable` or `keras.Variable` to update, of dtype float32, float64, bfloat16 or float16, or a list
        of variables, of mixed dtypes if need be. A list is one op.{slots}
        The slots of a float32 variable may be bfloat16, and those of a bfloat16 or float16 variable float32.
      grad: the gradient of each variable: a tensor of its shape and dtype; or of a matrix a `FactoredGradient(x, dz)`,
        which stands for x^T dz, added up over the batch in its order, and is never formed.
      lr: the learning rate. This and every other hyperparameter is a number, a scalar tensor or variable, or a vector
        with one entry for each variable. It is read when the op runs: a new value never retraces.{hypers}
      grad_scale: multiplies the gradient before all else, to unscale a loss. Default 1.
      accumulation_scale: multiplies the gradient or, where there is an accumulator, the sum of both, to make a mean of
        it. Default 1.
      l1, l2: coefficients of the penalty l1*sum|p| + l2*sum(p^2), as in `keras.regularizers.L1L2`: its gradient is
        added to `grad`. sign(0) is 0. PyTorch's coupled `weight_decay` and `tf.nn.l2_loss` are 2*l2. Default 0.
      clip_scale: multiplies the gradient with its penalty, to clip it by a norm. Default 1.
      clip_value: the largest magnitude of an element of the gradient with its penalty; 0 is none. Default 0.
      decay_lr: what weight_decay is multiplied by. Default: lr, as in Keras and PyTorch's AdamW. 1 is what TensorFlow
        Addons do, and a schedule without its base rate is what Loshchilov and Hutter do.
      weight_decay: decoupled decay. Default 0.
      proximal_l1, proximal_l2: coefficients of the same penalty as a proximal step: rate*proximal_l1 is the threshold
        under which an element becomes an exact 0. Default 0.
      ema_momentum: how much of the average is kept, if there is one. Default 0.99.
      ema_overwrite: whether the variable takes the value of its average at the end. Default False.
      seed: a whole number from 0 to 2^53, for all variables or for each, which should change from step to step: then
        what is stored in bfloat16 is rounded stochastically, by bits that are a hash of the seed and the element's
        place, so that changes far below the last bit are kept on average. Default None: to nearest.
      accumulator: sums of earlier gradients, like var, which are added to `grad` and set to 0. Default None.
      average: the moving averages of the variables, like var. Default None.
      scaled_proximal: the rate of the proximal step. False: lr. True: lr times the element's own preconditioner, as
        in proximal Adagrad (Duchi et al., 2011) and ProxGen (Yun et al., arXiv:2103.05725); {rate}. Default False.
      report_penalty: whether to return the penalty. Default False.
      name: of the op.

    Returns:
      l1*sum|p'| + l2*sum(p'^2) of each variable behind the step: a float64 vector. Without `report_penalty` it is
      empty, and good for a control dependency on the step.

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
    rate: Callable[..., tf.Tensor] | None = None

    @property
    def slots(self) -> tuple[str, ...]:
        parameters = inspect.signature(self.update).parameters.values()
        return tuple(p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD)[2:]

    @property
    def hypers(self) -> dict[str, Any]:
        """The rule's own hyperparameters, lr among them, with their defaults; inspect.Parameter.empty: none."""
        parameters = inspect.signature(self.update).parameters.values()
        return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}

    @property
    def signature(self) -> inspect.Signature:
        """That of `apply_<rule>`: var, slots, grad, then the rest by keyword."""
        tensors = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("var", *self.slots, "grad")]
        rest = self.hypers | STEP_DEFAULTS | CALL_DEFAULTS
        return inspect.Signature(
            [*tensors, *(inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d) for n, d in rest.items())]
        )

    @property
    def summary(self) -> str:
        """The rule's own docstring without its arguments."""
        return (self.update.__doc__ or "").partition("\n    Slots:")[0].rstrip()

    @property
    def doc(self) -> str:
        """The rule's own docstring, with its `Slots:` and `Hyperparameters:` sorted in among those of every step."""
        arguments = (self.update.__doc__ or "").partition("\n    Slots:")[2]
        slots, _, hypers = arguments.partition("\n    Hyperparameters:")
        rate = f"here {self.rate.__doc__}" if self.rate else "this rule has none, and True is as False"
        return self.summary + _STEP_DOC.format(slots=slots.rstrip(), hypers=hypers.rstrip(), rate=rate)


RULES: dict[str, Rule] = {}


def rule(update: Callable[..., tuple[tf.Tensor, ...]]) -> Callable[..., tuple[tf.Tensor, ...]]:
    """Enters `update(param, grad, *slots, *, lr, ...)`, which returns the new param and slots, as a rule."""
    RULES[update.__name__] = Rule(update.__name__, update)
    return update


def rate_of(*names: str) -> Callable[[Callable[..., tf.Tensor]], Callable[..., tf.Tensor]]:
    """Enters `rate(slots, hypers)`, of the new slots by name, as the elements' own learning rate in those rules."""

    def enter(rate: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
        for name in names:
            RULES[name] = Rule(name, RULES[name].update, rate)
        return rate

    return enter


@rule
def sgd(param: tf.Tensor, grad: tf.Tensor, *, lr: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Gradient descent: the plain step of `keras.optimizers.SGD`.

    rule(p, g) = p - lr*g
    """
    return (param - lr * grad,)


@rule
def momentum(
    param: tf.Tensor,
    grad: tf.Tensor,
    m: tf.Tensor,
    *,
    lr: tf.Tensor,
    momentum: tf.Tensor = 0.9,
    nesterov: tf.Tensor = False,
) -> tuple[tf.Tensor, ...]:
    """Gradient descent with momentum (Polyak, 1964), and Nesterov's (Sutskever et al., ICML 2013).

        m'         = momentum*m - lr*g
        rule(p, g) = p + m'                 or, with nesterov,  p + momentum*m' - lr*g

    As in Keras, lr is inside m. PyTorch keeps m' = momentum*m + g and multiplies by lr afterwards, so the two differ
    where lr changes from step to step.

    Slots:
      m: the momentum, like var.
    Hyperparameters:
      momentum: default 0.9.
      nesterov: whether to look ahead. Default False.
    """
    m = momentum * m - lr * grad
    return param + tf.where(tf.cast(nesterov, tf.bool), momentum * m - lr * grad, m), m


def rounded(x: tf.Tensor) -> tf.Tensor:
    """`x`: marks an intermediate that a kernel rounds, and then cancels or squares, for the bound of the tests."""
    return x


def _moments(
    grad: tf.Tensor, m: tf.Tensor, v: tf.Tensor, beta1: tf.Tensor, beta2: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    return beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2


def _adam_step_size(lr: tf.Tensor, beta1: tf.Tensor, beta2: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
    return lr * tf.sqrt(1 - beta2**step) / (1 - beta1**step)


_BETAS_DOC = """beta1, beta2: how much of m and v is kept. Default 0.9 and 0.999.
      epsilon: default 1e-7.
      step: the number of this step, from 1 on."""


def _with_betas(update: Callable[..., Any]) -> Callable[..., Any]:
    """Puts the hyperparameters that Adam's descendants share into the docstring."""
    update.__doc__ = (update.__doc__ or "").replace("{betas}", _BETAS_DOC)
    return update


@rule
@_with_betas
def adam(
    param: tf.Tensor,
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

        m'         = beta1*m + (1 - beta1)*g
        v'         = beta2*v + (1 - beta2)*g^2
        rule(p, g) = p - lr * sqrt(1 - beta2^step)/(1 - beta1^step) * m' / (sqrt(v') + epsilon)

    As in Keras, epsilon is the paper's "epsilon hat", added before the bias of v is corrected; PyTorch adds it after,
    and has 1e-8. Keras forms beta^step and 1 - beta2^step in the dtype of the variable, which for float32 is off by
    1e-5 relative in the first steps; here they are made in double.

    Slots:
      m, v: the first and second moment, like var.
    Hyperparameters:
      {betas}
    """
    m, v = _moments(grad, m, v, beta1, beta2)
    return param - _adam_step_size(lr, beta1, beta2, step) * m / (tf.sqrt(v) + epsilon), m, v


@rate_of("adam")
def _adam_rate(slots: dict[str, tf.Tensor], h: dict[str, tf.Tensor]) -> tf.Tensor:
    """lr * sqrt(1 - beta2^step) / (sqrt(v') + epsilon)"""
    return h["lr"] * tf.sqrt(1 - h["beta2"] ** h["step"]) / (tf.sqrt(slots["v"]) + h["epsilon"])


@rule
@_with_betas
def amsgrad(
    param: tf.Tensor,
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

        m'         = beta1*m + (1 - beta1)*g
        v'         = beta2*v + (1 - beta2)*g^2
        vhat'      = max(vhat, v')
        rule(p, g) = p - lr * sqrt(1 - beta2^step)/(1 - beta1^step) * m' / (sqrt(vhat') + epsilon)

    Slots:
      m, v, vhat: the first and second moment and the largest second moment, like var.
    Hyperparameters:
      {betas}
    """
    m, v = _moments(grad, m, v, beta1, beta2)
    vhat = tf.maximum(vhat, v)
    return param - _adam_step_size(lr, beta1, beta2, step) * m / (tf.sqrt(vhat) + epsilon), m, v, vhat


@rate_of("amsgrad")
def _amsgrad_rate(slots: dict[str, tf.Tensor], h: dict[str, tf.Tensor]) -> tf.Tensor:
    """lr * sqrt(1 - beta2^step) / (sqrt(vhat') + epsilon)"""
    return _adam_rate({"v": slots["vhat"]}, h)


@rule
@_with_betas
def nadam(
    param: tf.Tensor,
    grad: tf.Tensor,
    m: tf.Tensor,
    v: tf.Tensor,
    *,
    lr: tf.Tensor,
    beta1: tf.Tensor = 0.9,
    beta2: tf.Tensor = 0.999,
    epsilon: tf.Tensor = 1e-7,
    step: tf.Tensor,
    u_product: tf.Tensor,
) -> tuple[tf.Tensor, ...]:
    """Nadam (Dozat, ICLR workshop 2016), in the form of Keras: Adam with Nesterov's momentum.

        u_t        = beta1 * (1 - 0.96^t / 2)
        m'         = beta1*m + (1 - beta1)*g
        v'         = beta2*v + (1 - beta2)*g^2
        m_hat      = u_(step+1)*m' / (1 - u_product*u_(step+1)) + (1 - u_step)*g / (1 - u_product)
        rule(p, g) = p - lr * m_hat / (sqrt(v' / (1 - beta2^step)) + epsilon)

    Slots:
      m, v: the first and second moment, like var.
    Hyperparameters:
      {betas}
      u_product: u_1 * ... * u_step.
    """
    m, v = _moments(grad, m, v, beta1, beta2)
    u = beta1 * (1 - tf.constant(0.96, tf.float64) ** step / 2)
    next_u = beta1 * (1 - tf.constant(0.96, tf.float64) ** (step + 1) / 2)
    m_hat = rounded(rounded(next_u * m / (1 - u_product * next_u)) + rounded((1 - u) * grad / (1 - u_product)))
    return param - lr * m_hat / (tf.sqrt(v / (1 - beta2**step)) + epsilon), m, v


@rate_of("nadam")
def _nadam_rate(slots: dict[str, tf.Tensor], h: dict[str, tf.Tensor]) -> tf.Tensor:
    """lr / (sqrt(v' / (1 - beta2^step)) + epsilon)"""
    return h["lr"] / (tf.sqrt(slots["v"] / (1 - h["beta2"] ** h["step"])) + h["epsilon"])


@rule
@_with_betas
def adamax(
    param: tf.Tensor,
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
    """Adamax (Kingma and Ba, arXiv:1412.6980, section 7.1), with Keras's epsilon: Adam in the infinity norm.

        m'         = beta1*m + (1 - beta1)*g
        v'         = max(beta2*v, |g|)
        rule(p, g) = p - lr/(1 - beta1^step) * m' / (v' + epsilon)

    Slots:
      m, v: the first moment, and the weighted infinity norm (u in the paper), like var.
    Hyperparameters:
      {betas}
    """
    m = beta1 * m + (1 - beta1) * grad
    v = tf.maximum(beta2 * v, tf.abs(grad))
    return param - lr / (1 - beta1**step) * m / (v + epsilon), m, v


@rate_of("adamax")
def _adamax_rate(slots: dict[str, tf.Tensor], h: dict[str, tf.Tensor]) -> tf.Tensor:
    """lr / (v' + epsilon)"""
    return h["lr"] / (slots["v"] + h["epsilon"])


def _lamb_direction(
    m: tf.Tensor, v: tf.Tensor, beta1: tf.Tensor, beta2: tf.Tensor, epsilon: tf.Tensor, step: tf.Tensor
) -> tf.Tensor:
    return rounded(m / (1 - beta1**step)) / (rounded(tf.sqrt(v / (1 - beta2**step))) + epsilon)


def _lamb_ratio(param: tf.Tensor, direction: tf.Tensor) -> tf.Tensor:
    norms = tf.norm(param), tf.norm(direction)
    return tf.where((norms[0] > 0) & (norms[1] > 0), norms[0] / norms[1], 1)


@rule
@_with_betas
def lamb(
    param: tf.Tensor,
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
    """LAMB (You et al., arXiv:1904.00962), in the form of Keras: Adam's direction in the length of the variable.

        m'         = beta1*m + (1 - beta1)*g
        v'         = beta2*v + (1 - beta2)*g^2
        u          = m'/(1 - beta1^step) / (sqrt(v'/(1 - beta2^step)) + epsilon)
        rule(p, g) = p - lr * |p|/|u| * u,     where either norm is 0: p - lr*u

    The norms are those of the whole variable, p behind its decay, summed in double. The paper adds weight_decay*p to
    u and bounds |p|; Keras does neither.

    Slots:
      m, v: the first and second moment, like var.
    Hyperparameters:
      {betas}
    """
    m, v = _moments(grad, m, v, beta1, beta2)
    direction = _lamb_direction(m, v, beta1, beta2, epsilon, step)
    return param - rounded(lr * _lamb_ratio(param, direction)) * rounded(direction), m, v


@rule
def schedule_free_adam(
    param: tf.Tensor,
    grad: tf.Tensor,
    z: tf.Tensor,
    v: tf.Tensor,
    *,
    lr: tf.Tensor,
    beta1: tf.Tensor = 0.9,
    beta2: tf.Tensor = 0.999,
    epsilon: tf.Tensor = 1e-8,
    step: tf.Tensor,
) -> tuple[tf.Tensor, ...]:
    """Schedule-Free Adam (Defazio et al., arXiv:2405.15682), where all steps weigh alike, as in Keras on JAX.

        v'         = beta2*v + (1 - beta2)*g^2
        z'         = z - lr * g / (sqrt(v'/(1 - beta2^step)) + epsilon)
        x          = (p - (1 - beta1)*z) / beta1
        x'         = (1 - 1/step)*x + z'/step
        rule(p, g) = (1 - beta1)*z' + beta1*x'

    Slots:
      z: where the gradients go; it starts at the value of the variable. Like var.
      v: the second moment, like var.
    Hyperparameters:
      beta1, beta2: how far p is from z to x, and how much of v is kept. Default 0.9 and 0.999.
      epsilon: default 1e-8.
      step: the number of this step, from 1 on.
    """
    v = beta2 * v + (1 - beta2) * grad**2
    new_z = z - lr * grad / (tf.sqrt(v / (1 - beta2**step)) + epsilon)
    x = rounded(param - rounded((1 - beta1) * z)) / beta1
    x = rounded((1 - 1 / step) * x + rounded(new_z / step))
    return rounded((1 - beta1) * new_z) + beta1 * x, new_z, v


rate_of("schedule_free_adam")(_nadam_rate)


@rule
def lion(
    param: tf.Tensor,
    grad: tf.Tensor,
    m: tf.Tensor,
    *,
    lr: tf.Tensor,
    beta1: tf.Tensor = 0.9,
    beta2: tf.Tensor = 0.99,
) -> tuple[tf.Tensor, ...]:
    """Lion (Chen et al., arXiv:2302.06675): the sign of an interpolated momentum.

        rule(p, g) = p - lr * sign(beta1*m + (1 - beta1)*g)
        m'         = beta2*m + (1 - beta2)*g

    sign(0) is 0, as in the paper.

    Slots:
      m: the momentum, like var.
    Hyperparameters:
      beta1, beta2: how much of m is in the update, and is kept. Default 0.9 and 0.99.
    """
    return param - lr * tf.sign(beta1 * m + (1 - beta1) * grad), beta2 * m + (1 - beta2) * grad


def _root_of_variance(v: tf.Tensor, mean: tf.Tensor, epsilon: tf.Tensor) -> tf.Tensor:
    return tf.sqrt(tf.maximum(v - mean**2, 0) + epsilon)


@rule
def rmsprop(
    param: tf.Tensor,
    grad: tf.Tensor,
    v: tf.Tensor,
    *,
    lr: tf.Tensor,
    rho: tf.Tensor = 0.9,
    epsilon: tf.Tensor = 1e-7,
) -> tuple[tf.Tensor, ...]:
    """RMSprop (Tieleman and Hinton, 2012), in the form of Keras: epsilon stands under the root.

        v'         = rho*v + (1 - rho)*g^2
        rule(p, g) = p - lr * g / sqrt(v' + epsilon)

    Slots:
      v: the second moment, like var.
    Hyperparameters:
      rho: how much of v is kept. Default 0.9.
      epsilon: default 1e-7.
    """
    v = rho * v + (1 - rho) * grad**2
    return param - lr * grad / tf.sqrt(v + epsilon), v


@rule
def rmsprop_momentum(
    param: tf.Tensor,
    grad: tf.Tensor,
    v: tf.Tensor,
    m: tf.Tensor,
    *,
    lr: tf.Tensor,
    rho: tf.Tensor = 0.9,
    epsilon: tf.Tensor = 1e-7,
    momentum: tf.Tensor = 0.9,
) -> tuple[tf.Tensor, ...]:
    """RMSprop with momentum, in the form of Keras.

        v'         = rho*v + (1 - rho)*g^2
        m'         = momentum*m + lr * g / sqrt(v' + epsilon)
        rule(p, g) = p - m'

    Slots:
      v, m: the second moment and the momentum, like var.
    Hyperparameters:
      rho, momentum: how much of v and m is kept. Default 0.9.
      epsilon: default 1e-7.
    """
    v = rho * v + (1 - rho) * grad**2
    m = momentum * m + lr * grad / tf.sqrt(v + epsilon)
    return param - m, v, m


@rule
def centered_rmsprop(
    param: tf.Tensor,
    grad: tf.Tensor,
    v: tf.Tensor,
    mean: tf.Tensor,
    *,
    lr: tf.Tensor,
    rho: tf.Tensor = 0.9,
    epsilon: tf.Tensor = 1e-7,
) -> tuple[tf.Tensor, ...]:
    """RMSprop by the variance (Graves, arXiv:1308.0850), in the form of Keras.

        v'         = rho*v + (1 - rho)*g^2
        mean'      = rho*mean + (1 - rho)*g
        rule(p, g) = p - lr * g / sqrt(max(v' - mean'^2, 0) + epsilon)

    Keras has no max there: where rounding makes the variance less than -epsilon, it gives NaN.

    Slots:
      v, mean: the second and first moment, like var.
    Hyperparameters:
      rho: how much of v and mean is kept. Default 0.9.
      epsilon: default 1e-7.
    """
    v, mean = rho * v + (1 - rho) * grad**2, rho * mean + (1 - rho) * grad
    return param - lr * grad / _root_of_variance(v, mean, epsilon), v, mean


@rule
def centered_rmsprop_momentum(
    param: tf.Tensor,
    grad: tf.Tensor,
    v: tf.Tensor,
    mean: tf.Tensor,
    m: tf.Tensor,
    *,
    lr: tf.Tensor,
    rho: tf.Tensor = 0.9,
    epsilon: tf.Tensor = 1e-7,
    momentum: tf.Tensor = 0.9,
) -> tuple[tf.Tensor, ...]:
    """RMSprop by the variance (Graves, arXiv:1308.0850) with momentum, in the form of Keras.

        v'         = rho*v + (1 - rho)*g^2
        mean'      = rho*mean + (1 - rho)*g
        m'         = momentum*m + lr * g / sqrt(max(v' - mean'^2, 0) + epsilon)
        rule(p, g) = p - m'

    Slots:
      v, mean, m: the second and first moment and the momentum, like var.
    Hyperparameters:
      rho, momentum: how much of v and mean, and of m, is kept. Default 0.9.
      epsilon: default 1e-7.
    """
    v, mean = rho * v + (1 - rho) * grad**2, rho * mean + (1 - rho) * grad
    m = momentum * m + lr * grad / _root_of_variance(v, mean, epsilon)
    return param - m, v, mean, m


@rate_of("rmsprop", "rmsprop_momentum")
def _rmsprop_rate(slots: dict[str, tf.Tensor], h: dict[str, tf.Tensor]) -> tf.Tensor:
    """lr / sqrt(v' + epsilon)"""
    return h["lr"] / tf.sqrt(slots["v"] + h["epsilon"])


@rate_of("centered_rmsprop", "centered_rmsprop_momentum")
def _centered_rmsprop_rate(slots: dict[str, tf.Tensor], h: dict[str, tf.Tensor]) -> tf.Tensor:
    """lr / sqrt(max(v' - mean'^2, 0) + epsilon)"""
    return h["lr"] / _root_of_variance(slots["v"], slots["mean"], h["epsilon"])


@rule
def adagrad(
    param: tf.Tensor, grad: tf.Tensor, v: tf.Tensor, *, lr: tf.Tensor, epsilon: tf.Tensor = 1e-7
) -> tuple[tf.Tensor, ...]:
    """Adagrad (Duchi, Hazan and Singer, JMLR 2011), in the form of Keras: epsilon stands under the root.

        v'         = v + g^2
        rule(p, g) = p - lr * g / sqrt(v' + epsilon)

    Slots:
      v: the sum of squares, like var; Keras starts it at 0.1.
    Hyperparameters:
      epsilon: default 1e-7.
    """
    v = v + grad**2
    return param - lr * grad / tf.sqrt(v + epsilon), v


rate_of("adagrad")(_rmsprop_rate)


@rule
def adadelta(
    param: tf.Tensor,
    grad: tf.Tensor,
    v: tf.Tensor,
    v_delta: tf.Tensor,
    *,
    lr: tf.Tensor,
    rho: tf.Tensor = 0.95,
    epsilon: tf.Tensor = 1e-7,
) -> tuple[tf.Tensor, ...]:
    """Adadelta (Zeiler, arXiv:1212.5701), with Keras's lr.

        v'         = rho*v + (1 - rho)*g^2
        delta      = sqrt(v_delta + epsilon) / sqrt(v' + epsilon) * g
        v_delta'   = rho*v_delta + (1 - rho)*delta^2
        rule(p, g) = p - lr * delta

    Slots:
      v, v_delta: the second moments of the gradient and of the update, like var.
    Hyperparameters:
      rho: how much of v and v_delta is kept. Default 0.95.
      epsilon: default 1e-7.
    """
    v = rho * v + (1 - rho) * grad**2
    delta = rounded(tf.sqrt(v_delta + epsilon) / rounded(tf.sqrt(v + epsilon)) * grad)
    return param - lr * delta, v, rho * v_delta + (1 - rho) * delta**2


def _ftrl(
    param: tf.Tensor,
    grad: tf.Tensor,
    v: tf.Tensor,
    z: tf.Tensor,
    *,
    lr: tf.Tensor,
    l1_strength: tf.Tensor,
    l2_strength: tf.Tensor,
    l2_shrinkage: tf.Tensor,
    beta: tf.Tensor,
    lr_power: tf.Tensor,
) -> tuple[tf.Tensor, ...]:
    new_v = v + grad**2
    sigma = (rounded(new_v**-lr_power) - rounded(v**-lr_power)) / lr
    z = z + rounded(grad + rounded(2 * l2_shrinkage * param) - rounded(sigma * param))
    curvature = (beta + new_v**-lr_power) / lr + 2 * l2_strength
    return -tf.sign(z) * tf.maximum(tf.abs(z) - l1_strength, 0) / curvature, new_v, z


@rule
def ftrl(
    param: tf.Tensor,
    grad: tf.Tensor,
    v: tf.Tensor,
    z: tf.Tensor,
    *,
    lr: tf.Tensor,
    l1_strength: tf.Tensor = 0.0,
    l2_strength: tf.Tensor = 0.0,
    l2_shrinkage: tf.Tensor = 0.0,
    beta: tf.Tensor = 0.0,
) -> tuple[tf.Tensor, ...]:
    """FTRL-Proximal (McMahan et al., KDD 2013, algorithm 1), in the form of Keras.

        v'         = v + g^2
        z'         = z + g + 2*l2_shrinkage*p - (sqrt(v') - sqrt(v))/lr * p
        rule(p, g) = -sign(z') * max(|z'| - l1_strength, 0) / ((beta + sqrt(v'))/lr + 2*l2_strength)

    The paper's lambda_1 is l1_strength, its lambda_2 is 2*l2_strength; l2_shrinkage is TensorFlow's and 0 there.

    Slots:
      v, z: the sum of squares (n in the paper; Keras starts it at 0.1), and the linear term, like var.
    Hyperparameters:
      l1_strength, l2_strength: of the penalty that the rule itself solves for, with exact zeros. Default 0.
      l2_shrinkage: of a penalty whose gradient is not in v. Default 0.
      beta: default 0.
    """
    return _ftrl(
        param, grad, v, z, lr=lr, l1_strength=l1_strength, l2_strength=l2_strength, l2_shrinkage=l2_shrinkage,
        beta=beta, lr_power=tf.constant(-0.5, tf.float64),
    )  # fmt: skip


@rule
def ftrl_power(
    param: tf.Tensor,
    grad: tf.Tensor,
    v: tf.Tensor,
    z: tf.Tensor,
    *,
    lr: tf.Tensor,
    l1_strength: tf.Tensor = 0.0,
    l2_strength: tf.Tensor = 0.0,
    l2_shrinkage: tf.Tensor = 0.0,
    beta: tf.Tensor = 0.0,
    lr_power: tf.Tensor = -0.5,
) -> tuple[tf.Tensor, ...]:
    """FTRL-Proximal with any power of the accumulator, as Keras and TensorFlow have it; slower than `ftrl`.

        v'         = v + g^2
        z'         = z + g + 2*l2_shrinkage*p - (v'^-lr_power - v^-lr_power)/lr * p
        rule(p, g) = -sign(z') * max(|z'| - l1_strength, 0) / ((beta + v'^-lr_power)/lr + 2*l2_strength)

    Slots:
      v, z: the sum of squares and the linear term, like var.
    Hyperparameters:
      l1_strength, l2_strength, l2_shrinkage, beta: as for `ftrl`. Default 0.
      lr_power: at most 0. Default -0.5.
    """
    return _ftrl(
        param, grad, v, z, lr=lr, l1_strength=l1_strength, l2_strength=l2_strength, l2_shrinkage=l2_shrinkage,
        beta=beta, lr_power=lr_power,
    )  # fmt: skip


def to_float64(x: Any) -> tf.Tensor:
    """`x` in float64. A bare tf.cast would round a Python number, or a list of them, to float32 on the way."""
    if isinstance(x, (list, tuple)):
        return tf.stack([to_float64(entry) for entry in x]) if x else tf.zeros(0, tf.float64)
    if isinstance(x, (bool, int, float)):
        return tf.constant(float(x), tf.float64)
    if isinstance(x, FactoredGradient):
        x = x.cast(tf.float64).values
    x = tf.convert_to_tensor(x)
    if not (x.dtype.is_floating or x.dtype.is_integer or x.dtype.is_bool):
        raise ValueError(f"{x.dtype.name} is no type of numbers")
    return tf.cast(x, tf.float64)


def penalty_gradient(param: tf.Tensor, l1: Any, l2: Any) -> tf.Tensor:
    """The gradient of l1*sum|param| + l2*sum(param^2), in the dtype of `param`."""
    return tf.cast(l1, param.dtype) * tf.sign(param) + tf.cast(2 * l2, param.dtype) * param


def penalty(param: tf.Tensor, l1: Any, l2: Any) -> tf.Tensor:
    """l1*sum|param| + l2*sum(param^2), in float64."""
    param = to_float64(param)
    return to_float64(l1) * tf.reduce_sum(tf.abs(param)) + to_float64(l2) * tf.reduce_sum(param**2)


def _gradient(param: Any, grad: tf.Tensor, accumulator: Any, h: dict[str, tf.Tensor]) -> tf.Tensor:
    g = h["grad_scale"] * grad
    if accumulator is not None:
        g = g + to_float64(accumulator)
    g = h["accumulation_scale"] * g
    return g if param is None else g + penalty_gradient(param, h["l1"], h["l2"])


def step(
    rule_name: str,
    param: Any,
    slots: Sequence[Any],
    grad: Any,
    *,
    accumulator: Any = None,
    average: Any = None,
    scaled_proximal: bool = False,
    **hypers: Any,
) -> tuple[tf.Tensor, ...]:
    """One step of one variable in float64: the new param, the new slots and, if there is one, the average; unrounded.

    `param`, `slots`, `grad`, `accumulator` and `average` are tensors or arrays of any floating dtype; `hypers` are
    scalars.
    """
    rule = RULES[rule_name]
    p, g, *slots = (to_float64(x) for x in (param, grad, *slots))
    given = STEP_DEFAULTS | {n: d for n, d in rule.hypers.items() if d is not inspect.Parameter.empty} | hypers
    h = {n: to_float64(x) for n, x in given.items() if x is not None}
    g = h["clip_scale"] * _gradient(p, g, accumulator, h)
    g = tf.where(h["clip_value"] > 0, tf.clip_by_value(g, -h["clip_value"], h["clip_value"]), g)
    p = p - h.get("decay_lr", h["lr"]) * h["weight_decay"] * p
    p, *slots = rule.update(p, g, *slots, **{n: h[n] for n in rule.hypers})
    rate = h["lr"]
    if scaled_proximal and rule.rate:
        rate = rule.rate(dict(zip(rule.slots, slots, strict=True)), h)
    p = tf.sign(p) * tf.maximum(tf.abs(p) - rate * h["proximal_l1"], 0) / (1 + 2 * rate * h["proximal_l2"])
    if average is None:
        return p, *slots
    average = h["ema_momentum"] * to_float64(average) + (1 - h["ema_momentum"]) * p
    return tf.where(h["ema_overwrite"] != 0, average, p), *slots, average


class Norms(NamedTuple):
    """What `norms` returns."""

    norm: tf.Tensor
    penalty: tf.Tensor
    finite: tf.Tensor


def norms(
    grad: Any,
    var: Any = None,
    *,
    accumulator: Any = None,
    grad_scale: Any = 1.0,
    accumulation_scale: Any = 1.0,
    l1: Any = 0.0,
    l2: Any = 0.0,
    report_penalty: bool = True,
    name: str | None = None,
) -> Norms:
    """The norm of every gradient with its penalty, in one read; what clipping needs.

        g       = accumulation_scale * (grad_scale*grad + accumulator) + l1*sign(p) + 2*l2*p
        norm    = sqrt(sum(g^2))
        penalty = l1*sum|p| + l2*sum(p^2)

    Sums are made in double over a fixed tree: the same bits for every number of threads, and no square overflows.

    Args:
      grad: a tensor of dtype float32, float64, bfloat16 or float16, or a `FactoredGradient`, or a list of them. Without
        a penalty and an accumulator the norm of factors is |x^T dz|^2 = sum(x x^T * dz dz^T), where that is less work.
      var: the variables of the gradients; without them there is no penalty. Default None.
      accumulator: sums of earlier gradients, like var; they are only read. Default None.
      grad_scale, accumulation_scale, l1, l2: as in `apply_sgd`. Default 1, 1, 0, 0.
      report_penalty: whether to return the penalty, too. Default True.
      name: of the op.

    Returns:
      `Norms(norm, penalty, finite)`: two float64 vectors with one entry for each gradient, and whether every element
      of every g is finite, a bool scalar. Without `report_penalty` the second is empty.

    Raises:
      ValueError, tf.errors.InvalidArgumentError: as `apply_sgd`.
    """
    hypers = {"grad_scale": grad_scale, "accumulation_scale": accumulation_scale, "l1": l1, "l2": l2}
    hypers = {n: to_float64(x) for n, x in hypers.items()}
    found = []
    for i, g in enumerate(as_list(grad)):
        h = {n: x if len(x.shape) == 0 else x[i] for n, x in hypers.items()}
        param = None if var is None else to_float64(as_list(var)[i])
        total = _gradient(param, to_float64(g), None if accumulator is None else as_list(accumulator)[i], h)
        of_param = 0.0 if param is None else penalty(param, h["l1"], h["l2"])
        found.append((tf.norm(total), to_float64(of_param), tf.reduce_all(tf.math.is_finite(total))))
    norm, penalties, finite = (tf.stack(x) for x in zip(*found, strict=True))
    return Norms(norm, penalties if report_penalty else tf.zeros(0, tf.float64), tf.reduce_all(finite))


def global_norm(grad: Any, var: Any = None, **arguments: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """The norm of all gradients together, and whether all are finite; a float64 and a bool scalar.

    Takes the arguments of `norms`.
    """
    norm, _, finite = norms(grad, var, **arguments)
    return tf.norm(norm), finite


# Klambauer et al., arXiv:1706.02515: with these, mean 0 and variance 1 are a fixed point.
SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717

_ACTIVATION_DOC = """

    The gradient is made from the output alone, in one pass that also sums up that of the bias:

        x_grad = grad * f'(z) = grad * ({derivative})
        bias_grad = the sum of x_grad over all axes but that of the channels

    At z = 0 the slope is that of negative z{at_zero}. Gradients of gradients are right, too. NaN propagates, but where
    the slope is 0 so is x_grad, whatever grad is; TensorFlow makes NaN of NaN and infinity there. Sums are made in
    double over a fixed tree: the same bits for every number of threads and every instruction set. float16, bfloat16 and
    float32 are computed in float32, float64 in float64; subnormal floats count as 0, or under `jit_compile=True` may
    stay what they are.

    Args:
      x: a tensor of dtype float32, float64, bfloat16 or float16, of any shape.
      bias: a vector of the dtype of x with one entry for each channel. Default None: there is none.{alpha}
      data_format: "NHWC": the channels are the last axis; "NCHW": they are axis 1. Whatever the rank. Default "NHWC".
      name: of the op.

    Returns:
      A tensor of the shape and dtype of x. That of `wdops.reference` is float64.

    Raises:
      ValueError, tf.errors.InvalidArgumentError: x is no float, the bias has another dtype or length{raises}.
"""
_ALPHA_DOC = """
      alpha: a number, not negative: else the sign of the output would no longer be that of z. One that is subnormal in
        what x is computed in counts as 0. Default {default}."""


def _activation(derivative: str, at_zero: str = "", alpha: float | None = None) -> Callable[..., Any]:
    """Completes the docstring of an activation."""

    def document(activate: Callable[..., Any]) -> Callable[..., Any]:
        activate.__doc__ = (activate.__doc__ or "").rstrip() + _ACTIVATION_DOC.format(
            derivative=derivative,
            at_zero=at_zero,
            alpha="" if alpha is None else _ALPHA_DOC.format(default=alpha),
            raises="" if alpha is None else ", alpha is negative or not finite in what x is computed in",
        )
        return activate

    return document


def _biased(x: Any, bias: Any, data_format: str) -> tf.Tensor:
    z = to_float64(x)
    if bias is None:
        return z
    axis = 1 if data_format == "NCHW" else len(z.shape) - 1
    return z + tf.reshape(to_float64(bias), [-1 if i == axis else 1 for i in range(len(z.shape))])


@_activation("1 if y > 0 else y + alpha", alpha=1.0, at_zero=", alpha, as in Keras")
def elu(
    x: Any, bias: Any = None, alpha: float = 1.0, *, data_format: str = "NHWC", name: str | None = None
) -> tf.Tensor:
    """ELU (Clevert et al., arXiv:1511.07289) behind a bias, in one pass.

        z    = x + bias
        f(z) = z if z > 0 else alpha*(e^z - 1)

    For alpha 1 it is within 1 ULP of z's exact value, near 0 too, where `tf.nn.elu` forms exp(z) - 1 and keeps no
    digit of it; elu(-0.0) is -0.0. Unlike `tf.nn.elu`, at 0 with another alpha the slope is alpha.
    """
    z = _biased(x, bias, data_format)
    return tf.where(z > 0, z, alpha * tf.math.expm1(tf.minimum(z, 0)))


@_activation("1 if y > 0 else 0", at_zero=", 0, as in TensorFlow and Keras")
def relu(x: Any, bias: Any = None, *, data_format: str = "NHWC", name: str | None = None) -> tf.Tensor:
    """ReLU behind a bias, in one pass.

    z    = x + bias
    f(z) = max(z, 0)
    """
    z = _biased(x, bias, data_format)
    return tf.where(z <= 0, tf.zeros_like(z), z)


@_activation("1 if y > 0 else alpha", alpha=0.2, at_zero=", alpha, as in TensorFlow and Keras")
def leaky_relu(
    x: Any, bias: Any = None, alpha: float = 0.2, *, data_format: str = "NHWC", name: str | None = None
) -> tf.Tensor:
    """Leaky ReLU (Maas et al., ICML 2013) behind a bias, in one pass.

        z    = x + bias
        f(z) = z if z > 0 else alpha*z

    The default of alpha is that of `tf.nn.leaky_relu` and `keras.activations.leaky_relu`; that of
    `keras.layers.LeakyReLU` is 0.3, and PyTorch's 0.01. `tf.nn.leaky_relu` rounds alpha to float32, and this does not.
    """
    z = _biased(x, bias, data_format)
    return tf.where(z > 0, z, alpha * z) if alpha else relu(z)


@_activation("scale if y > 0 else y + scale*alpha", at_zero=", scale*alpha, as in TensorFlow")
def selu(x: Any, bias: Any = None, *, data_format: str = "NHWC", name: str | None = None) -> tf.Tensor:
    """SELU (Klambauer et al., arXiv:1706.02515) behind a bias, in one pass.

    z    = x + bias
    f(z) = scale * (z if z > 0 else alpha*(e^z - 1))           scale = 1.0507..., alpha = 1.6732...
    """
    return SELU_SCALE * elu(x, bias, SELU_ALPHA, data_format=data_format)


def as_list(x: Any) -> list[Any]:
    """`x` as a list, if it is not a list or tuple of variables or tensors."""
    return list(x) if isinstance(x, (list, tuple)) else [x]


def _make_apply(rule: Rule) -> Callable[..., Any]:
    def apply(*args: Any, **kwargs: Any) -> tf.Tensor:
        given = rule.signature.bind(*args, **kwargs)
        given.apply_defaults()
        arguments = given.arguments
        names = [n for n in (*rule.hypers, *STEP_DEFAULTS) if arguments[n] is not None]
        hypers = {n: to_float64(arguments[n]) for n in names}
        lists = [n for n in ("var", *rule.slots, "accumulator", "average") if arguments[n] is not None]
        targets = {n: as_list(arguments[n]) for n in lists}
        penalties = []
        for i, grad in enumerate(as_list(arguments["grad"])):
            h = {n: x if len(x.shape) == 0 else x[i] for n, x in hypers.items()}
            of = {n: target[i] for n, target in targets.items()}
            values = step(
                rule.name, of["var"], [of[n] for n in rule.slots], grad, accumulator=of.get("accumulator"),
                average=of.get("average"), scaled_proximal=arguments["scaled_proximal"], **h,
            )  # fmt: skip
            written = ["var", *rule.slots, *(["average"] if "average" in of else [])]
            for name, value in zip(written, values, strict=True):
                of[name].assign(tf.cast(value, of[name].dtype))
            if "accumulator" in of:
                of["accumulator"].assign(tf.zeros_like(of["accumulator"]))
            penalties.append(penalty(of["var"], h["l1"], h["l2"]))
        return tf.stack(penalties) if arguments["report_penalty"] and penalties else tf.zeros(0, tf.float64)

    return document(apply, rule)


def document(apply: Callable[..., Any], rule: Rule) -> Callable[..., Any]:
    """Gives `apply` the name, signature and docstring of `apply_<rule>`."""
    apply.__name__ = apply.__qualname__ = f"apply_{rule.name}"
    apply.__doc__ = rule.doc
    apply.__signature__ = rule.signature
    return apply


for _rule in RULES.values():
    globals()[f"apply_{_rule.name}"] = _make_apply(_rule)
