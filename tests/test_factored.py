"""Factored gradients: the same step as with x^T dz, exact norms, and the way from a layer to the step."""

import functools
import platform
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import (
    DTYPES,
    TERMS,
    assert_within,
    names_of,
    on_two_devices,
    oracle,
    own_hypers,
    product_of,
    random_case,
)
from test_ops import MODES, apply

import wdops
from wdops import reference
from wdops._load import native, raw_ops
from wdops.factored import MOST_ROWS, FactoredGradient

# (batch, rows, columns): each width of a register, panel and tile, and one less and more; several tiles down and
# across; nothing.
SHAPES = [
    *[(n, n, n) for n in (1, 6, 7, 8, 9, 12, 13, 15, 16, 17, 31, 32, 33, 36, 37, 63, 64, 65)],
    (3, 700, 100), (2, 3, 4097), (2, 33, 9001), (300, 5, 70), (129, 9, 65), (5, 40000, 1), (1, 1, 20000),
    (65, 40, 1030), (257, 70, 520),  # tiles that are higher for their batch
    (0, 3, 4), (4, 0, 5), (4, 5, 0),
]  # fmt: skip


def ids(shape):
    return "x".join(map(str, shape))


def factors(dtype, batch, rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, n)).astype(DTYPES[dtype]) for n in (rows, columns)]


@functools.cache
def product_of_shape(dtype, shape):
    return product_of(*factors(dtype, *shape))


def stepped(rule, arrays, grad, **hypers):
    variables = [[tf.Variable(a)] for a in arrays]
    penalty = apply(rule, variables, [grad], report_penalty=True, **hypers)
    return [v.numpy() for (v,) in variables], penalty.numpy()


# --- the ops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l1", [TERMS["l1"], 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_the_same_bits_as_the_product(isa, dtype, shape, l1):
    x, dz = factors(dtype, *shape)
    arrays = [a.reshape(shape[1:]) for a in random_case("adam", dtype, shape[1] * shape[2])[:-1]]
    hypers = own_hypers("adam") | TERMS | {"l1": l1}
    got, penalty = stepped("adam", arrays, FactoredGradient(x, dz), **hypers)
    want, of_product = stepped("adam", arrays, product_of_shape(dtype, shape), **hypers)
    for name, g, w in zip(names_of("adam"), got, want, strict=True):
        assert g.tobytes() == w.tobytes(), name
    np.testing.assert_allclose(penalty, of_product, rtol=1e-12)  # added up in other chunks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", reference.RULES)
def test_every_rule_matches_the_oracle(rule, mode):
    shapes = [(5, 33, 70), (0, 3, 4), (3, 2, 4100)]
    hypers = own_hypers(rule) | TERMS
    cases = [
        [a.reshape(s[1:]) for a in random_case(rule, "float32", s[1] * s[2], seed=i)] for i, s in enumerate(shapes)
    ]
    pairs = [factors("float32", *s, seed=i) for i, s in enumerate(shapes)]
    variables = [[tf.Variable(c[k]) for c in cases] for k in range(len(cases[0]) - 1)]
    # Between them a gradient that is a tensor.
    dense = cases[1][-1]
    grads = [FactoredGradient(*pairs[0]), tf.constant(dense), FactoredGradient(*pairs[2])]
    MODES[mode](lambda: apply(rule, variables, grads, **hypers))()
    for i, (param, *slots, _) in enumerate(cases):
        grad = dense if i == 1 else product_of(*pairs[i])
        want, bound = oracle(rule, param, slots, grad, hypers)
        for name, list_, w, b in zip(names_of(rule), variables, want, bound, strict=True):
            # XLA may contract a product and a sum, and add up in another order, which a rule may magnify.
            slack = 1 if mode not in ("jit", "hlo") else 1.5 + 8 * len(pairs[i][0])
            assert_within(list_[i].numpy(), w, b * slack, f"{name}[{i}]")


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulator_and_average_belong_to_the_step(isa, dtype):
    x, dz = factors(dtype, 5, 40, 600)
    param, m, v, _ = (a.reshape(40, 600) for a in random_case("adam", dtype, 24000))
    results = []
    for grad in (FactoredGradient(x, dz), product_of(x, dz)):
        p, m_, v_, accumulator, average = (tf.Variable(a) for a in (param, m, v, m, param))
        wdops.ops.apply_adam(
            p, m_, v_, grad, accumulator=accumulator, average=average, **own_hypers("adam"), **TERMS, seed=7
        )
        results.append([a.numpy().tobytes() for a in (p, m_, v_, accumulator, average)])
    assert results[0] == results[1]


_PRINT_HASH = """
import hashlib, sys
import numpy as np, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
import wdops
from wdops.factored import FactoredGradient
rng = np.random.default_rng(0)
digest = hashlib.sha256()
for batch, rows, columns in [(64, 1000, 300), (9, 50, 9000), (300, 64, 64)]:
    x, dz = (tf.constant(rng.normal(size=(batch, n)), tf.float32) for n in (rows, columns))
    p = tf.Variable(rng.normal(size=(rows, columns)), dtype=tf.float32)
    m = tf.Variable(tf.zeros_like(p))
    for penalized in ({}, {"var": p, "l2": 0.1}):
        for x_ in wdops.ops.norms(FactoredGradient(x, dz), **penalized):
            digest.update(x_.numpy().tobytes())
    penalty = wdops.ops.apply_momentum(p, m, FactoredGradient(x, dz), lr=0.1, momentum=0.9, l2=0.1, report_penalty=True)
    for x_ in (p, m, penalty):
        digest.update(x_.numpy().tobytes())
print(digest.hexdigest())
"""


def test_the_same_bits_for_every_number_of_threads():
    hashes = [
        subprocess.run([sys.executable, "-c", _PRINT_HASH, str(n)], check=True, capture_output=True, text=True).stdout
        for n in (1, 2, 7)
    ]
    assert len(hashes[0]) == 65
    assert hashes[0] == hashes[1] == hashes[2]


# --- norms -------------------------------------------------------------------------------------------------------


# By the factors where nothing is added and the batch is thin; by the elements elsewhere.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("penalized", [False, True], ids=["alone", "penalized"])
def test_norms_match_the_oracle(isa, dtype, shape, penalized):
    x, dz = factors(dtype, *shape)
    var = {"var": tf.Variable(random_case("sgd", dtype, shape[1] * shape[2])[0].reshape(shape[1:]))}
    more = {"l1": 0.3, "l2": 0.2, **var} if penalized else {}
    got = wdops.ops.norms(FactoredGradient(x, dz), grad_scale=0.5, **more)
    want = reference.norms(FactoredGradient(x, dz), grad_scale=0.5, **more)
    # What is added up is rounded once for each row of the batch, and by its storing in 16 bits.
    rounding = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-9, "float16": 2.0**-11}[dtype]
    np.testing.assert_allclose(got.norm, want.norm, rtol=rounding * (2 + shape[0]) + 1e-14)
    np.testing.assert_allclose(got.penalty, want.penalty, rtol=1e-6)
    assert got.finite.numpy()


@pytest.mark.parametrize("mode", MODES)
def test_norms_with_an_accumulator(mode):
    x, dz = factors("float32", 5, 33, 70)
    accumulator = tf.Variable(random_case("sgd", "float32", 33 * 70)[0].reshape(33, 70))
    hypers = {"accumulator": accumulator, "accumulation_scale": 0.25, "grad_scale": 3.0}
    got = MODES[mode](lambda: wdops.ops.norms([FactoredGradient(x, dz)], **hypers))()
    want = reference.norms([FactoredGradient(x, dz)], **hypers)
    np.testing.assert_allclose(got.norm, want.norm, rtol=1e-6)


def test_a_norm_that_cancels_is_exact():
    """Two rows that all but cancel: the sum over pairs of rows is then far smaller than its terms."""
    x, dz = factors("float32", 2, 60, 60)
    x[1], dz[1] = x[0], -dz[0] * np.float32(1 + 2**-12)
    want = np.linalg.norm(x[0].astype(np.float64)) * np.linalg.norm(dz[0].astype(np.float64) + dz[1])
    np.testing.assert_allclose(wdops.ops.norms(FactoredGradient(x, dz)).norm.numpy(), [want], rtol=1e-7)


@pytest.mark.parametrize("exponent", [4, 12, 20, 28, 36])
def test_a_norm_of_float64_that_cancels_is_exact(exponent):
    """As far as the elements are: of the sum over pairs of rows, half of the digits would be left, or none."""
    x, dz = factors("float64", 2, 60, 60)
    x[1], dz[1] = x[0], -dz[0] * (1 + 2.0**-exponent)
    want = np.linalg.norm(x[0]) * np.linalg.norm(dz[0] + dz[1])
    got = wdops.ops.norms(FactoredGradient(x, dz)).norm.numpy()
    np.testing.assert_allclose(got, [want], rtol=2.0 ** (exponent - 52) + 2.0**-40)


def test_a_norm_of_float64_sees_factors_whose_squares_underflow():
    x, dz = np.full((2, 40), 1e-170), np.full((2, 40), 1e150)
    x[1], dz[1] = 1e-12, 1e-12
    want = np.linalg.norm(x.T @ dz)
    np.testing.assert_allclose(wdops.ops.norms(FactoredGradient(x, dz)).norm.numpy(), [want], rtol=1e-14)


@pytest.mark.parametrize("scale", [1e39, 1e-39, -1e39, 0.0])
def test_a_scale_that_no_float_holds_is_measured_as_the_step_takes_it(scale):
    x, dz = (np.full((1, 40), 1e-3, "f4") for _ in range(2))
    got, dense = (wdops.ops.norms(g, grad_scale=scale) for g in (FactoredGradient(x, dz), tf.constant(x.T @ dz)))
    np.testing.assert_array_equal(got.norm, dense.norm)
    assert got.finite.numpy() == dense.finite.numpy() == (abs(scale) < 1)


def test_an_empty_vector_for_dz_is_refused_where_its_rank_is_not_known():
    p = tf.Variable(tf.ones([3, 3]))

    @tf.function(input_signature=[tf.TensorSpec(None)])
    def step(dz):
        wdops.ops.apply_sgd(p, FactoredGradient(tf.ones([3, 3]), dz), lr=0.1)

    with pytest.raises(tf.errors.InvalidArgumentError, match=r"\[0\]"):
        step(tf.zeros([0]))
    assert (p.numpy() == 1).all()
    step(tf.ones([3, 3]))
    assert (p.numpy() != 1).all()


@pytest.mark.parametrize(
    ("dtype", "value", "finite"),
    [
        ("float32", np.nan, False), ("float32", np.inf, False), ("float32", 1e30, False), ("float32", 1e18, True),
        ("float64", np.nan, False), ("float64", 1e200, False), ("float64", 1e100, True), ("float16", 300, False),
        ("float16", 100, True), ("bfloat16", np.inf, False), ("bfloat16", 1e30, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("penalized", [False, True], ids=["alone", "penalized"])
def test_finite_says_what_the_elements_are(isa, dtype, value, finite, penalized):
    """Factors that are finite may have a product that is not."""
    x, dz = factors(dtype, 3, 40, 50)
    x[1, 7] = dz[1, 9] = value
    with np.errstate(all="ignore"):
        assert np.isfinite(product_of(x, dz).astype(np.float64)).all() == finite
    more = {"var": tf.Variable(np.ones((40, 50), DTYPES[dtype])), "l2": 0.1} if penalized else {}
    assert wdops.ops.norms(FactoredGradient(x, dz), **more).finite.numpy() == finite


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "dz", "message"),
    [
        (np.ones((2, 3), "f4"), np.ones((3, 4), "f4"), r"grad\[0\].*\[2,3\].*\[3,4\].*batch"),
        (np.ones((2, 5), "f4"), np.ones((2, 4), "f4"), r"grad\[0\].*\[2,5\].*var\[0\].*\[3,4\]"),
        (np.ones((2, 3), "f4"), np.ones((2, 5), "f4"), r"grad\[0\].*\[2,5\].*var\[0\].*\[3,4\]"),
        (np.ones((2, 2, 3), "f4"), np.ones((2, 4), "f4"), r"grad\[0\].*\[2,2,3\]"),
        (np.ones((2, 3), "f4"), np.ones((2, 4), "f8"), r"grad\[0\].*dz has dtype double"),
        (np.ones((2, 3), "f8"), np.ones((2, 4), "f8"), r"grad\[0\] has dtype double"),
        (np.ones((2, 3), "f4"), np.ones(4, "f4"), r"grad\[0\]"),
        (np.ones((3, 4), "f4"), np.ones(0, "f4"), r"grad\[0\].*\(3, 4\).*\(0,\)"),
    ],
    ids=["batch", "rows", "columns", "rank", "dz dtype", "dtype", "vector", "empty vector"],
)
@pytest.mark.parametrize("mode", MODES)
def test_factors_that_do_not_fit_are_refused(mode, x, dz, message):
    p, m = tf.Variable(tf.ones([3, 4])), tf.Variable(tf.ones([3, 4]))

    def step():
        wdops.ops.apply_momentum(p, m, FactoredGradient(x, dz), lr=0.1, momentum=0.5)

    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=message):
        MODES[mode](step)()
    assert (p.numpy() == 1).all() and (m.numpy() == 1).all()


@pytest.mark.parametrize(
    ("factored", "factors", "message"),
    [
        ([0], 0, "factored has 1 entries, but factor has 0"),
        ([2], 1, r"factored\[0\] is 2, but must be another variable of the 2"),
        ([1, 1], 2, r"factored\[1\] is 1, but must be another variable of the 2"),
        ([-1], 1, r"factored\[0\] is -1"),
    ],
    ids=["length", "beyond", "twice", "negative"],
)
def test_the_bare_op_checks_which_are_factored(factored, factors, message):
    variables = [tf.Variable(tf.ones([3, 4])) for _ in range(2)]
    hypers = dict.fromkeys(next(r["hypers"] for r in native.rules if r["name"] == "sgd"), 0.5)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=message):
        raw_ops.wdops_apply_sgd(
            var=[v.handle for v in variables], accumulator=[], average=[], grad=[tf.ones([3, 4])] * 2,
            factor=[tf.ones([2, 4])] * factors, factored=factored, **hypers,
        )  # fmt: skip
    assert all((v.numpy() == 1).all() for v in variables)


# --- from a layer to the step --------------------------------------------------------------------------------------


def network(dims=1, shared=False, l2=1e-3, dtype=None):
    keras.utils.set_random_seed(1)
    regularizer = keras.regularizers.L2(l2) if l2 else None
    inputs = keras.Input((3,) * (dims - 1) + (24,))
    layer = keras.layers.Dense(24, activation="elu", kernel_regularizer=regularizer, dtype=dtype, name="first")
    x = layer(inputs)
    if shared:
        x = layer(x)
    return keras.Model(inputs, keras.layers.Dense(4, kernel_regularizer=regularizer, dtype=dtype, name="last")(x))


def data(samples, dims=1):
    rng = np.random.default_rng(0)
    between = (3,) * (dims - 1)
    x, y = (rng.normal(size=(samples, *between, n)) for n in (24, 4))
    return x.astype("float32"), y.astype("float32")


def formed_products(function):
    """How many gradients of matrices run in a graph: what has an effect is reached from them."""
    ops = function.graph.get_operations()
    products = [op for op in ops if op.type == "MatMul" and op.get_attr("transpose_a")]
    assert products
    wanted = [op for op in ops if op.op_def.is_stateful] + [x.op for x in function.outputs]
    reached = {op.name for op in wanted}
    while wanted:
        op = wanted.pop()
        before = [x.op for x in op.inputs] + list(op.control_inputs)
        wanted += [o for o in before if o.name not in reached]
        reached |= {o.name for o in before}
    return sum(op.name in reached for op in products)


def train(optimizer, factored, steps, batch, mode="graph", **network_options):
    """Trains, and returns the weights and how many of the gradients are formed."""
    model = network(**network_options)
    optimizer.build(model.trainable_variables)
    if network_options.get("l2", True):
        wdops.fold_regularizers(model, optimizer)
    if factored:
        assert optimizer.factor_gradients(model) == ["first/kernel", "last/kernel"]
    x, y = data(batch, network_options.get("dims", 1))

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((tf.cast(model(x, training=True), tf.float32) - y) ** 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    step = MODES[mode](step)
    for _ in range(steps):
        step(x, y)
    formed = formed_products(step.get_concrete_function(x, y)) if mode == "graph" else None
    return [v.numpy() for v in model.trainable_variables], formed


OPTIMIZERS = {
    "clipped momentum": lambda: wdops.optimizers.SGD(0.05, momentum=0.9, global_clipnorm=0.1),
    "adam": lambda: wdops.optimizers.Adam(1e-2),
    "adamw, each clipped": lambda: wdops.optimizers.AdamW(1e-2, weight_decay=0.1, clipnorm=0.05),
}


without_fma_they_are_formed = pytest.mark.skipif(not native.has_fma(), reason="factors are not kept without one")


@without_fma_they_are_formed
@pytest.mark.filterwarnings("ignore:.*both a regularizer")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("batch", [1, 7, 64, 512])
def test_training_is_that_with_plain_gradients(optimizer, batch):
    got, formed = train(OPTIMIZERS[optimizer](), True, 50, batch)
    want, all_formed = train(OPTIMIZERS[optimizer](), False, 50, batch)
    clips = "clip" in optimizer
    assert (formed, all_formed) == (2 if clips and batch > MOST_ROWS[2] else 0, 2)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=2e-5 * np.abs(w).max())


VARIANTS = {
    "shared layer": ({"shared": True}, {}),
    "rank 3": ({"dims": 2}, {}),
    "rank 4": ({"dims": 3}, {}),
    "bfloat16 compute": ({"dtype": "mixed_bfloat16"}, {}),
    "no penalty, clipped": ({"l2": 0}, {"global_clipnorm": 0.01}),
    "averaged": ({}, {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3}),
    "accumulated": ({}, {"gradient_accumulation_steps": 3, "global_clipnorm": 0.05}),
    "skipping": ({}, {"skip_nonfinite": True}),
    "all": (
        {"shared": True, "dims": 2},
        {"gradient_accumulation_steps": 2, "clipvalue": 0.01, "skip_nonfinite": True, "use_ema": True},
    ),
}


@without_fma_they_are_formed
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_stands_around_the_step(variant):
    options, arguments = VARIANTS[variant]
    make = lambda: wdops.optimizers.SGD(0.05, momentum=0.9, proximal_l1=1e-3, **arguments)  # noqa: E731
    got, formed = train(make(), True, 6, 7, **options)
    want, _ = train(make(), False, 6, 7, **options)
    assert formed == 0
    # The plain gradient of bfloat16 factors is itself rounded to bfloat16.
    tolerance = 2.0**-8 if "dtype" in options else 1e-5
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * np.abs(w).max())


@without_fma_they_are_formed
def test_a_loss_scale_optimizer_factors_as_the_one_inside():
    make = lambda: wdops.optimizers.LossScaleOptimizer(  # noqa: E731
        wdops.optimizers.SGD(0.05, momentum=0.9), initial_scale=8.0
    )
    got, formed = train(make(), True, 6, 7)
    want, _ = train(make(), False, 6, 7)
    assert formed == 0
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.abs(w).max())


@without_fma_they_are_formed
def test_lamb_forms_a_gradient_that_it_needs_twice_of_a_large_batch():
    make = lambda: wdops.optimizers.Lamb(1e-2)  # noqa: E731
    for batch, formed in ((MOST_ROWS[2], 0), (MOST_ROWS[2] + 1, 2)):
        got, found = train(make(), True, 3, batch)
        want, _ = train(make(), False, 3, batch)
        assert found == formed
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.abs(w).max())


@pytest.mark.parametrize("jit", [False, True])
def test_fit_with_batches_of_a_size_that_is_known_late(jit):
    """Of 130 samples in batches of 100 the first is beyond the rows that are worth it, the second is not."""
    weights = []
    for factored in (False, True):
        model = network()
        optimizer = wdops.optimizers.AdamW(1e-2, weight_decay=0.0, global_clipnorm=0.05)
        model.compile(optimizer, loss="mse", jit_compile=jit)
        wdops.fold_regularizers(model, optimizer)
        if factored:
            optimizer.factor_gradients(model)
        model.fit(*data(130), batch_size=100, epochs=3, verbose=0, shuffle=False)
        weights.append(model.get_weights())
    for g, w in zip(*weights, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.abs(w).max())


def test_factors_are_kept_where_a_product_is_an_instruction(isa):
    grad = FactoredGradient(*factors("float32", 3, 5, 7))
    kept = wdops.factored.worthwhile(grad, products=1, device="/device:CPU:0") is grad
    assert kept == native.has_fma() == (isa != "baseline" or platform.machine() != "x86_64")


@without_fma_they_are_formed
@pytest.mark.parametrize("batch", [MOST_ROWS[2], MOST_ROWS[2] + 1])
def test_the_choice_at_run_time(batch):
    """Of factors whose batch is not known while the graph is made: kept, or formed with the same bits."""
    x, dz = factors("float32", batch, 65, 130)

    @tf.function(input_signature=[tf.TensorSpec([None, 65]), tf.TensorSpec([None, 130])])
    def choose(x, dz):
        return wdops.factored.worthwhile(FactoredGradient(x, dz), products=2, device="/device:CPU:0")

    grad, factor = choose(x, dz)
    if batch <= MOST_ROWS[2]:
        assert grad.numpy().tobytes() == x.tobytes() and factor.numpy().tobytes() == dz.tobytes()
    else:
        assert grad.numpy().tobytes() == product_of(x, dz).tobytes() and factor.shape == [0]
    p, q = tf.Variable(tf.ones([65, 130])), tf.Variable(tf.ones([65, 130]))
    wdops.ops.apply_sgd(p, [(grad, factor)], lr=0.1)
    wdops.ops.apply_sgd(q, product_of(x, dz), lr=0.1)
    assert p.numpy().tobytes() == q.numpy().tobytes()


def test_a_step_that_is_not_finite_changes_nothing():
    model = network()
    optimizer = wdops.optimizers.AdamW(1e-2, weight_decay=0.0, skip_nonfinite=True)
    model.compile(optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    wdops.fold_regularizers(model, optimizer)
    optimizer.factor_gradients(model)
    before = [v.numpy() for v in (*model.trainable_variables, *optimizer.variables)]
    x, y = data(16)
    x[3, 5] = np.inf
    model.fit(x, y, batch_size=16, verbose=0)
    assert not optimizer.step_applied.numpy()
    for a, b in zip(before, [*model.trainable_variables, *optimizer.variables], strict=True):
        assert a.tobytes() == b.numpy().tobytes()


@pytest.mark.filterwarnings("error")
def test_a_tape_gives_the_whole_gradient():
    """Whoever asks for it has it, beside a step that does not form it."""
    model = network(l2=0)
    optimizer = wdops.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    optimizer.factor_gradients(model)
    x, y = data(7)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        grads = tape.gradient(loss, model.trainable_variables)
        with tf.control_dependencies(grads):
            before = [tf.identity(v) for v in model.trainable_variables]
        with tf.control_dependencies(before):
            optimizer.apply(grads, model.trainable_variables)
        return grads, before

    grads, before = step()
    for g, b, v in zip(grads, before, model.trainable_variables, strict=True):
        assert g.shape == v.shape
        np.testing.assert_allclose(v.numpy(), b - 0.1 * g, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["read elsewhere", "changed", "penalized"])
def test_a_gradient_that_is_no_product_any_more_is_right_and_warned_of(how):
    results = []
    for factored in (True, False):
        model = network(l2=1e-3 if how == "penalized" else 0)
        optimizer = wdops.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)
        if factored:
            optimizer.factor_gradients(model)
        x, y = data(7)

        @tf.function
        def step(model=model, optimizer=optimizer, x=x, y=y):
            variables = model.trainable_variables
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x) - y) ** 2) + tf.add_n([*model.losses, 0.0])
                if how == "read elsewhere":
                    loss += tf.reduce_sum(model.layers[1].kernel[3])
            grads = tape.gradient(loss, variables)
            optimizer.apply([2 * g for g in grads] if how == "changed" else grads, variables)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
        of_first = [str(w.message) for w in caught if "first/kernel is not factored" in str(w.message)]
        assert len(of_first) == factored
        assert not factored or "fold_regularizers" in of_first[0]
        results.append([v.numpy() for v in model.trainable_variables])
    for g, w in zip(*results, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.abs(w).max())


@pytest.mark.filterwarnings("error")
def test_a_tied_kernel_has_factors_too():
    """Where a kernel multiplies in another place, and even from the other side, its gradient is a sum of products."""
    results = []
    for factored in (True, False):
        model = network(l2=0)
        optimizer = wdops.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)
        if factored:
            optimizer.factor_gradients(model)
        x, y = data(7)

        @tf.function
        def step(model=model, optimizer=optimizer, x=x, y=y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x) - y) ** 2)
                loss += tf.reduce_sum(tf.matmul(x, model.layers[1].kernel, transpose_b=True) ** 2) / 100
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        step()
        assert formed_products(step.get_concrete_function()) == (0 if factored else 3)
        results.append([v.numpy() for v in model.trainable_variables])
    for g, w in zip(*results, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.abs(w).max())


def test_a_model_that_is_not_built_is_refused():
    model = keras.Sequential([keras.layers.Dense(3, name="late")])
    with pytest.raises(ValueError, match=r"layer .* is not built"):
        wdops.optimizers.SGD(0.1).factor_gradients(model)


def test_as_indexed_slices_it_is_the_whole_gradient():
    x, dz = factors("float32", 5, 3, 4)
    grad = FactoredGradient(x, dz)
    assert grad.shape == [3, 4] and grad.dtype == tf.float32
    np.testing.assert_allclose(tf.convert_to_tensor(grad), product_of(x, dz), rtol=1e-6)
    np.testing.assert_allclose(grad.numpy(), product_of(x, dz), rtol=1e-6)
    optimizer, variable = keras.optimizers.SGD(1.0), keras.Variable(np.zeros((3, 4), "f4"))
    optimizer.apply([grad], [variable])
    np.testing.assert_allclose(variable.numpy(), -product_of(x, dz), rtol=1e-5)


# --- wdops.layers.Dense ----------------------------------------------------------------------------------------------


def dense(**arguments):
    keras.utils.set_random_seed(1)
    layer = wdops.layers.Dense(5, activation="elu", name="first", **arguments)
    layer.build((None, 24))
    return layer


def stepped_by_factors(layer):
    """The layer, and the optimizer that takes its factors as long as it lives."""
    optimizer = wdops.optimizers.SGD(0.1)
    optimizer.build(layer.trainable_variables)
    return layer, optimizer


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["eager", "graph", "jit"])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "float64"])
def test_dense_hands_over_factors(mode, dims, policy):
    """Also eagerly, where what the tape gives are the factors, and to any optimizer the gradient."""
    x, _ = data(7, dims)
    kernels, found = [], []
    for factored in (True, False):
        layer = dense(factored_gradient=factored, dtype=policy)
        optimizer = wdops.optimizers.SGD(0.1, momentum=0.9)
        optimizer.build(layer.trainable_variables)

        def step(layer=layer, optimizer=optimizer):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.cast(layer(x), tf.float32) ** 2)
            grads = tape.gradient(loss, layer.trainable_variables)
            optimizer.apply(grads, layer.trainable_variables)
            return grads[0]

        found.append(MODES[mode](step)())
        kernels.append(layer.kernel.numpy())
    got, formed = found
    assert isinstance(got, FactoredGradient) == (mode == "eager")
    assert got.dtype == layer.kernel.dtype
    is_bfloat16 = policy == "mixed_bfloat16"
    tolerance = 2.0**-8 if is_bfloat16 else 1e-6
    if mode == "eager":
        exact = np.float64(got.x).T @ np.float64(got.dz)
        scale = np.abs(exact).max()
        np.testing.assert_allclose(tf.convert_to_tensor(got), exact, rtol=0, atol=1e-6 * scale)
        # Where a processor has no instruction for it, TensorFlow rounds a product of bfloat16 behind every row.
        of_formed = len(got.x) * 2.0**-9 if is_bfloat16 else tolerance
        np.testing.assert_allclose(formed, exact, rtol=0, atol=of_formed * scale)
    else:
        np.testing.assert_allclose(got, formed, rtol=0, atol=tolerance * np.abs(formed).max())
    np.testing.assert_allclose(*kernels, rtol=0, atol=tolerance * np.abs(kernels[1]).max())


EAGER = {
    "sgd": lambda o: o.SGD(0.1),
    "adam": lambda o: o.Adam(1e-2),
    "clipped by value": lambda o: o.Adam(1e-2, clipvalue=0.01),
    "clipped by norm": lambda o: o.RMSprop(1e-2, clipnorm=0.1),
    "averaged": lambda o: o.AdamW(1e-2, use_ema=True, global_clipnorm=0.1),
}


@pytest.mark.filterwarnings("ignore:.*is not factored")
@pytest.mark.parametrize("options", EAGER)
@pytest.mark.parametrize("module", ["wdops", "keras"])
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_eager_training_of_a_layer_that_is_called_several_times(calls, module, options):
    """Joined by the tape, factors would be rows of a sparse gradient, and each row a gradient of its own."""
    x, _ = data(7)
    kernels = []
    for factored in (True, False):
        layer = dense(factored_gradient=factored)
        optimizer = EAGER[options]({"wdops": wdops, "keras": keras}[module].optimizers)
        optimizer.build(layer.trainable_variables)
        for _ in range(3):
            with tf.GradientTape() as tape:
                loss = tf.add_n([tf.reduce_mean(layer((k + 1) * x) ** 2) for k in range(calls)])
            grads = tape.gradient(loss, layer.trainable_variables)
            assert isinstance(grads[0], FactoredGradient) == (factored and calls == 1 and module == "wdops")
            optimizer.apply(grads, layer.trainable_variables)
        kernels.append(layer.kernel.numpy())
    np.testing.assert_allclose(*kernels, rtol=0, atol=2e-5)


def test_what_is_computed_from_factors_is_computed_from_the_gradient():
    x, dz = factors("float32", 5, 3, 4)
    grad, whole = FactoredGradient(x, dz), product_of(x, dz)
    for got, want in [
        (2 * grad, 2 * whole), (grad * 2.0, 2 * whole), (grad + whole, 2 * whole), (grad + grad, 2 * whole),
        (1 - grad, 1 - whole), (grad / 3, whole / 3), (-grad, -whole), (abs(grad), abs(whole)), (grad**2, whole**2),
        (1 / grad, 1 / whole), (grad // 2, whole // 2), (1 // grad, 1 // whole), (grad % 2, whole % 2),
        (2 % grad, 2 % whole), (2**grad, 2**whole), (grad @ whole.T, whole @ whole.T),
        (tf.transpose(whole) @ grad, whole.T @ whole), (grad > 0, whole > 0), (grad >= 1, whole >= 1),
        (grad < 0, whole < 0), (grad <= 1, whole <= 1),
        (grad[1], whole[1]), (grad[:, 2:], whole[:, 2:]), (len(grad), 3), (list(grad), list(whole)), (grad.ndim, 2),
        (grad.get_shape(), whole.shape), (np.asarray(grad), whole), (tf.norm(grad), np.linalg.norm(whole)),
    ]:  # fmt: skip
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_product_that_fits_a_narrow_dtype_is_not_made_of_factors_that_do_not():
    """A gradient that is compressed to float16 on its way: x alone would overflow there."""
    x, y = data(7)
    results = []
    for factored in (True, False):
        model = network(l2=0)
        optimizer = wdops.optimizers.SGD(1e-6)
        optimizer.build(model.trainable_variables)
        if factored:
            optimizer.factor_gradients(model)

        @tf.function
        def step(model=model, optimizer=optimizer):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(1e-4 * (model(1e5 * x) - y))
            grads = tape.gradient(loss, model.trainable_variables)
            grads = [tf.cast(tf.cast(g, tf.float16), tf.float32) for g in grads]
            optimizer.apply(grads, model.trainable_variables)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step()
        results.append([v.numpy() for v in model.trainable_variables])
    for g, w in zip(*results, strict=True):
        assert np.isfinite(w).all()
        np.testing.assert_array_equal(g, w)


def test_dense_with_a_keras_optimizer():
    x, y = data(32)
    weights = []
    for factored in (True, False):
        keras.utils.set_random_seed(1)
        layer = wdops.layers.Dense(4, factored_gradient=factored)
        model = keras.Sequential([keras.Input((24,)), layer])
        model.compile(keras.optimizers.Adam(1e-2, global_clipnorm=0.1), loss="mse", run_eagerly=True)
        model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
        weights.append(model.get_weights())
    for g, w in zip(*weights, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("activation", [None, "softmax", "tanh"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_hands_over_factors_whatever_its_activation(activation, use_bias):
    x, _ = data(7)
    layer = wdops.layers.Dense(5, activation=activation, use_bias=use_bias, factored_gradient=True)
    theirs = keras.layers.Dense(5, activation=activation, use_bias=use_bias)
    for one in (layer, theirs):
        one.build((None, 24))
    theirs.set_weights(layer.get_weights())
    layer, _optimizer = stepped_by_factors(layer)
    grads = []
    for one in (layer, theirs):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(one(x) ** 2)
        grads.append(tape.gradient(loss, one.kernel.value))
    assert isinstance(grads[0], FactoredGradient)
    np.testing.assert_allclose(grads[0].values, grads[1], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("error")
def test_an_optimizer_that_its_first_step_builds_gets_factors_from_then_on():
    x, _ = data(7)
    layer, optimizer = dense(factored_gradient=True), wdops.optimizers.SGD(0.1)
    for step in range(3):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(layer(x) ** 2)
        grads = tape.gradient(loss, layer.trainable_variables)
        assert isinstance(grads[0], FactoredGradient) == (step > 0)
        optimizer.apply(grads, layer.trainable_variables)


class OfUnitNorm(wdops.layers.Dense):
    @property
    def kernel(self):
        kernel = tf.convert_to_tensor(super().kernel)
        return kernel / tf.norm(kernel)


def test_the_kernel_is_the_one_that_the_layer_has():
    """In a scope that gives it another value, and in a subclass that makes it from the variable."""
    x, _ = data(7)
    layer, _optimizer = stepped_by_factors(dense(factored_gradient=True))
    others = [tf.random.normal(v.shape) for v in layer.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(others)
        output, _ = layer.stateless_call(others, [], x)
    np.testing.assert_allclose(output, tf.nn.elu(x @ others[0] + others[1]), rtol=1e-5, atol=1e-5)
    assert all(g is not None for g in tape.gradient(output, others))

    normed = OfUnitNorm(5, use_bias=False, factored_gradient=True)
    normed.build((None, 24))
    normed, _optimizer = stepped_by_factors(normed)
    np.testing.assert_allclose(normed(x), x @ normed.kernel, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "bool", "bfloat16", "float64"])
@pytest.mark.parametrize("autocast", [True, False])
def test_inputs_of_another_dtype_are_promoted_as_in_keras(dtype, autocast):
    x = tf.cast(tf.constant([[0, 1, 2]]), dtype)
    layers = [
        wdops.layers.Dense(4, use_bias=False, factored_gradient=True, autocast=autocast),
        keras.layers.Dense(4, use_bias=False, autocast=autocast),
    ]
    for layer in layers:
        layer.build((None, 3))
    layers[0].set_weights(layers[1].get_weights())
    ours, _optimizer = stepped_by_factors(layers[0])
    got, want = ours(x), layers[1](x)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("module", ["wdops", "keras"])
@pytest.mark.parametrize("reader", ["a layer", "a lookup"])
def test_eager_training_where_something_else_reads_the_kernel(reader, module):
    x, _ = data(7)
    kernels = []
    for factored in (True, False):
        layer, tied = (dense(factored_gradient=factored) for _ in range(2))
        tied._tracker.unlock()
        tied._kernel = layer._kernel
        optimizer = (wdops if module == "wdops" else keras).optimizers.Adam(1e-2)
        optimizer.build(layer.trainable_variables)
        for _ in range(3):
            with tf.GradientTape() as tape:
                other = tied(2 * x) if reader == "a layer" else tf.gather(layer._kernel.value, [1, 3, 3])
                loss = tf.reduce_mean(layer(x) ** 2) + tf.reduce_mean(other**2)
            optimizer.apply(tape.gradient(loss, layer.trainable_variables), layer.trainable_variables)
        kernels.append(layer.kernel.numpy())
    np.testing.assert_allclose(*kernels, rtol=0, atol=2e-5)


def test_forward_mode_and_second_derivatives_eagerly():
    x = tf.constant(data(7)[0])
    results = []
    for factored in (True, False):
        layer, _optimizer = stepped_by_factors(dense(factored_gradient=factored))
        kernel, towards = layer._kernel.value, tf.ones_like(layer._kernel.value)
        of_both = []
        for primal, tangent in ((x, tf.ones_like(x)), (kernel, towards)):
            with tf.autodiff.ForwardAccumulator(primal, tangent) as accumulator:
                output = layer(x)
            of_both.append(accumulator.jvp(output))
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                loss = tf.reduce_sum(layer(x) ** 2)
            grad = inner.gradient(loss, kernel)
        results.append([*of_both, outer.gradient(grad, kernel, output_gradients=towards)])
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


_REPLICAS = """
x = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
for module in (keras, wdops):
    losses = []
    for factored in (True, False):
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            keras.utils.set_random_seed(0)
            layers = [wdops.layers.Dense(n, factored_gradient=factored) for n in (4, 2)]
            model = keras.Sequential([keras.Input((5,)), *layers])
            model.compile(module.optimizers.Adam(0.05), "mse", run_eagerly=True)
        losses.append(model.fit(x, np.ones((8, 2)), epochs=3, verbose=0, shuffle=False).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)
"""


def test_replicas_of_an_eager_layer():
    on_two_devices(_REPLICAS)


def test_dense_is_saved_with_its_choice(tmp_path):
    model = keras.Sequential([keras.Input((24,)), dense(factored_gradient=True)])
    model.save(tmp_path / "model.keras")
    layer = keras.saving.load_model(tmp_path / "model.keras").layers[0]
    assert layer.factored_gradient and layer._kernel.factored_gradient
    assert "factored_gradient" not in dense().get_config()
    np.testing.assert_array_equal(layer.kernel, model.layers[0].kernel)


@pytest.mark.filterwarnings("error")
def test_fit_eagerly():
    x, y = data(32)
    weights = []
    for factored in (True, False):
        keras.utils.set_random_seed(1)
        layers = [wdops.layers.Dense(n, activation="elu") for n in (24, 4)]
        model = keras.Sequential([keras.Input((24,)), *layers])
        optimizer = wdops.optimizers.Adam(1e-2, global_clipnorm=0.1)
        model.compile(optimizer, loss="mse", run_eagerly=True)
        if factored:
            optimizer.factor_gradients(model)
        model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
        weights.append(model.get_weights())
    for g, w in zip(*weights, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda a, b: tf.matmul(a, b, transpose_a=True), True),
        (lambda a, b: tf.add_n([tf.matmul(a, b, transpose_a=True)] * 2), True),
        (lambda a, b: tf.matmul(a, b, transpose_a=True) + tf.matmul(2 * a, b, transpose_a=True), True),
        (lambda a, b: tf.cast(tf.matmul(*(tf.cast(x, "bfloat16") for x in (a, b)), transpose_a=True), "float32"), True),
        (lambda a, b: tf.cast(tf.matmul(*(tf.cast(x, "double") for x in (a, b)), transpose_a=True), "float32"), False),
        (lambda a, b: tf.matmul(a, b), False),
        (lambda a, b: tf.matmul(a, b, transpose_b=True), False),
        (lambda a, b: tf.matmul(a, b, transpose_a=True, transpose_b=True), False),
        (lambda a, b: tf.matmul(a, b, transpose_a=True) + tf.matmul(a[:, :1], b, transpose_a=True), False),
        (lambda a, b: tf.matmul(a, b, transpose_a=True) + a, False),
        (lambda a, b: 2 * tf.matmul(a, b, transpose_a=True), False),
        (lambda a, b: tf.cast(tf.matmul(tf.complex(a, b), tf.complex(b, a), transpose_a=True), "float32"), False),
    ],
    ids=[
        "product", "AddN", "sum", "wider", "narrower", "plain", "other side", "both", "broadcast", "half", "scaled",
        "complex",
    ],
)  # fmt: skip
def test_only_what_is_a_product_has_factors(make, found):
    """Of square matrices, where a wrong one has the right shape."""
    a, b = (np.random.default_rng(seed).normal(size=(6, 6)).astype("float32") for seed in range(2))
    seen = []

    @tf.function
    def both():
        grad = make(tf.identity(a), tf.identity(b))
        seen.append(wdops.factored.factors_of(grad))
        return grad, grad if seen[0] is None else seen[0].values

    grad, product = both()
    assert (seen[0] is not None) == found
    # One of them was rounded to bfloat16 on its way.
    np.testing.assert_allclose(grad, product, rtol=0, atol=2.0**-7 * np.abs(grad).max())
