"""Moves the L1 and L2 regularizers of a model's layers into the optimizer's step, which reads the variables anyway."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from tensorflow.python.eager import record  # private: whether a GradientTape is open

from wdops import devices, hyperparameters, ops, reference
from wdops.fused_step import FusedStep

_FOLDED = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)


class Folded(NamedTuple):
    """What `fold_regularizers` did: the (l1, l2) that it moved, and the regularizers that it left, by path."""

    folded: dict[str, tuple[float, float]]
    left: dict[str, Any]


class Penalties:
    """The penalties of the folded variables as the last step left them, which the loss reads back."""

    def __init__(self, optimizer: FusedStep, index: Sequence[int]) -> None:
        self.optimizer = optimizer
        self.index = list(index)  # in the order of the optimizer
        self.values = keras.Variable(tf.zeros(len(self.index)), dtype="float32", trainable=False, name="penalties")

    def update(self, index: list[int], penalty: tf.Tensor) -> None:
        """Takes over what the op reported for the variables at `index`."""
        penalty = tf.cast(penalty, tf.float32)
        if index == self.index:
            self.values.assign(penalty)
            return
        rows = [(self.index.index(i), k) for k, i in enumerate(index) if i in self.index]
        if rows:
            places, entries = zip(*rows, strict=True)
            self.values.value.scatter_nd_update([[place] for place in places], tf.gather(penalty, entries))

    def refresh(self, index: Sequence[int] | None = None) -> None:
        """Reads the variables: for all who write to them but the step."""
        index = self.index if index is None else list(index)
        l1, l2 = (tf.broadcast_to(reference.to_float64(self.optimizer._coefficient(n, index)), [len(index)]) for n in
                  ("l1", "l2"))  # fmt: skip
        variables = [self.optimizer._trainable_variables[i] for i in index]
        values = [tf.convert_to_tensor(v) for v in variables]
        places = {variable.value.device for variable in variables}
        if tf.distribute.has_strategy() or len(places) > 1 or not devices.has_kernels(places.pop()):
            found = tf.stack([reference.penalty(value, l1[k], l2[k]) for k, value in enumerate(values)])
        else:
            found = ops.norms(values, variables, l1=l1, l2=l2).penalty  # without a copy in float64
        self.update(index, found)


class _FoldedRegularizer(keras.regularizers.Regularizer):
    """Stands in the variable for the one that was folded.

    Where a step is under way, its penalty is that which the last step reported, without a gradient. Elsewhere, as in
    `evaluate`, nothing is gained by that, and it is what the variable says.
    """

    def __init__(self, penalties: Penalties, index: int, original: Any) -> None:
        self.penalties, self.index, self.original = penalties, index, original

    def __call__(self, x: Any) -> tf.Tensor:
        if not isinstance(x, keras.Variable) or not record.could_possibly_record():
            return self.original(x)
        value = self.penalties.values.value[self.penalties.index.index(self.index)]
        return tf.cast(tf.stop_gradient(value), x.dtype)


def fold_regularizers(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> Folded:
    """Moves every L1, L2 and L1L2 regularizer of a model's trainable variables into the optimizer's step.

        g  = grad + l1*sign(p) + 2*l2*p          as the regularizer's gradient is, before clipping
        loss reported = loss + sum over the variables of l1*sum|p| + l2*sum(p^2)

    The trajectory is that of the model before, and the loss that is reported still contains the penalty: the step
    returns that of the values it wrote, and the next forward pass reads it back.

    Args:
      model: a built `keras.Model`.
      optimizer: of a class of `wdops.optimizers`, or a `LossScaleOptimizer` around one; it is built for the model's
        trainable variables if it is not yet.

    Returns:
      `Folded(folded, left)`: the (l1, l2) of each variable, and the regularizers of another class, or of a subclass,
      which stay where they are and in the loss, both by the path of the variable.

    Raises:
      ValueError: the optimizer is not of wdops, was built for other variables or has an update of its own, the model is
        not built, or there is a distribution strategy.

    A layer that is decayed by `weight_decay` as well gets a warning. An `l1`, `l2` or a group's multiplier of the
    optimizer reaches the folded variables too, and then is in the reported loss. Variables that another optimizer had
    folded change over to this one. To compile the model with another optimizer unfolds it, with a warning. A file has
    the regularizers in its layers: fold again what was loaded. A write to a folded `tf.Variable` past its
    `keras.Variable` is seen by the loss of the next training step only behind that step.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not isinstance(optimizer, FusedStep) or not optimizer._is_fused:
        raise ValueError(f"regularizers fold into an optimizer of wdops.optimizers, and this one is {type(optimizer)}")
    if tf.distribute.has_strategy():
        raise ValueError("regularizers do not fold under a distribution strategy")
    if not model.built or not model.trainable_variables:
        raise ValueError(f"the model {model.name!r} is not built, or has no trainable variables")
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    found, left = {}, {}
    for variable in model.trainable_variables:
        regularizer = getattr(variable.regularizer, "original", variable.regularizer)
        if type(regularizer) in _FOLDED:
            found[variable.path] = (variable, regularizer)
        elif regularizer is not None:
            left[variable.path] = regularizer
    optimizer._check_variables_are_known([variable for variable, _ in found.values()])
    _unfold([variable for variable, _ in found.values()])
    folded = {}
    for path, (variable, regularizer) in found.items():
        pair = tuple(float(getattr(regularizer, n, 0.0)) for n in ("l1", "l2"))
        folded[path] = optimizer._own.folded[optimizer._get_variable_index(variable)] = pair
    if folded:
        _fold(optimizer)
        _watch(model, "compile", lambda old, *args, **kwargs: _compile(model, optimizer, old, *args, **kwargs))
    if hyperparameters.changes(optimizer.weight_decay) or optimizer.weight_decay:
        decayed = [path for path, (variable, _) in found.items() if optimizer._use_weight_decay(variable)]
        for layer in dict.fromkeys(path.rpartition("/")[0] for path in decayed):
            warnings.warn(f"layer {layer!r} has both a regularizer and the optimizer's weight_decay", stacklevel=2)
    _trace_anew(model)
    return Folded(folded, left)


def unfold_regularizers(model: keras.Model) -> None:
    """Gives the layers their regularizers back, as before `fold_regularizers`, and takes them from the optimizer.

    Args:
      model: one that was folded, or not.
    """
    _unfold(model.variables)
    vars(model).pop("compile", None)
    _trace_anew(model)


def _fold(optimizer: FusedStep) -> None:
    """Makes a built optimizer the one that penalizes the variables of `folded`, and their regularizers silent."""
    penalties = optimizer._own.penalties = Penalties(optimizer, sorted(optimizer._own.folded))
    for i in penalties.index:
        variable = optimizer._trainable_variables[i]
        original = getattr(variable.regularizer, "original", variable.regularizer)
        variable.regularizer = _FoldedRegularizer(penalties, i, original)
        # By a constraint, `set_weights`, or a file that is loaded.
        _watch(variable, "assign", functools.partial(_assign, functools.partial(penalties.refresh, [i])))
    penalties.refresh()


def _unfold(variables: Sequence[Any]) -> None:
    optimizers = {}
    for variable in variables:
        stand_in = getattr(variable, "regularizer", None)
        if isinstance(stand_in, _FoldedRegularizer):
            optimizer = stand_in.penalties.optimizer
            optimizers[id(optimizer)] = optimizer
            del optimizer._own.folded[stand_in.index], variable.assign
            variable.regularizer = stand_in.original
    for optimizer in optimizers.values():
        optimizer._own.penalties = None
        if optimizer._own.folded:
            _fold(optimizer)


def _watch(target: Any, name: str, instead: Callable[..., Any]) -> None:
    """Has `instead` called for a method of one object, with the method before its arguments."""
    method = getattr(type(target), name).__get__(target)
    object.__setattr__(target, name, functools.wraps(method)(functools.partial(instead, method)))


def _assign(refresh: Callable[[], None], assign: Callable[..., Any], value: Any) -> Any:
    result = assign(value)
    refresh()
    return result


def _compile(model: keras.Model, folded: FusedStep, compile: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    compile(*args, **kwargs)
    if getattr(model.optimizer, "inner_optimizer", model.optimizer) is not folded:
        warnings.warn(
            f"the regularizers of {model.name!r} were folded into another optimizer, and are in its layers again: call "
            "fold_regularizers for the new one",
            stacklevel=4,
        )
        unfold_regularizers(model)


def _trace_anew(model: keras.Model) -> None:
    """The losses are part of what Keras has traced."""
    model.train_function = model.test_function = None
