"""Moves the L1 and L2 regularizers of a model's layers into the optimizer's step, which reads the variables anyway."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from wdops import hyperparameters, reference
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
        found = [reference.penalty(tf.convert_to_tensor(v), l1[k], l2[k]) for k, v in enumerate(variables)]
        self.update(index, tf.stack(found))


class _FoldedRegularizer(keras.regularizers.Regularizer):
    """Stands in the variable for the one that was folded: a penalty that is reported, and has no gradient."""

    def __init__(self, penalties: Penalties, place: int, original: Any) -> None:
        self._penalties, self._place, self.original = penalties, place, original

    def __call__(self, x: Any) -> tf.Tensor:
        return tf.stop_gradient(self._penalties.values.value[self._place])


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
    optimizer reaches the folded variables too, and then is in the reported loss. A saved model has its regularizers in
    its layers and is folded again when it is loaded with its optimizer; to train it with another one, unfold first.
    A write to a folded `tf.Variable` past its `keras.Variable` is seen by the reported loss only behind the next step.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not isinstance(optimizer, FusedStep) or not optimizer._is_fused:
        raise ValueError(f"regularizers fold into an optimizer of wdops.optimizers, and this one is {type(optimizer)}")
    if tf.distribute.has_strategy():
        raise ValueError("regularizers do not fold under a distribution strategy")
    if not model.built:
        raise ValueError(f"the model {model.name!r} is not built, and has no variables yet")
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    optimizer._check_variables_are_known([v for v in model.trainable_variables if type(v.regularizer) in _FOLDED])
    folded, left = {}, {}
    for variable in model.trainable_variables:
        regularizer = getattr(variable, "regularizer", None)
        if type(regularizer) in _FOLDED:
            pair = tuple(float(getattr(regularizer, n, 0.0)) for n in ("l1", "l2"))
            folded[variable.path] = optimizer._own.folded[optimizer._get_variable_index(variable)] = pair
        elif regularizer is not None and not isinstance(regularizer, _FoldedRegularizer):
            left[variable.path] = regularizer
    fold(optimizer)
    if hyperparameters.changes(optimizer.weight_decay) or optimizer.weight_decay:
        decayed = [v.path for v in model.trainable_variables if v.path in folded and optimizer._use_weight_decay(v)]
        for layer in dict.fromkeys(path.rpartition("/")[0] for path in decayed):
            warnings.warn(f"layer {layer!r} has both a regularizer and the optimizer's weight_decay", stacklevel=2)
    _trace_anew(model)
    return Folded(folded, left)


def fold(optimizer: FusedStep) -> None:
    """Makes a built optimizer the one that penalizes the variables of `folded`, and their regularizers silent."""
    index = sorted(optimizer._own.folded)
    if not index:
        return
    penalties = optimizer._own.penalties = Penalties(optimizer, index)
    for place, i in enumerate(index):
        variable = optimizer._trainable_variables[i]
        original = getattr(variable.regularizer, "original", variable.regularizer)
        variable.regularizer = _FoldedRegularizer(penalties, place, original)
        _watch(variable, functools.partial(penalties.refresh, [i]))
    penalties.refresh()


def unfold_regularizers(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """Gives the layers their regularizers back, as before `fold_regularizers`, and takes them from the optimizer.

    Args:
      model, optimizer: those that were folded.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    for variable in model.variables:
        if isinstance(getattr(variable, "regularizer", None), _FoldedRegularizer):
            variable.regularizer = variable.regularizer.original
            optimizer._own.folded.pop(optimizer._get_variable_index(variable))
            del variable.assign
    optimizer._own.penalties = None
    _trace_anew(model)


def _watch(variable: keras.Variable, refresh: functools.partial) -> None:
    """Calls `refresh` behind every assignment: by a constraint, `set_weights`, or a file that is loaded."""
    assign = type(variable).assign.__get__(variable)

    @functools.wraps(assign)
    def assign_and_refresh(value: Any) -> Any:
        result = assign(value)
        refresh()
        return result

    variable.assign = assign_and_refresh


def _trace_anew(model: keras.Model) -> None:
    """The losses are part of what Keras has traced."""
    model.train_function = model.test_function = None
