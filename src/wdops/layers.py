"""Keras's Dense with bias and activation in one pass, forward and backward, and models that are converted to it."""

import contextlib
import functools
import itertools
import numbers
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common.stateless_scope import in_stateless_scope  # private: who else has the kernel's value
from keras.src.models.functional import Functional  # private: what keras.Model(inputs, outputs) is
from tensorflow.python.eager import forwardprop_util, record  # private: who else differentiates

from wdops import ops
from wdops.factored import FactoredGradient, handover_of

_FUNCTIONS = (
    (keras.activations.elu, ops.elu),
    (keras.activations.relu, ops.relu),
    (keras.activations.leaky_relu, ops.leaky_relu),
    (keras.activations.selu, ops.selu),
)


def _is_alpha(alpha: Any) -> bool:
    """Whether the ops take it in every dtype."""
    return isinstance(alpha, numbers.Real) and 0 <= alpha <= float(np.finfo(np.float32).max)


def _fused(activation: Any) -> Callable[..., tf.Tensor] | None:
    """The op that is a Keras activation, a function or a layer; None: there is none."""
    kind = type(activation)
    if kind is keras.layers.Activation:
        return _fused(activation.activation)
    if kind is keras.layers.ELU and _is_alpha(activation.alpha):
        return functools.partial(ops.elu, alpha=activation.alpha)
    leaky = kind is keras.layers.LeakyReLU
    leaky |= kind is keras.layers.ReLU and activation.max_value is None and activation.threshold == 0
    if leaky and _is_alpha(activation.negative_slope):
        return functools.partial(ops.leaky_relu, alpha=activation.negative_slope)
    # Not every callable is hashable.
    return next((op for function, op in _FUNCTIONS if function is activation), None)


class _Call:
    """Lives as long as the gradient function of a call does."""


def _factored_matmul(variable: keras.Variable, x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """The product, whose gradient is a FactoredGradient, unless a tape holds another call with the variable.

    A tape would join two of those as the rows of a sparse gradient, each of which optimizers take for a gradient. Nor
    can it differentiate one, so that a tape around the tape gets a tensor.
    """
    calls = handover_of(variable).calls

    @tf.custom_gradient
    def matmul(x: tf.Tensor, kernel: tf.Tensor) -> Any:
        cast = tf.cast(kernel, x.dtype)
        call = _Call()
        calls.add(call)

        def gradient(dz: tf.Tensor, call: _Call = call) -> tuple[tf.Tensor, Any]:
            factors = FactoredGradient(x, dz)
            kept = len(calls) == 1 and not record.should_record_backprop([x, dz, cast])
            of_kernel = factors.cast(kernel.dtype) if kept else tf.cast(factors.values, kernel.dtype)
            return tf.matmul(dz, cast, transpose_b=True), of_kernel

        return tf.matmul(x, cast), gradient

    return matmul(x, kernel)


@keras.saving.register_keras_serializable("wdops")
class Dense(keras.layers.Dense):
    """`keras.layers.Dense` whose bias and activation are one op, in one pass forward and one backward.

        output = activation(inputs @ kernel + bias)

    Takes all that Keras's takes, and has its variables, config and weights files. What is fused are "elu", "relu",
    "leaky_relu" and "selu", as names, functions of `keras.activations`, or layers `ELU`, `ReLU` (without max_value and
    threshold) and `LeakyReLU` of the same dtype. All other activations, LoRA and quantization go Keras's way.

    With `factored_gradient`, the optimizers of wdops step the kernel from the factors of its gradient and never form
    it, as `optimizer.factor_gradients` says: in a `tf.function` and eagerly, where the kernel's gradient is a
    `wdops.factored.FactoredGradient` once such an optimizer is built with it. Outside a `tf.function` the gradient is
    formed while a tape holds another call with the kernel, for a tape around the tape, in forward mode, in a
    distribution strategy, and in a subclass with a `kernel` of its own. What else reads the kernel there, as a lookup
    of its rows, makes its gradient sparse: right for the optimizers, but `tf.clip_by_global_norm` counts rows apart.

    Args:
      factored_gradient: default False.
      **arguments: those of `keras.layers.Dense`.

    Where it differs from Keras: ELU is accurate near 0; the bias's gradient is summed in double; with bfloat16 and
    float16 the sum with the bias is not rounded before the activation.

    A `.keras` file that was saved with this class loads once wdops is imported, and, unless `factored_gradient` is set,
    without wdops with `custom_objects={"wdops>Dense": keras.layers.Dense}`.
    """

    def __init__(self, *args: Any, factored_gradient: bool = False, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.factored_gradient = factored_gradient

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        # Where the optimizer looks. In some quantizations there is no kernel.
        if getattr(self, "_kernel", None) is not None:
            self._kernel.factored_gradient = self.factored_gradient

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if not self._is_plain:
            return super().call(inputs, training=training)
        product = self._matmul(inputs)
        fused = self._fused_activation()
        bias = None if self.bias is None else tf.convert_to_tensor(self.bias)
        # With autocast=False the dtypes may differ; Keras promotes.
        if fused is not None and (bias is None or bias.dtype == product.dtype):
            return fused(product, bias)
        biased = product if bias is None else keras.ops.add(product, bias)
        return biased if self.activation is None else self.activation(biased)

    @property
    def _is_plain(self) -> bool:
        """Whether it is a product of floats by one kernel."""
        plain = not self.lora_enabled and self.quantization_mode is None
        floats = self.compute_dtype in {dtype.name for dtype in ops.DTYPES}
        return plain and floats and keras.backend.backend() == "tensorflow"

    def _fused_activation(self) -> Callable[..., tf.Tensor] | None:
        if not self._is_plain:
            return None
        if isinstance(self.activation, keras.Layer) and self.activation.compute_dtype != self.compute_dtype:
            return None
        return _fused(self.activation)

    def _matmul(self, inputs: Any) -> Any:
        if not self._hands_over(inputs):
            return keras.ops.matmul(inputs, self.kernel)
        # Past the autocast, so that the factors and not their product pass the gradient of a cast.
        kernel = tf.convert_to_tensor(self._kernel._value)
        rows = tf.reshape(inputs, [-1, kernel.shape[0]])
        return tf.reshape(_factored_matmul(self._kernel, rows, kernel), [*inputs.shape[:-1], kernel.shape[1]])

    def _hands_over(self, inputs: Any) -> bool:
        """Whether a tape is to get a FactoredGradient. In a graph the optimizer finds the product by itself."""
        if not self._kernel.factored_gradient or not isinstance(inputs, tf.Tensor) or not tf.executing_eagerly():
            return False
        # The product is of the variable itself, and in the dtype of the inputs.
        of_variable = type(self).kernel is keras.layers.Dense.kernel and not in_stateless_scope()
        dtype = self.compute_dtype if self.autocast else self._kernel.dtype
        # Another optimizer would take a sum of factors and another gradient for that of an embedding.
        stepped = len(handover_of(self._kernel).optimizers) > 0 and not tf.distribute.has_strategy()
        backwards = not forwardprop_util.pack_tangents([inputs, self._kernel._value.handle]).tangents
        return of_variable and inputs.dtype.name == dtype and stepped and backwards

    def quantize(self, mode: Any = None, type_check: bool = True, config: Any = None) -> None:
        # Keras quantizes no subclass that does not say that it may.
        super().quantize(mode, type_check=type_check and type(self) is not Dense, config=config)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        if self.factored_gradient:
            config["factored_gradient"] = True
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
        if not isinstance(layer, keras.Layer):  # an operation, as of x + y
            return type(layer).from_config(layer.get_config())
        path = paths[layer]
        if layer in moved:
            replaced[path] = "moved into the Dense layer before it"
            return keras.layers.Activation(
                "linear", name=layer.name, dtype=layer.dtype_policy, trainable=layer.trainable
            )
        new_class = type(layer)
        reason = _reason_to_leave(layer)
        if reason:
            left[path] = reason
        elif isinstance(layer, keras.layers.Dense):
            new_class = Dense
        try:
            new = new_class.from_config(layer.get_config())
        except Exception as error:
            raise ValueError(f"layer {path} cannot be made from its config: {error}") from error
        if new_class is Dense and not reason:
            if layer in into:
                new.activation = _as_activation(into[layer])
            fused = new._fused_activation() is not None
            name = getattr(new.activation, "__name__", new.activation.__class__.__name__)
            replaced[path] = f"wdops.layers.Dense, {name} {'fused' if fused else 'by Keras'}"
        return new

    with _not_compiled(list(models.values())):
        new_model = keras.models.clone_model(model, clone_function=clone, recursive=True)
    old_variables, new_variables = model.variables, new_model.variables
    if [v.shape for v in old_variables] != [v.shape for v in new_variables]:
        raise ValueError(
            f"the copy of {model.name!r} has other variables: {[v.path for v in new_variables]}, not "
            f"{[v.path for v in old_variables]}"
        )
    if not model.trainable:
        new_model.trainable = False
    for old, new in zip(old_variables, new_variables, strict=True):
        new.assign(old)
        if old.trainable != new.trainable:
            new.trainable = old.trainable
    for old, new in zip(*([x for x in m._flatten_layers() if _learns(x)] for m in (model, new_model)), strict=True):
        _copy_learned(old, new)
    if model.compiled:
        twins = list(zip(old_variables, new_variables, strict=True))
        new_model.compile(**{name: _fresh(value, twins) for name, value in model._compile_config.config.items()})
    return Converted(new_model, replaced, left)


@contextlib.contextmanager
def _not_compiled(models: list[keras.Model]) -> Iterator[None]:
    """Keeps Keras from compiling a copy from a config, which losses and metrics of the user's own may not have."""
    compiled = [model for model in models if model.compiled]
    for model in compiled:
        model.compiled = False
    try:
        yield
    finally:
        for model in compiled:
            model.compiled = True


def _fresh(value: Any, twins: list[tuple[keras.Variable, keras.Variable]]) -> Any:
    """An argument of `compile` for another model: optimizers and metrics have variables, and are made anew."""

    def copy(x: Any) -> Any:
        if isinstance(x, keras.Optimizer):
            return _fresh_optimizer(x, twins)
        return type(x).from_config(x.get_config()) if isinstance(x, keras.Metric) else x

    return keras.tree.map_structure(copy, value)


def _fresh_optimizer(optimizer: keras.Optimizer, twins: list[tuple[keras.Variable, keras.Variable]]) -> keras.Optimizer:
    """One of the same config, with what Keras leaves out there. `twins`: each variable, and that of the new model."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = _fresh_optimizer(optimizer.inner_optimizer, twins)
        return type(optimizer)(inner, optimizer.initial_scale, optimizer.dynamic_growth_steps, name=optimizer.name)
    rate = optimizer._learning_rate
    # Keras cannot make a schedule that is not registered, nor a lambda, from a config.
    given = {} if isinstance(rate, keras.Variable) else {"learning_rate": rate}
    new = type(optimizer).from_config(optimizer.get_config() | given)
    if hasattr(optimizer, "_exclude_from_weight_decay"):
        keys = optimizer._exclude_from_weight_decay
        new._exclude_from_weight_decay = {new._var_key(v) for old, v in twins if optimizer._var_key(old) in keys}
        new._exclude_from_weight_decay_pattern = optimizer._exclude_from_weight_decay_pattern
    return new


def _learns(layer: keras.Layer) -> bool:
    """Whether this is a preprocessing layer, which keeps what it learned not in variables alone."""
    return hasattr(layer, "finalize_state")


def _copy_learned(old: keras.Layer, new: keras.Layer) -> None:
    """As saving and loading does it."""
    store: dict[str, Any] = {}
    old.save_own_variables(store)
    new.load_own_variables({name: np.array(value) for name, value in store.items()})
    if hasattr(old, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)


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
    if type(layer) is keras.layers.ELU and layer.alpha == 1:
        return keras.activations.elu
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
