"""What all tests share: the instruction sets as a fixture, random cases of every rule, and the bound of the oracle."""

import functools
import os
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import wdops
from wdops import reference
from wdops._load import native

DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

# By name, for every rule that has it. Amplified, so that a term that is missing or doubled stands far above rounding.
HYPERS = {
    "lr": 0.1,
    "momentum": 0.7,
    "nesterov": True,
    "beta1": 0.6,
    "beta2": 0.8,
    "epsilon": 1e-3,
    "step": 3,
    "u_product": 0.3,
    "rho": 0.8,
    "l1_strength": 0.4,
    "l2_strength": 0.3,
    "l2_shrinkage": 0.2,
    "beta": 0.5,
    "lr_power": -0.6,
}
TERMS = {
    "grad_scale": 0.5,
    "accumulation_scale": 1.7,
    "l1": 0.3,
    "l2": 0.2,
    "clip_scale": 0.7,
    "clip_value": 0.9,
    "decay_lr": 0.3,
    "weight_decay": 0.4,
    "proximal_l1": 0.25,
    "proximal_l2": 0.15,
}
# Each term alone, so that a wrong one cannot hide behind another; all at once; none.
DECAYS = {"all": TERMS, "none": {}, **{name: {name: value} for name, value in TERMS.items()}}
DECAYS["decay_lr"]["weight_decay"] = TERMS["weight_decay"]  # alone it does nothing
# Rules that want norms of the whole variable: an element's step depends on all the others.
WHOLE = {"lamb"}
LAYOUTS = [tuple(layout) for layout in native.layouts]

# How many roundings of the type that the step is computed in may stand between it and the oracle, each as large as a
# relative change by half an ULP of every input and of the result. The largest seen over 3.6 M elements is 1.6 in
# float32; in float64, where the oracle rounds as much as the kernel, 2.4.
MAX_ROUNDINGS = {"float32": 2.0, "bfloat16": 2.0, "float16": 2.0, "float64": 4.0}
# Half an ULP of what is stored in 16 bits, relative to the least number with that ULP.
STORAGE = {"float32": 0, "float64": 0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# The least normal number: what is below counts as 0, or in float16 is a subnormal and stored with this spacing.
TINY = {"float32": 2.0**-126, "float64": 2.0**-1022, "bfloat16": 2.0**-126, "float16": 2.0**-24}


def own_hypers(rule):
    """The hyperparameters of a rule without those of every step; one that has no name above keeps its default."""
    return {name: HYPERS.get(name, default) for name, default in reference.RULES[rule].hypers.items()}


@pytest.fixture(params=wdops.isa.available())
def isa(request):
    before = wdops.isa.active()
    wdops.isa.use(request.param)
    assert wdops.isa.active() == request.param
    yield request.param
    wdops.isa.use(before)


def random_case(rule, dtype, n, seed=0, slot_dtype=None):
    """param, slots, grad of n elements that reach every branch of a step: second moments are positive."""
    rng = np.random.default_rng(seed)

    def draw(dtype, positive=False):
        x = rng.normal(size=n) * 2.0 ** rng.integers(-3, 2, size=n)
        return (np.abs(x) if positive else x).astype(DTYPES[dtype])

    slots = [draw(slot_dtype or dtype, name.startswith("v")) for name in reference.RULES[rule].slots]
    return [draw(dtype), *slots, draw(dtype)]


MOST_MARKS = 8  # in a rule, of what it marks as `rounded`


@functools.cache
def graph_of_step(rule, arrays, hypers, scaled_proximal):
    """The reference as a graph of arrays and hyperparameters in the order of their names, and of factors of the marks.

    An oracle takes dozens of steps, whose ops one by one would take several times as long.
    """

    def step(arrays_, hypers_, factors):
        factor = iter(tf.unstack(factors))
        more = dict(zip(arrays, arrays_, strict=True))
        param, grad, *slots = (more.pop(name) for name in arrays if name not in ("accumulator", "average"))
        more |= dict(zip(hypers, tf.unstack(hypers_), strict=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "rounded", lambda x: x * next(factor))
            return reference.step(rule, param, slots, grad, **more, scaled_proximal=scaled_proximal)

    array, numbers, factors = (tf.TensorSpec([n], tf.float64) for n in (None, len(hypers), MOST_MARKS))
    return tf.function(step, autograph=False).get_concrete_function([array] * len(arrays), numbers, factors)


def oracle(rule, param, slots, grad, hypers, **options):
    """The new param, slots and average in float64, and how far a step in the dtype of `param` may be from each element.

    A rounding is a relative change by half an ULP, so what it can do is measured on the oracle itself: each input, each
    hyperparameter, what the oracle marks as `rounded`, and the result is changed by so much, and the changes of the
    result are added up. Where a sum cancels, or a quotient has a small divisor, the bound grows as the error does. What
    is stored in 16 bits is rounded once more. `options` are those of `reference.step`.
    """
    half_ulp = 2.0**-53 if param.dtype == np.float64 else 2.0**-24
    change = 2.0**-20
    arrays = {"param": param, "grad": grad} | {f"slot{k}": s for k, s in enumerate(slots)}
    arrays |= {name: options[name] for name in ("accumulator", "average") if options.get(name) is not None}
    hypers = {n: float(x) for n, x in hypers.items() if n != "seed"}
    hypers = {n: x for n, x in reference.STEP_DEFAULTS.items() if x is not None} | {"decay_lr": hypers["lr"]} | hypers
    stored = [str(x.dtype) for x in (param, *slots, *([param] if "average" in arrays else []))]
    graph = graph_of_step(rule, tuple(arrays), tuple(hypers), options.get("scaled_proximal", False))
    arrays = {name: tf.constant(np.ravel(x), tf.float64) for name, x in arrays.items()}

    def step(changes, factors=(1.0,) * MOST_MARKS):
        """With inputs changed by a factor, by name, and what is marked by `factors`."""
        changed = [x * changes[name] if name in changes else x for name, x in arrays.items()]
        numbers = [x * changes.get(name, 1) for name, x in hypers.items()]
        return [
            x.numpy().reshape(param.shape)
            for x in graph(changed, *(tf.constant(x, tf.float64) for x in (numbers, factors)))
        ]

    want = step({})
    slack = [np.abs(w) for w in want]
    for name, value in (arrays | hypers).items():
        if name in ("nesterov", "step", "ema_overwrite") or not np.any(value):  # exact
            continue
        less, more = step({name: 1 - change}), step({name: 1 + change})
        for k, w in enumerate(want):
            slack[k] = slack[k] + np.maximum(np.abs(less[k] - w), np.abs(more[k] - w)) / change
    for mark in np.eye(MOST_MARKS):
        for k, moved in enumerate(step({}, 1 + change * mark)):
            slack[k] = slack[k] + np.abs(moved - want[k]) / change
    rounding = MAX_ROUNDINGS[str(param.dtype)] * half_ulp
    # What is stored in 16 bits and then averaged or overwritten is not rounded in between: one storing each.
    bounds = [
        rounding * s + STORAGE[dtype] * np.abs(w) + TINY[dtype] for s, w, dtype in zip(slack, want, stored, strict=True)
    ]
    return want, bounds


def assert_within(got, want, bound, name):
    got = np.asarray(got).astype(np.float64)
    assert got.shape == want.shape, name
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(got - want) <= bound) & ~(np.isnan(got) & np.isnan(want)) & ~(got == want)
    assert not wrong.any(), (
        f"{name}: {wrong.sum()} of {wrong.size} elements beyond the bound; the first at {np.flatnonzero(wrong)[0]}: "
        f"{got[wrong][0]!r}, not {want[wrong][0]!r} +- {bound[wrong][0]:.2g}"
    )


def names_of(rule):
    return ["var", *reference.RULES[rule].slots]


# ---- a product of factors


def two_sum(a, b):
    """The sum, and what its rounding lost."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def sum_to_odd(a, b):
    """In float64, with the last bit set where it is not exact: rounded once more, it is as if only that were done."""
    total, lost = two_sum(a, b)
    even = total.view(np.int64) & 1 == 0
    return np.where((lost != 0) & even, np.nextafter(total, np.copysign(np.inf, lost)), total)


def two_product(a, b):
    """The product in float64, and what its rounding lost (Dekker 1971)."""

    def halves(x):
        high = 134217729.0 * x
        high -= high - x
        return high, x - high

    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    product = a * b
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def fused(a, b, c):
    """a*b + c, rounded once, in float32 or float64 (Boldo and Melquiond, IEEE Trans. Comp. 57(4), 2008)."""
    if c.dtype == np.float32:
        return sum_to_odd(np.float64(a) * b, np.float64(c)).astype(np.float32)
    product, lost = two_product(a, b)
    low, lower = two_sum(c, lost)
    high, rest = two_sum(product, low)
    return high + sum_to_odd(lower, rest)


def product_of(x, dz):
    """x^T dz as it is promised: in float32, or float64, added up over the batch in its order, then stored."""
    compute = np.float64 if x.dtype == np.float64 else np.float32
    total = np.zeros((x.shape[1], dz.shape[1]), compute)
    for of_x, of_dz in zip(x.astype(compute), dz.astype(compute), strict=True):
        total = fused(of_x[:, None], of_dz, total)
    return total.astype(x.dtype)


_TWO_DEVICES = """
import keras, numpy as np, tensorflow as tf, wdops
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
"""


def on_two_devices(program):
    """What a program prints in a process of its own, whose CPU is split into two devices."""
    result = subprocess.run([sys.executable, "-c", _TWO_DEVICES + program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
