"""The kernels on NumPy arrays, without TensorFlow's ops: for tests, for measuring, and for other frameworks."""

from collections.abc import Sequence

import numpy as np

from wdops import reference
from wdops._load import native

_hyper_names = {r["name"]: r["hypers"] for r in native.rules}


def apply(
    rule: str,
    param: np.ndarray,
    slots: Sequence[np.ndarray],
    grad: np.ndarray,
    *,
    accumulator: np.ndarray | None = None,
    average: np.ndarray | None = None,
    scaled_proximal: bool = False,
    **hypers: float,
) -> None:
    """Steps `param`, `slots`, `accumulator` and `average` in place, in the calling thread.

    Args:
      rule: a name of `wdops.reference.RULES`; `wdops.ops.apply_<rule>` says what it computes.
      param: contiguous, of dtype float32, float64, float16 or `ml_dtypes.bfloat16`.
      slots: arrays of the size of `param`, in the order of the rule, of its dtype or one that goes with it.
      grad, accumulator, average: of the dtype and size of `param`.
      scaled_proximal, **hypers: a bool and numbers, with the names and defaults of `wdops.ops.apply_<rule>`.

    Raises:
      ValueError: an argument is unknown, has another dtype or size, overlaps another, or is out of range; then nothing
        has changed.
    """
    if rule not in reference.RULES:
        raise ValueError(f"rule is {rule!r}, but must be one of {', '.join(reference.RULES)}")
    tensors = ("var", *reference.RULES[rule].slots, "grad")
    given = reference.RULES[rule].signature.bind(*tensors, **hypers)
    given.apply_defaults()
    values = dict(given.arguments)
    stochastic = values["seed"] is not None
    values["seed"] = values["seed"] or 0
    values["decay_lr"] = values["lr"] if values["decay_lr"] is None else values["decay_lr"]
    numbers = [float(values[name]) for name in _hyper_names[rule]]
    native.apply(rule, param, list(slots), grad, accumulator, average, numbers, scaled_proximal, stochastic)


def norm(
    grad: np.ndarray, param: np.ndarray | None = None, *, accumulator: np.ndarray | None = None, **hypers: float
) -> tuple[float, float, bool]:
    """The norm of one gradient with its penalty, the penalty, and whether all is finite, as `wdops.ops.norms`.

    Args:
      grad: contiguous, of dtype float32, float64, float16 or `ml_dtypes.bfloat16`.
      param, accumulator: of the dtype and size of `grad`, or None.
      **hypers: numbers, with the names and defaults of `wdops.ops.norms`.

    Raises:
      ValueError: an argument is unknown, has another dtype or size, or is out of range.
    """
    values = reference.GRADIENT_DEFAULTS | hypers
    if len(values) > len(reference.GRADIENT_DEFAULTS):
        raise ValueError(
            f"hyperparameters are {', '.join(hypers)}, but may be {', '.join(reference.GRADIENT_DEFAULTS)}"
        )
    return native.norm(grad, param, accumulator, [float(values[name]) for name in native.gradient_hypers])
