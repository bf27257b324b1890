"""Keras's optimizers with the step fused: same constructors, variables, configs and saved files, one op per step.

Each class takes every argument of the Keras class of its name, and those of `wdops.fused_step.OPTIONS`.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from wdops import groups, ops, reference
from wdops.fused_step import OPTIONS, FusedStep

if keras.backend.backend() != "tensorflow":  # before Keras's classes, which depend on it, are mixed in
    raise ImportError(
        f"wdops needs Keras on TensorFlow, and found it on {keras.backend.backend()}: set KERAS_BACKEND=tensorflow"
    )

_DOC = """{keras_class} with its whole step fused into one op, and one pass, for all variables of a device.

    {rules}

    Around the rule stands the step that `wdops.ops.apply_sgd` describes: clipping, accumulation, the moving average
    (`use_ema`), the loss scale and all decays are in that pass, and clipping by a norm reads the gradients once before.
    Steps with a variable that is no float, and under a distribution strategy, run Keras's code around the fused rule.
    A gradient that is a `tf.IndexedSlices` is made dense, and rows that occur twice are added up: Keras's Adam adds up
    their squares in v.

    Every hyperparameter that is a number here or in `{keras_class}` may also be a scalar tensor or variable, a
    `LearningRateSchedule` (of `iterations`), or a callable without arguments, and is saved as `learning_rate` is; not
    `gradient_accumulation_steps`, `ema_overwrite_frequency`, `learning_rate_power` and `warmup_steps`.

    Args:
      *args, **kwargs: those of `{keras_class}`, in its order.
      l1, l2: coefficients, at least 0, of the penalty l1*sum|p| + l2*sum(p^2) over all variables, as in
        `keras.regularizers.L1L2`. Its gradient is added before clipping, as if it were in the loss; the loss that is
        reported does not contain it. Default 0.
      proximal_l1, proximal_l2: coefficients, at least 0, of the same penalty as a proximal step behind the update,
        which gives exact zeros. Default 0.
      scaled_proximal: whether the threshold of the proximal step has the rule's preconditioner. Default False.
      decay_coupling: what `weight_decay` is multiplied by: "lr", the learning rate, as in Keras and PyTorch;
        "schedule", the learning rate without its base, as Loshchilov and Hutter (arXiv:1711.05101) have it; "none", 1,
        as in TensorFlow Addons. Default "lr".
      skip_nonfinite: whether a step with a gradient that is not finite changes nothing and does not count;
        `step_applied` tells of the last one. Costs one read of the gradients, unless they are clipped by a norm.
        Default False.
      slot_dtype: "bfloat16" for slots of 2 bytes for float32 variables, "float32" for float32 slots of 16-bit ones;
        None: as the variable. Default None.
      rounding: how variables, slots and averages are stored in bfloat16: "stochastic", so that small changes are kept
        on average, or "nearest". Default "stochastic".
      seed: of stochastic rounding, which also depends on the step, the variable and the element. Default 0.

    Raises:
      ValueError: an option is out of range, or what `{keras_class}` raises.

    Differs from Keras: Adam's bias corrections are made in double; bfloat16 and float16 variables are stepped in
    float32, and bfloat16 is rounded stochastically; a negative `weight_decay` is refused when the step runs; exclusions
    and groups are saved; a config contains them and the options above only where there are some, so that Keras reads
    the others too.
    """


_CLASSES: list[type[keras.optimizers.Optimizer]] = []


def _public(cls: type[FusedStep]) -> type[FusedStep]:
    """Registers the class, and gives it a docstring and the signature of the Keras class of its name with `OPTIONS`."""
    keras_class = getattr(keras.optimizers, cls.__name__)
    rules = "\n\n    ".join(reference.RULES[name].summary for name in cls._RULES)
    cls.__doc__ = _DOC.format(keras_class=f"keras.optimizers.{cls.__name__}", rules=rules)
    signature = inspect.signature(keras_class)
    *own, rest = signature.parameters.values()
    options = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=d) for name, d in OPTIONS.items()]
    cls.__signature__ = signature.replace(parameters=[*own, *options, rest])
    _CLASSES.append(cls)
    return keras.saving.register_keras_serializable(package="wdops")(cls)


@_public
class SGD(FusedStep, keras.optimizers.SGD):
    _RULES = ("sgd", "momentum")

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        if not self.momentums:
            return ops.apply_sgd, [], {}
        return ops.apply_momentum, [self.momentums], {"momentum": self.momentum, "nesterov": self.nesterov}


class _FusedAdam(FusedStep):
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

    def _counters(self) -> dict[str, tuple[keras.Variable, tf.Tensor]]:
        power = tf.cast(0.96, tf.float64) ** tf.cast(self.iterations + 1, tf.float64)
        momentum = reference.to_float64(self._now(self.beta_1)) * (1 - 0.5 * power)
        return {"u_product": (self._u_product, self._u_product * tf.cast(momentum, self._u_product.dtype))}

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
class Lion(FusedStep, keras.optimizers.Lion):
    _RULES = ("lion",)

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        return ops.apply_lion, [self._momentums], {"beta1": self.beta_1, "beta2": self.beta_2}


@_public
class RMSprop(FusedStep, keras.optimizers.RMSprop):
    _RULES = ("rmsprop", "rmsprop_momentum", "centered_rmsprop", "centered_rmsprop_momentum")

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        hypers = {"rho": self.rho, "epsilon": self.epsilon}
        slots = [self._velocities, *([self._average_gradients] if self.centered else [])]
        if self._momentums:
            apply = ops.apply_centered_rmsprop_momentum if self.centered else ops.apply_rmsprop_momentum
            return apply, [*slots, self._momentums], hypers | {"momentum": self.momentum}
        return ops.apply_centered_rmsprop if self.centered else ops.apply_rmsprop, slots, hypers


@_public
class Adagrad(FusedStep, keras.optimizers.Adagrad):
    _RULES = ("adagrad",)

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        return ops.apply_adagrad, [self._accumulators], {"epsilon": self.epsilon}


@_public
class Adadelta(FusedStep, keras.optimizers.Adadelta):
    _RULES = ("adadelta",)

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        slots = [self._accumulated_grads, self._accumulated_delta_vars]
        return ops.apply_adadelta, slots, {"rho": self.rho, "epsilon": self.epsilon}


@_public
class Ftrl(FusedStep, keras.optimizers.Ftrl):
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


if hasattr(keras.optimizers, "ScheduleFreeAdamW"):  # from Keras 3.14 on

    @_public
    class ScheduleFreeAdamW(_FusedAdam, keras.optimizers.ScheduleFreeAdamW):
        _RULES = ("schedule_free_adam",)

        def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
            hypers = self._betas()
            if self.warmup_steps > 0:
                # As in Keras, the decay is not warmed up.
                hypers["lr_scale"] = tf.minimum(reference.to_float64(hypers["step"]) / self.warmup_steps, 1.0)
            return ops.apply_schedule_free_adam, [self._momentums, self._velocities], hypers


@keras.saving.register_keras_serializable(package="wdops")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """`keras.optimizers.LossScaleOptimizer` around an optimizer of this module: unscaling costs no pass of its own.

    The gradients are divided by the scale inside the step, and found finite by the read that clipping makes anyway; a
    step whose gradients are not finite leaves everything as it was, `iterations` included, and halves the scale.
    Keras's own class around such an optimizer does the same with passes more, as this one does around any other.

    Args:
      inner_optimizer: the optimizer.
      initial_scale: Default 2^15.
      dynamic_growth_steps: after how many finite steps the scale doubles. Default 2000.
      name: Default None.

    Raises:
      ValueError: what Keras's class raises.
    """

    @property
    def step_applied(self) -> Any:
        """Whether the last step was made."""
        return self.inner_optimizer.step_applied

    def factor_gradients(self, model: Any) -> list[str]:
        """As that of the optimizer inside, which has to be of this module."""
        return self.inner_optimizer.factor_gradients(model)

    def _common_apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        if not isinstance(self.inner_optimizer, FusedStep) or tf.distribute.has_strategy():
            super()._common_apply(grads, trainable_variables)
            return
        applied = self.inner_optimizer.apply_scaled(
            grads, trainable_variables, loss_scale=self.dynamic_scale, skip_nonfinite=True
        )
        grows = tf.logical_and(applied, tf.convert_to_tensor(self.step_counter) == self.dynamic_growth_steps - 1)
        scale = tf.convert_to_tensor(self.dynamic_scale)
        self.dynamic_scale.assign(tf.where(applied, tf.where(grows, 2 * scale, scale), 0.5 * scale))
        steps = tf.convert_to_tensor(self.step_counter) + 1
        self.step_counter.assign(tf.where(applied & ~grows, steps, tf.zeros_like(steps)))


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
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return _rewrap(LossScaleOptimizer, optimizer, from_keras)
    converted = globals()[name].from_config(optimizer.get_config())
    excluded = getattr(optimizer, "_exclude_from_weight_decay", ())
    names = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    if excluded or names:
        converted.exclude_from_weight_decay(var_names=[names.pattern] if names else None)
        keys = [groups.Selector("variable", str(key), key) for key in excluded]
        converted._own.groups[-1].selectors.extend(keys)
    _take_over(converted, optimizer)
    return converted


def to_keras(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The way back: Keras's own optimizer that goes on where one of this module stands.

    Raises:
      ValueError: it is not of a class of this module, or Keras's cannot go on: there is an option that is not the
        default, a hyperparameter but the learning rate that changes from step to step, a group, a folded regularizer,
        or an exclusion by path or predicate in an optimizer that is not built.
    """
    if type(optimizer) is LossScaleOptimizer:
        return _rewrap(keras.optimizers.LossScaleOptimizer, optimizer, to_keras)
    if type(optimizer) not in _CLASSES:
        raise ValueError(f"{type(optimizer)} is not a class of wdops.optimizers")
    for name, default in OPTIONS.items():
        # The slots are converted, and rounding is how wdops does what Keras does too.
        if getattr(optimizer, name) != default and name not in ("slot_dtype", "rounding", "seed"):
            raise ValueError(f"Keras's optimizers have no `{name}`, and this one has {name}={getattr(optimizer, name)}")
    config = optimizer.get_config()
    changing = [name for name in optimizer._changing() if name != "learning_rate"]
    exclusions = [s for g in optimizer._own.groups if g.exclusion for s in g.selectors]
    found = {
        "a folded regularizer": optimizer._own.folded,
        "a group": not all(g.exclusion for g in optimizer._own.groups),
    }
    found |= {f"a {name} that changes": True for name in changing}
    if any(found.values()):
        raise ValueError(f"Keras's optimizers cannot have {' or '.join(n for n, there in found.items() if there)}")
    if not optimizer.built and any(s.kind in ("path", "predicate") for s in exclusions):
        raise ValueError("before it is built, Keras's optimizer has no exclusions by path or predicate")
    for name in ("groups", *OPTIONS):
        config.pop(name, None)
    converted = getattr(keras.optimizers, type(optimizer).__name__).from_config(config)
    if optimizer.built:
        excluded = [v for v in optimizer._trainable_variables if not optimizer._use_weight_decay(v)]
        converted.exclude_from_weight_decay(var_list=excluded)
    else:
        converted.exclude_from_weight_decay(var_names=[s.value for s in exclusions if s.kind == "name"])
        converted._exclude_from_weight_decay = {s.key for s in exclusions if s.kind == "variable"}
    _take_over(converted, optimizer)
    return converted


def _take_over(converted: keras.optimizers.Optimizer, optimizer: keras.optimizers.Optimizer) -> None:
    if optimizer.built:
        converted.build(optimizer._trainable_variables)
        for variable, value in zip(_variables(converted), _variables(optimizer), strict=True):
            variable.assign(tf.cast(value, variable.dtype))


def _variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """All, Nadam's product of momenta last: Keras does not count it where a LossScaleOptimizer built the Nadam."""
    product = getattr(optimizer, "_u_product", None)
    return [v for v in optimizer.variables if v is not product] + ([] if product is None else [product])


def _rewrap(cls: type, optimizer: Any, convert: Callable[[Any], Any]) -> Any:
    converted = cls(convert(optimizer.inner_optimizer), optimizer.initial_scale, optimizer.dynamic_growth_steps)
    if optimizer.built:
        converted.build(optimizer.inner_optimizer._trainable_variables)
        for name in ("_iterations", "step_counter", "dynamic_scale"):
            getattr(converted, name).assign(getattr(optimizer, name))
    return converted
