"""The TensorFlow op: lists, modes, hyperparameters, copies, locks, and that a bad call changes nothing."""

import re
import subprocess
import sys
import threading
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import DTYPES, TERMS, assert_within, names_of, oracle, own_hypers, random_case

import wdops
from wdops import reference
from wdops._load import native, raw_ops


def as_hlo(f):
    """Under XLA without the kernels, as on a GPU."""
    compiled = tf.function(f, jit_compile=True)

    def run(*tensors):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WDOPS_XLA", "hlo")
            return compiled(*tensors)

    return run


MODES = {
    "eager": lambda f: f,
    "graph": tf.function,
    "jit": lambda f: tf.function(f, jit_compile=True),
    "hlo": as_hlo,
}
modes = pytest.mark.parametrize("mode", MODES)
rules = pytest.mark.parametrize("rule", reference.RULES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)

# More than one chunk of 16384, odd, empty first, in the middle and last, scalars; one more than twice the dtypes.
SHAPES = [(0,), (3, 5), (), (2, 0, 3), (16384,), (20001,), (7, 11, 13), (1,), (0, 4)]


def apply(rule, variables, grads, **hypers):
    return getattr(wdops.ops, f"apply_{rule}")(*variables, grads, **hypers)


def make(rule, dtypes, shapes=SHAPES):
    """Lists of arrays: var, each slot, grad; one of each shape, in turn of each of `dtypes`."""
    cases = []
    for i, shape in enumerate(shapes):
        arrays = random_case(rule, dtypes[i % len(dtypes)], int(np.prod(shape)), seed=i)
        cases.append([a.reshape(shape) for a in arrays])
    return [list(arrays) for arrays in zip(*cases, strict=True)]


def to_variables(arrays):
    return [[tf.Variable(a) for a in list_] for list_ in arrays[:-1]], [tf.constant(g) for g in arrays[-1]]


def vector(rule, n):
    """Every hyperparameter of the step as a vector with entries that differ."""
    hypers = own_hypers(rule) | TERMS
    return {
        name: [value * (1 + 0.1 * i) for i in range(n)] if name in TERMS else value for name, value in hypers.items()
    }


def entry(hypers, i):
    return {name: value[i] if isinstance(value, list) else value for name, value in hypers.items()}


@rules
@pytest.mark.parametrize("per_variable", [False, True], ids=["scalars", "vectors"])
def test_a_list_of_every_dtype_matches_the_oracle(rule, per_variable):
    arrays = make(rule, list(DTYPES))
    n = len(SHAPES)
    hypers = vector(rule, n) if per_variable else own_hypers(rule) | TERMS
    wanted = []
    for i in range(n):
        param, *slots, grad = (a[i] for a in arrays)
        wanted.append(oracle(rule, param, slots, grad, entry(hypers, i)))
    for mode in MODES:
        variables, grads = to_variables(arrays)
        MODES[mode](lambda variables=variables, grads=grads: apply(rule, variables, grads, **hypers))()
        for i, (want, bound) in enumerate(wanted):
            for name, list_, w, b in zip(names_of(rule), variables, want, bound, strict=True):
                # XLA may contract a product and a sum into one rounding.
                assert_within(list_[i].numpy(), w, b * (1.5 if mode == "hlo" else 1), f"{mode} {name}[{i}]")


@rules
@pytest.mark.parametrize("mode", ["eager", "graph"])
@dtypes
def test_a_list_has_the_bits_of_the_kernel(rule, mode, dtype, isa):
    arrays = make(rule, [dtype])
    variables, grads = to_variables(arrays)
    hypers = vector(rule, len(SHAPES))
    MODES[mode](lambda: apply(rule, variables, grads, **hypers))()
    for i in range(len(SHAPES)):
        param, *slots, grad = (a[i].copy() for a in arrays)
        wdops.kernels.apply(rule, param, slots, grad, **entry(hypers, i))
        for list_, want in zip(variables, [param, *slots], strict=True):
            assert list_[i].numpy().tobytes() == want.tobytes(), i


_PRINT_HASH = """
import hashlib, sys
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
sys.path.insert(0, sys.argv[2])
from test_ops import *
digest = hashlib.sha256()
for rule in reference.RULES:
    for dtype in DTYPES:
        arrays = make(rule, [dtype], [(70001,), (5,), (70000,)])
        arrays = [[np.tile(large, 10), *others] for large, *others in arrays]
        for a in arrays[0]:
            a[::7] *= np.asarray(1e-39 if dtype != "float16" else 1e-7, a.dtype)
        variables, grads = to_variables(arrays)
        step = lambda: apply(rule, variables, grads, **own_hypers(rule), **TERMS)
        for f in (step, tf.function(step)) * 3:
            f()
        for list_ in variables:
            for v in list_:
                digest.update(v.numpy().tobytes())
print(digest.hexdigest())
"""


def test_the_same_bits_for_every_number_of_threads():
    """Also with subnormals: TensorFlow's pool flushes them, and the calling thread, which helps, does not."""
    hashes = {}
    for threads in (1, 2, 7):
        command = [sys.executable, "-c", _PRINT_HASH, str(threads), __file__.rpartition("/")[0]]
        hashes[threads] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    assert len(set(hashes.values())) == 1, hashes


@modes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", ["sgd", "adam", "lamb", "centered_rmsprop_momentum"])
def test_accumulators_averages_and_the_penalty_of_one_pass(rule, dtype, mode):
    shapes = [(3, 5), (0,), (20001,)]
    arrays = make(rule, [dtype], shapes)
    more = [[x.reshape(s) for x in random_case("momentum", dtype, int(np.prod(s)), 9)] for s in shapes]
    variables, grads = to_variables(arrays)
    accumulators, averages = ([tf.Variable(x[k]) for x in more] for k in (0, 1))
    hypers = own_hypers(rule) | TERMS | {"ema_momentum": 0.6, "l2": [0.1, 0.2, 0.3]}
    lists = {"accumulator": accumulators, "average": averages}
    norms = MODES[mode](
        lambda: wdops.ops.norms(grads, variables[0], accumulator=accumulators, grad_scale=0.5, l1=0.3, l2=[0.1, 0, 0])
    )()
    want_norms = reference.norms(
        arrays[-1], arrays[0], accumulator=[x[0] for x in more], grad_scale=0.5, l1=0.3, l2=[0.1, 0, 0]
    )
    for got, want in zip(norms, want_norms, strict=True):
        # Each term of a g is rounded four times at most, by 2^-24; together they are less than twice as large as g.
        np.testing.assert_allclose(got, want, rtol=8 * 2.0**-24)
    penalty = MODES[mode](
        lambda: apply(rule, variables, grads, **hypers, **lists, scaled_proximal=True, report_penalty=True)
    )()
    for i in range(len(shapes)):
        param, *slots, grad = (a[i] for a in arrays)
        want, bound = oracle(
            rule, param, slots, grad, entry(hypers, i), accumulator=more[i][0], average=more[i][1], scaled_proximal=True
        )
        for name, list_, w, b in zip([*names_of(rule), "average"], [*variables, averages], want, bound, strict=True):
            assert_within(list_[i].numpy(), w, b * (1.5 if mode == "hlo" else 1), f"{name}[{i}]")
        assert not accumulators[i].numpy().any()
        new = variables[0][i].numpy().astype(np.float64)
        np.testing.assert_allclose(
            penalty[i], TERMS["l1"] * np.abs(new).sum() + hypers["l2"][i] * (new**2).sum(), rtol=1e-9
        )


@modes
@pytest.mark.parametrize("l1", [0.0, 0.3])
@pytest.mark.parametrize("accumulated", [False, True])
def test_norms_without_the_penalty_have_the_same_bits(accumulated, l1, mode):
    arrays = make("momentum", list(DTYPES), SHAPES)
    (params, accumulators), grads = to_variables(arrays)
    hypers = {"l1": l1, "l2": [0.1 * (i % 3) for i in range(len(grads))], "grad_scale": 0.5}
    hypers |= {"accumulator": accumulators} if accumulated else {}

    def norms(**report_penalty):
        return MODES[mode](lambda: wdops.ops.norms(grads, params, **hypers, **report_penalty))()

    (norm, penalty, finite), (same, none, also) = norms(), norms(report_penalty=False)
    assert norm.numpy().tobytes() == same.numpy().tobytes()
    assert finite and also
    assert penalty.shape == (len(grads),) and none.shape == (0,)
    assert reference.norms(arrays[-1], arrays[0], report_penalty=False).penalty.shape == (0,)
    bad = [g * np.nan if i == 1 else g for i, g in enumerate(grads)]
    assert not MODES[mode](lambda: wdops.ops.norms(bad, params, **hypers, report_penalty=False))().finite


@rules
@pytest.mark.parametrize("kinks", [{}, {"clip_value": 0.0, "proximal_l1": 0.0}], ids=["kinks", "smooth"])
@pytest.mark.parametrize("lists", ["", "accumulator", "average", "accumulator average"])
def test_squares_that_the_sweep_adds_up_move_no_bit(rule, lists, kinks, isa):
    """The sums have 64 lanes each, and are made behind every 256 elements; 1024 stand for an average that is not."""
    sizes = 0, 1, 8, 63, 64, 65, 127, 128, 255, 256, 257, 1023, 1024, 1025, 1088, 16383, 16384, 16385, 40001
    shapes = [(n,) for n in sizes]
    shapes = [shape for shape in shapes for _ in range(2)]
    arrays = make(rule, ["float32", "float64"], shapes)
    l2 = [0.1 * (i % 5) for i in range(len(shapes))]
    overwrite = [float(i % 4 < 2) for i in range(len(shapes))]
    hypers = own_hypers(rule) | TERMS | kinks
    hypers |= {"l1": 0.0, "l2": l2, "ema_momentum": 0.6, "ema_overwrite": overwrite}

    def result(report_penalty):
        variables, grads = to_variables(arrays)
        # Some slots of float32 are bfloat16.
        for slot in variables[1:]:
            slot[::6] = [tf.Variable(tf.cast(x, tf.bfloat16)) for x in slot[::6]]
        more = {name: [tf.Variable(g) for g in grads] for name in lists.split()}
        penalty = apply(rule, variables, grads, **hypers, **more, report_penalty=report_penalty)
        every = [x for list_ in (*variables, *more.values()) for x in list_]
        return penalty, variables[0], [x.numpy().tobytes() for x in every]

    (_, _, want), (penalty, params, got) = result(False), result(True)
    assert got == want
    no_grads = [tf.zeros_like(p) for p in params]
    np.testing.assert_array_equal(penalty, wdops.ops.norms(no_grads, params, l2=l2).penalty)
    squares = [np.sum(p.numpy().astype(np.float64) ** 2) for p in params]
    np.testing.assert_allclose(penalty, np.multiply(l2, squares), rtol=1e-12)


@modes
@pytest.mark.parametrize("lists", ["", "accumulator"])
@pytest.mark.parametrize("scaled_proximal", [False, True])
def test_nothing_overwrites_a_variable_without_an_average(mode, lists, scaled_proximal):
    def result(ema_overwrite):
        param, v, grad, accumulator = (tf.Variable([0.5, -2.0, 3.0]) for _ in range(4))
        more = {name: accumulator for name in lists.split()}
        MODES[mode](
            lambda: wdops.ops.apply_adagrad(
                param, v, tf.convert_to_tensor(grad), lr=0.1, l2=0.1, proximal_l1=0.1, report_penalty=True,
                scaled_proximal=scaled_proximal, ema_overwrite=ema_overwrite, **more,
            )
        )()  # fmt: skip
        return param.numpy()

    np.testing.assert_array_equal(result(True), result(False))


@pytest.mark.parametrize("mode", ["graph", "jit", "hlo"])
def test_stochastic_rounding_has_the_bits_of_the_kernel(mode):
    param, m, v, grad = random_case("adam", "bfloat16", 20001)
    variables = [tf.Variable(x) for x in (param, m, v)]
    MODES[mode](lambda: wdops.ops.apply_adam(*variables, tf.constant(grad), lr=0.1, step=1, seed=2**40 + 7))()
    wdops.kernels.apply("adam", param, [m, v], grad, lr=0.1, step=1, seed=2**40 + 7)
    for variable, want in zip(variables, (param, m, v), strict=True):
        # Where XLA contracts a product and a sum, another last bit of the float may cross the random threshold.
        same = np.mean(variable.numpy() == want)
        assert same > 0.999 if mode == "hlo" else same == 1


@rules
@pytest.mark.parametrize("terms", ["scalars", "vectors", "options", "squares"])
def test_xla_calls_the_kernels_and_has_their_bits(rule, terms):
    """In a list that is longer than one call takes, whose variables alone do not fill a chunk."""
    arrays = make(rule, list(DTYPES), SHAPES * 4)
    n = len(arrays[0])
    hypers = own_hypers(rule) | TERMS if terms == "scalars" else vector(rule, n)
    if terms == "options":
        hypers |= {"ema_momentum": 0.6, "seed": 7, "scaled_proximal": True}
    if terms == "squares":
        hypers |= {"l1": 0.0}

    def result(mode):
        variables, grads = to_variables(arrays)
        more = [[tf.Variable(g) for g in grads] for _ in range(2)] if terms == "options" else []
        lists = dict(zip(("accumulator", "average"), more, strict=False))

        def step():
            accumulator = {"accumulator": more[0]} if more else {}
            norms = wdops.ops.norms(grads, variables[0], l1=0.1, l2=[0.01 * i for i in range(n)], **accumulator)
            return *norms, apply(rule, variables, grads, **hypers, **lists, report_penalty=True)

        found = MODES[mode](step)()
        return [x.numpy().tobytes() for x in (*found, *(x for list_ in (*variables, *more) for x in list_))]

    assert result("graph") == result("jit")


def test_a_program_of_hlo_has_no_calls(monkeypatch):
    variable = tf.Variable(tf.ones(3))

    def calls():
        @tf.function(jit_compile=True)
        def step():
            norms = wdops.ops.norms([tf.convert_to_tensor(variable)])
            wdops.ops.apply_sgd(variable, tf.ones(3), lr=1.0)
            bias = tf.convert_to_tensor(variable)
            return norms, tf.gradients(wdops.ops.elu(tf.ones((2, 3)), bias), bias)

        return re.findall('custom_call_target="([a-z_]+)"', step.experimental_get_compiler_ir()(stage="hlo"))

    assert sorted(calls()) == ["wdops_activation_grad", "wdops_apply", "wdops_norms"]
    monkeypatch.setenv("WDOPS_XLA", "hlo")
    assert calls() == []


@pytest.mark.parametrize("entries", [1, 70])
def test_xla_refuses_bad_hyperparameters_and_changes_nothing(entries):
    variables, momenta = ([tf.Variable([1.0, 2.0]) for _ in range(70)] for _ in range(2))
    good = [0.5] * entries
    decay = tf.Variable(good if entries > 1 else 0.5, dtype=tf.float64)
    grads = [tf.ones(2)] * 70

    @tf.function(jit_compile=True)
    def step():
        wdops.ops.apply_momentum(variables, momenta, grads, lr=0.1, momentum=0.9, weight_decay=decay)

    decay.assign([*good[:-1], -1.0] if entries > 1 else -1.0)
    where = r" \(entry 69\)" if entries > 1 else ""
    with pytest.raises(tf.errors.InvalidArgumentError, match="weight_decay is -1, but must be at least 0" + where):
        step()
    assert all((x.numpy() == [1.0, 2.0]).all() for x in (*variables, *momenta))
    decay.assign(good if entries > 1 else 0.5)
    step()
    assert all((x.numpy() != [1.0, 2.0]).all() for x in (*variables, *momenta))


@modes
def test_one_variable_needs_no_list(mode):
    var, m, grad = (x.reshape(3, 5) for x in random_case("momentum", "float32", 15))
    hypers = {"lr": 0.1, "momentum": 0.5, "nesterov": False}
    want, bounds = oracle("momentum", var, [m], grad, hypers)

    def check(v, s):
        MODES[mode](lambda: wdops.ops.apply_momentum(v, s, grad, **hypers))()
        for variable, w, b in zip((v, s), want, bounds, strict=True):
            assert_within(variable.numpy(), w, b, variable.name)

    check(tf.Variable(var), tf.Variable(m))
    check(keras.Variable(var), keras.Variable(m))


@pytest.mark.parametrize("mode", ["eager", "graph", "jit"])
@rules
def test_the_reference_takes_the_same_call(mode, rule):
    shapes = [(0,), (3, 5), (20001,)]
    arrays = make(rule, ["float32"], shapes)
    hypers = vector(rule, len(shapes))

    def result(module):
        variables, grads = to_variables(arrays)
        MODES[mode](lambda: getattr(module, f"apply_{rule}")(*variables, grads, **hypers))()
        return variables

    got, want = result(wdops.ops), result(wdops.reference)
    for i in range(len(shapes)):
        param, *slots, grad = (a[i] for a in arrays)
        _, bound = oracle(rule, param, slots, grad, entry(hypers, i))
        for name, g, w, b in zip(names_of(rule), got, want, bound, strict=True):
            # Both are rounded when they are stored, and XLA may contract a product and a sum into one rounding.
            assert_within(g[i].numpy(), w[i].numpy().astype(np.float64), b * 1.5, f"{name}[{i}]")


@modes
def test_a_hyperparameter_is_read_when_the_op_runs(mode):
    """As a number, a tensor, a vector, a tf.Variable, a keras.Variable; a new value does not retrace."""
    lr = tf.Variable(0.0, dtype=tf.float32)
    decay = keras.Variable([0.0, 0.0])
    variables = [tf.Variable([2.0]), tf.Variable([4.0])]
    traces = []

    def step():
        traces.append(1)
        wdops.ops.apply_sgd(variables, [tf.zeros(1)] * 2, lr=lr, weight_decay=decay, l1=tf.constant([0, 0], tf.int32))

    run = MODES[mode](step)
    run()
    assert [v.numpy()[0] for v in variables] == [2, 4]
    lr.assign(0.5)
    decay.assign([0.5, 1.0])
    run()
    assert [v.numpy()[0] for v in variables] == [1.5, 2]
    assert len(traces) == (2 if mode == "eager" else 1)


def test_the_coefficients_are_those_that_the_readme_gives_for_tensorflow():
    p0, l1, l2, lr = np.linspace(-2, 2, 41).astype(np.float32), 0.3, 0.2, 0.25
    plain, penalized, proximal = (tf.Variable(p0) for _ in range(3))
    with tf.GradientTape() as tape:
        loss = l1 * tf.reduce_sum(tf.abs(plain)) + 2 * l2 * tf.nn.l2_loss(plain)
    plain.assign_sub(lr * tape.gradient(loss, plain))
    wdops.ops.apply_sgd(penalized, tf.zeros(41), lr=lr, l1=l1, l2=l2)
    # TensorFlow makes the same sums of float32 in another order, with a rounding by 2^-24 at each of a few steps.
    np.testing.assert_allclose(penalized.numpy(), plain.numpy(), rtol=1e-6)

    grad = tf.constant(p0[::-1] / 3)
    want = tf.Variable(p0)
    tf.raw_ops.ResourceApplyProximalGradientDescent(var=want.handle, alpha=lr, l1=l1, l2=2 * l2, delta=grad)
    wdops.ops.apply_sgd(proximal, grad, lr=lr, proximal_l1=l1, proximal_l2=l2)
    # Here too; what is just beyond the threshold is the difference of two numbers below 1.
    np.testing.assert_allclose(proximal.numpy(), want.numpy(), rtol=1e-6, atol=1e-7)
    assert (proximal.numpy() == 0).any()


def test_a_list_is_one_op():
    variables, grads = to_variables(make("adam", ["float32", "bfloat16"]))
    graph = tf.function(lambda: apply("adam", variables, grads, lr=0.1, step=1)).get_concrete_function().graph
    assert [op.type for op in graph.get_operations() if op.type.startswith("Wdops>")] == ["Wdops>ApplyAdam"]


@modes
def test_an_empty_list_does_nothing(mode):
    MODES[mode](lambda: wdops.ops.apply_momentum([], [], [], lr=0.1))()


@pytest.mark.parametrize("mode", ["eager", "graph"])
@dtypes
def test_a_tensor_read_before_the_step_keeps_its_value(mode, dtype):
    arrays = make("adam", [dtype])
    variables, _ = to_variables(arrays)

    def step():
        reads = [[v.read_value() for v in list_] for list_ in variables]
        # The gradient is the very buffer of the variable, which an identity gradient makes.
        aliases = [v.read_value() for v in variables[0]]
        apply("adam", variables, aliases, lr=0.1, step=1)
        return reads

    reads = MODES[mode](step)()
    for list_, before, values in zip(variables, arrays[:-1], reads, strict=True):
        for variable, old, read in zip(list_, before, values, strict=True):
            assert read.numpy().tobytes() == old.tobytes()
            if old.size > 1:
                assert variable.numpy().tobytes() != old.tobytes()
    for i, param in enumerate(arrays[0]):
        m, v = (np.copy(a[i]) for a in arrays[1:3])
        want, grad = param.copy(), param.copy()
        wdops.kernels.apply("adam", want, [m, v], grad, lr=0.1, step=1)
        assert variables[0][i].numpy().tobytes() == want.tobytes()


def test_a_variable_that_was_read_sparsely_is_updated_in_place():
    variable = tf.Variable(np.ones((8, 2), np.float32))
    variable.scatter_add(tf.IndexedSlices(tf.ones((1, 2)), tf.constant([3])))  # turns copy-on-read on, for good
    read = variable.read_value()
    wdops.ops.apply_sgd(variable, tf.ones((8, 2)), lr=1.0)
    assert read.numpy()[3].tolist() == [2, 2]
    assert variable.numpy()[3].tolist() == [1, 1] and not variable.numpy()[0].any()


def test_steps_in_two_threads_neither_wait_for_ever_nor_lose_an_update():
    """Over the same variables in opposite orders: unsorted locks deadlock here, and no locks lose updates."""
    variables = [tf.Variable(tf.zeros(4)) for _ in range(200)]
    grads = [tf.ones(4)] * 200
    steps = [tf.function(lambda o=o: wdops.ops.apply_sgd(variables[:: int(o)], grads, lr=1.0)) for o in (1, -1)]

    def work(step):
        for _ in range(2000):
            step()

    threads = [threading.Thread(target=work, args=(step,), daemon=True) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    for variable in variables:
        assert (variable.numpy() == -4000).all()


@pytest.mark.parametrize("mode", MODES)
def test_the_bare_op_checks_that_its_lists_are_of_one_length(mode):
    variable = tf.Variable(tf.ones(4))
    hypers = dict.fromkeys(next(r["hypers"] for r in native.rules if r["name"] == "sgd"), 0.5)

    def call(n, grads):
        raw_ops.wdops_apply_sgd(
            var=[variable.handle] * n, accumulator=[], average=[], grad=[tf.ones(4)] * grads, factor=[], **hypers
        )

    for n, grads in ((1, 3), (3, 1)):
        with pytest.raises(
            (ValueError, tf.errors.InvalidArgumentError), match=f"grad has {grads} entries, but var has {n}"
        ):
            MODES[mode](partial(call, n, grads))()
    assert (variable.numpy() == 1).all()


def uninitialized():
    handle = tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=[4], shared_name="never_initialized")

    class Uninitialized:
        pass

    variable = Uninitialized()
    variable.handle = handle
    return variable


def replace(name, i, make):
    """Puts what `make` returns in place of entry i of the argument."""

    def spoil(arguments):
        arguments[name][i] = make()

    return spoil


def _twice(a):
    a["var"][2] = a["var"][0]


def _slot_is_var(a):
    a["v"][1] = a["var"][0]


BAD_CALLS = {
    "the same variable twice": (_twice, r"var\[0\] and var\[2\] are the same variable|var\[2\] and var\[0\]"),
    "a variable as a slot": (_slot_is_var, r"(var\[0\] and v\[1\]|v\[1\] and var\[0\]) are the same variable"),
    "a slot of another shape": (
        replace("v", 2, lambda: tf.Variable(tf.zeros(5))),
        r"v\[2\] has shape \[5\], but var\[2\] has shape \[4\]",
    ),
    "a slot of another rank": (
        replace("m", 0, lambda: tf.Variable(tf.zeros([4, 1]))),
        r"m\[0\] has shape \[4,1\], but var\[0\] has shape \[4\]",
    ),
    "a slot of another dtype": (
        replace("m", 2, lambda: tf.Variable(tf.zeros(4, tf.float64))),
        r"m\[2\] has dtype double, but var\[2\] has dtype float",
    ),
    "a slot of another dtype than the first": (
        replace("v", 1, lambda: tf.Variable(tf.zeros(4, tf.bfloat16))),
        r"v\[1\] has dtype bfloat16, but m\[1\] has dtype float",
    ),
    "a gradient of another shape": (
        replace("grad", 1, lambda: tf.zeros([2, 2])),
        r"grad\[1\] has shape \[2,2\], but var\[1\] has shape \[4\]",
    ),
    "a gradient of another dtype": (
        replace("grad", 2, lambda: tf.zeros(4, tf.float16)),
        r"grad\[2\] has dtype half, but var\[2\] has dtype float",
    ),
    "an integer gradient": (
        replace("grad", 2, lambda: tf.zeros(4, tf.int32)),
        r"grad\[2\] has dtype int32, but must have",
    ),
    "a sparse gradient": (
        replace("grad", 1, lambda: tf.IndexedSlices(tf.ones(1), tf.constant([0]))),
        r"grad\[1\] is a tf.IndexedSlices",
    ),
    "a list that is short": (lambda a: a["m"].pop(), r"m has 2 entries, but var has 3"),
    "a gradient too many": (lambda a: a["grad"].append(tf.zeros(4)), r"grad has 4 entries, but var has 3"),
    "not a variable": (replace("var", 1, lambda: tf.zeros(4)), r"var\[1\] must be a tf.Variable"),
    "a vector of another length": (
        lambda a: a.update(lr=[0.1, 0.2]),
        r"lr has shape \[2\], but must be a scalar or have one entry for each of the 3",
    ),
    "a matrix": (lambda a: a.update(l2=tf.zeros([3, 1])), r"l2 has shape \[3,1\]"),
    "an l1 below 0": (lambda a: a.update(l1=-0.1), r"l1 is -0.1"),
    "a weight_decay that is not a number": (lambda a: a.update(weight_decay=float("nan")), r"weight_decay is nan"),
    "an l2 below 0 in a list": (lambda a: a.update(l2=[0.1, -0.1, 0.1]), r"l2 is \[0.1, -0.1, 0.1\], but must"),
    "an l1 below 0 in an array": (lambda a: a.update(l1=np.array(-0.1)), r"l1 is -0.1"),
    "no lr": (lambda a: a.update(lr=None), r"lr must be a number"),
    "a word": (lambda a: a.update(lr="fast"), r"lr must be a number"),
    "a complex number": (lambda a: a.update(lr=1j), r"lr must be a number"),
    "an empty vector": (lambda a: a.update(beta1=[]), r"beta1 has shape \[0\]"),
    "no gradient": (replace("grad", 1, lambda: None), r"grad\[1\] is None"),
    "a step of 0": (lambda a: a.update(step=0), r"step is 0"),
}
# A tensor's value is not known while XLA compiles.
BAD_VALUES = {
    "an l1 below 0 in a tensor": (lambda a: a.update(l1=tf.constant(-0.1)), r"l1 is -0.1"),
    "a proximal_l2 below 0 in a vector": (
        lambda a: a.update(proximal_l2=tf.constant([0, 0, -1.0])),
        r"proximal_l2 is -1.*var\[2\]",
    ),
    "a negative lr beside a proximal term": (
        lambda a: a.update(lr=-1.0, proximal_l1=0.1),
        r"lr is -1.*must not be negative",
    ),
    "an lr that is not finite": (lambda a: a.update(lr=float("inf")), r"lr is inf, but must be finite"),
    "an uninitialized variable": (replace("var", 1, lambda: uninitialized()), r"var\[1\] is not initialized"),
    "an uninitialized slot": (replace("v", 2, lambda: uninitialized()), r"v\[2\] is not initialized"),
}


@pytest.mark.parametrize(
    ("mode", "case"),
    [(m, c) for m in MODES for c in BAD_CALLS] + [(m, c) for m in ("eager", "graph") for c in BAD_VALUES],
)
def test_a_bad_call_is_named_and_changes_nothing(mode, case):
    spoil, message = (BAD_CALLS | BAD_VALUES)[case]
    arguments = {name: [tf.Variable(tf.fill([4], 0.5)) for _ in range(3)] for name in ("var", "m", "v")}
    arguments["grad"] = [tf.ones(4) for _ in range(3)]
    arguments |= {"lr": 0.1, "step": 1}
    watched = [v for name in ("var", "m", "v") for v in arguments[name]]
    spoil(arguments)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=message):
        MODES[mode](lambda: wdops.ops.apply_adam(**arguments))()
    for variable in watched:
        assert (variable.numpy() == 0.5).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"lr": 0.1, "beta1": 0.9}, "beta1"), ({}, "lr"), ({"lr": 0.1, "l3": 1.0}, "l3")],
)
def test_an_unknown_or_missing_argument_is_a_type_error(arguments, message):
    with pytest.raises(TypeError, match=message):
        wdops.ops.apply_sgd(tf.Variable([1.0]), tf.constant([1.0]), **arguments)


def test_more_than_2_to_the_31_bytes():
    """One variable of 2.1 GiB in bfloat16: byte offsets beyond 32 bits, in the op and in the kernel."""
    n = 2**30 + 2**27 + 3
    variable = tf.Variable(tf.zeros(n, tf.bfloat16))
    wdops.ops.apply_sgd(variable, tf.ones(n, tf.bfloat16), lr=1.0)
    assert variable[-1].numpy() == -1
    assert tf.reduce_all(variable == -1)
