"""The fused ops, each one op and one pass over memory for a whole list of variables.

`apply_<rule>` is the step of every rule; `norms` and `global_norm` are what clipping needs. All of them take a
`FactoredGradient` for the gradient of a matrix. The names, arguments and
defaults are those of `wdops.reference`, which also says what each op computes.
"""

import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from wdops import reference
from wdops._load import native, raw_ops
from wdops.factored import FactoredGradient

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


def _gradients(grads: list[Any]) -> dict[str, Any]:
    """The inputs of an op that are gradients. Of factors, x stands with the gradients and dz behind them."""
    pairs = {i: (g.x, g.dz) for i, g in enumerate(grads) if isinstance(g, FactoredGradient)}
    pairs |= {i: g for i, g in enumerate(grads) if isinstance(g, tuple)}
    return {
        "grad": [_gradient(i, pairs[i][0] if i in pairs else g) for i, g in enumerate(grads)],
        "factor": [_gradient(i, pairs[i][1]) for i in pairs],
        "factored": list(pairs),
    }


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


def _targets(given: dict[str, Any], n: int) -> dict[str, list[tf.Tensor]]:
    """The handles of lists of variables, each of length n; an empty list where there is none."""
    handles = {name: [] if given[name] is None else _handles(name, given[name]) for name in given}
    for name, values in handles.items():
        if len(values) != n and given[name] is not None:
            raise ValueError(f"{name} has {len(values)} entries, but {next(iter(given))} has {n}")
    return handles


def _make_apply(rule: reference.Rule, op: Callable[..., Any], hyper_names: list[str]) -> Callable[..., Any]:
    signature = rule.signature

    def apply(*args: Any, **kwargs: Any) -> tf.Tensor:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        arguments = given.arguments
        n = len(reference.as_list(arguments["var"]))
        targets = _targets({name: arguments[name] for name in ("var", *rule.slots, "accumulator", "average")}, n)
        grads = reference.as_list(arguments["grad"])
        if len(grads) != n:
            raise ValueError(f"grad has {len(grads)} entries, but var has {n}")
        report = arguments["report_penalty"]
        if n == 0:
            return tf.zeros(0, tf.float64)
        stochastic = arguments["seed"] is not None
        values = {name: arguments[name] for name in hyper_names}
        values |= {} if stochastic else {"seed": 0}
        values |= {} if values["decay_lr"] is not None else {"decay_lr": values["lr"]}
        hypers = {name: _hyper(name, value) for name, value in values.items()}
        return op(
            **targets,
            **_gradients(grads),
            **hypers,
            scaled_proximal=arguments["scaled_proximal"],
            stochastic=stochastic,
            report_penalty=report,
            name=arguments["name"],
        )

    return reference.document(apply, rule)


_hyper_names = {r["name"]: r["hypers"] for r in native.rules}
for _rule in reference.RULES.values():
    globals()[f"apply_{_rule.name}"] = _make_apply(
        _rule, getattr(raw_ops, f"wdops_apply_{_rule.name}"), _hyper_names[_rule.name]
    )


def norms(
    grad: Any,
    var: Any = None,
    *,
    accumulator: Any = None,
    grad_scale: Any = 1.0,
    accumulation_scale: Any = 1.0,
    l1: Any = 0.0,
    l2: Any = 0.0,
    name: str | None = None,
) -> reference.Norms:
    grads = reference.as_list(grad)
    targets = _targets({"grad": None, "var": var, "accumulator": accumulator}, len(grads))
    del targets["grad"]
    if not grads:
        return reference.Norms(tf.zeros(0, tf.float64), tf.zeros(0, tf.float64), tf.constant(True))
    hypers = {"grad_scale": grad_scale, "accumulation_scale": accumulation_scale, "l1": l1, "l2": l2}
    values = {n: _hyper(n, x) for n, x in hypers.items()}
    return reference.Norms(*raw_ops.wdops_norms(**targets, **_gradients(grads), **values, name=name))


def global_norm(grad: Any, var: Any = None, **arguments: Any) -> tuple[tf.Tensor, tf.Tensor]:
    norm, _, finite = norms(grad, var, **arguments)
    return tf.norm(norm), finite


norms.__doc__ = reference.norms.__doc__
global_norm.__doc__ = reference.global_norm.__doc__
