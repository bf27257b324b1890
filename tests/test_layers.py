"""The fused Dense beside Keras's, its files, and models that are converted to it."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import wdops
from wdops import layers

ACTIVATIONS = {
    "linear": lambda: None,
    "softmax": lambda: "softmax",
    "elu": lambda: "elu",
    "relu": lambda: keras.activations.relu,
    "leaky_relu": lambda: "leaky_relu",
    "selu": lambda: "selu",
    "ELU": lambda: keras.layers.ELU(alpha=0.5),
    "ReLU": lambda: keras.layers.ReLU(negative_slope=0.1),
    "ReLU6": lambda: keras.layers.ReLU(max_value=6.0),
    "LeakyReLU": lambda: keras.layers.LeakyReLU(),
}
FUSED = set(ACTIVATIONS) - {"linear", "softmax", "ReLU6"}
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "mixed_bfloat16": 3e-2, "mixed_float16": 4e-3, "bfloat16": 3e-2}


def inputs(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def ops_of(function, *arguments):
    """The types of the ops in a graph, those of functions that it calls among them."""
    graph = tf.function(function).get_concrete_function(*arguments).graph.as_graph_def()
    return {n.op for n in [*graph.node, *(n for f in graph.library.function for n in f.node_def)]}


def pair(**arguments):
    """Keras's layer and this one, with the same weights, for inputs of 5 features."""
    activation = arguments.pop("activation")
    keras.utils.set_random_seed(0)
    both = [c(4, activation=ACTIVATIONS[activation](), **arguments) for c in (keras.layers.Dense, layers.Dense)]
    for layer in both:
        layer.build((None, 5))
    if both[0].use_bias:
        both[0].bias.assign(inputs(4, seed=1))
    both[1].set_weights(both[0].get_weights())
    return both


def outputs_and_gradients(layer, x):
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        output = layer(x)
        loss = tf.reduce_sum(tf.cast(output, tf.float64) ** 2)
    return [output, *tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])]


@activations
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no_bias"])
def test_outputs_and_gradients_are_those_of_keras(activation, dtype, use_bias):
    theirs, ours = pair(activation=activation, dtype=dtype, use_bias=use_bias)
    for got, want in zip(*(outputs_and_gradients(layer, inputs(6, 5)) for layer in (ours, theirs)), strict=True):
        assert got.dtype == want.dtype
        got, want = (tf.cast(v, tf.float64).numpy() for v in (got, want))
        # TensorFlow rounds the alpha of its leaky ReLU to float32, also in float64.
        rounded = 2.0**-22 if activation in ("leaky_relu", "LeakyReLU", "ReLU") else 0
        atol = max(TOLERANCE[dtype], rounded) * max(1, np.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (2, 3, 2, 5), (0, 5)], ids=["2", "3", "4", "empty"])
def test_every_rank(shape):
    theirs, ours = pair(activation="elu")
    for got, want in zip(*(outputs_and_gradients(layer, inputs(*shape)) for layer in (ours, theirs)), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=1e-5)


@activations
def test_what_is_fused(activation):
    dense = layers.Dense(4, activation=ACTIVATIONS[activation]())
    found = ops_of(lambda x: dense(x), tf.ones([2, 5]))
    assert any(op.startswith("Wdops>") for op in found) == (activation in FUSED)
    assert ("BiasAdd" in found or "AddV2" in found) == (activation not in FUSED)


@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_quantization_goes_the_way_of_keras(mode):
    theirs = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, activation="elu", name="d")])
    ours = layers.convert(theirs).model
    x = inputs(5, 6)
    for model in (theirs, ours):
        model.quantize(mode)
    assert ours.layers[0].quantization_mode == mode
    assert ours.layers[0].kernel.dtype == theirs.layers[0].kernel.dtype
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_lora_and_layers_of_another_dtype_go_the_way_of_keras():
    dense = layers.Dense(4, activation="elu")
    dense.build((None, 5))
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(inputs(2, 4))
    x = inputs(3, 5)
    kernel = dense._kernel + dense.lora_kernel_a @ dense.lora_kernel_b
    np.testing.assert_allclose(dense(x), keras.activations.elu(x @ np.asarray(kernel)), atol=1e-6)
    other = layers.Dense(4, activation=keras.layers.ELU(dtype="float16"))
    assert other(x).dtype == "float16"


@pytest.mark.parametrize("alpha", [tf.constant(0.5), tf.Variable(0.5), 1e39], ids=["tensor", "variable", "no float"])
def test_an_alpha_that_no_op_takes_goes_the_way_of_keras(alpha):
    theirs, ours = (
        c(4, activation=keras.layers.ELU(alpha), kernel_initializer="ones") for c in (keras.layers.Dense, layers.Dense)
    )
    np.testing.assert_array_equal(ours(np.ones((2, 3), "f4")), theirs(np.ones((2, 3), "f4")))


@pytest.mark.parametrize("mode", ["gptq", "awq"])
def test_a_quantization_that_has_no_kernel_is_built_as_by_keras(mode):
    names = []
    for dense in (keras.layers.Dense, layers.Dense):
        layer = dense(4, dtype=f"{mode}/4/8_from_float32")
        layer.build((None, 8))
        assert wdops.optimizers.SGD().factor_gradients(layer) == []
        names.append([(v.name, v.shape) for v in layer.variables])
    assert names[0] == names[1]
    assert names[0]


@activations
def test_the_config_is_that_of_keras(activation):
    theirs, ours = pair(activation=activation, kernel_regularizer="l2", bias_constraint="non_neg", name="dense")
    config = ours.get_config()
    copy = layers.Dense.from_config(config)
    assert copy.get_config() == config
    names = {name: value for name, value in config.items() if name != "activation"}
    assert names == {name: value for name, value in theirs.get_config().items() if name != "activation"}
    copy.build((None, 5))
    copy.set_weights(ours.get_weights())
    np.testing.assert_array_equal(copy(inputs(3, 5)), ours(inputs(3, 5)))


@pytest.mark.parametrize("mode", ["eager", "graph", "jit"])
def test_fit_is_that_of_keras(mode):
    x, y = inputs(64, 5), inputs(64, 1)
    losses = []
    for dense in (keras.layers.Dense, layers.Dense):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((5,)), dense(8, activation="elu"), dense(1)])
        model.compile("sgd", "mse", run_eagerly=mode == "eager", jit_compile=mode == "jit")
        losses.append(model.fit(x, y, epochs=3, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


# ---- files


def test_weights_go_both_ways(tmp_path):
    path = tmp_path / "w.weights.h5"
    models = [keras.Sequential([keras.Input((5,)), d(4, activation="elu")]) for d in (keras.layers.Dense, layers.Dense)]
    for source, target in (models, models[::-1]):
        source.layers[0].kernel.assign_add(tf.ones([5, 4]))
        source.save_weights(path)
        target.load_weights(path)
        np.testing.assert_allclose(target(inputs(3, 5)), source(inputs(3, 5)), atol=1e-6)


_LOAD_WITHOUT_WDOPS = """
import sys, keras, numpy as np
model = keras.models.load_model(sys.argv[1], custom_objects={"wdops>Dense": keras.layers.Dense})
assert "wdops" not in sys.modules and type(model.layers[0]) is keras.layers.Dense
np.testing.assert_allclose(model(np.load(sys.argv[2])), np.load(sys.argv[3]), atol=1e-6)
"""


def test_a_saved_model_loads_with_and_without_wdops(tmp_path):
    x = inputs(3, 5)
    model = keras.Sequential([keras.Input((5,)), layers.Dense(4, keras.layers.ELU(alpha=0.5)), layers.Dense(2, "relu")])
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert [type(layer) for layer in loaded.layers] == [layers.Dense] * 2
    assert loaded.layers[0].activation.alpha == 0.5
    np.testing.assert_array_equal(loaded(x), model(x))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", model(x))
    files = [tmp_path / name for name in ("m.keras", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", _LOAD_WITHOUT_WDOPS, *files], check=True)


def test_a_model_saved_by_keras_is_loaded_and_converted(tmp_path):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4, "elu")])
    model.save(tmp_path / "m.keras")
    converted = wdops.convert(keras.models.load_model(tmp_path / "m.keras")).model
    assert type(converted.layers[0]) is layers.Dense
    np.testing.assert_allclose(converted(inputs(3, 5)), model(inputs(3, 5)), atol=1e-6)


# ---- convert


def check(model, *shapes):
    """That the converted model computes and is what the model is; what `convert` returned."""
    for variable in model.variables:
        if "float" in variable.dtype:
            variable.assign_add(0.1 * inputs(*variable.shape, seed=2))
    converted = wdops.convert(model)
    new = converted.model
    arguments = [inputs(*shape) for shape in shapes]
    call = arguments if len(arguments) > 1 else arguments[0]
    for got, want in zip(tf.nest.flatten(new(call)), tf.nest.flatten(model(call)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    # Keras itself names an Input anew, and what is in a wrapper.
    assert [v.path.split("/")[-2:] for v in new.variables] == [v.path.split("/")[-2:] for v in model.variables]
    assert [v.trainable for v in new.variables] == [v.trainable for v in model.variables]
    names = [[x.name for x in m.layers if not isinstance(x, keras.layers.InputLayer)] for m in (new, model)]
    assert names[0] == names[1]
    assert not {id(v) for v in new.variables} & {id(v) for v in model.variables}
    return converted


def test_convert_a_sequential_model():
    dense = keras.layers.Dense
    model = keras.Sequential(
        [
            keras.Input((5,), name="in"),
            dense(4, name="a"),
            keras.layers.ELU(alpha=0.5, name="elu"),
            dense(4, "relu", kernel_regularizer="l2", bias_constraint="non_neg", trainable=False, name="b"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.ELU(alpha=0.25, name="alone"),
            dense(4, activity_regularizer="l2", name="c"),
            keras.layers.ReLU(name="relu"),
            dense(3, "softmax", name="d"),
        ],
        name="m",
    )
    converted = check(model, (6, 5))
    assert converted.replaced == {
        "m/a": "wdops.layers.Dense, ELU fused",
        "m/elu": "moved into the Dense layer before it",
        "m/b": "wdops.layers.Dense, relu fused",
        "m/c": "wdops.layers.Dense, linear by Keras",
        "m/d": "wdops.layers.Dense, softmax by Keras",
    }
    assert not converted.left
    assert str(converted).startswith("m/a: wdops.layers.Dense, ELU fused\nm/elu: moved into")
    new = {layer.name: layer for layer in converted.model.layers}
    assert type(new["b"].kernel.regularizer) is keras.regularizers.L2
    assert type(new["b"].bias.constraint) is keras.constraints.NonNeg
    np.testing.assert_allclose(converted.model.losses[0], model.losses[0])


def test_convert_a_functional_model_with_shared_layers():
    first, second = keras.Input((5,)), keras.Input((5,))
    shared = keras.layers.Dense(5, name="shared")  # read by two: nothing moves into it
    one = keras.layers.ReLU(name="one")(shared(first))
    two = keras.layers.LeakyReLU(name="two")(shared(second))
    alone = keras.layers.Dense(4, name="alone")(one + two)
    split = keras.layers.Dense(4, name="split")(alone)  # an output is read from outside
    last = keras.layers.Activation("elu", name="last")(split)
    moved = keras.layers.LeakyReLU(name="moved")(keras.layers.Dense(2, name="dense")(last))
    converted = check(keras.Model([first, second], [split, moved], name="m"), (3, 5), (3, 5))
    assert {path: what for path, what in converted.replaced.items() if "by Keras" not in what} == {
        "m/dense": "wdops.layers.Dense, LeakyReLU fused",
        "m/moved": "moved into the Dense layer before it",
    }
    assert {path for path, what in converted.replaced.items() if "linear by Keras" in what} == {
        "m/shared", "m/alone", "m/split",
    }  # fmt: skip


def test_convert_nested_models():
    inner = keras.Sequential([keras.Input((5,)), keras.layers.Dense(5, "elu", name="dense")], name="inner")
    x = keras.Input((5,))
    model = keras.Model(x, inner(keras.layers.Dense(5, "relu", name="outer")(inner(x))), name="m")
    converted = check(model, (3, 5))
    assert set(converted.replaced) == {"m/inner/dense", "m/outer"}
    assert type(converted.model.get_layer("inner").layers[0]) is layers.Dense


def test_what_is_left_alone_is_named():
    class Mine(keras.layers.Dense):
        pass

    lora = keras.layers.Dense(5, lora_rank=2, name="lora")
    x = keras.Input((4, 5))
    y = keras.layers.TimeDistributed(keras.layers.Dense(5, name="inside"), name="wrapper")(x)
    for layer in (Mine(5, name="mine"), layers.Dense(5, "elu", name="done"), lora):
        y = layer(y)
    converted = check(keras.Model(x, y, name="m"), (2, 4, 5))
    assert converted.left == {
        "m/wrapper": "is a TimeDistributed with inside inside",
        "m/mine": "is of a subclass, Mine",
        "m/done": "is a wdops.layers.Dense already",
        "m/lora": "has LoRA",
    }
    assert not converted.replaced
    assert "m/lora: left alone, since it has LoRA" in str(converted)


def test_a_converted_model_trains_as_before():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8), keras.layers.ELU(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    converted = wdops.convert(model).model
    fits = [m.fit(inputs(64, 5), inputs(64, 1), epochs=2, shuffle=False, verbose=0) for m in (model, converted)]
    np.testing.assert_allclose(fits[0].history["loss"], fits[1].history["loss"], rtol=1e-5)


class Rate(keras.optimizers.schedules.LearningRateSchedule):
    """Not registered: Keras makes none from a config."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate / (1 + tf.cast(step, tf.float32))

    def get_config(self):
        return {"rate": self.rate}


def constant_rate():
    return 0.1


@pytest.mark.parametrize("module", [keras, wdops], ids=["keras", "wdops"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("rate", [Rate(0.1), constant_rate, 0.1], ids=["schedule", "function", "number"])
@pytest.mark.parametrize("by", ["name", "variable"])
def test_a_converted_model_has_the_optimizer_that_it_had(module, scaled, rate, by):
    x, y = inputs(16, 5), inputs(16, 1)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4), keras.layers.ELU(), keras.layers.Dense(1)])
    optimizer = module.optimizers.AdamW(rate, weight_decay=0.5)
    exclusions = {"name": {"var_names": ["bias"]}, "variable": {"var_list": [model.layers[-1].kernel]}}
    optimizer.exclude_from_weight_decay(**exclusions[by])
    if scaled:
        optimizer = module.optimizers.LossScaleOptimizer(optimizer, initial_scale=4.0)
    model.compile(optimizer, "mse", jit_compile=rate == 0.1)
    converted = wdops.convert(model).model
    assert type(converted.optimizer) is type(optimizer)
    assert converted.optimizer is not optimizer
    for one in (model, converted):
        one.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    for got, want in zip(converted.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_layer_without_a_config_is_named():
    class Own(keras.layers.Layer):
        def __init__(self, function):
            super().__init__()
            self.function = function

    model = keras.Sequential([keras.Input((5,)), Own(np.tanh), keras.layers.Dense(1)], name="m")
    with pytest.raises(ValueError, match=r"layer m/own.* cannot be made from its config"):
        wdops.convert(model)


def test_a_model_of_a_class_of_its_own_is_refused():
    class Mine(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="mine is a Mine, but must be a Sequential or functional model"):
        wdops.convert(Mine(name="mine"))
    with pytest.raises(ValueError, match="m/mine is a Mine"):
        wdops.convert(keras.Sequential([keras.Input((5,)), Mine(name="mine")], name="m"))


def adapted():
    numbers = keras.layers.Normalization()
    numbers.adapt(inputs(50, 2) * 3 + 30)
    bins = keras.layers.Discretization(num_bins=4, output_mode="one_hot")
    bins.adapt(inputs(50, 1))
    words = keras.layers.TextVectorization(output_mode="multi_hot")
    words.adapt(["a b", "c d e"])
    lookup = keras.layers.IntegerLookup(output_mode="multi_hot")
    lookup.adapt(np.array([3, 5, 7]))
    return {
        "numbers": (numbers, inputs(6, 2) * 3 + 30),
        "bins": (bins, inputs(6, 1)),
        "words": (words, np.array(["a c", "z", "e e", "d"])),
        "lookup": (lookup, np.array([[3], [9], [7]])),
    }


@pytest.mark.parametrize("kind", ["numbers", "bins", "words", "lookup"])
def test_convert_keeps_what_preprocessing_has_learned(kind):
    layer, x = adapted()[kind]
    x = tf.constant(x if x.ndim > 1 else x[:, None])
    model = keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype), layer, keras.layers.Dense(3, activation="elu")])
    want = model(x)
    converted = wdops.convert(model).model
    assert type(converted.layers[-1]) is layers.Dense
    np.testing.assert_allclose(converted(x), want, rtol=1e-6, atol=1e-6)


def test_convert_compiles_with_functions_that_no_config_has():
    def own_loss(y, prediction):
        return tf.reduce_mean(tf.abs(y - prediction))

    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1, activation="elu")])
    metric, optimizer = keras.metrics.MeanSquaredError(), wdops.optimizers.Adam(0.3)
    model.compile(optimizer, own_loss, metrics=[metric], jit_compile=True)
    model.fit(inputs(8, 5), inputs(8, 1), verbose=0)
    converted = wdops.convert(model).model
    assert model.compiled and converted.loss is own_loss and converted.jit_compile
    assert converted.optimizer is not optimizer and float(converted.optimizer.learning_rate) == pytest.approx(0.3)
    got, want = (m.evaluate(inputs(8, 5), inputs(8, 1), verbose=0) for m in (converted, model))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert metric not in converted.metrics


def test_convert_of_a_frozen_model():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1)])
    model.trainable = False
    converted = wdops.convert(model).model
    assert not converted.trainable and not converted.trainable_variables


@pytest.mark.parametrize(
    "activation",
    [keras.layers.ELU(float("inf")), type("Own", (), {"__call__": lambda self, x: 2 * x, "__hash__": None})()],
    ids=["inf", "unhashable"],
)
def test_what_does_not_fuse_goes_keras_way(activation):
    theirs, ours = (c(4, activation=activation) for c in (keras.layers.Dense, layers.Dense))
    for layer in (theirs, ours):
        layer.build((None, 5))
    ours.set_weights(theirs.get_weights())
    np.testing.assert_array_equal(ours(inputs(6, 5)), theirs(inputs(6, 5)))
