"""The ops on a GPU, which is one of tests/cuda_on_cpu: test_gpu.py builds the libraries and runs this file.

A process of its own, because a device is there before TensorFlow starts, or never; and a variable goes there by itself.
"""

import os
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import DTYPES, LAYOUTS, TERMS, own_hypers, random_case
from tensorflow.python.framework import kernels
from test_ops import (  # noqa: F401  (these run here as well)
    BAD_VALUES,
    MODES,
    test_a_bad_call_is_named_and_changes_nothing,
    test_a_hyperparameter_is_read_when_the_op_runs,
    test_a_tensor_read_before_the_step_keeps_its_value,
    test_accumulators_averages_and_the_penalty_of_one_pass,
)

import wdops
from wdops import reference
from wdops._load import native, raw_ops
from wdops.factored import FactoredGradient

LIBRARIES = Path(os.environ["WDOPS_GPU_ON_CPU"])
tf.load_library(str(LIBRARIES / "libdevice.so"))
tf.load_op_library(str(LIBRARIES / "libwdops_gpu.so"))

DEVICES = ("CPU:0", "GPU:0")
RULES = {"Wdops>Apply" + "".join(map(str.capitalize, rule["name"].split("_"))): rule for rule in native.rules}
HYPERS = {op: rule["hypers"] for op, rule in RULES.items()} | {"Wdops>Norms": native.gradient_hypers}
SIZES = [(0,), (1,), (3, 5), (0, 4), (63,), (16383,), (40001,), (2, 0, 3)]
modes = pytest.mark.parametrize("mode", ["eager", "graph"])
rules = pytest.mark.parametrize("rule", reference.RULES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def test_there_is_a_gpu_and_variables_go_there():
    assert tf.Variable([1.0]).device.endswith("GPU:0")


def test_every_op_has_a_kernel_that_takes_handles_and_numbers_from_the_host():
    for op, rule in RULES.items():
        on_host = {"var", *rule["slots"], "accumulator", "average", *rule["hypers"]} - {"grad_scale", "clip_scale"}
        assert host_memory_of(op) == on_host
    assert host_memory_of("Wdops>Norms") == {"var", "accumulator", "accumulation_scale", "l1", "l2"}
    assert host_memory_of("Wdops>FactoredGradient") == set()
    for name, hypers in {"Elu": {"alpha", "scale"}, "Relu": set(), "LeakyRelu": {"alpha"}}.items():
        assert host_memory_of(f"Wdops>{name}") == host_memory_of(f"Wdops>{name}Grad") == hypers


def host_memory_of(op):
    (kernel,) = (k for k in kernels.get_registered_kernels_for_op(op).kernel if k.device_type == "GPU")
    return {*kernel.host_memory_arg}


def on_both(mode, make):
    """What a step returns, and what it leaves in variables, has the same bits on both devices. Returns both.

    `make` returns the step and the variables, and is called where they are to be.
    """
    results = []
    for device in DEVICES:
        with tf.device(device):
            step, variables = make()
        outputs = MODES[mode](step)()
        results.append([np.asarray(x) for x in tf.nest.flatten([outputs, variables])])
    for k, (cpu, gpu) in enumerate(zip(*results, strict=True)):
        assert cpu.dtype == gpu.dtype and cpu.shape == gpu.shape
        assert cpu.tobytes() == gpu.tobytes(), (k, cpu, gpu)
    return results[1]


@rules
@modes
def test_a_step_has_the_bits_of_the_cpu(rule, mode):
    """Of a list of every layout and size, with all that a step has."""

    def make():
        cases = [random_case(rule, *LAYOUTS[i % len(LAYOUTS)][:1], int(np.prod(shape)), i,
                             LAYOUTS[i % len(LAYOUTS)][1]) for i, shape in enumerate(SIZES)]  # fmt: skip
        param, *slots, grad = ([tf.constant(a.reshape(s)) for a, s in zip(arrays, SIZES, strict=True)]
                               for arrays in zip(*cases, strict=True))  # fmt: skip
        lists = [[tf.Variable(a) for a in list_] for list_ in (param, *slots, grad, param)]
        *variables, accumulator, average = lists
        each = {"grad_scale", "clip_scale", "l2"}
        terms = {n: [x * (1 + 0.1 * i) for i in range(len(SIZES))] if n in each else x for n, x in TERMS.items()}

        def step():
            return getattr(wdops.ops, f"apply_{rule}")(
                *variables, grad, accumulator=accumulator, average=average, report_penalty=True, seed=5,
                scaled_proximal=True, ema_momentum=0.9, **own_hypers(rule), **terms,
            )  # fmt: skip

        return step, lists

    *_, penalty = (on_both(mode, make)[0],)
    assert penalty.shape == (len(SIZES),) and penalty[2] > 0


@modes
@dtypes
@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
def test_norms_have_the_bits_of_the_cpu(mode, dtype, bad):
    def make():
        arrays = [random_case("sgd", dtype, int(np.prod(shape)), i) for i, shape in enumerate(SIZES)]
        variables = [tf.Variable(param.reshape(s)) for (param, _), s in zip(arrays, SIZES, strict=True)]
        sums = [tf.Variable(v) for v in variables]
        grads = [grad.reshape(s) for (_, grad), s in zip(arrays, SIZES, strict=True)]
        if bad is not None:
            grads[5][777] = bad
        grads = [tf.constant(g) for g in grads]
        scales = [0.5 + i for i in range(len(SIZES))]

        def measure():
            alone = wdops.ops.norms(grads, report_penalty=False)
            return alone, wdops.ops.norms(grads, variables, accumulator=sums, grad_scale=scales, l1=0.3, l2=0.2)

        return measure, variables

    results = on_both(mode, make)
    assert results[2] == results[5] == (bad is None)


@modes
@dtypes
def test_a_factored_gradient_has_the_bits_of_the_cpu(mode, dtype):
    rng = np.random.default_rng(1)
    shapes = [(7, 65, 33), (0, 5, 4), (3, 0, 4), (40, 130, 70)]

    def make():
        factors = [[tf.constant(rng.normal(size=(b, k)).astype(DTYPES[dtype])) for k in (r, c)] for b, r, c in shapes]
        variables = [tf.Variable(rng.normal(size=(r, c)).astype(DTYPES[dtype])) for _, r, c in shapes]

        def step():
            formed = [raw_ops.wdops_factored_gradient(x=x, dz=dz, most_rows=3) for x, dz in factors]
            kept = [FactoredGradient(x, dz) for x, dz in factors]
            wdops.ops.apply_sgd(variables, kept, lr=0.1, l2=0.1)
            wdops.ops.apply_sgd(variables, [tuple(pair) for pair in formed], lr=0.1)
            return formed

        return step, variables

    def run():
        nonlocal rng
        rng = np.random.default_rng(1)
        return make()

    on_both(mode, run)


def test_the_norm_of_a_factored_gradient_is_that_of_the_product():
    rng = np.random.default_rng(2)
    x, dz = (tf.constant(rng.normal(size=(9, k)), tf.float64) for k in (30, 50))
    norm = wdops.ops.norms([FactoredGradient(x, dz)]).norm
    assert norm.device.endswith("GPU:0")
    np.testing.assert_allclose(norm, [tf.norm(tf.matmul(x, dz, transpose_a=True))], rtol=1e-14)


@modes
@dtypes
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 300), (257, 3, 2), (0, 3), (2, 3, 0), (4, 0, 2)])
def test_activations_have_the_bits_of_the_cpu(mode, dtype, data_format, shape):
    functions = [wdops.ops.elu, wdops.ops.relu, wdops.ops.leaky_relu, wdops.ops.selu]

    def make():
        rng = np.random.default_rng(3)
        x, grad = (tf.constant(rng.normal(size=shape).astype(DTYPES[dtype])) for _ in range(2))
        bias = tf.constant(rng.normal(size=shape[1 if data_format == "NCHW" else -1]).astype(DTYPES[dtype]))

        def run():
            results = []
            for function in functions:
                for inputs in ([x], [x, bias]):
                    with tf.GradientTape() as tape:
                        tape.watch(inputs)
                        y = function(*inputs, data_format=data_format)
                    results += [y, *tape.gradient(y, inputs, grad)]
            return results

        return run, []

    on_both(mode, make)


def test_the_outputs_stay_on_the_card_and_a_scale_is_taken_from_it():
    variable = tf.Variable(tf.ones(5))
    norms = wdops.ops.norms([tf.ones(5)])
    penalty = wdops.ops.apply_sgd([variable], [tf.ones(5)], lr=1.0, l2=1.0, clip_scale=norms.norm, report_penalty=True)
    assert all(x.device.endswith("GPU:0") for x in (*norms, penalty))
    np.testing.assert_allclose(variable, np.full(5, 1 - 3 * 5**0.5), rtol=1e-6)


def test_a_scale_that_is_not_a_number_reaches_every_element():
    variable = tf.Variable(tf.ones(5))
    wdops.ops.apply_sgd([variable], [tf.ones(5)], lr=1.0, clip_scale=tf.constant(np.nan, tf.float64))
    assert np.isnan(variable.numpy()).all()


def test_hyperparameters_are_computed_on_the_host_in_a_graph():
    variable, lr = tf.Variable(tf.ones(5)), tf.Variable(0.5)
    with tf.device("CPU:0"):
        step = tf.Variable(0, dtype=tf.int64)

    @tf.function
    def run(grad):
        wdops.ops.apply_adam([variable], [m], [v], [grad], lr=lr * 2, step=step + 1)

    m, v = tf.Variable(tf.zeros(5)), tf.Variable(tf.zeros(5))
    graph = run.get_concrete_function(tf.ones(5)).graph
    (op,) = (op for op in graph.get_operations() if op.type == "Wdops>ApplyAdam")
    names = [name for name in next(r["hypers"] for r in native.rules if r["name"] == "adam")]
    for name, hyper in zip(names, op.inputs[-len(names) :], strict=True):
        assert hyper.device.endswith("CPU:0") == (name not in ("grad_scale", "clip_scale")), name


def optimizers():
    common = {"weight_decay": 0.01, "l1": 1e-3, "l2": 1e-3, "proximal_l1": 1e-4, "seed": 3}
    yield "adamw", lambda: wdops.optimizers.AdamW(0.1, global_clipnorm=0.5, use_ema=True, **common)
    yield "sgd", lambda: wdops.optimizers.SGD(0.1, momentum=0.9, clipnorm=0.2, gradient_accumulation_steps=2, **common)
    yield "nadam", lambda: wdops.optimizers.Nadam(0.1, clipvalue=0.01, skip_nonfinite=True, **common)
    yield (
        "lamb",
        lambda: wdops.optimizers.Lamb(
            keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.9), slot_dtype="bfloat16", **common
        ),
    )
    yield "scaled", lambda: wdops.optimizers.LossScaleOptimizer(wdops.optimizers.Adam(0.1, **common), 8.0, 2)


@pytest.mark.parametrize("name", [name for name, _ in optimizers()])
@modes
def test_an_optimizer_trains_as_on_the_cpu(name, mode):
    results = []
    for device in DEVICES:
        rng = np.random.default_rng(4)
        with tf.device(device):
            variables = [keras.Variable(rng.normal(size=s).astype("f"), name=f"v{k}") for k, s in enumerate(SIZES)]
        optimizer = dict(optimizers())[name]()
        optimizer.build(variables)
        grads = [[tf.constant(rng.normal(size=s).astype("f")) for s in SIZES] for _ in range(4)]
        apply = MODES[mode](optimizer.apply)
        for g in grads:
            apply(g)
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        for variable in inner.variables:
            stays = variable is inner.iterations or variable.shape == ()
            assert variable.value.device.endswith("CPU:0" if stays else device), variable.path
        results.append([np.asarray(v) for v in (*variables, *optimizer.variables)])
    for cpu, gpu in zip(*results, strict=True):
        np.testing.assert_array_equal(cpu.view(np.uint8) if cpu.ndim else cpu, gpu.view(np.uint8) if gpu.ndim else gpu)


@pytest.mark.parametrize("name", [name for name, _ in optimizers()])
def test_an_optimizer_computes_on_the_host_what_the_host_needs(name):
    variables = [keras.Variable(tf.ones(n)) for n in (3, 5)]
    optimizer = dict(optimizers())[name]()
    optimizer.build(variables)
    step = tf.function(optimizer.apply)
    graph = step.get_concrete_function([tf.ones(3), tf.ones(5)]).graph.as_graph_def()
    checked = set()
    for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
        devices = {node.name: node.device for node in nodes}
        for node in nodes:
            hypers = HYPERS.get(node.op, [])
            inputs = [name.partition(":")[0] for name in node.input if name[0] != "^"]
            for hyper, name in zip(hypers, inputs[len(inputs) - len(hypers) :], strict=True):
                # What comes from outside of a function has no node in it.
                if name in devices and hyper not in ("grad_scale", "clip_scale"):
                    assert devices[name].endswith("CPU:0"), (node.op, hyper, name)
                    checked.add(hyper)
    assert {"lr", "weight_decay", "l2", "ema_momentum", "accumulation_scale"} <= checked


def test_a_step_finds_the_factors_of_a_dense_layer_however_many_rows_there_are():
    layer = wdops.layers.Dense(4)
    layer.build((None, 3))
    optimizer = wdops.optimizers.SGD(0.1)
    optimizer.build(layer.trainable_variables)
    optimizer.factor_gradients(layer)

    @tf.function(input_signature=[tf.TensorSpec([None, 3])])
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x))
        optimizer.apply(tape.gradient(loss, layer.trainable_variables), layer.trainable_variables)

    before = layer.kernel.numpy()
    assert layer.kernel.value.device.endswith("GPU:0")
    for rows in (3, 1000):
        x = tf.random.stateless_normal([rows, 3], [1, rows])
        step(x)
        after = layer.kernel.numpy()
        # Up to 1000 floats of both signs are added up, each sum rounded to 2^-24 of what stands before it cancels.
        np.testing.assert_allclose(after - before, -0.1 * np.repeat(x.numpy().sum(0)[:, None], 4, 1), rtol=1e-3)
        before = after


def test_folded_penalties_are_measured_there():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, kernel_regularizer="l2")])
    optimizer = wdops.optimizers.SGD(0.1)
    wdops.fold_regularizers(model, optimizer)
    kernel = model.layers[0].kernel
    np.testing.assert_allclose(optimizer._own.penalties.values, [0.01 * np.sum(kernel.numpy() ** 2)], rtol=1e-6)


def test_steps_of_many_threads_have_tables_of_their_own():
    lists = [[tf.Variable(tf.zeros(n)) for n in (5, 16385)] for _ in range(4)]

    def run(variables):
        for _ in range(20):
            wdops.ops.apply_sgd(variables, [tf.ones_like(v) for v in variables], lr=1.0)

    threads = [threading.Thread(target=run, args=(variables,)) for variables in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((v.numpy() == -20).all() for variables in lists for v in variables)


def test_slots_on_a_gpu_are_one_capture():
    params, momenta = ([tf.Variable(tf.ones(3)) for _ in range(4)] for _ in range(2))

    @tf.function
    def step():
        momenta[2].assign_add(tf.ones(3))
        wdops.ops.apply_momentum(params, momenta, [tf.ones(3)] * 4, lr=1.0, momentum=1.0)

    captured = [t for t in step.get_concrete_function().captured_inputs if t.dtype == tf.resource]
    # The parameters, the momentum that is written to, and all of them at once.
    assert len(captured) == 4 + 1 + 1
