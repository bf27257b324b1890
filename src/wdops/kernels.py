"""The kernels on NumPy arrays, without TensorFlow's ops: for tests, for measuring, and for other frameworks."""

from collections.abc import Sequence

import numpy as np

from wdops import reference
from wdops._load import native

_hyper_names = {r["name"]: r["hypers"] for r in native.rules}


def apply(rule: str, param: np.ndarray, slots: Sequence[np.ndarray], grad: np.ndarray, **hypers: float) -> None:
    """Steps `param` and `slots` in place, in the calling thread.

    Args:
      rule: a name of `wdops.reference.RULES`; `wdops.ops.apply_<rule>` says what it computes.
      param: contiguous, of dtype float32, float64, float16 or `ml_dtypes.bfloat16`.
      slots: arrays of the dtype and size of `param`, in the order of the rule.
      grad: likewise.
      **hypers: numbers, with the names and defaults of `wdops.ops.apply_<rule>`.

    Raises:
      ValueError: an argument is unknown, has another dtype or size, overlaps another, or is out of range; then nothing
        has changed.
    """
    if rule not in reference.RULES:
        raise ValueError(f"rule is {rule!r}, but must be one of {', '.join(reference.RULES)}")
    tensors = ("var", *reference.RULES[rule].slots, "grad")
    given = reference.RULES[rule].signature.bind(*tensors, **hypers)
    given.apply_defaults()
    native.apply(rule, param, list(slots), grad, [float(given.arguments[name]) for name in _hyper_names[rule]])
