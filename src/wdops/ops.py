"""The fused ops, each one op and one pass over memory.

`apply_<rule>` is the step of every rule for a whole list of variables; `norms` and `global_norm` are what clipping
needs; both take a `FactoredGradient` for the gradient of a matrix. `elu`, `relu`, `leaky_relu` and `selu` are
activations behind a bias, with their gradients. The names, arguments and defaults are those of `wdops.reference`, which
also says what each op computes.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from wdops import devices, packed, reference
from wdops._load import native, raw_ops
from wdops.factored import FactoredGradient

# Whoever calls this from a tf.function waits for AutoGraph to translate all of its source, and there is nothing in it
# to translate.
as_it_is = tf.autograph.experimental.do_not_convert

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
    pairs = {i: (g.x, _dz(i, g)) for i, g in enumerate(grads) if isinstance(g, FactoredGradient)}
    pairs |= {i: g for i, g in enumerate(grads) if isinstance(g, tuple)}
    return {
        "grad": [_gradient(i, pairs[i][0] if i in pairs else g) for i, g in enumerate(grads)],
        "factor": [_gradient(i, pairs[i][1]) for i in pairs],
        "factored": list(pairs),
    }


def _dz(i: int, grad: FactoredGradient) -> tf.Tensor:
    """Surely a matrix: an empty vector would tell the op that x is the gradient."""
    if grad.dz.shape.rank is None:
        return tf.ensure_shape(grad.dz, [None, None])
    if grad.dz.shape.rank != 2:
        raise ValueError(
            f"grad[{i}]: x has shape {grad.x.shape} and dz has shape {grad.dz.shape}, but they must be [batch, rows] "
            "and [batch, columns]"
        )
    return grad.dz


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


# What is made of gradients, and taken from where they are.
_SCALES = ("grad_scale", "clip_scale")


def _hypers(values: dict[str, Any]) -> dict[str, tf.Tensor]:
    """The inputs of an op that are hyperparameters."""
    hypers = {name: _hyper(name, value) for name, value in values.items() if name in _SCALES}
    with devices.on_host():
        return hypers | {name: _hyper(name, value) for name, value in values.items() if name not in _SCALES}


def _targets(given: dict[str, Any], n: int) -> dict[str, list[tf.Tensor]]:
    """The handles of lists of variables, each of length n; an empty list where there is none."""
    handles = {name: [] if given[name] is None else _handles(name, given[name]) for name in given}
    for name, values in handles.items():
        if len(values) != n and given[name] is not None:
            raise ValueError(f"{name} has {len(values)} entries, but {next(iter(given))} has {n}")
    # The rest of a training step has captured every `var` anyway.
    return {name: values if name == "var" else packed.pack(values) for name, values in handles.items()}


def _make_apply(rule: reference.Rule, op: Callable[..., Any], hyper_names: list[str]) -> Callable[..., Any]:
    signature = rule.signature

    @as_it_is
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
        hypers = _hypers(values)
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


@as_it_is
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
) -> reference.Norms:
    grads = reference.as_list(grad)
    targets = _targets({"grad": None, "var": var, "accumulator": accumulator}, len(grads))
    del targets["grad"]
    if not grads:
        return reference.Norms(tf.zeros(0, tf.float64), tf.zeros(0, tf.float64), tf.constant(True))
    hypers = {"grad_scale": grad_scale, "accumulation_scale": accumulation_scale, "l1": l1, "l2": l2}
    found = raw_ops.wdops_norms(
        **targets, **_gradients(grads), **_hypers(hypers), report_penalty=report_penalty, name=name
    )
    return reference.Norms(*found)


@as_it_is
def global_norm(grad: Any, var: Any = None, **arguments: Any) -> tuple[tf.Tensor, tf.Tensor]:
    norm, _, finite = norms(grad, var, report_penalty=False, **arguments)
    return tf.norm(norm), finite


norms.__doc__ = reference.norms.__doc__
global_norm.__doc__ = reference.global_norm.__doc__


# ---- activations


def _float_tensor(name: str, value: Any, dtype: tf.DType = tf.float32) -> tf.Tensor:
    """`value` as a tensor; numbers and lists of them become one of `dtype`."""
    tensor = tf.convert_to_tensor(value, dtype_hint=None if hasattr(value, "dtype") else dtype)
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype.name}, but must have one of {[d.name for d in DTYPES]}")
    return tensor


def _activate(op: Callable[..., Any], x: Any, bias: Any, data_format: str, name: str | None, *hypers: float) -> Any:
    x = _float_tensor("x", x)
    if data_format not in ("NHWC", "NCHW"):
        raise ValueError(f"data_format is {data_format!r}, but must be 'NHWC' or 'NCHW'")
    biases = [] if bias is None else [_float_tensor("bias", bias, x.dtype)]
    if biases and biases[0].dtype != x.dtype:
        raise ValueError(f"bias has dtype {biases[0].dtype.name}, but x has dtype {x.dtype.name}")
    return op(x, biases, *(tf.constant(h, tf.float64) for h in hypers), data_format=data_format, name=name)


def _check_alpha(alpha: Any, dtype: tf.DType) -> float:
    """`alpha` as a float, and as 0 where it is subnormal in what `dtype` is computed in."""
    limits = np.finfo(np.float64 if dtype == tf.float64 else np.float32)
    if not isinstance(alpha, numbers.Real) or alpha != alpha or alpha in (math.inf, -math.inf):
        raise ValueError(f"alpha must be a finite Python number, but is {alpha!r}")
    if alpha < 0:
        raise ValueError(
            f"alpha is {alpha}, but must not be negative: the gradient is made from the output, which then does not "
            "tell the sign of the input"
        )
    if alpha > float(limits.max):
        raise ValueError(f"alpha is {alpha}, but must be at most {limits.max} beside an x of {dtype.name}")
    return float(alpha) if alpha >= float(limits.tiny) else 0.0


@as_it_is
def elu(
    x: Any, bias: Any = None, alpha: float = 1.0, *, data_format: str = "NHWC", name: str | None = None
) -> tf.Tensor:
    x = _float_tensor("x", x)
    alpha = _check_alpha(alpha, x.dtype)
    if alpha == 0:
        return relu(x, bias, data_format=data_format, name=name)
    return _activate(raw_ops.wdops_elu, x, bias, data_format, name, alpha, 1.0)


@as_it_is
def relu(x: Any, bias: Any = None, *, data_format: str = "NHWC", name: str | None = None) -> tf.Tensor:
    return _activate(raw_ops.wdops_relu, x, bias, data_format, name)


@as_it_is
def leaky_relu(
    x: Any, bias: Any = None, alpha: float = 0.2, *, data_format: str = "NHWC", name: str | None = None
) -> tf.Tensor:
    x = _float_tensor("x", x)
    alpha = _check_alpha(alpha, x.dtype)
    if alpha == 0:  # 0 times infinity is not what is meant
        return relu(x, bias, data_format=data_format, name=name)
    return _activate(raw_ops.wdops_leaky_relu, x, bias, data_format, name, alpha)


@as_it_is
def selu(x: Any, bias: Any = None, *, data_format: str = "NHWC", name: str | None = None) -> tf.Tensor:
    return _activate(raw_ops.wdops_elu, x, bias, data_format, name, reference.SELU_ALPHA, reference.SELU_SCALE)


for _function in (elu, relu, leaky_relu, selu):
    _function.__doc__ = getattr(reference, _function.__name__).__doc__


def _register_gradients(op_name: str, grad_op: Callable[..., Any], curved: bool) -> None:
    """Of the op, and of its gradient; `curved`: the derivative is the output and a constant where that is below 0."""

    @tf.RegisterGradient(op_name)
    def gradient(op: Any, grad: tf.Tensor) -> list[Any]:
        biases = op.get_attr("B")
        hypers = op.inputs[1 + biases :]
        x_grad, bias_grad = grad_op(
            grad, op.outputs[0], *hypers, B=biases, data_format=op.get_attr("data_format")
        )  # fmt: skip
        return [x_grad, *bias_grad, *[None] * len(hypers)]

    @tf.RegisterGradient(f"{op_name}Grad")
    def gradient_of_gradient(op: Any, x_grad_grad: tf.Tensor, *bias_grad_grad: tf.Tensor) -> list[Any]:
        grad, output, *hypers = op.inputs
        for of_bias in bias_grad_grad:  # an element of x_grad is in one sum
            if tf.compat.as_str(op.get_attr("data_format")) == "NCHW":
                behind = tf.ones(tf.rank(output) - 2, tf.int32)
                of_bias = tf.reshape(of_bias, tf.concat([[1, -1], behind], 0))
            x_grad_grad += of_bias
        grad_grad, _ = grad_op(x_grad_grad, output, *hypers, B=0)
        output_grad = tf.where(output > 0, tf.zeros_like(output), grad * x_grad_grad) if curved else None
        return [grad_grad, output_grad, *[None] * len(hypers)]


_register_gradients("Wdops>Elu", raw_ops.wdops_elu_grad, curved=True)
_register_gradients("Wdops>Relu", raw_ops.wdops_relu_grad, curved=False)
_register_gradients("Wdops>LeakyRelu", raw_ops.wdops_leaky_relu_grad, curved=False)
