"""Keras's Dense with bias and activation in one pass, forward and backward, and models that are converted to it."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.src.models.functional import Functional  # private: what keras.Model(inputs, outputs) is

from wdops import ops
from wdops.factored import FactoredGradient

_FUNCTIONS = {
    keras.activations.elu: ops.elu,
    keras.activations.relu: ops.relu,
    keras.activations.leaky_relu: ops.leaky_relu,
    keras.activations.selu: ops.selu,
}


def _fused(activation: Any) -> Callable[..., tf.Tensor] | None:
    """The op that is a Keras activation, a function or a layer; None: there is none."""
    kind = type(activation)
    if kind is keras.layers.Activation:
        return _fused(activation.activation)
    if kind is keras.layers.ELU and activation.alpha >= 0:
        return functools.partial(ops.elu, alpha=activation.alpha)
    if kind is keras.layers.LeakyReLU:
        return functools.partial(ops.leaky_relu, alpha=activation.negative_slope)
    if kind is keras.layers.ReLU and activation.max_value is None and activation.threshold == 0:
        return functools.partial(ops.leaky_relu, alpha=activation.negative_slope)
    return None if isinstance(activation, keras.Layer) else _FUNCTIONS.get(activation)


@tf.custom_gradient
def _factored_matmul(x: tf.Tensor, kernel: tf.Tensor) -> Any:
    cast = tf.cast(kernel, x.dtype)

    def gradient(dz: tf.Tensor) -> tuple[tf.Tensor, FactoredGradient]:
        return tf.matmul(dz, cast, transpose_b=True), FactoredGradient(x, dz).cast(kernel.dtype)

    return tf.matmul(x, cast), gradient


@keras.saving.register_keras_serializable("wdops")
class Dense(keras.layers.Dense):
    """`keras.layers.Dense` whose bias and activation are one op, in one pass forward and one backward.

        output = activation(inputs @ kernel + bias)

    Takes all that Keras's takes, and has its variables, config and weights files. What is fused are "elu", "relu",
    "leaky_relu" and "selu", as names, functions of `keras.activations`, or layers `ELU`, `ReLU` (without max_value and
    threshold) and `LeakyReLU` of the same dtype. All other activations, LoRA and quantization go Keras's way.

    With `factored_gradient`, the optimizers of wdops step the kernel from the factors of its gradient and never form
    it, as `optimizer.factor_gradients` says: in a `tf.function` and eagerly, where the kernel's gradient is a
    `wdops.factored.FactoredGradient`. Called twice on one tape outside a `tf.function`, it forms the gradient.

    Args:
      factored_gradient: default False.
      **arguments: those of `keras.layers.Dense`.

    Where it differs from Keras: ELU is accurate near 0; the bias's gradient is summed in double; with bfloat16 and
    float16 the sum with the bias is not rounded before the activation.

    A `.keras` file that was saved with this class loads once wdops is imported, and without wdops with
    `custom_objects={"wdops>Dense": keras.layers.Dense}`.
    """

    def __init__(self, *args: Any, factored_gradient: bool = False, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.factored_gradient = factored_gradient

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        # Where the optimizer looks.
        self._kernel.factored_gradient = self.factored_gradient

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        fused = self._fused_activation()
        if fused is None:
            return super().call(inputs, training=training)
        product = self._matmul(inputs)
        bias = None if self.bias is None else tf.convert_to_tensor(self.bias)
        if bias is not None and bias.dtype != product.dtype:  # with autocast=False; Keras promotes
            return self.activation(keras.ops.add(product, bias))
        return fused(product, bias)

    def _fused_activation(self) -> Callable[..., tf.Tensor] | None:
        plain = not self.lora_enabled and self.quantization_mode is None
        floats = self.compute_dtype in {dtype.name for dtype in ops.DTYPES}
        if not plain or not floats or keras.backend.backend() != "tensorflow":
            return None
        if isinstance(self.activation, keras.Layer) and self.activation.compute_dtype != self.compute_dtype:
            return None
        return _fused(self.activation)

    def _matmul(self, inputs: Any) -> Any:
        if not self._kernel.factored_gradient or not isinstance(inputs, tf.Tensor) or not tf.executing_eagerly():
            return keras.ops.matmul(inputs, self.kernel)
        # Past the autocast, so that the factors and not their product pass the gradient of a cast.
        kernel = tf.convert_to_tensor(self._kernel._value)
        rows = tf.reshape(inputs, [-1, kernel.shape[0]])
        return tf.reshape(_factored_matmul(rows, kernel), [*inputs.shape[:-1], kernel.shape[1]])

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        if self.factored_gradient:
            config["factored_gradient"] = True
        if type(self.activation) is keras.layers.ELU:  # which leaves its alpha out of its own config
            config["activation"]["config"]["alpha"] = self.activation.alpha
        return config


class Converted(NamedTuple):
    """What `convert` made: the new model, what happened to which layer, and which were left alone and why, by path."""

    model: keras.Model
    replaced: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        rows = [f"{path}: {what}" for path, what in self.replaced.items()]
        rows += [f"{path}: left alone, since it {why}" for path, why in self.left.items()]
        return "\n".join(rows) or "there is no Dense layer"


def convert(model: keras.Model) -> Converted:
    """A copy of a model in which every `keras.layers.Dense` is a `wdops.layers.Dense`.

    An `ELU`, `ReLU`, `LeakyReLU` or `Activation` layer that is all that reads a Dense layer without an activation moves
    into it, where the two fuse; a linear `Activation` of its name stays in its place. Names, weights, regularizers,
    constraints and what is trainable are as before, and so are layers that models nest or share. A compiled model is
    compiled anew, with an optimizer that has not yet made a step.

    Args:
      model: a Sequential or functional `keras.Model`.

    Returns:
      `Converted(model, replaced, left)`, which prints as a list of what was done.

    Raises:
      ValueError: the model, or one nested in it, is of a class of its own, whose `call` cannot be seen from outside
        (use `wdops.layers.Dense` there), or a layer cannot be made from its config.
    """
    models = _models_of(model, model.name)
    uses: dict[int, int] = {}
    for one in {id(m): m for m in models.values()}.values():
        for layer in one.layers:
            uses[id(layer)] = uses.get(id(layer), 0) + 1
    into = {}
    for one in models.values():
        into |= {pair[0]: pair[1] for pair in _pairs(one) if uses[id(pair[0])] == uses[id(pair[1])] == 1}
    moved = set(into.values())
    paths = {layer: f"{path}/{layer.name}" for path, one in models.items() for layer in one.layers}
    replaced, left = {}, {}

    def clone(layer: keras.Layer) -> keras.Layer:
        config = layer.get_config()
        if not isinstance(layer, keras.Layer):  # an operation, as of x + y
            return type(layer).from_config(config)
        path = paths[layer]
        if layer in moved:
            replaced[path] = "moved into the Dense layer before it"
            return keras.layers.Activation("linear", name=layer.name, dtype=config["dtype"])
        if type(layer) is keras.layers.ELU:
            config["alpha"] = layer.alpha  # which Keras leaves out
        new_class = type(layer)
        reason = _reason_to_leave(layer)
        if reason:
            left[path] = reason
        elif isinstance(layer, keras.layers.Dense):
            new_class = Dense
        try:
            new = new_class.from_config(config)
        except Exception as error:
            raise ValueError(f"layer {path} cannot be made from its config: {error}") from error
        if new_class is Dense and not reason:
            if layer in into:
                new.activation = _as_activation(into[layer])
            fused = new._fused_activation() is not None
            name = getattr(new.activation, "__name__", new.activation.__class__.__name__)
            replaced[path] = f"wdops.layers.Dense, {name} {'fused' if fused else 'by Keras'}"
        return new

    new_model = keras.models.clone_model(model, clone_function=clone, recursive=True)
    old_variables, new_variables = model.variables, new_model.variables
    if [v.shape for v in old_variables] != [v.shape for v in new_variables]:
        raise ValueError(
            f"the copy of {model.name!r} has other variables: {[v.path for v in new_variables]}, not "
            f"{[v.path for v in old_variables]}"
        )
    for old, new in zip(old_variables, new_variables, strict=True):
        new.assign(old)
        if old.trainable != new.trainable:
            new.trainable = old.trainable
    return Converted(new_model, replaced, left)


def _models_of(model: keras.Model, path: str) -> dict[str, keras.Model]:
    """A model and those nested in it, by path."""
    if type(model) not in (keras.Sequential, Functional):
        raise ValueError(
            f"{path} is a {type(model).__name__}, but must be a Sequential or functional model: what the `call` of a "
            "class of its own does cannot be seen from outside; use wdops.layers.Dense in it"
        )
    models = {path: model}
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            models |= _models_of(layer, f"{path}/{layer.name}")
    return models


def _pairs(model: keras.Model) -> list[tuple[keras.Layer, keras.Layer]]:
    """Dense layers without an activation, with the activation layer that alone reads them."""
    if type(model) is keras.Sequential:
        pairs = list(zip(model.layers, model.layers[1:], strict=False))
    else:
        readers: dict[int, list[keras.Layer | None]] = {}
        made_by = {}
        for node in itertools.chain(*model._nodes_by_depth.values()):
            for tensor in node.outputs:
                made_by.setdefault(node.operation, []).append(tensor)
            for tensor in node.input_tensors:
                readers.setdefault(id(tensor), []).append(node.operation)
        for tensor in model.outputs:
            readers.setdefault(id(tensor), []).append(None)
        pairs = [
            (layer, readers[id(tensors[0])][0])
            for layer, tensors in made_by.items()
            if len(tensors) == 1 and len(readers.get(id(tensors[0]), [])) == 1
        ]
        pairs = [(layer, reader) for layer, reader in pairs if len(made_by.get(reader, [])) == 1]
    return [
        (dense, reader)
        for dense, reader in pairs
        if isinstance(dense, keras.layers.Dense)
        and not _reason_to_leave(dense)
        and dense.activation is keras.activations.linear
        and dense.activity_regularizer is None  # it would see the activation
        and isinstance(reader, keras.Layer)
        and _fused(reader) is not None
        and reader.activity_regularizer is None
        and reader.compute_dtype == dense.compute_dtype
    ]


def _as_activation(layer: keras.Layer) -> Any:
    """A layer of an activation as a function where there is one, else a copy of it."""
    if type(layer) is keras.layers.Activation:
        return layer.activation
    if type(layer) is keras.layers.ELU:
        new = keras.layers.ELU(**layer.get_config() | {"alpha": layer.alpha})
        return keras.activations.elu if layer.alpha == 1 else new
    if type(layer) is keras.layers.ReLU and layer.negative_slope == 0:
        return keras.activations.relu
    return type(layer).from_config(layer.get_config())


def _reason_to_leave(layer: keras.Layer) -> str:
    """Why a layer that is a Dense, or holds one, stays what it is; empty: it is none, or does not."""
    if isinstance(layer, Dense):
        return "is a wdops.layers.Dense already"
    if type(layer) is keras.layers.Dense:
        if layer.lora_enabled or layer.lora_rank:
            return "has LoRA"
        return f"is quantized to {layer.quantization_mode}" if layer.quantization_mode else ""
    if isinstance(layer, keras.layers.Dense):
        return f"is of a subclass, {type(layer).__name__}"
    if isinstance(layer, keras.Model):
        return ""
    inner = [x.name for x in layer._flatten_layers(include_self=False) if isinstance(x, keras.layers.Dense)]
    return f"is a {type(layer).__name__} with {', '.join(inner)} inside" if inner else ""
