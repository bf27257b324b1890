"""The activations behind a bias and their gradients: values, bits, special values, shapes, and what is refused."""

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from conftest import DTYPES
from test_ops import MODES

import wdops
from wdops import ops, reference
from wdops._load import raw_ops

modes = pytest.mark.parametrize("mode", ["eager", "graph", "jit"])
dtypes = pytest.mark.parametrize("dtype", DTYPES)
# With alphas that are exact in no dtype, and those where a term vanishes.
ACTIVATIONS = {
    "elu": ("elu", {}),
    "elu_0.3": ("elu", {"alpha": 0.3}),
    "elu_0": ("elu", {"alpha": 0.0}),
    "relu": ("relu", {}),
    "leaky_relu": ("leaky_relu", {}),
    "leaky_relu_1.7": ("leaky_relu", {"alpha": 1.7}),
    "leaky_relu_0": ("leaky_relu", {"alpha": 0.0}),
    "selu": ("selu", {}),
}
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
# Half an ULP of a stored number, relative to it; of float32 and float64 that of what is computed.
HALF_ULP = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-8, "float16": 2.0**-11}
TINY = {"float32": 2.0**-126, "float64": 2.0**-1022, "bfloat16": 2.0**-126, "float16": 2.0**-24}

# Shape and data format: rows shorter, equal and longer than vectors; one block and many, with a last one that is not
# full in either direction; channels that fill a block alone, and ones whose planes are large or small.
SHAPES = [
    *(((n,), "NHWC") for n in (0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)),
    ((3, 5), "NHWC"),
    ((2, 0), "NHWC"),
    ((0, 4), "NHWC"),
    ((259, 3), "NHWC"),
    ((70001, 1), "NHWC"),
    ((40007, 3), "NHWC"),
    ((5, 1027), "NHWC"),
    ((515, 1100), "NHWC"),
    ((2, 3, 4, 5, 7), "NHWC"),
    ((3, 5), "NCHW"),
    ((2, 3, 5), "NCHW"),
    ((2, 3, 0, 5), "NCHW"),
    ((3, 7, 16, 16), "NCHW"),
    ((2, 3, 301, 299), "NCHW"),
    ((1, 1, 70001), "NCHW"),
    ((2, 5, 3, 2, 3), "NCHW"),
]
SHAPE_IDS = ["x".join(map(str, shape)) + data_format[1] for shape, data_format in SHAPES]
shapes = pytest.mark.parametrize(("shape", "data_format"), SHAPES, ids=SHAPE_IDS)
FEW_SHAPES = [((259, 3), "NHWC"), ((5, 1027), "NHWC"), ((3, 7, 16, 16), "NCHW"), ((2, 3, 5), "NCHW")]
few_shapes = pytest.mark.parametrize(("shape", "data_format"), FEW_SHAPES, ids=["259x3", "5x1027", "planes", "small"])


def draw(shape, data_format, dtype, seed=0):
    """x, bias, and the gradient of the output."""
    rng = np.random.default_rng(seed)
    channels = shape[1 if data_format == "NCHW" else -1]
    size = np.prod(shape, dtype=int)
    x = rng.normal(size=size) * 2.0 ** rng.integers(-8, 4, size=size)
    values = x.reshape(shape), rng.normal(size=channels), rng.normal(size=shape)
    return [v.astype(DTYPES[dtype]) for v in values]


def run(module, activation, x, bias, grad, data_format="NHWC"):
    """The output, and the gradients of x and the bias, if there is one."""
    name, alpha = ACTIVATIONS[activation]
    sources = [x] if bias is None else [x, bias]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        output = getattr(module, name)(x, bias, **alpha, data_format=data_format)
    return [output, *tape.gradient(output, sources, tf.cast(grad, output.dtype))]


def wide(x):
    return np.asarray(x.numpy() if tf.is_tensor(x) else x).astype(np.float64)


def sum_of(x, data_format):
    axis = 1 if data_format == "NCHW" else x.ndim - 1
    return x.sum(axis=tuple(i for i in range(x.ndim) if i != axis))


def oracle(activation, x, bias, grad, data_format):
    """What `run` gives, in float64, and how far each may be away."""
    sources = [tf.constant(wide(v)) for v in ((x,) if bias is None else (x, bias))]
    want = [wide(v) for v in run(reference, activation, sources[0], *sources[1:] or [None], wide(grad), data_format)]
    dtype = str(x.dtype)
    half, stored = (2.0**-53 if dtype == "float64" else 2.0**-24), HALF_ULP[dtype]
    # The sum with the bias is rounded once, and that is passed on by a slope of at most 1.76; alpha, its product with
    # e^z - 1, and e^z - 1 itself, by 1.2 ULP, are.
    absolute_z = np.abs(wide(x)) + (0 if bias is None else np.abs(wide(bias)).max(initial=0))
    output_bound = 2 * half * absolute_z * (bias is not None) + (6 * half + stored) * np.abs(want[0]) + TINY[dtype]
    bounds = [output_bound]
    # The derivative is made from the output as it was stored, beside an alpha of at most 1.76.
    slope_bound = output_bound + 6 * half
    x_bound = np.abs(wide(grad)) * slope_bound + (3 * half + stored) * np.abs(want[1]) + TINY[dtype]
    bounds.append(x_bound)
    if bias is not None:
        absolute = sum_of(np.abs(want[1]), data_format)
        # Summed before they are rounded for storage. The oracle's sum and the kernel's are in double.
        sum_bound = sum_of(np.abs(wide(grad)) * slope_bound, data_format)
        bounds.append(sum_bound + x.size * 2.0**-53 * absolute + 2 * stored * np.abs(want[2]) + TINY[dtype])
    return want, bounds


def assert_close(got, want, bound):
    got = wide(got)
    assert got.shape == want.shape
    wrong = ~(np.abs(got - want) <= bound)
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size}; the first at {np.flatnonzero(wrong)[0]}: {got[wrong][0]!r}, not "
        f"{want[wrong][0]!r} +- {np.broadcast_to(bound, want.shape)[wrong][0]:.2g}"
    )


def check(activation, x, bias, grad, data_format, mode):
    want, bounds = oracle(activation, x, bias, grad, data_format)
    tensors = [tf.constant(v) for v in ((x, grad) if bias is None else (x, grad, bias))]
    got = MODES[mode](lambda x, grad, bias=None: run(ops, activation, x, bias, grad, data_format))(*tensors)
    for g, w, b in zip(got, want, bounds, strict=True):
        assert g.dtype.name == str(x.dtype)
        assert_close(g, w, b)


# ---- values and gradients


def test_examples():
    np.testing.assert_array_equal(ops.relu([[-1, 0], [0, 1]]), [[0, 0], [0, 1]])
    np.testing.assert_allclose(ops.elu([[-1, 0], [0, 1]]), [[-0.6321206, 0], [0, 1]], rtol=1e-7)
    np.testing.assert_allclose(ops.leaky_relu([-1.0, 1.0]), [-0.2, 1], rtol=1e-7)
    np.testing.assert_allclose(ops.selu([-1.0, 1.0]), [-1.1113307, 1.050701], rtol=1e-7)


@activations
@dtypes
@shapes
def test_every_shape_matches_the_oracle(activation, dtype, shape, data_format):
    check(activation, *draw(shape, data_format, dtype), data_format, "eager")


@activations
@dtypes
@few_shapes
def test_every_instruction_set_matches_the_oracle(activation, dtype, shape, data_format, isa):
    check(activation, *draw(shape, data_format, dtype), data_format, "eager")


@activations
@dtypes
def test_a_graph_matches_the_oracle(activation, dtype):
    check(activation, *draw((259, 3), "NHWC", dtype), "NHWC", "graph")


@activations
@dtypes
@pytest.mark.parametrize("mode", ["jit", "hlo"])
def test_xla_matches_the_oracle(activation, dtype, mode):
    for shape, data_format in (((259, 3), "NHWC"), ((2, 3, 4, 5), "NCHW"), ((0, 3), "NHWC"), ((3, 0), "NHWC")):
        check(activation, *draw(shape, data_format, dtype), data_format, mode)


@dtypes
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])  # their outputs, too, have the same bits
def test_xla_gives_the_bits_of_the_op(activation, dtype):
    x, bias, grad = (tf.constant(v) for v in draw((70001, 5), "NHWC", dtype))
    op, xla = (MODES[mode](lambda *tensors: run(ops, activation, *tensors))(x, bias, grad) for mode in ("graph", "jit"))
    for got, want in zip(xla, op, strict=True):
        assert got.numpy().tobytes() == want.numpy().tobytes()


@activations
@dtypes
@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (70001,)], ids=["scalar", "empty", "matrix", "many"])
def test_without_a_bias(activation, dtype, shape):
    x, _, grad = draw((*shape, 1), "NHWC", dtype)
    check(activation, x.reshape(shape), None, grad.reshape(shape), "NHWC", "eager")


def test_xla_without_a_bias():
    x, _, grad = draw((33,), "NHWC", "float32")
    check("elu_0.3", x, None, grad, "NHWC", "jit")


def ulps(got, exact, bits):
    """The distance of `got` from `exact` in units in the last place of a number of so many bits."""
    _, exponent = np.frexp(exact)
    return np.abs(got.astype(np.longdouble) - exact) / np.ldexp(np.longdouble(1), exponent - bits)


@pytest.mark.parametrize("mode", ["graph", "jit"])
def test_elu_is_within_2_ulp_of_expm1(mode):
    """Every 97th negative float32; all of them are within 0.98 ULP."""
    bits = np.arange(0x80800000, 0xFF800000, 97, dtype=np.uint32)
    x = bits.view(np.float32)
    got = MODES[mode](ops.elu)(tf.constant(x)).numpy()
    assert ulps(got, np.expm1(x.astype(np.float64)), 24).max() <= 2


def test_elu_is_within_2_ulp_of_expm1_in_float64(isa):
    rng = np.random.default_rng(0)
    x = np.concatenate([-(2.0 ** rng.uniform(-80, 6, 2_000_000)), -rng.uniform(0, 40, 1_000_000)])
    assert ulps(ops.elu(tf.constant(x)).numpy(), np.expm1(x.astype(np.longdouble)), 53).max() <= 2


@activations
def test_gradients_by_finite_differences(activation):
    x, bias, _ = draw((4, 3), "NHWC", "float64")
    x[np.abs(x + bias) < 1e-3] += 0.1  # away from the kink
    name, alpha = ACTIVATIONS[activation]
    for analytic, numeric in zip(
        *tf.test.compute_gradient(lambda x, b: getattr(ops, name)(x, b, **alpha), [x, bias], delta=1e-6), strict=True
    ):
        np.testing.assert_allclose(analytic, numeric, atol=1e-7)


@activations
@modes
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_second_order_gradients(activation, mode, data_format):
    x, bias, grad = (tf.constant(v) for v in draw((3, 4, 2), data_format, "float64"))
    name, alpha = ACTIVATIONS[activation]

    def second(module, x, bias, grad):
        sources = [x, bias, grad]
        with tf.GradientTape() as outer:
            outer.watch(sources)
            with tf.GradientTape() as inner:
                inner.watch(sources)
                output = getattr(module, name)(x, bias, **alpha, data_format=data_format)
            of_x, of_bias = inner.gradient(output, [x, bias], grad)
            loss = tf.reduce_sum(of_x**2 * (1 + x)) + tf.reduce_sum(of_bias**3)
        return outer.gradient(loss, sources, unconnected_gradients="zero")

    got = MODES[mode](lambda *s: second(ops, *s))(x, bias, grad)
    for g, w in zip(got, second(reference, x, bias, grad), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-14)


# ---- bits


def digests():
    """Of all results, for each instruction set."""
    found = {isa: hashlib.sha256() for isa in wdops.isa.available()}
    for (shape, data_format), dtype in itertools.product(SHAPES, DTYPES):
        x, bias, grad = draw(shape, data_format, dtype)
        x.flat[::5] *= np.asarray(1e-39 if dtype != "float16" else 1e-7, x.dtype)  # subnormals
        tensors = [tf.constant(v) for v in (x, bias, grad)]
        for isa, activation in itertools.product(found, ("elu_0.3", "relu", "leaky_relu_1.7", "selu")):
            wdops.isa.use(isa)
            for result in run(ops, activation, *tensors, data_format):
                found[isa].update(result.numpy().tobytes())
    return [of_isa.hexdigest() for of_isa in found.values()]


_PRINT_DIGESTS = """
import sys
from pathlib import Path
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
sys.path.insert(0, sys.argv[2])
import test_activations
print(*test_activations.digests())
"""


def test_the_same_bits_for_every_number_of_threads_and_instruction_set():
    found = set()
    for threads in (1, 2, 7):
        command = [sys.executable, "-c", _PRINT_DIGESTS, str(threads), __file__.rpartition("/")[0]]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.update(output.splitlines()[-1].split())
    assert len(found) == 1


def test_sums_lose_nothing_that_cancels():
    """Float sums would: 2^20 - 1 rows of 1 between 2^24 and -2^24."""
    grad = np.ones((2**20 + 1, 1), np.float32)
    grad[0], grad[-1] = 2**24, -(2**24)
    _, _, bias_grad = run(ops, "relu", tf.ones_like(grad), tf.ones(1), tf.constant(grad))
    assert bias_grad.numpy()[0] == 2**20 - 1


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_the_input_is_not_changed(offset):
    """Though a buffer that nobody else holds is reused."""
    x = tf.constant(draw((1001,), "NHWC", "float32")[0])
    before = x.numpy().copy()
    got = tf.function(lambda x: (ops.elu(x[offset:]), ops.elu(x), x + 1))(x)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(got[0], got[1][offset:])
    grad = tf.ones_like(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        output = ops.elu(x)
    kept = output.numpy().copy()
    tape.gradient(output, x, grad)
    np.testing.assert_array_equal(output, kept)
    np.testing.assert_array_equal(grad, tf.ones_like(grad))


_KEEP = """
import threading
from pathlib import Path
import numpy as np
import tensorflow as tf
from wdops import ops

N = 2**24 + 5  # 64 MiB and one page

def address(tensor):
    return np.asarray(tensor).ctypes.data  # no copy

def mapped():
    '''Bytes of which large pages were asked for.'''
    total = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *others = line.split()
        if "-" in first:
            begin, end = (int(bound, 16) for bound in first.split("-"))
        elif first == "VmFlags:" and "hg" in others:
            total += end - begin
    return total

def the_systems():
    '''Bytes that it may take without asking.'''
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("LazyFree:"))

block = 66 << 20
x = tf.fill([N], -1.0)
before = mapped()
first = ops.elu(x)
assert mapped() - before == block
second = ops.relu(x)
used = {address(first), address(second)}
assert len(used) == 2 and mapped() - before == 2 * block
first, second = first[:1].numpy(), second[:1].numpy()
third = ops.elu(x, alpha=2.0)
assert address(third) in used
np.testing.assert_allclose(third, np.full(N, 2 * np.expm1(-1.0)), rtol=1e-6)
assert the_systems() <= block
del third
assert block < the_systems() <= 2 * block

# Never more than was once in use: one that fits nowhere takes the place of the others.
larger = ops.elu(tf.fill([N + 2**20], 3.0))
assert mapped() - before <= 2 * block
np.testing.assert_array_equal(larger, 3.0)
del larger

def train(k):
    for i in range(10):
        n = N + k % 3 * 2**19
        with tf.GradientTape() as tape:
            z = tf.fill([n], float(k - 4))
            tape.watch(z)
            output = ops.leaky_relu(z, alpha=0.5)
        grad = tape.gradient(output, z, tf.fill([n], 2.0))
        if not (np.all(output == (1 if k > 4 else 0.5) * (k - 4.0)) and np.all(grad == (2 if k > 4 else 1))):
            wrong.append((k, i))

wrong = []
threads = [threading.Thread(target=train, args=(k,)) for k in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not wrong, wrong
print("kept")
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no large pages to ask for")
def test_memory_of_large_outputs_is_kept():
    """Without oneDNN: with it, TensorFlow keeps it itself."""
    environment = os.environ | {"TF_ENABLE_ONEDNN_OPTS": "0"}
    output = subprocess.run([sys.executable, "-c", _KEEP], capture_output=True, text=True, env=environment)
    assert output.stdout == "kept\n", output.stderr


# ---- special values

SPECIAL = np.array([-0.0, 0.0, np.inf, -np.inf, np.nan, 1.0])


@dtypes
@modes
@pytest.mark.parametrize(
    ("activation", "want", "slopes"),
    [
        ("elu", [-0.0, 0.0, np.inf, -1.0, np.nan, 1.0], [1, 1, 1, 0, np.nan, 1]),
        ("elu_0", [0.0, 0.0, np.inf, 0.0, np.nan, 1.0], [0, 0, 1, 0, np.nan, 1]),
        ("relu", [0.0, 0.0, np.inf, 0.0, np.nan, 1.0], [0, 0, 1, 0, np.nan, 1]),
        ("leaky_relu_1.7", [-0.0, 0.0, np.inf, -np.inf, np.nan, 1.0], [1.7, 1.7, 1, 1.7, np.nan, 1]),
        ("leaky_relu_0", [0.0, 0.0, np.inf, 0.0, np.nan, 1.0], [0, 0, 1, 0, np.nan, 1]),
    ],
)
def test_special_values(activation, want, slopes, dtype, mode):
    x = tf.constant(SPECIAL.astype(DTYPES[dtype]))
    output, grad = MODES[mode](lambda x: run(ops, activation, x, None, tf.ones_like(x)))(x)
    output = wide(output)
    np.testing.assert_array_equal(output, want)
    if mode != "jit":
        np.testing.assert_array_equal(np.signbit(output), np.signbit(want))
    np.testing.assert_array_equal(wide(grad), np.array(slopes).astype(DTYPES[dtype]).astype(np.float64))


def test_relu_of_an_infinite_gradient_is_0_where_it_is_off():
    x = tf.constant([-1.0, 1.0])
    _, grad = run(ops, "relu", x, None, tf.constant([np.inf, np.inf]))
    np.testing.assert_array_equal(grad, [0, np.inf])


@pytest.mark.parametrize(("dtype", "alpha"), [("float32", 1e-40), ("bfloat16", 1e-40), ("float64", 1e-310)])
@pytest.mark.parametrize("activation", ["elu", "leaky_relu"])
def test_an_alpha_that_is_subnormal_counts_as_0(dtype, alpha, activation):
    x = tf.constant([-np.inf, -1, -0.0, 2, np.nan], dtype)
    got, zero = (wide(getattr(ops, activation)(x, alpha=a)) for a in (alpha, 0.0))
    np.testing.assert_array_equal(got, zero)
    np.testing.assert_array_equal(got, [0, 0, 0, 2, np.nan])


def test_a_large_alpha_is_finite_where_the_dtype_holds_it():
    x = tf.constant([-1.0, 0, 2], tf.float64)
    np.testing.assert_array_equal(ops.leaky_relu(x, alpha=1e300), [-1e300, 0, 2])


# ---- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.elu([1.0], alpha=-0.5), r"alpha is -0\.5, but must not be negative: the gradient .* output"),
        (lambda: ops.leaky_relu([1.0], alpha=-1), r"alpha is -1, but must not be negative"),
        (lambda: ops.elu([1.0], alpha=float("nan")), "alpha must be a finite Python number, but is nan"),
        (lambda: ops.elu([1.0], alpha=tf.constant(1.0)), "alpha must be a finite Python number"),
        (lambda: ops.elu([1.0], alpha=1e39), r"alpha is 1e\+39, but must be at most 3\.40\d*e\+38 beside .* float32"),
        (lambda: ops.leaky_relu([1.0], alpha=10**400), r"alpha is 10{400}, but must be at most 3\.40"),
        (lambda: ops.relu(tf.constant([1, 2])), r"x has dtype int32, but must have one of \['float32'"),
        (lambda: ops.relu([1.0], tf.constant([1.0], tf.float64)), "bias has dtype float64, but x has dtype float32"),
        (lambda: ops.relu([1.0], [1.0], data_format="NWC"), "data_format is 'NWC', but must be 'NHWC' or 'NCHW'"),
    ],
    ids=["elu", "leaky_relu", "nan", "tensor", "large", "huge", "integers", "dtypes", "data_format"],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("x", "bias", "data_format", "message"),
    [
        ((2, 3), (2,), "NHWC", r"bias has shape \[2\], but x has shape \[2,3\] with its channels on axis 1"),
        ((2, 3, 4), (4,), "NCHW", r"bias has shape \[4\], but x has shape \[2,3,4\] with its channels on axis 1"),
        ((2, 3), (1, 3), "NHWC", r"bias has shape \[1,3\]"),
        ((), (1,), "NHWC", "x has rank 0, but must have at least 1 beside a bias with data_format NHWC"),
        ((3,), (3,), "NCHW", "x has rank 1, but must have at least 2 beside a bias with data_format NCHW"),
    ],
    ids=["length", "length_nchw", "rank", "scalar", "rank_nchw"],
)
def test_a_bias_that_does_not_fit_is_refused(x, bias, data_format, message):
    x, bias = tf.ones(x), tf.ones(bias)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        ops.elu(x, bias, data_format=data_format)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):  # already while it is traced
        tf.function(lambda x, b: ops.elu(x, b, data_format=data_format)).get_concrete_function(x, bias)


def test_the_ops_refuse_what_python_would_not_send():
    one = tf.constant(1.0, tf.float64)
    with pytest.raises(tf.errors.InvalidArgumentError, match="alpha is -1, but must be finite and not negative"):
        raw_ops.wdops_leaky_relu([1.0], [], -one)
    with pytest.raises(tf.errors.InvalidArgumentError, match="there are 2 biases"):
        raw_ops.wdops_relu([1.0], [[1.0], [1.0]])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"grad has shape \[1\], but output has shape \[2\]"):
        raw_ops.wdops_relu_grad([1.0], [1.0, 2.0], B=0)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"alpha has shape \[1\], but must be a scalar"):
        raw_ops.wdops_leaky_relu([1.0], [], [one])


def test_shapes_are_known_while_tracing():
    @tf.function(input_signature=[tf.TensorSpec([None, None]), tf.TensorSpec([3])])
    def biased(x, bias):
        y = ops.elu(x, bias)
        assert y.shape.as_list() == [None, 3]
        return y

    assert biased(tf.ones([2, 3]), tf.zeros(3)).shape == (2, 3)
    unknown = tf.function(ops.relu, input_signature=[tf.TensorSpec(None)])
    assert unknown(tf.ones([2, 3])).shape == (2, 3)


def test_bfloat16_arrays_stay_bfloat16():
    assert ops.relu(np.ones(3, ml_dtypes.bfloat16)).dtype == tf.bfloat16


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_second_order_of_unknown_rank(data_format):
    rng = np.random.default_rng(0)
    x, bias = (tf.constant(rng.normal(size=s)) for s in ((3, 4, 4), (4,)))

    def second(x, bias):
        with tf.GradientTape() as outer:
            outer.watch([x, bias])
            with tf.GradientTape() as inner:
                inner.watch([x, bias])
                loss = tf.reduce_sum(wdops.ops.elu(x, bias, data_format=data_format) ** 3)
            first = inner.gradient(loss, [x, bias])
            total = tf.reduce_sum(first[0] ** 2) + tf.reduce_sum(first[1] ** 2)
        return outer.gradient(total, [x, bias])

    unknown = tf.function(second, input_signature=[tf.TensorSpec(None, tf.float64)] * 2)
    for got, want in zip(unknown(x, bias), second(x, bias), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)
