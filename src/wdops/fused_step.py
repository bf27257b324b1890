"""The step that the classes of `wdops.optimizers` share: what Keras does around a rule, and the rule, in one pass."""

import contextlib
import inspect
import numbers
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import rich.console
import rich.table
import tensorflow as tf

from wdops import devices, factored, groups, hyperparameters, ops, placement, reference
from wdops._load import native

COEFFICIENTS = ("l1", "l2", "proximal_l1", "proximal_l2")
OPTIONS: dict[str, Any] = dict.fromkeys(COEFFICIENTS, 0.0) | {
    "scaled_proximal": False,
    "decay_coupling": "lr",
    "skip_nonfinite": False,
    "slot_dtype": None,
    "rounding": "stochastic",
    "seed": 0,
}
_CHOICES = {
    "scaled_proximal": (False, True),
    "decay_coupling": ("lr", "schedule", "none"),
    "skip_nonfinite": (False, True),
    "slot_dtype": (None, "float32", "bfloat16"),
    "rounding": ("stochastic", "nearest"),
}
# The slots that the kernels take for variables of a dtype, beside those of its own.
_SLOTS = {"float32": ("bfloat16",), "bfloat16": ("float32",), "float16": ("float32",)}
_FIXED = {"gradient_accumulation_steps", "ema_overwrite_frequency", "learning_rate_power", "warmup_steps"}
# A subclass that overrides one of these gets the step as Keras makes it.
_HOOKS = (
    "update_step", "_backend_apply_gradients", "_backend_update_step", "_clip_gradients", "_clip_by_norm",
    "_apply_weight_decay", "_update_model_variables_moving_average", "_filter_empty_gradients",
)  # fmt: skip


def checked(name: str, value: Any) -> Any:
    """An option of the constructor, if it is one that it takes."""
    if name in _CHOICES:
        chosen = [c for c in _CHOICES[name] if value is c or value == c]
        if not chosen:
            raise ValueError(f"`{name}` must be one of {_CHOICES[name]}. Received: {name}={value!r}")
        return chosen[0]
    if name == "seed":
        if not isinstance(value, numbers.Integral) or value < 0:
            raise ValueError(f"`seed` must be a whole number of at least 0. Received: seed={value!r}")
        return int(value)
    if name not in COEFFICIENTS:
        return value
    if not 0 <= hyperparameters.to_float(name, value) < float("inf"):
        raise ValueError(f"`{name}` must be a finite number of at least 0. Received: {name}={value}")
    return value if hyperparameters.changes(value) else float(value)


def is_keras_business(variable: Any) -> bool:
    """Whether Keras's own code steps this variable: its dtype is not that of a kernel."""
    return tf.as_dtype(variable.dtype) not in ops.DTYPES


def dense(grad: Any, variable: Any) -> tf.Tensor:
    """A gradient as a tensor: rows of an embedding that occur twice are added up, as they stand in the loss."""
    if isinstance(grad, tf.IndexedSlices):
        # tf.convert_to_tensor would ask a batch for the shape, and warn that it is unknown.
        return tf.math.unsorted_segment_sum(grad.values, grad.indices, variable.shape[0])
    return tf.convert_to_tensor(grad)


class _Own:
    """What an optimizer keeps without Keras seeing it, so that its variables and files stay those of Keras."""

    def __init__(self) -> None:
        self.groups: list[groups.Group] = []
        self.choices: dict[Any, groups.Choice] = {}
        self.folded: dict[int, tuple[float, float]] = {}  # the l1 and l2 of a regularizer, by index
        self.swapped: set[str] = set()  # hyperparameters that change, and are numbers for the moment
        self.traced = False
        self.penalties: Any = None  # wdops.regularizers.Penalties
        self.base_lr: float | None = None
        self.step_applied: keras.Variable | None = None
        self.slot_dtype: str | None = None  # of the variable that is being added
        self.places: Counter[str] = Counter()  # in memory, that slots of a variable have
        self.arguments: set[str] = set()  # of the constructor
        self.warned: set[str] = set()  # variables whose gradients were not factored


@dataclass
class _Batch:
    """The variables of one device in a step, which are one op."""

    index: list[int]  # in the order of the optimizer
    variables: list[Any]
    grads: list[Any]  # as wdops.ops takes them


def _stored(variable: Any) -> Any:
    """The tf.Variable of a variable, of Keras or not."""
    return variable.value if isinstance(variable, keras.Variable) else variable


class FusedStep(keras.optimizers.Optimizer):
    """Mixed in before a Keras class, it replaces how a step reaches the variables.

    A step is `_whole_step`. Where a variable is no float, under a distribution strategy, and in a subclass with methods
    of its own, it is `_step_by_keras`: Keras's code, around ops of the same kernels.
    """

    _RULES: tuple[str, ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = {name: checked(name, kwargs.pop(name, default)) for name, default in OPTIONS.items()}
        given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        changing = {n: x for n, x in given.items() if hyperparameters.changes(x)}
        for name, value in given.items():
            if name not in changing and name != "name" and value is not None:
                number = hyperparameters.to_float(name, value)
                given[name] = number if tf.is_tensor(value) else value
        for name in _FIXED & set(changing):
            raise ValueError(f"`{name}` must be a number that does not change. Received: {name}={changing[name]}")
        if not isinstance(changing.get("learning_rate"), (keras.Variable, tf.Variable)):
            changing.pop("learning_rate", None)  # Keras itself takes schedules and callables
        with devices.on_host():
            super().__init__(**(given | {n: hyperparameters.to_float(n, x) for n, x in changing.items()}))
        object.__setattr__(self, "_own", _Own())
        self._own.arguments = {*given, *OPTIONS}
        lr = changing.pop("learning_rate", None)
        if lr is not None:
            lr = hyperparameters.as_keras(lr)
            # A new list: checkpoints refuse one of which an element was replaced.
            self._variables = [lr if v is self._learning_rate else v for v in self._variables]
            self._learning_rate = lr
        for name, value in (options | changing).items():
            # Past Keras's tracking: a variable of the user is none of the optimizer's.
            object.__setattr__(self, name, value)
        if self.decay_coupling == "schedule":
            self._own.base_lr = hyperparameters.base_of(self._learning_rate)

    def _rule(self) -> tuple[Callable[..., Any], list[list[keras.Variable]], dict[str, Any]]:
        """The op, the slots of all variables in the op's order, and the rule's own hyperparameters.

        `lr_scale` among them is what the learning rate of the rule, but not that of the decay, is multiplied by.
        """
        raise NotImplementedError

    def _counters(self) -> dict[str, tuple[keras.Variable, tf.Tensor]]:
        """Hyperparameters that the step advances: the variable that holds one, and its next value, which is used."""
        return {}

    # --- configuration -------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        config = super().get_config() | {n: getattr(self, n) for n, d in OPTIONS.items() if getattr(self, n) != d}
        config |= {n: hyperparameters.serialize(n, x) for n, x in self._changing().items()}
        if self._own.groups:
            known = self._trainable_variables if self.built else []
            config["groups"] = groups.serialize(self._own.groups, [(v, self._var_key(v)) for v in known])
        if self._own.base_lr is not None:
            config["base_learning_rate"] = self._own.base_lr
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "FusedStep":
        config = dict(config)
        chosen = config.pop("groups", [])
        base_lr = config.pop("base_learning_rate", None)
        optimizer = cls(**{n: hyperparameters.deserialize(x, custom_objects) for n, x in config.items()})
        optimizer._own.groups = groups.deserialize(chosen, custom_objects)
        optimizer._own.base_lr = base_lr if base_lr is not None else optimizer._own.base_lr
        return optimizer

    def _changing(self) -> dict[str, Any]:
        """The hyperparameters that have to be asked anew in every step; Keras knows how for the learning rate."""
        given = {n: x for n, x in vars(self).items() if n in self._own.arguments}
        return {n: x for n, x in given.items() if hyperparameters.changes(x)}

    def _now(self, value: Any) -> Any:
        return hyperparameters.current(value, self._iterations)

    def _may_change(self, name: str) -> bool:
        return name in self._own.swapped or hyperparameters.changes(getattr(self, name))

    @contextlib.contextmanager
    def _with(self, stand_in: Callable[[Any], Any]) -> Iterator[None]:
        """While Keras's code runs, which computes with the attributes, what changes from step to step is a number."""
        changing = self._changing()
        for name, value in changing.items():
            object.__setattr__(self, name, stand_in(value))
        self._own.swapped |= set(changing)
        try:
            yield
        finally:
            self._own.swapped -= set(changing)
            for name, value in changing.items():
                object.__setattr__(self, name, value)

    # --- variables -----------------------------------------------------------------------------------------------

    def build(self, variables: Sequence[Any]) -> None:
        if self.built:
            return
        # Keras asks whether there is a momentum at all; what changes from step to step is one.
        # The slots are where their variables are, and counters where the host has them.
        with self._with(lambda value: 0.5), devices.on_host():
            super().build(variables)
            self._own.step_applied = keras.Variable(True, dtype="bool", trainable=False, name="step_applied")
        for variable in self._trainable_variables:
            factored.handover_of(variable).optimizers.add(self)
        self._own.choices = {}
        self._find_saved()

    def _find_saved(self) -> None:
        """Finds the variables that a config names among those that the optimizer was built with."""
        missing = []
        for group in self._own.groups:
            for k, selector in enumerate(group.selectors):
                if selector.kind != "variable" or selector.key in self._trainable_variables_indices:
                    continue
                i = None if selector.key else groups.find(self._trainable_variables, selector.value, selector.index)
                if i is None:
                    missing.append(selector.value)
                else:
                    group.selectors[k] = replace(selector, key=self._var_key(self._trainable_variables[i]))
        if missing:
            warnings.warn(
                f"{self.name} has multipliers or exclusions of variables that it was not built with: "
                f"{', '.join(missing)}",
                stacklevel=4,
            )

    def add_variable(self, shape: Any, initializer: Any = "zeros", dtype: Any = None, **arguments: Any) -> Any:
        return super().add_variable(shape, initializer, self._own.slot_dtype or dtype, **arguments)

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: Any = "zeros"
    ) -> keras.Variable:
        dtype = keras.backend.standardize_dtype(reference_variable.dtype)
        is_slot = name not in ("average", "gradient_accumulator")
        self._own.slot_dtype = self.slot_dtype if is_slot and self.slot_dtype in _SLOTS.get(dtype, ()) else None
        try:
            key = self._var_key(reference_variable)
            self._own.places[key] += 1
            initializer = placement.apart(initializer, self._own.places[key])
            return super().add_variable_from_reference(reference_variable, name, initializer)
        finally:
            self._own.slot_dtype = None

    @property
    def step_applied(self) -> Any:
        """Whether the last step was made: with `skip_nonfinite`, or in a `LossScaleOptimizer`, it may not have been."""
        return tf.constant(True) if self._own.step_applied is None else self._own.step_applied.value

    # --- groups --------------------------------------------------------------------------------------------------

    def exclude_from_weight_decay(
        self,
        var_list: Sequence[Any] | None = None,
        var_names: Sequence[str] | None = None,
        *,
        paths: Sequence[str] | str | None = None,
        predicate: Callable[[Any], bool] | None = None,
    ) -> None:
        """Says which variables have no `weight_decay`; of several calls the last counts, as in Keras.

        Args:
          var_list: variables. Default None.
          var_names: regular expressions of which one is found in the `name` of a variable, as in Keras. Default None.
          paths: one or more regular expressions of which one is found in the `path` of a variable, which contains its
            layer's. Default None.
          predicate: takes a variable and returns whether to exclude it. Default None.

        Raises:
          ValueError: a pattern is no regular expression.

        Differs from Keras: saved and loaded with the optimizer, variables by their path.
        """
        names = [var_names] if isinstance(var_names, str) else var_names or []
        chosen = groups.selectors(list(var_list or []), self._var_key)
        chosen += [groups.Selector("name", groups.pattern("var_names", name)) for name in names]
        chosen += groups.selectors([paths] if isinstance(paths, str) else list(paths or []), self._var_key)
        chosen += groups.selectors([predicate] if predicate else [], self._var_key)
        kept = [g for g in self._own.groups if not g.exclusion]
        self._set_groups([*kept, groups.Group(chosen, {"weight_decay": 0.0}, exclusion=True)])

    def add_group(self, variables: Any, **multipliers: float) -> None:
        """Multiplies hyperparameters of some variables, for layer-wise rates and decays of their own.

        Args:
          variables: a variable, a regular expression that is found in the `path` of a variable, a predicate that takes
            a variable, or a list of those.
          **multipliers: of `lr`, `weight_decay`, `l1`, `l2`, `proximal_l1`, `proximal_l2`, finite and at least 0. Where
            two groups have a variable in common, the later one overrides the multipliers that it names. `l1` and `l2`
            reach folded regularizers too.

        Raises:
          ValueError: a multiplier is unknown or out of range, there is none, or a pattern is no regular expression.
        """
        if not multipliers:
            raise ValueError(f"a group needs multipliers, of {', '.join(groups.MULTIPLIERS)}")
        multipliers = {n: groups.multiplier(n, x) for n, x in multipliers.items()}
        group = groups.Group(groups.selectors(variables, self._var_key), multipliers)
        self._set_groups([*self._own.groups, group])

    def _set_groups(self, chosen: list[groups.Group]) -> None:
        self._own.groups, self._own.choices = chosen, {}
        if self._own.traced:
            warnings.warn(
                "a step that was traced keeps the groups and exclusions that it was traced with: compile the model "
                "again, or make a new tf.function",
                stacklevel=3,
            )

    def _choice(self, variable: Any) -> groups.Choice:
        key = self._var_key(variable)
        if key not in self._own.choices:
            index = self._trainable_variables_indices.get(key)
            if index is not None:
                variable = self._trainable_variables[index]  # Keras hands over its tf.Variable, which has no path
            self._own.choices[key] = groups.choose(self._own.groups, variable, key)
        return self._own.choices[key]

    def _use_weight_decay(self, variable: Any) -> bool:
        return self._choice(variable).multipliers["weight_decay"] != 0

    def factor_gradients(self, model: Any) -> list[str]:
        """Never forms the gradients of the kernels of a model's `Dense` layers: the step takes their factors.

        With x and dz the input and the gradient behind the product of a layer, the gradient of its kernel is x^T dz.
        The step makes it tile by tile while a tile is in cache, so that it is neither written nor read: 4 bytes a
        parameter less memory in float32. The factors of a layer that is used more than once are joined along the batch.
        Where they have too many rows to be worth it (`wdops.factored.MOST_ROWS`), where the processor has no fused
        multiply-add, and in layers that are not `Dense`, the gradient is formed as before. So it is under
        `jit_compile=True`, where the update is XLA's, in a distribution strategy, and, outside a `tf.function`, of
        layers other than `wdops.layers.Dense`.

        A tape that is asked for such a gradient gives it whole, as ever, and what is computed from it is right. But a
        gradient that was changed or added to before the step is no product any more, and is formed; a warning says so.
        Not saved with the optimizer; `wdops.layers.Dense(..., factored_gradient=True)` is saved with the model.

        Args:
          model: a built model or layer.

        Returns:
          The paths of the kernels.

        Raises:
          ValueError: a layer is not built.
        """
        kernels = []
        for layer in model._flatten_layers():
            if not layer.built:
                raise ValueError(f"the layer {layer.name} is not built: call the model once, or give it an Input")
            if isinstance(layer, keras.layers.Dense) and getattr(layer, "_kernel", None) is not None:
                kernels.append(layer._kernel)
        for kernel in kernels:
            kernel.factored_gradient = True
        return [kernel.path for kernel in kernels]

    def decay_report(self, print_fn: Callable[[str], None] = print) -> None:
        """Prints a table: of every variable its shape, the multiplier of its learning rate, all its decays, and why.

        Args:
          print_fn: takes the table as one string. Default `print`.

        Raises:
          ValueError: the optimizer is not built, and knows no variables.
        """
        if not self.built:
            raise ValueError(
                "the optimizer knows its variables once it is built: optimizer.build(model.trainable_variables)"
            )
        table = rich.table.Table(box=None, pad_edge=False)
        for name in ("variable", "shape", "lr", "weight_decay", *COEFFICIENTS, "because"):
            table.add_column(
                name, justify="left" if name in ("variable", "shape", "because") else "right", no_wrap=True
            )
        index = list(range(len(self._trainable_variables)))
        columns = {name: self._coefficient(name, index) for name in ("weight_decay", *COEFFICIENTS)}
        columns = {n: np.broadcast_to(np.asarray(x, np.float64), len(index)) for n, x in columns.items()}
        for i, variable in enumerate(self._trainable_variables):
            choice = self._choice(variable)
            because = [*choice.reasons, *(["folded regularizer"] if i in self._own.folded else [])]
            table.add_row(
                groups.path_of(variable), str(tuple(variable.shape)), f"x {choice.multipliers['lr']:g}",
                *(f"{values[i]:g}" for values in columns.values()), "; ".join(because),
            )  # fmt: skip
        console = rich.console.Console(width=10_000)
        with console.capture() as capture:
            console.print(table)
        print_fn("\n".join(line.rstrip() for line in capture.get().splitlines()))

    # --- the hyperparameters of a step ---------------------------------------------------------------------------

    def _coefficient(self, name: str, index: list[int]) -> Any:
        """A coefficient of the variables at `index`: one number, or a vector where they differ."""
        variables = [self._trainable_variables[i] for i in index]
        factors = [self._choice(v).multipliers[name] for v in variables]
        offsets = [0.0] * len(index)
        if name in ("l1", "l2") and self._own.folded:
            pairs = [self._own.folded.get(i, (0.0, 0.0)) for i in index]
            offsets = [f * pair[name == "l2"] for f, pair in zip(factors, pairs, strict=True)]
        value = self._now(getattr(self, name))
        value = 0.0 if value is None else value
        if len(set(factors)) == len(set(offsets)) == 1:
            if factors[0] == 1 and offsets[0] == 0:
                return value
            factors, offsets = factors[0], offsets[0]
        if not hyperparameters.changes(value) and not tf.is_tensor(value):
            return np.asarray(factors) * float(value) + np.asarray(offsets)
        return reference.to_float64(value) * tf.constant(factors, tf.float64) + tf.constant(offsets, tf.float64)

    def _penalizes(self, index: list[int]) -> bool:
        """Whether there is an l1 or l2, or may be one in a later step."""
        return any(self._may_change(n) or np.any(self._coefficient(n, index)) for n in ("l1", "l2"))

    def _hypers(self, index: list[int], learning_rate: Any, lr_scale: Any = None) -> dict[str, Any]:
        """What the op of these variables takes beside the gradient's own: rates, decays and the seed."""
        factors = [self._choice(self._trainable_variables[i]).multipliers["lr"] for i in index]
        with devices.on_host():
            lr = reference.to_float64(learning_rate)
            rate = lr if set(factors) == {1.0} else lr * tf.constant(factors, tf.float64)
            hypers = {n: self._coefficient(n, index) for n in ("weight_decay", "proximal_l1", "proximal_l2")}
            scaled = rate if lr_scale is None else rate * lr_scale
            hypers |= {"lr": scaled, "decay_lr": rate, "scaled_proximal": self.scaled_proximal}
            if self.decay_coupling == "schedule":
                hypers["decay_lr"] = lr / self._own.base_lr
            elif self.decay_coupling == "none":
                hypers["decay_lr"] = 1.0
            return hypers | self._seed(index)

    def _seed(self, index: list[int]) -> dict[str, Any]:
        """A number of its own for every variable in every step, if something is stored in bfloat16."""
        rounded = [
            i for i in index
            if "bfloat16" in (self.slot_dtype, keras.backend.standardize_dtype(self._trainable_variables[i].dtype))
        ]  # fmt: skip
        if self.rounding == "nearest" or not rounded:
            return {}
        # A seed is where the numbers start: below 2^52, so that 2^52 of them stay exact in the op's double.
        start = tf.constant(random.Random(self.seed).getrandbits(52), tf.float64)
        step = tf.cast(self._iterations, tf.float64) * len(self._trainable_variables)
        return {"seed": start + step + tf.constant(index, tf.float64)}

    # --- the step in one pass ------------------------------------------------------------------------------------

    @ops.as_it_is
    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        with self._with(self._now):
            return super().scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        super().finalize_variable_values(var_list)
        if self._own.penalties is not None:
            self._own.penalties.refresh()

    @ops.as_it_is
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        self.apply_scaled(grads, trainable_variables, self._now(self.loss_scale_factor), self.skip_nonfinite)

    @ops.as_it_is
    def apply_scaled(
        self,
        grads: Sequence[Any],
        trainable_variables: Sequence[Any] | None,
        loss_scale: Any,
        skip_nonfinite: bool,
    ) -> tf.Tensor:
        """`apply` of gradients of a loss that was multiplied by `loss_scale`, which costs no pass of its own.

        Args:
          grads, trainable_variables: those of `apply`.
          loss_scale: a number or scalar tensor, or None.
          skip_nonfinite: whether to leave everything as it is where a gradient is not finite.

        Returns:
          Whether the step was made: a bool scalar.
        """
        grads = list(grads)
        self._own.traced |= not tf.executing_eagerly()
        # Eagerly a layer gives factors to an optimizer that is built, so not to this one in its first step.
        expects_factors = self.built or not tf.executing_eagerly()
        if trainable_variables is not None and not self.built and grads:
            with keras.name_scope(self.name):
                self.build(list(trainable_variables))
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        if not grads or not self.built or len(grads) != len(variables):
            if trainable_variables is not None and len(grads) != len(variables):
                raise ValueError(f"grads has {len(grads)} entries, but trainable_variables has {len(variables)}")
            super().apply(grads, trainable_variables)  # Keras's errors, and nothing to do without gradients
            return tf.constant(True)
        self._check_variables_are_known(variables)
        grads = [self._gradient(g, v, expects_factors) for g, v in zip(grads, variables, strict=True)]
        index = [self._get_variable_index(v) for v in variables]
        whole = self._is_whole and not (self._moves_between_steps and self._penalizes(index))
        whole = whole and not any(
            is_keras_business(v) or self._overwrite_variable_with_gradient(v)
            for g, v in zip(grads, variables, strict=True)
            if g is not None
        )
        if not whole:
            grads = [g.values if isinstance(g, factored.FactoredGradient) else g for g in grads]
            return self._step_by_keras(grads, variables, loss_scale, skip_nonfinite)
        grads, variables = self._filter_empty_gradients(grads, variables)
        with keras.name_scope(self.name):
            return self._whole_step(grads, variables, loss_scale, skip_nonfinite)

    def _gradient(self, grad: Any, variable: Any, expects_factors: bool) -> Any:
        if grad is None:
            # What a regularizer in the loss gives a variable that nothing else in it depends on.
            return tf.zeros_like(variable) if self._get_variable_index(variable) in self._own.folded else None
        kernel = self._trainable_variables[self._get_variable_index(variable)]
        if getattr(kernel, "factored_gradient", False):
            found = factored.factors_of(grad)
            if found is not None:
                return found
            if expects_factors:
                self._warn_of_whole(kernel)
        if isinstance(grad, factored.FactoredGradient):
            return grad
        grad = dense(grad, variable)
        if not (grad.dtype.is_floating or grad.dtype.is_integer or grad.dtype.is_bool):
            raise ValueError(f"the gradient of {groups.path_of(kernel)} has dtype {grad.dtype.name}, but must be real")
        return grad

    def _warn_of_whole(self, variable: Any) -> None:
        key = self._var_key(variable)
        if key not in self._own.warned:
            self._own.warned.add(key)
            warnings.warn(
                f"the gradient of {groups.path_of(variable)} is not factored: it reached the optimizer as something "
                "else than the product of its layer. Fold its regularizer (wdops.fold_regularizers), clip and scale "
                "through the optimizer's arguments, and call the tape and the optimizer in the tf.function that calls "
                "the model; without a tf.function, only wdops.layers.Dense hands over factors",
                stacklevel=4,
            )

    @property
    def _is_whole(self) -> bool:
        """Whether the step is all ours: on one replica, and in no subclass that has its own."""
        ours = ("wdops.", "keras.")
        return not tf.distribute.has_strategy() and all(
            getattr(type(self), hook).__module__.startswith(ours) for hook in _HOOKS
        )

    @property
    def _moves_between_steps(self) -> bool:
        """Whether micro-steps write to variables. Then each has a penalty of its own, as a regularizer has."""
        constrained = any(getattr(v, "constraint", None) is not None for v in self._trainable_variables)
        averaged = self.use_ema and self.ema_overwrite_frequency
        return bool(self.gradient_accumulation_steps and (averaged or constrained))

    def _batches(self, grads: list[Any], variables: list[Any], products: int = 1) -> list[_Batch]:
        """`products`: how often the step makes a factored gradient."""
        batches: dict[str, _Batch] = {}
        for grad, variable in zip(grads, map(_stored, variables), strict=True):
            batch = batches.setdefault(variable.device, _Batch([], [], []))
            batch.index.append(self._get_variable_index(variable))
            batch.variables.append(variable)
            if isinstance(grad, factored.FactoredGradient):
                grad = grad.cast(variable.dtype)
            if isinstance(grad, factored.FactoredGradient):
                batch.grads.append(factored.worthwhile(grad, products, variable.device))
            else:
                batch.grads.append(tf.cast(grad, variable.dtype))
        return list(batches.values())

    def _whole_step(self, grads: list[Any], variables: list[Any], loss_scale: Any, skip_nonfinite: bool) -> tf.Tensor:
        batches = self._batches(grads, variables, self._products(variables, skip_nonfinite))
        scale = {} if loss_scale is None else {"grad_scale": 1 / reference.to_float64(loss_scale)}

        def guarded(
            measure: Callable[[], list[reference.Norms]], write: Callable[[list[tf.Tensor]], list[tf.Tensor]]
        ) -> tf.Tensor:
            norms = measure()
            finite = tf.reduce_all([n.finite for n in norms]) if skip_nonfinite else tf.constant(True)

            def act() -> tf.Tensor:
                # Nothing else orders them in a graph, and a step that fails must not count.
                with tf.control_dependencies(write([n.norm for n in norms])):
                    for variable in variables:
                        if getattr(variable, "constraint", None) is not None:
                            variable.assign(variable.constraint(variable))
                    self._iterations.assign_add(1)
                return tf.constant(True)

            return tf.cond(finite, act, lambda: tf.constant(False)) if skip_nonfinite else act()

        def step() -> tf.Tensor:
            return guarded(
                lambda: self._measure(batches, scale, skip_nonfinite), lambda norms: self._update(batches, scale, norms)
            )

        def accumulate() -> tf.Tensor:
            def measure() -> list[reference.Norms]:
                return [self._norms(b, None, scale) for b in batches] if skip_nonfinite else []

            return guarded(measure, lambda norms: self._accumulate(batches, scale))

        every = self.gradient_accumulation_steps
        if every:
            with devices.on_host():
                is_last = (tf.convert_to_tensor(self._iterations) + 1) % every == 0
            applied = tf.cond(is_last, step, accumulate)
        else:
            applied = step()
        if skip_nonfinite:
            self._own.step_applied.assign(applied)
        return applied

    def _products(self, variables: list[Any], skip_nonfinite: bool) -> int:
        """How often a step needs every element of a gradient."""
        measured = skip_nonfinite or self._clips("clipnorm", "global_clipnorm")
        index = [self._get_variable_index(v) for v in variables]
        by_element = bool(self.gradient_accumulation_steps) or self._penalizes(index)
        by_element |= any(devices.is_gpu(_stored(v).device) for v in variables)
        trusts = any(rule["trust"] for rule in native.rules if rule["name"] in self._RULES)
        return 1 + (measured and by_element) + trusts

    def _gradient_hypers(self, batch: _Batch, scale: dict[str, Any]) -> dict[str, Any]:
        """What makes the gradient with its penalty: the arguments that the norms and the step share."""
        with devices.on_host():
            hypers = scale | {n: self._coefficient(n, batch.index) for n in ("l1", "l2")}
        if self.gradient_accumulation_steps:
            hypers["accumulation_scale"] = 1 / self.gradient_accumulation_steps
            hypers["accumulator"] = [self._accumulated_gradients[i] for i in batch.index]
        return hypers

    def _clips(self, *names: str) -> bool:
        """Whether any of these limits of clipping is set."""
        return any(self._may_change(n) or (getattr(self, n) or 0) > 0 for n in names)

    def _limit(self, name: str) -> Any:
        return reference.to_float64(self._now(getattr(self, name)))

    def _measure(self, batches: list[_Batch], scale: dict[str, Any], skip_nonfinite: bool) -> list[reference.Norms]:
        if not skip_nonfinite and not self._clips("clipnorm", "global_clipnorm"):
            return []
        return [
            self._norms(b, b.variables if self._penalizes(b.index) else None, self._gradient_hypers(b, scale))
            for b in batches
        ]

    @staticmethod
    def _norms(batch: _Batch, variables: list[Any] | None, hypers: dict[str, Any]) -> reference.Norms:
        """Without the penalty of the old parameter, which nobody reads."""
        return ops.norms(batch.grads, variables, report_penalty=False, **hypers)

    def _clip_scales(self, norms: list[tf.Tensor]) -> list[Any]:
        if self._clips("clipnorm"):
            limit = self._limit("clipnorm")
            return [limit / tf.maximum(norm, limit) for norm in norms]
        limit = self._limit("global_clipnorm")
        norm = tf.norm(tf.concat(norms, 0))
        # As in Keras: not finite where the norm is not.
        return [limit * tf.minimum(1 / norm, 1 / limit) + (norm - norm)] * len(norms)

    def _update(self, batches: list[_Batch], scale: dict[str, Any], norms: list[tf.Tensor]) -> list[tf.Tensor]:
        """Makes the step. What it returns is there when it has been made."""
        with devices.on_host():
            apply, slots, rule_hypers = self._rule()
            counters = self._counters()
            rule_hypers = {n: self._now(x) for n, x in rule_hypers.items()} | {n: x for n, (_, x) in counters.items()}
            lr_scale = rule_hypers.pop("lr_scale", None)
            clips = self._clips("clipnorm", "global_clipnorm")
            # As in Keras, of limits that are set one after another a norm's counts.
            clip_value = self._limit("clipvalue") if self._clips("clipvalue") and not clips else 0.0
            learning_rate = self.learning_rate
        clip_scales = self._clip_scales(norms) if clips else [1.0] * len(batches)
        done = []
        for batch, clip_scale in zip(batches, clip_scales, strict=True):
            hypers = self._hypers(batch.index, learning_rate, lr_scale) | self._gradient_hypers(batch, scale)
            if self.use_ema:
                keep, overwrite = self._ema()
                hypers |= {"ema_momentum": keep, "ema_overwrite": overwrite}
                hypers["average"] = [self._model_variables_moving_average[i] for i in batch.index]
            penalty = apply(
                batch.variables,
                *([slot[i] for i in batch.index] for slot in slots),
                batch.grads,
                clip_scale=clip_scale,
                clip_value=clip_value,
                report_penalty=self._own.penalties is not None,
                **hypers,
                **rule_hypers,
            )
            done.append(penalty)
            if self._own.penalties is not None:
                self._own.penalties.update(batch.index, penalty)
        with tf.control_dependencies(done):
            for variable, value in counters.values():
                variable.assign(value)
            stepped = {i for batch in batches for i in batch.index}
            rest = [i for i in range(len(self._trainable_variables)) if i not in stepped]
            self._average(rest)
            # A variable without a gradient in the last micro-step loses those before, as in Keras.
            for i in rest if self.gradient_accumulation_steps else ():
                self._accumulated_gradients[i].assign(tf.zeros_like(self._accumulated_gradients[i]))
        return done

    def _accumulate(self, batches: list[_Batch], scale: dict[str, Any]) -> list[tf.Tensor]:
        """Makes a micro-step."""
        done = []
        for batch in batches:
            sums = [self._accumulated_gradients[i] for i in batch.index]
            done.append(ops.apply_sgd(sums, batch.grads, lr=-1.0, **scale, **self._seed(batch.index)))
        with tf.control_dependencies(done):
            self._average(list(range(len(self._trainable_variables))))
        return done

    def _ema(self) -> tuple[Any, Any]:
        """How much of the average is kept in this step, and whether it overwrites the variable."""
        every = self.ema_overwrite_frequency
        with devices.on_host():
            iterations = tf.convert_to_tensor(self.iterations)
            momentum = reference.to_float64(self._now(self.ema_momentum))
            keep = tf.where(iterations == 0, tf.zeros([], tf.float64), momentum)
            return keep, (iterations + 1) % every == 0 if every else False

    def _average(self, index: list[int]) -> None:
        """The moving averages of variables that this step does not reach. Keras has them in every micro-step too."""
        averages = {i: self._model_variables_moving_average[i] for i in index} if self.use_ema else {}
        averages = {i: average for i, average in averages.items() if average is not None}
        if not averages:
            return
        keep, overwrite = self._ema()
        with devices.on_host():
            rest = 1 - keep
        values = [tf.convert_to_tensor(self._trainable_variables[i]) for i in averages]
        for batch in self._batches(values, [self._trainable_variables[i] for i in averages]):
            # average + (1 - keep)*(p - average), as a step of -(1 - keep) along p with a decay of 1 - keep.
            ops.apply_sgd(
                [averages[i] for i in batch.index], batch.grads, lr=-rest, decay_lr=1.0, weight_decay=rest,
                **self._seed(batch.index),
            )  # fmt: skip

        def assign() -> tf.Tensor:
            for i, average in averages.items():
                self._trainable_variables[i].assign(average)
            return tf.constant(True)

        if self.ema_overwrite_frequency:
            tf.cond(overwrite, assign, lambda: tf.constant(False))

    # --- the step by Keras's code --------------------------------------------------------------------------------

    def _step_by_keras(
        self, grads: list[Any], variables: list[Any], loss_scale: Any, skip_nonfinite: bool
    ) -> tf.Tensor:
        if skip_nonfinite and tf.distribute.has_strategy():
            raise ValueError(
                "skip_nonfinite takes no distribution strategy; keras.optimizers.LossScaleOptimizer skips there too"
            )
        # Keras divides by the attribute.
        before = self.loss_scale_factor
        object.__setattr__(self, "loss_scale_factor", loss_scale)

        def step() -> tf.Tensor:
            with self._with(self._now):
                super(FusedStep, self).apply(grads, variables)
            if self._own.penalties is not None:
                self._own.penalties.refresh()
            return tf.constant(True)

        try:
            if not skip_nonfinite:
                return step()
            floats = [g for g in grads if g is not None and g.dtype.is_floating]
            finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in floats])
            applied = tf.cond(finite, step, lambda: tf.constant(False))
            self._own.step_applied.assign(applied)
            return applied
        finally:
            object.__setattr__(self, "loss_scale_factor", before)

    @property
    def _penalizes_first(self) -> bool:
        """Whether Keras's code, before the rule, needs gradients that contain the penalty."""
        return self._moves_between_steps or self._clips("clipnorm", "clipvalue", "global_clipnorm")

    def _backend_apply_gradients(self, grads: list[Any], trainable_variables: list[Any]) -> None:
        if self._penalizes_first:
            grads = [self._penalized(g, v) for g, v in zip(grads, trainable_variables, strict=True)]
        super()._backend_apply_gradients(grads, trainable_variables)

    def _penalized(self, grad: Any, variable: Any) -> Any:
        index = [self._get_variable_index(variable)]
        if not self._penalizes(index):
            return grad
        l1, l2 = (tf.squeeze(reference.to_float64(self._coefficient(n, index))) for n in ("l1", "l2"))
        penalty = reference.penalty_gradient(tf.convert_to_tensor(variable), l1, l2)
        # The replicas' gradients are added up, and so is this.
        penalty /= tf.distribute.get_strategy().num_replicas_in_sync
        return tf.cast(tf.convert_to_tensor(grad), variable.dtype) + penalty

    @property
    def _is_fused(self) -> bool:
        """Whether the update is ours: a subclass that overrides update_step gets what Keras gives it."""
        return type(self).update_step is FusedStep.update_step

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        """Nothing where the update is ours: it decays, and so does update_step where it hands over to Keras."""
        if not self._is_fused:
            super()._apply_weight_decay(variables)

    def _backend_update_step(self, grads: list[Any], trainable_variables: list[Any], learning_rate: Any) -> None:
        if tf.distribute.has_strategy() or not self._is_fused:
            # Reduces over the replicas and calls update_step for each variable where it lives.
            super()._backend_update_step(grads, trainable_variables, learning_rate)
            return
        counters = self._counters()
        variables = list(map(_stored, trainable_variables))
        pairs = list(zip(grads, variables, strict=True))
        ours = [pair for pair in pairs if not is_keras_business(pair[1])]
        # The fused ops come first: they check everything before they write.
        if ours:
            for batch in self._batches(*map(list, zip(*ours, strict=True))):
                self._update_batch(batch, learning_rate, {n: x for n, (_, x) in counters.items()})
        for variable, value in counters.values():
            variable.assign(value)
        for grad, variable in pairs:
            if is_keras_business(variable):
                self.update_step(grad, variable, learning_rate)

    def update_step(self, gradient: Any, variable: tf.Variable, learning_rate: Any) -> None:
        index = [self._get_variable_index(variable)]
        if not is_keras_business(variable):
            gradient = tf.cast(dense(gradient, variable), variable.dtype)
            self._update_batch(_Batch(index, [variable], [gradient]), learning_rate)
            return
        lr = tf.cast(learning_rate, variable.dtype)
        if self.weight_decay is not None and self._is_fused and self._use_weight_decay(variable):
            hypers = self._hypers(index, learning_rate)
            decay_lr, decay = (tf.squeeze(reference.to_float64(hypers[n])) for n in ("decay_lr", "weight_decay"))
            decay = decay_lr * decay
            variable.assign_sub(variable * tf.cast(decay, variable.dtype))
        super().update_step(gradient, variable, lr * tf.cast(self._choice(variable).multipliers["lr"], variable.dtype))

    def _update_batch(self, batch: _Batch, learning_rate: Any, counters: dict[str, tf.Tensor] | None = None) -> None:
        """The rule and the decays alone, inside the step by Keras."""
        with devices.on_host():
            apply, slots, rule_hypers = self._rule()
        rule_hypers |= counters or {}
        hypers = self._hypers(batch.index, learning_rate, rule_hypers.pop("lr_scale", None))
        if not self._is_fused:
            hypers["weight_decay"] = 0.0
        if not self._penalizes_first:
            hypers |= {n: self._coefficient(n, batch.index) for n in ("l1", "l2")}
        apply(
            batch.variables, *([slot[i] for i in batch.index] for slot in slots), batch.grads, **hypers, **rule_hypers
        )
