"""The oracle of gpu.py: steps, norms and activations in float64 NumPy, written from the papers, not from the kernels.

Beside each number stands how far from it a kernel may be that rounds every operation, as in the running error analysis
of Higham (Accuracy and Stability of Numerical Algorithms, 2002, section 3.3): so the bound grows where a sum cancels
or a divisor is small, and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import sqrt
from typing import Any

import numpy as np

# Half a unit in the last place, of what is computed with and of what is stored.
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-24, "float16": 2.0**-24}
STORED = {"float32": 0.0, "float64": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# The least normal number, below which a float counts as 0, or of float16, which has subnormals, the least number.
LEAST = {"float32": 2.0**-126, "float64": 2.0**-1022, "bfloat16": 2.0**-126, "float16": 2.0**-24}
# A kernel in another order of operations may be off by a little more; in float64 the oracle rounds, too.
ORDERS = {"float32": 1.25, "float64": 2.5, "bfloat16": 1.25, "float16": 1.25}
# Of a sum in double, whatever its tree, over no more than some 100,000 elements.
SUM = 512 * 2.0**-53


class Number:
    """An array in float64, and the largest error of each element where every operation is rounded to `unit`.

    A Python number in an expression is a constant of the step, made in double and rounded once.
    """

    __array_ufunc__ = None  # NumPy leaves mixed expressions to the methods here

    def __init__(self, value: Any, unit: float, error: Any = 0.0) -> None:
        self.value = np.asarray(value, np.float64)
        self.unit = unit
        # What is infinite is so exactly: the values that overflow are beyond these cases.
        self.error = np.where(np.isfinite(self.value), error, 0.0)

    def _rounded(self, value: np.ndarray, error: np.ndarray) -> Number:
        return Number(value, self.unit, error + self.unit * np.abs(value))

    def _number(self, x: Any) -> Number:
        return x if isinstance(x, Number) else Number(x, self.unit, self.unit * abs(x))

    def __neg__(self) -> Number:
        return Number(-self.value, self.unit, self.error)

    def __abs__(self) -> Number:
        return Number(np.abs(self.value), self.unit, self.error)

    def __add__(self, other: Any) -> Number:
        other = self._number(other)
        return self._rounded(self.value + other.value, self.error + other.error)

    def __radd__(self, other: float) -> Number:
        return self + other

    def __sub__(self, other: Any) -> Number:
        return self + -self._number(other)

    def __rsub__(self, other: float) -> Number:
        return -self + other

    def __mul__(self, other: Any) -> Number:
        other = self._number(other)
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error + self.error * other.error
        return self._rounded(self.value * other.value, error)

    def __rmul__(self, other: float) -> Number:
        return self * other

    def __truediv__(self, other: Any) -> Number:
        other = self._number(other)
        quotient = self.value / other.value
        divisor = np.maximum(np.abs(other.value) - other.error, 0)
        return self._rounded(quotient, (self.error + np.abs(quotient) * other.error) / divisor)

    def __rtruediv__(self, other: float) -> Number:
        return self._number(other) / self

    def __pow__(self, exponent: float) -> Number:
        value = self.value**exponent
        ends = [np.maximum(self.value + e, 0) ** exponent for e in (-self.error, self.error)]
        # Powers are within an ULP.
        return self._rounded(value, np.maximum(*(np.abs(e - value) for e in ends)) + self.unit * np.abs(value))

    def root(self) -> Number:
        value = np.sqrt(self.value)
        return self._rounded(value, value - np.sqrt(np.maximum(self.value - self.error, 0)))

    def sign(self) -> Number:
        """Where rounding may turn it, it may be off by 2."""
        turned = (np.abs(self.value) <= self.error) & (self.error > 0)
        return Number(np.sign(self.value), self.unit, np.where(turned, 2.0, 0.0))

    def clipped(self, limit: float) -> Number:
        """Within [-limit, limit]; a limit of 0 is none."""
        if limit == 0:
            return self
        return Number(np.clip(self.value, -limit, limit), self.unit, self.error + self.unit * limit)

    def at_least(self, other: Any) -> Number:
        other = self._number(other)
        return Number(np.maximum(self.value, other.value), self.unit, np.maximum(self.error, other.error))

    def shrunk(self, threshold: Any) -> Number:
        """Soft thresholding: sign(x) * max(|x| - threshold, 0)."""
        size = abs(self) - threshold
        return Number(np.sign(self.value) * np.maximum(size.value, 0), self.unit, size.error)

    def summed(self, axes: tuple[int, ...]) -> Number:
        """In double, and then rounded."""
        error = self.error.sum(axes) + SUM * np.abs(self.value).sum(axes)
        return self._rounded(self.value.sum(axes), error)

    def norm(self) -> float:
        return sqrt(np.sum(self.value**2))

    def norm_error(self) -> float:
        """By the triangle inequality."""
        return sqrt(np.sum(self.error**2)) + SUM * self.norm()

    def bound(self, dtype: str, roundings: float = 1.0) -> np.ndarray:
        """How far from `value` what is stored in `dtype` may be; stochastic rounding takes 2 `roundings`."""
        error = ORDERS[dtype] * self.error
        return error + roundings * STORED[dtype] * (np.abs(self.value) + error) + LEAST[dtype]


def term(coefficient: float, x: Number) -> Number:
    """A coefficient of 0 turns its term off, whatever x is."""
    return coefficient * x if coefficient else Number(np.zeros_like(x.value), x.unit)


# ---- rules: the new param, the new slots, and the element's own learning rate, where the rule has one

Update = tuple[Number, tuple[Number, ...], Any]
RULES: dict[str, Callable[..., Update]] = {}


def rule(update: Callable[..., Update]) -> Callable[..., Update]:
    """Enters `update(p, g, *slots, *, lr, ...)`; slots and hyperparameters are named as in the kernels' tables."""
    RULES[update.__name__] = update
    return update


@cache
def slots_of(name: str) -> list[str]:
    parameters = inspect.signature(RULES[name]).parameters.values()
    return [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD][2:]


@cache
def hypers_of(name: str) -> list[str]:
    """Without lr."""
    parameters = inspect.signature(RULES[name]).parameters.values()
    return [p.name for p in parameters if p.kind == p.KEYWORD_ONLY and p.name != "lr"]


def _moments(g: Number, m: Number, v: Number, beta1: float, beta2: float) -> tuple[Number, Number]:
    return beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * (g * g)


@rule
def sgd(p: Number, g: Number, *, lr: float) -> Update:
    return p - lr * g, (), None


@rule
def momentum(p: Number, g: Number, m: Number, *, lr: float, momentum: float, nesterov: bool) -> Update:
    """Sutskever et al., ICML 2013, equations 1 to 4, with their velocity as m."""
    m = momentum * m - lr * g
    return p + (momentum * m - lr * g if nesterov else m), (m,), None


@rule
def adam(
    p: Number, g: Number, m: Number, v: Number, *, lr: float, beta1: float, beta2: float, epsilon: float, step: float
) -> Update:
    """Kingma and Ba, arXiv:1412.6980, the more efficient order before section 2.1, with its "epsilon hat"."""
    m, v = _moments(g, m, v, beta1, beta2)
    rate = lr * sqrt(1 - beta2**step) / (v.root() + epsilon)
    return p - rate * m / (1 - beta1**step), (m, v), rate


@rule
def amsgrad(
    p: Number, g: Number, m: Number, v: Number, vhat: Number,
    *, lr: float, beta1: float, beta2: float, epsilon: float, step: float,
) -> Update:  # fmt: skip
    """Reddi et al., arXiv:1904.09237, algorithm 2, with Adam's corrections of bias."""
    m, v = _moments(g, m, v, beta1, beta2)
    vhat = vhat.at_least(v)
    rate = lr * sqrt(1 - beta2**step) / (vhat.root() + epsilon)
    return p - rate * m / (1 - beta1**step), (m, v, vhat), rate


@rule
def nadam(
    p: Number, g: Number, m: Number, v: Number,
    *, lr: float, beta1: float, beta2: float, epsilon: float, step: float, u_product: float,
) -> Update:  # fmt: skip
    """Dozat, ICLR workshop 2016, algorithm 2, with its schedule mu_t = beta1 * (1 - 0.96^t / 2)."""
    m, v = _moments(g, m, v, beta1, beta2)
    mu, next_mu = (beta1 * (1 - 0.96**t / 2) for t in (step, step + 1))
    m_bar = (1 - mu) / (1 - u_product) * g + next_mu / (1 - u_product * next_mu) * m
    rate = lr / ((v / (1 - beta2**step)).root() + epsilon)
    return p - rate * m_bar, (m, v), rate


@rule
def adamax(
    p: Number, g: Number, m: Number, v: Number, *, lr: float, beta1: float, beta2: float, epsilon: float, step: float
) -> Update:
    """Kingma and Ba, arXiv:1412.6980, algorithm 2; its u is v."""
    m, v = beta1 * m + (1 - beta1) * g, (beta2 * v).at_least(abs(g))
    rate = lr / (v + epsilon)
    return p - rate * m / (1 - beta1**step), (m, v), rate


@rule
def lamb(
    p: Number, g: Number, m: Number, v: Number, *, lr: float, beta1: float, beta2: float, epsilon: float, step: float
) -> Update:
    """You et al., arXiv:1904.00962, algorithm 2, with the identity for phi and no decay in the ratio."""
    m, v = _moments(g, m, v, beta1, beta2)
    u = m / (1 - beta1**step) / ((v / (1 - beta2**step)).root() + epsilon)
    if p.norm() > 0 and u.norm() > 0:
        trust = p.norm() / u.norm()
        error = p.unit * trust + trust * (p.norm_error() / p.norm() + u.norm_error() / u.norm())
        return p - lr * Number(trust, p.unit, error) * u, (m, v), None
    return p - lr * u, (m, v), None


@rule
def schedule_free_adam(
    p: Number, g: Number, z: Number, v: Number, *, lr: float, beta1: float, beta2: float, epsilon: float, step: float
) -> Update:
    """Defazio et al., arXiv:2405.15682, equations 2 to 4, with c = 1/step; p is their y."""
    v = beta2 * v + (1 - beta2) * (g * g)
    x = (p - (1 - beta1) * z) / beta1
    rate = lr / ((v / (1 - beta2**step)).root() + epsilon)
    z = z - rate * g
    x = (1 - 1 / step) * x + 1 / step * z
    return (1 - beta1) * z + beta1 * x, (z, v), rate


@rule
def lion(p: Number, g: Number, m: Number, *, lr: float, beta1: float, beta2: float) -> Update:
    """Chen et al., arXiv:2302.06675, algorithm 2."""
    return p - lr * (beta1 * m + (1 - beta1) * g).sign(), (beta2 * m + (1 - beta2) * g,), None


def _rmsprop(
    p: Number, g: Number, v: Number, mean: Number | None, m: Number | None,
    *, lr: float, rho: float, epsilon: float, momentum: float = 0.0,
) -> Update:  # fmt: skip
    """Tieleman and Hinton, 2012; centered as in Graves, arXiv:1308.0850, equations 38 to 41."""
    v = rho * v + (1 - rho) * (g * g)
    variance = v
    if mean is not None:
        mean = rho * mean + (1 - rho) * g
        variance = (v - mean * mean).at_least(Number(np.zeros_like(v.value), v.unit))
    rate = lr / (variance + epsilon).root()
    step = rate * g
    if m is not None:
        step = m = momentum * m + step
    return p - step, tuple(slot for slot in (v, mean, m) if slot is not None), rate


@rule
def rmsprop(p: Number, g: Number, v: Number, *, lr: float, rho: float, epsilon: float) -> Update:
    return _rmsprop(p, g, v, None, None, lr=lr, rho=rho, epsilon=epsilon)


@rule
def rmsprop_momentum(
    p: Number, g: Number, v: Number, m: Number, *, lr: float, rho: float, epsilon: float, momentum: float
) -> Update:
    return _rmsprop(p, g, v, None, m, lr=lr, rho=rho, epsilon=epsilon, momentum=momentum)


@rule
def centered_rmsprop(p: Number, g: Number, v: Number, mean: Number, *, lr: float, rho: float, epsilon: float) -> Update:
    return _rmsprop(p, g, v, mean, None, lr=lr, rho=rho, epsilon=epsilon)


@rule
def centered_rmsprop_momentum(
    p: Number, g: Number, v: Number, mean: Number, m: Number, *, lr: float, rho: float, epsilon: float, momentum: float
) -> Update:
    return _rmsprop(p, g, v, mean, m, lr=lr, rho=rho, epsilon=epsilon, momentum=momentum)


@rule
def adagrad(p: Number, g: Number, v: Number, *, lr: float, epsilon: float) -> Update:
    """Duchi, Hazan and Singer, JMLR 2011, figure 1, with Keras's epsilon under the root."""
    v = v + g * g
    rate = lr / (v + epsilon).root()
    return p - rate * g, (v,), rate


@rule
def adadelta(p: Number, g: Number, v: Number, v_delta: Number, *, lr: float, rho: float, epsilon: float) -> Update:
    """Zeiler, arXiv:1212.5701, algorithm 1, with a rate."""
    v = rho * v + (1 - rho) * (g * g)
    delta = (v_delta + epsilon).root() / (v + epsilon).root() * g
    return p - lr * delta, (v, rho * v_delta + (1 - rho) * (delta * delta)), None


@rule
def ftrl(
    p: Number, g: Number, v: Number, z: Number,
    *, lr: float, l1_strength: float, l2_strength: float, l2_shrinkage: float, beta: float,
) -> Update:  # fmt: skip
    """McMahan et al., KDD 2013, algorithm 1, with 2*l2_strength for lambda_2, and TensorFlow's l2_shrinkage."""
    return ftrl_power(
        p, g, v, z, lr=lr, l1_strength=l1_strength, l2_strength=l2_strength, l2_shrinkage=l2_shrinkage, beta=beta,
        lr_power=-0.5,
    )  # fmt: skip


@rule
def ftrl_power(
    p: Number, g: Number, v: Number, z: Number,
    *, lr: float, l1_strength: float, l2_strength: float, l2_shrinkage: float, beta: float, lr_power: float,
) -> Update:  # fmt: skip
    new_v = v + g * g
    sigma = (new_v**-lr_power - v**-lr_power) / lr
    z = z + g + 2 * l2_shrinkage * p - sigma * p
    return -z.shrunk(l1_strength) / ((new_v**-lr_power + beta) / lr + 2 * l2_strength), (new_v, z), None


# ---- around the rule


@dataclass(frozen=True)
class Step:
    param: Number
    slots: tuple[Number, ...]
    average: Number | None


def gradient(g: Number, p: Number | None, accumulator: Number | None, h: dict[str, float]) -> Number:
    """Of the mean loss, with that of the penalty l1*sum|p| + l2*sum(p^2) where there is a param."""
    g = h["grad_scale"] * g
    if accumulator is not None:
        g = g + accumulator
    g = h["accumulation_scale"] * g
    return g if p is None else g + term(h["l1"], p.sign()) + term(2 * h["l2"], p)


def step(
    name: str,
    p: Number,
    grad: Number,
    slots: list[Number],
    accumulator: Number | None,
    average: Number | None,
    scaled_proximal: bool,
    h: dict[str, float],
) -> Step:
    """One step of one variable, in the order of Keras; `h` are all hyperparameters by name."""
    g = (h["clip_scale"] * gradient(grad, p, accumulator, h)).clipped(h["clip_value"])
    p = p - term(h["decay_lr"] * h["weight_decay"], p)  # Loshchilov and Hutter, arXiv:1711.05101
    p, slots, own_rate = RULES[name](p, g, *slots, lr=h["lr"], **{hyper: h[hyper] for hyper in hypers_of(name)})
    rate = own_rate if scaled_proximal and own_rate is not None else h["lr"]
    # Parikh and Boyd, Proximal Algorithms, 2014, section 6.5.2.
    p = p.shrunk(rate * h["proximal_l1"]) / (2 * h["proximal_l2"] * rate + 1)
    if average is not None:
        average = h["ema_momentum"] * average + (1 - h["ema_momentum"]) * p
        p = average if h["ema_overwrite"] else p
    return Step(p, slots, average)


def penalty(param: np.ndarray, l1: float, l2: float) -> float:
    """Of the parameters as they are stored."""
    return l1 * np.sum(np.abs(param)) + l2 * np.sum(param**2)


def product(x: np.ndarray, dz: np.ndarray, dtype: str, stored: Callable[[np.ndarray], np.ndarray]) -> Number:
    """x^T dz, added up over the batch in any order, and `stored` in `dtype`.

    Rounding keeps order, so what is stored is between the ends of the bound, stored.
    """
    value = x.T @ dz
    error = (len(x) + 1) * UNIT[dtype] * (np.abs(x).T @ np.abs(dz))
    low, middle, high = (stored(value + e) for e in (-error, 0, error))
    return Number(middle, UNIT[dtype], np.maximum(high - middle, middle - low))


# ---- activations of z = x + bias, and their gradients by z from the output


def _expm1(z: Number) -> Number:
    """Within an ULP."""
    value = np.expm1(z.value)
    return Number(value, z.unit, np.exp(z.value) * z.error + 2 * z.unit * np.abs(value))


def _where(condition: np.ndarray, yes: Number, no: Number) -> Number:
    return Number(
        np.where(condition, yes.value, no.value),
        yes.unit,
        np.where(condition, yes.error, no.error),
    )


def elu(z: Number, *, alpha: float, scale: float) -> Number:
    """Clevert et al., arXiv:1511.07289; with a scale that is not 1 it is SELU, Klambauer et al., arXiv:1706.02515."""
    negative = Number(np.minimum(z.value, 0), z.unit, z.error)
    return _where(z.value > 0, scale * z, alpha * scale * _expm1(negative))


def elu_slope(y: Number, *, alpha: float, scale: float) -> Number:
    """For z <= 0: alpha*scale*e^z, by the output."""
    return _where(y.value > 0, Number(np.full_like(y.value, scale), y.unit, y.unit * scale), y + alpha * scale)


def relu(z: Number) -> Number:
    return z.at_least(Number(np.zeros_like(z.value), z.unit))


def relu_slope(y: Number) -> Number:
    return Number(np.where(np.isnan(y.value), np.nan, y.value > 0), y.unit)


def leaky_relu(z: Number, *, alpha: float) -> Number:
    """Maas et al., ICML 2013."""
    return _where(z.value > 0, z, alpha * z)


def leaky_relu_slope(y: Number, *, alpha: float) -> Number:
    slope = np.where(y.value > 0, 1.0, np.where(np.isnan(y.value), np.nan, alpha))
    return Number(slope, y.unit, y.unit * np.abs(slope))


# By the name of the class in the kernels' table.
ACTIVATIONS = {
    "Elu": (elu, elu_slope),
    "Relu": (relu, relu_slope),
    "LeakyRelu": (leaky_relu, leaky_relu_slope),
}
