"""The fused ops: `apply_<rule>` for every rule, each one op and one pass over memory for a whole list of variables.

The names, arguments and defaults are those of `wdops.reference`, which also says what each op computes.
"""

import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from wdops import reference
from wdops._load import native, raw_ops

DTYPES = (tf.float32, tf.float64, tf.bfloat16, tf.float16)


def _handles(name: str, variables: Any) -> list[tf.Tensor]:
    handles = []
    for i, variable in enumerate(reference.as_list(variables)):
        # A keras.Variable holds its tf.Variable in `value`; that of a tf.Variable is a method.
        variable = getattr(variable, "value", variable) if not hasattr(variable, "handle") else variable
        if not hasattr(variable, "handle"):
            raise ValueError(f"{name}[{i}] must be a tf.Variable or a keras.Variable, but is {type(variable)}")
        handles.append(variable.handle)
    return handles


def _gradient(i: int, grad: Any) -> tf.Tensor:
    if isinstance(grad, tf.IndexedSlices):
        raise ValueError(f"grad[{i}] is a tf.IndexedSlices, but must be dense: tf.convert_to_tensor makes it so")
    if grad is None:
        raise ValueError(f"grad[{i}] is None")
    grad = tf.convert_to_tensor(grad)
    if grad.dtype not in DTYPES:
        raise ValueError(f"grad[{i}] has dtype {grad.dtype.name}, but must have one of {[d.name for d in DTYPES]}")
    return grad


def _known_values(value: Any) -> np.ndarray:
    """Those that are not in a tensor or variable."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    known = (numbers.Real, np.ndarray)
    return np.ravel([x for x in entries if isinstance(x, known)]) if len(entries) else np.zeros(0)


def _hyper(name: str, value: Any) -> tf.Tensor:
    minimum = native.minima.get(name)
    # Here and not only in the kernel, because XLA sees no values while it compiles.
    if minimum is not None and not np.all(_known_values(value) >= minimum):
        raise ValueError(f"{name} is {value}, but must be at least {minimum}")
    try:
        return reference.to_float64(value)
    except (TypeError, ValueError, tf.errors.OpError) as error:
        raise ValueError(f"{name} must be a number, a tensor or a vector of numbers, but is {value!r}") from error


def _make_apply(rule: reference.Rule, op: Callable[..., Any], hyper_names: list[str]) -> Callable[..., Any]:
    signature = rule.signature

    def apply(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        arguments = given.arguments
        targets = {n: _handles(n, arguments[n]) for n in ("var", *rule.slots)}
        grads = reference.as_list(arguments["grad"])
        n = len(targets["var"])
        for name, values in [*targets.items(), ("grad", grads)]:
            if len(values) != n:
                raise ValueError(f"{name} has {len(values)} entries, but var has {n}")
        if n == 0:
            return
        grads = [_gradient(i, grad) for i, grad in enumerate(grads)]
        hypers = {name: _hyper(name, arguments[name]) for name in hyper_names}
        op(**targets, grad=grads, **hypers, name=arguments["name"])

    return reference.document(apply, rule)


_hyper_names = {r["name"]: r["hypers"] for r in native.rules}
for _rule in reference.RULES.values():
    globals()[f"apply_{_rule.name}"] = _make_apply(
        _rule, getattr(raw_ops, f"wdops_apply_{_rule.name}"), _hyper_names[_rule.name]
    )
