"""Keras's optimizers with the step fused: same constructors, variables, configs and saved files, one op per step.

Each class takes every argument of the Keras class of its name, and `l1`, `l2`, `proximal_l1`, `proximal_l2`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from wdops import ops, reference

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"wdops needs Keras on TensorFlow, and found it on {keras.backend.backend()}: set KERAS_BACKEND=tensorflow"
    )

_DECAYS = ("l1", "l2", "proximal_l1", "proximal_l2")

_DOC = """{keras_class} with its whole step fused, decay included, into one op for all dense variables of a device.

    {rules}

    Around the rule stands the step that `wdops.ops.apply_sgd` describes. A gradient that is a `tf.IndexedSlices` goes
    through Keras's own code, unless one of the four coefficients below is not zero: they reach every row, so that
    gradient is made dense, as a Keras regularizer makes it. Clipping, averaging (`use_ema`), accumulation and loss
    scaling are Keras's own, around the fused step.

    Args:
      *args, **kwargs: those of `{keras_class}`, in its order.
      l1, l2: coefficients, at least 0, of the penalty l1*sum|p| + l2*sum(p^2) over all variables, as in
        `keras.regularizers.L1L2`. Its gradient is added before clipping, as if it were in the loss; the loss that is
        reported does not contain it. Default 0.
      proximal_l1, proximal_l2: coefficients, at least 0, of the same penalty as a proximal step behind the update,
        which gives exact zeros. Default 0.

    Raises:
      ValueError: a coefficient is negative or not a number, or what `{keras_class}` raises.

    Differs from Keras: Adam's bias corrections are made in double; bfloat16 and float16 variables are stepped in
    float32; a negative `weight_decay` is refused when the step runs; a config contains the four coefficients only
    where they are not zero, so that Keras reads it too.
    """


def _coefficient(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number < float("inf"):
        raise ValueError(f"`{name}` must be a finite number of at least 0. Received: {name}={value}")
    return number


def _is_keras_business(grad: Any, variable: tf.Variable) -> bool:
    """Whether Keras's own code steps this variable: its gradient is sparse, or its dtype is not that of a kernel."""
    return isinstance(grad, tf.IndexedSlices) or variable.dtype not in ops.DTYPES


class _FusedStep(keras.optimizers.Optimizer):
    """What the classes below share: mixed in before the Keras class, it replaces how a step reaches the variables."""

    _RULES: tuple[str, ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        decays = {name: _coefficient(name, kwargs.pop(name, 0.0)) for name in _DECAYS}
        super().__init__(*args, **kwargs)
        self.l1, self.l2 = decays["l1"], decays["l2"]
        self.proximal_l1, self.proximal_l2 = decays["proximal_l1"], decays["proximal_l2"]

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {name: getattr(self, name) for name in _DECAYS if getattr(self, name)}

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        """The op, the slots of all variables in the op's order, and the rule's own hyperparameters."""
        raise NotImplementedError

    @property
    def _clips(self) -> bool:
        return any(limit is not None and limit > 0 for limit in (self.clipnorm, self.clipvalue, self.global_clipnorm))

    def _backend_apply_gradients(self, grads: list[Any], trainable_variables: list[keras.Variable]) -> None:
        # Keras clips before the fused step sees the gradients, and the penalty belongs to what is clipped.
        if self._clips and (self.l1 or self.l2):
            grads = [
                tf.cast(tf.convert_to_tensor(g), v.dtype)
                + reference.penalty_gradient(tf.convert_to_tensor(v), self.l1, self.l2)
                for g, v in zip(grads, trainable_variables, strict=True)
            ]
        super()._backend_apply_gradients(grads, trainable_variables)

    @property
    def _is_fused(self) -> bool:
        """Whether the step is ours: a subclass that overrides update_step gets what Keras gives it."""
        return type(self).update_step is _FusedStep.update_step

    def _apply_weight_decay(self, variables: list[keras.Variable]) -> None:
        """Nothing where the step is ours: it decays, and so does update_step where it hands over to Keras."""
        if not self._is_fused:
            super()._apply_weight_decay(variables)

    def _backend_update_step(
        self, grads: list[Any], trainable_variables: list[keras.Variable], learning_rate: Any
    ) -> None:
        if tf.distribute.has_strategy() or not self._is_fused:
            # Reduces over the replicas and calls update_step for each variable where it lives.
            super()._backend_update_step(grads, trainable_variables, learning_rate)
            return
        variables = [v.value if isinstance(v, keras.Variable) else v for v in trainable_variables]
        dense: dict[str, list[tuple[Any, tf.Variable]]] = {}
        others = []
        for grad, variable in zip(grads, variables, strict=True):
            pair = (grad, variable)
            if _is_keras_business(*pair):
                others.append(pair)
            else:
                dense.setdefault(variable.device, []).append(pair)
        # The fused ops come first: they check everything before they write.
        for pairs in dense.values():
            self._fused_step(*zip(*pairs, strict=True), learning_rate)
        for grad, variable in others:
            self.update_step(grad, variable, learning_rate)

    def update_step(self, gradient: Any, variable: tf.Variable, learning_rate: Any) -> None:
        if not _is_keras_business(gradient, variable):
            self._fused_step([gradient], [variable], learning_rate)
        elif variable.dtype in ops.DTYPES and any(getattr(self, name) for name in _DECAYS):
            self._fused_step([tf.convert_to_tensor(gradient)], [variable], learning_rate)
        else:
            if self.weight_decay is not None and self._is_fused and self._use_weight_decay(variable):
                decay = tf.cast(self.weight_decay, variable.dtype) * tf.cast(learning_rate, variable.dtype)
                variable.assign_sub(variable * decay)
            super().update_step(gradient, variable, learning_rate)

    def _fused_step(self, grads: list[tf.Tensor], variables: list[tf.Variable], learning_rate: Any) -> None:
        apply, slots, hypers = self._rule()
        index = [self._get_variable_index(v) for v in variables]
        weight_decay = 0.0 if self.weight_decay is None or not self._is_fused else self.weight_decay
        decayed = [self._use_weight_decay(v) for v in variables]
        if not all(decayed):
            weight_decay = [weight_decay * float(d) for d in decayed]
        penalty = {} if self._clips else {"l1": self.l1, "l2": self.l2}
        apply(
            list(variables),
            *([slot[i] for i in index] for slot in slots),
            [tf.cast(g, v.dtype) for g, v in zip(grads, variables, strict=True)],
            weight_decay=weight_decay,
            proximal_l1=self.proximal_l1,
            proximal_l2=self.proximal_l2,
            **penalty,
            **({"lr": learning_rate} | hypers),
        )


_CLASSES: list[type[keras.optimizers.Optimizer]] = []


def _public(cls: type[_FusedStep]) -> type[_FusedStep]:
    """Registers the class, and gives it a docstring and the signature of the Keras class of its name with `_DECAYS`."""
    keras_class = getattr(keras.optimizers, cls.__name__)
    rules = "\n\n    ".join(reference.RULES[name].summary for name in cls._RULES)
    cls.__doc__ = _DOC.format(keras_class=f"keras.optimizers.{cls.__name__}", rules=rules)
    signature = inspect.signature(keras_class)
    *own, rest = signature.parameters.values()
    decays = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=0.0) for name in _DECAYS]
    cls.__signature__ = signature.replace(parameters=[*own, *decays, rest])
    _CLASSES.append(cls)
    return keras.saving.register_keras_serializable(package="wdops")(cls)


@_public
class SGD(_FusedStep, keras.optimizers.SGD):
    _RULES = ("sgd", "momentum")

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        if self.momentum == 0:
            return ops.apply_sgd, [], {}
        return ops.apply_momentum, [self.momentums], {"momentum": self.momentum, "nesterov": self.nesterov}


class _FusedAdam(_FusedStep):
    _RULES = ("adam", "amsgrad")

    def _betas(self) -> dict[str, Any]:
        return {
            "beta1": self.beta_1,
            "beta2": self.beta_2,
            "epsilon": self.epsilon,
            "step": self.iterations + 1,
        }

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        slots = [self._momentums, self._velocities]
        if self.amsgrad:
            return ops.apply_amsgrad, [*slots, self._velocity_hats], self._betas()
        return ops.apply_adam, slots, self._betas()


@_public
class Adam(_FusedAdam, keras.optimizers.Adam):
    pass


@_public
class AdamW(_FusedAdam, keras.optimizers.AdamW):
    pass


@_public
class Nadam(_FusedAdam, keras.optimizers.Nadam):
    _RULES = ("nadam",)

    def _backend_update_step(self, grads: list[Any], trainable_variables: list[Any], learning_rate: Any) -> None:
        if self._is_fused and not tf.distribute.has_strategy():  # else Keras's own method does it
            power = tf.cast(0.96, tf.float64) ** tf.cast(self.iterations + 1, tf.float64)
            momentum = tf.cast(self.beta_1 * (1 - 0.5 * power), self._u_product.dtype)
            self._u_product.assign(self._u_product * momentum)
        super()._backend_update_step(grads, trainable_variables, learning_rate)

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        return ops.apply_nadam, [self._momentums, self._velocities], self._betas() | {"u_product": self._u_product}


@_public
class Adamax(_FusedAdam, keras.optimizers.Adamax):
    _RULES = ("adamax",)

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        return ops.apply_adamax, [self._m, self._u], self._betas()


@_public
class Lamb(_FusedAdam, keras.optimizers.Lamb):
    _RULES = ("lamb",)

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        return ops.apply_lamb, [self._momentums, self._velocities], self._betas()


@_public
class Lion(_FusedStep, keras.optimizers.Lion):
    _RULES = ("lion",)

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        return ops.apply_lion, [self._momentums], {"beta1": self.beta_1, "beta2": self.beta_2}


@_public
class RMSprop(_FusedStep, keras.optimizers.RMSprop):
    _RULES = ("rmsprop", "rmsprop_momentum", "centered_rmsprop", "centered_rmsprop_momentum")

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        hypers = {"rho": self.rho, "epsilon": self.epsilon}
        slots = [self._velocities, *([self._average_gradients] if self.centered else [])]
        if self.momentum > 0:
            apply = ops.apply_centered_rmsprop_momentum if self.centered else ops.apply_rmsprop_momentum
            return apply, [*slots, self._momentums], hypers | {"momentum": self.momentum}
        return ops.apply_centered_rmsprop if self.centered else ops.apply_rmsprop, slots, hypers


@_public
class Adagrad(_FusedStep, keras.optimizers.Adagrad):
    _RULES = ("adagrad",)

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        return ops.apply_adagrad, [self._accumulators], {"epsilon": self.epsilon}


@_public
class Adadelta(_FusedStep, keras.optimizers.Adadelta):
    _RULES = ("adadelta",)

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        slots = [self._accumulated_grads, self._accumulated_delta_vars]
        return ops.apply_adadelta, slots, {"rho": self.rho, "epsilon": self.epsilon}


@_public
class Ftrl(_FusedStep, keras.optimizers.Ftrl):
    _RULES = ("ftrl", "ftrl_power")

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        hypers = {
            "l1_strength": self.l1_regularization_strength,
            "l2_strength": self.l2_regularization_strength,
            "l2_shrinkage": self.l2_shrinkage_regularization_strength,
            "beta": self.beta,
        }
        slots = [self._accumulators, self._linears]
        if self.learning_rate_power == -0.5:
            return ops.apply_ftrl, slots, hypers
        return ops.apply_ftrl_power, slots, hypers | {"lr_power": self.learning_rate_power}


def from_keras(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimizer of this module that goes on where a Keras one stands, as behind `keras.saving.load_model`.

    Args:
      optimizer: of a class of Keras that this module has too; built or not.

    Returns:
      An optimizer of that class here, with the same config, variables and exclusions from weight decay.

    Raises:
      ValueError: this module has no such class.
    """
    name = type(optimizer).__name__
    if type(optimizer) is not getattr(keras.optimizers, name, None) or name not in globals():
        raise ValueError(f"wdops.optimizers has no counterpart of {type(optimizer)}")
    return _go_on_as(globals()[name], optimizer)


def to_keras(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The way back: Keras's own optimizer that goes on where one of this module stands.

    Raises:
      ValueError: it is not of a class of this module, or has an `l1`, `l2`, `proximal_l1` or `proximal_l2`, which
        Keras's has not.
    """
    if type(optimizer) not in _CLASSES:
        raise ValueError(f"{type(optimizer)} is not a class of wdops.optimizers")
    for name in _DECAYS:
        if getattr(optimizer, name):
            raise ValueError(f"Keras's optimizers have no `{name}`, and this one has {name}={getattr(optimizer, name)}")
    return _go_on_as(getattr(keras.optimizers, type(optimizer).__name__), optimizer)


def _go_on_as(cls: type, optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    converted = cls.from_config(optimizer.get_config())
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        if hasattr(optimizer, name):
            setattr(converted, name, getattr(optimizer, name))
    if optimizer.built:
        converted.build(optimizer._trainable_variables)
        for variable, value in zip(converted.variables, optimizer.variables, strict=True):
            variable.assign(value)
    return converted
