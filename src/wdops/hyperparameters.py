"""What a hyperparameter of an optimizer may be: a number, a tensor, a variable, a schedule or a callable."""

import numbers
from typing import Any

import keras
import tensorflow as tf

Schedule = keras.optimizers.schedules.LearningRateSchedule


def changes(value: Any) -> bool:
    """Whether it has to be asked anew in every step."""
    return isinstance(value, (keras.Variable, tf.Variable)) or callable(value)


def current(value: Any, iterations: Any) -> Any:
    """The number or tensor that stands for it in this step; a schedule is asked for `iterations`, as in Keras."""
    if isinstance(value, Schedule):
        return value(iterations)
    if callable(value) and not isinstance(value, (keras.Variable, tf.Variable)):
        return value()
    return value


def to_float(name: str, value: Any) -> float:
    """Its value at iteration 0."""
    try:
        return float(current(value, 0))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must be a number, a scalar tensor or variable, a LearningRateSchedule, or a callable without "
            f"arguments that returns one of them. Received: {name}={value}"
        ) from error


def as_keras(variable: Any) -> keras.Variable:
    """A variable of TensorFlow as one of Keras, which is a name for the same memory."""
    if isinstance(variable, keras.Variable):
        return variable
    named = keras.Variable(0.0, dtype=variable.dtype.name, trainable=False, name="learning_rate")
    named._value = variable
    return named


def serialize(name: str, value: Any) -> Any:
    """As a config keeps it: schedules and callables as Keras does, variables as their value."""
    if isinstance(value, (keras.Variable, tf.Variable)):
        return to_float(name, value)
    return keras.saving.serialize_keras_object(value) if callable(value) else value


def deserialize(value: Any, custom_objects: dict[str, Any] | None = None) -> Any:
    if isinstance(value, dict) and "class_name" in value:
        return keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
    return value


def base_of(learning_rate: Any) -> float:
    """What a learning rate is divided by to have its schedule alone, without the rate.

    Raises:
      ValueError: it is a callable, or a schedule that does not say.
    """
    base = None
    if isinstance(learning_rate, (numbers.Real, keras.Variable, tf.Variable)):
        base = to_float("learning_rate", learning_rate)
    elif isinstance(learning_rate, keras.optimizers.schedules.PiecewiseConstantDecay):
        base = float(learning_rate.values[0])
    else:
        for name in ("initial_learning_rate", "warmup_target"):
            value = getattr(learning_rate, name, None)
            base = base if value is None else float(value)
    if not base:
        raise ValueError(
            f"decay_coupling='schedule' divides the learning rate by its base, and found {base} for {learning_rate}: a "
            "schedule tells it by an attribute `initial_learning_rate`, a number is its own base, and 0 is none"
        )
    return base
