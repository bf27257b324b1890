"""The kernels of csrc/cuda, compiled by g++ against tests/cuda_on_cpu, have the bits of the CPU's."""

import ctypes
import mmap
import re
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import DTYPES, LAYOUTS, TERMS, own_hypers, product_of, random_case

import wdops
from wdops import reference
from wdops._load import native, raw_ops

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
DTYPE_NUMBERS = {name: k for k, name in enumerate(DTYPES)}
RULES = {rule["name"]: (number, rule) for number, rule in enumerate(native.rules)}
SCALED_PROXIMAL, STOCHASTIC = 1, 2
INVALID = 1  # cudaErrorInvalidValue

# Every remainder of a vector, of a lane, of a piece and of a chunk; empty ones at the ends and in between.
SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 0, 31, 32, 33, 63, 64, 65, 4095, 4097, 16383, 16385, 0]


class Variable(ctypes.Structure):
    """WdopsVariable of csrc/cuda/interface.h."""

    _fields_ = (
        ("n", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("slot_dtype", ctypes.c_int32),
        ("param", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("slot", ctypes.c_void_p * 3),
        ("accumulator", ctypes.c_void_p),
        ("average", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("dz", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("width", ctypes.c_int64),
    )


def build(csrc: Path, folder: Path) -> ctypes.CDLL:
    """The kernels of a folder of sources, as a library for the CPU."""
    include = ["-x", "c++", f"-I{ROOT}/tests/cuda_on_cpu", f"-I{csrc}"]

    def compile_one(source: Path) -> Path:
        to = folder / f"{source.stem}.o"
        subprocess.run(["g++", *FLAGS, *include, "-c", source, "-o", to], check=True)
        return to

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_one, sorted((csrc / "cuda").glob("*.cu"))))
    library = folder / "libwdops_cuda_on_cpu.so"
    subprocess.run(["g++", "-shared", *objects, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("table", "steps", "scratch", "activate_scratch"):
        getattr(loaded, f"wdops_cuda_{name}_bytes").restype = ctypes.c_int64
    return loaded


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return build(ROOT / "csrc", tmp_path_factory.mktemp("cuda"))


def pointer(array):
    return None if array is None else array.ctypes.data


def doubles(values):
    return None if values is None else np.asarray(values, np.float64).reshape(-1)


def scale_arguments(scale):
    return ctypes.c_void_p(pointer(scale)), scale is not None and scale.size > 1


def variable_of(*, param=None, grad=None, slots=(), dtype=None, **more):
    """A WdopsVariable of arrays; `more` are its other fields."""
    dtype = str((grad if param is None else param).dtype) if dtype is None else dtype
    variable = Variable(n=0 if grad is None else grad.size, dtype=DTYPE_NUMBERS[dtype])
    variable.slot_dtype = DTYPE_NUMBERS[str(slots[0].dtype)] if len(slots) else variable.dtype
    variable.param, variable.grad = pointer(param), pointer(grad)
    for k, slot in enumerate(slots):
        variable.slot[k] = pointer(slot)
    for name, value in more.items():
        setattr(variable, name, pointer(value) if isinstance(value, np.ndarray) else value)
    return variable


class Call:
    """Tables and scratch of a list of variables, on which the functions of the library are called."""

    def __init__(self, library: ctypes.CDLL, variables: Sequence[Variable]) -> None:
        self.library, self.count = library, len(variables)
        self.table = np.zeros(library.wdops_cuda_table_bytes(self.count) // 8, np.int64)
        given = (Variable * self.count)(*variables)
        self.error = library.wdops_cuda_fill_table(given, self.count, ctypes.c_void_p(pointer(self.table)))
        if not self.error:
            bytes_ = library.wdops_cuda_scratch_bytes(ctypes.c_void_p(pointer(self.table)))
            self.scratch = np.zeros(bytes_ // 8 + 1, np.int64)

    def fill_steps(self, rule: str | None, hypers: Sequence[Mapping[str, float]], options: int = 0) -> int:
        number, names = (-1, native.gradient_hypers) if rule is None else (RULES[rule][0], RULES[rule][1]["hypers"])
        hyper = np.array([[float(h[name]) for name in names] for h in hypers], np.float64)
        self.rule, shared = number, len(hypers) == 1
        self.steps = np.zeros(self.library.wdops_cuda_steps_bytes(self.count) // 8, np.int64)
        return self.library.wdops_cuda_fill_steps(
            number,
            ctypes.c_void_p(pointer(self.table)),
            ctypes.c_void_p(pointer(hyper)),
            shared,
            options,
            ctypes.c_void_p(pointer(self.steps)),
        )

    def apply(self, *, grad_scale=None, clip_scale=None, report_penalty=False):
        grad_scale, clip_scale = doubles(grad_scale), doubles(clip_scale)
        penalty = np.full(self.count, np.nan) if report_penalty else None
        error = self.library.wdops_cuda_apply(
            self.rule,
            *(ctypes.c_void_p(pointer(x)) for x in (self.table, self.table, self.steps)),
            *(argument for scale in (grad_scale, clip_scale) for argument in scale_arguments(scale)),
            *(ctypes.c_void_p(pointer(x)) for x in (penalty, self.scratch, None)),
        )
        return penalty if report_penalty else error

    def norms(self, grad_scale=None, report_penalty=True):
        norm = np.full(self.count, np.nan)
        penalty = np.full(self.count, np.nan) if report_penalty else None
        finite = np.full(1, 7, np.uint8)
        grad_scale = doubles(grad_scale)
        error = self.library.wdops_cuda_norms(
            *(ctypes.c_void_p(pointer(x)) for x in (self.table, self.table, self.steps)),
            *scale_arguments(grad_scale),
            *(ctypes.c_void_p(pointer(x)) for x in (norm, penalty, finite, self.scratch, None)),
        )
        assert not error
        return norm, penalty, finite[0]


def every_hyper(rule, hypers):
    """Numbers for all hyperparameters of a rule, of which some are given."""
    defaults = {name: value for name, value in reference.STEP_DEFAULTS.items() if value is not None}
    values = {"seed": 0, **defaults, **own_hypers(rule), **hypers}
    return {"decay_lr": values["lr"], **values}


def misaligned(array):
    """A copy that begins one element behind a multiple of 64 bytes."""
    size = array.itemsize
    room = np.zeros(array.nbytes + 64 + size, np.uint8)
    begin = -room.ctypes.data % 64 + size
    copy = room[begin : begin + array.nbytes].view(array.dtype)
    copy[:] = array
    return copy


def guarded(array):
    """A copy behind which there is no memory to read or to write."""
    size = -(-max(array.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
    behind = ctypes.c_void_p(pages.ctypes.data + size)
    assert not ctypes.CDLL(None).mprotect(behind, ctypes.c_size_t(mmap.PAGESIZE), 0)
    copy = pages[size - array.nbytes : size].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


# In turns: most where vectors can be moved at once, some where they cannot.
COPIES = [np.copy, guarded, misaligned]


def assert_same_bits(got, want, name):
    assert got.dtype == want.dtype and got.shape == want.shape, name
    bits = f"u{got.itemsize}"
    different = np.flatnonzero(got.view(bits) != want.view(bits))
    assert not different.size, f"{name}[{different[0]}] is {got[different[0]]!r}, not {want[different[0]]!r}"


def apply_on_cpu(rule, case, hypers, options):
    """Steps the arrays of a case as the CPU's kernels do."""
    numbers = [hypers[name] for name in RULES[rule][1]["hypers"]]
    native.apply(
        rule,
        case["param"],
        list(case["slots"]),
        case["grad"],
        case.get("accumulator"),
        case.get("average"),
        numbers,
        bool(options & SCALED_PROXIMAL),
        bool(options & STOCHASTIC),
    )


def copy_of(case, copy=np.copy):
    return {name: [copy(x) for x in a] if name == "slots" else copy(a) for name, a in case.items()}


def assert_same_case(got, want):
    for name, array in want.items():
        for k, (g, w) in enumerate(zip(got[name], array, strict=True) if name == "slots" else [(got[name], array)]):
            assert_same_bits(g, w, f"{name} {k} of {w.size}")


def cases_of(rule, layout, sizes, extras=()):
    cases = []
    for seed, n in enumerate(sizes):
        param, *slots, grad = random_case(rule, layout[0], n, seed, layout[1])
        case = {"param": param, "slots": slots, "grad": grad}
        for k, name in enumerate(extras):
            case[name] = random_case("sgd", layout[0], n, 100 + 10 * seed + k)[0]
        cases.append(case)
    return cases


OPTIONS = {
    "plain": ((), 0),
    "accumulator": (("accumulator",), 0),
    "average": (("average",), 0),
    "all": (("accumulator", "average"), SCALED_PROXIMAL | STOCHASTIC),
    "scaled": ((), SCALED_PROXIMAL),
    "stochastic": ((), STOCHASTIC),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
def test_step(library, rule, layout):
    for name, (extras, options) in OPTIONS.items():
        cases = cases_of(rule, layout, SIZES, extras)
        hypers = [
            every_hyper(rule, {**TERMS, "lr": 0.1 + i / 64, "ema_momentum": 0.75, "seed": i + 5})
            for i in range(len(cases))
        ]
        stepped = [copy_of(case, COPIES[i % 3]) for i, case in enumerate(cases)]
        call = Call(library, [variable_of(**case) for case in stepped])
        assert call.fill_steps(rule, hypers, options) == 0
        assert call.apply() == 0
        for case, hyper, got in zip(cases, hypers, stepped, strict=True):
            apply_on_cpu(rule, case, hyper, options)
            try:
                assert_same_case(got, case)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


def test_shared_steps_in_tables_of_all_dtypes(library):
    sizes = [3, 0, 4099]
    cases = [case for dtype in DTYPES for case in cases_of("adam", (dtype, dtype), sizes, ["average"])]
    hyper = every_hyper("adam", TERMS)
    stepped = [copy_of(case) for case in cases]
    call = Call(library, [variable_of(**case) for case in stepped])
    assert call.fill_steps("adam", [hyper]) == 0
    assert call.apply() == 0
    for case, got in zip(cases, stepped, strict=True):
        apply_on_cpu("adam", case, hyper, 0)
        assert_same_case(got, case)


@pytest.mark.parametrize("of_each", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_on_the_card_multiply(library, dtype, of_each):
    cases = cases_of("lamb", (dtype, dtype), SIZES, ["accumulator"])
    hypers = [every_hyper("lamb", {**TERMS, "weight_decay": i / 16}) for i in range(len(cases))]
    grad_scale, clip_scale = 0.3, np.linspace(0.1, 0.9, len(cases)) if of_each else 0.7
    stepped = [copy_of(case) for case in cases]
    call = Call(library, [variable_of(**case) for case in stepped])
    assert call.fill_steps("lamb", hypers) == 0
    assert call.apply(grad_scale=grad_scale, clip_scale=clip_scale) == 0
    clip_scales = np.broadcast_to(clip_scale, len(cases))
    for case, hyper, got, clip in zip(cases, hypers, stepped, clip_scales, strict=True):
        scales = {"grad_scale": hyper["grad_scale"] * grad_scale, "clip_scale": hyper["clip_scale"] * clip}
        apply_on_cpu("lamb", case, {**hyper, **scales}, 0)
        assert_same_case(got, case)


@pytest.mark.parametrize("terms", ["of_all", "l1", "l2", "none"])
@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("has_param", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(library, dtype, has_param, accumulated, terms):
    sizes = [*SIZES[:-1], 70 * 16384 + 3, 0]  # of more chunks than there are lanes
    given = {"l1": ["l1"], "l2": ["l2"], "none": []}.get(terms, [n for n in native.gradient_hypers if n in TERMS])
    cases = cases_of("sgd", (dtype, dtype), sizes, ["accumulator"])
    hypers = [every_hyper("sgd", {n: TERMS[n] + i / 32 for n in given}) for i in range(len(cases))]
    for i, case in enumerate(cases):
        del case["slots"]
        if not has_param:
            del case["param"]
        if not accumulated:
            del case["accumulator"]
        cases[i] = copy_of(case, COPIES[i % 3])
    call = Call(library, [variable_of(**case) for case in cases])
    assert call.fill_steps(None, hypers) == 0
    norm, penalty, finite = call.norms(grad_scale=0.9)
    assert call.norms(grad_scale=0.9, report_penalty=False)[0].tobytes() == norm.tobytes()
    for i, (case, hyper) in enumerate(zip(cases, hypers, strict=True)):
        scaled = {**hyper, "grad_scale": hyper["grad_scale"] * 0.9}
        numbers = [scaled[name] for name in native.gradient_hypers]
        want = native.norm(case["grad"], case.get("param"), case.get("accumulator"), numbers)
        assert (norm[i], penalty[i], True) == want, i
    assert finite == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_tell_what_is_not_finite(library, dtype, value):
    for n, at in ((1, 0), (5000, 4999), (40000, 16384)):
        grads = [np.ones(3, DTYPES[dtype]), np.ones(n, DTYPES[dtype]), np.ones(0, DTYPES[dtype])]
        call = Call(library, [variable_of(grad=grad) for grad in grads])
        assert call.fill_steps(None, [every_hyper("sgd", {})]) == 0
        assert call.norms()[2] == 1
        grads[1][at] = value
        norm, _, finite = call.norms()
        assert finite == 0 and not np.isfinite(norm[1]) and norm[0] == np.sqrt(3)
    # The square of a double overflows where the double does not.
    grads = [np.full(2, 1e200)]
    call = Call(library, [variable_of(grad=grads[0])])
    assert call.fill_steps(None, [every_hyper("sgd", {})]) == 0
    norm, _, finite = call.norms()
    assert norm[0] == np.inf and finite == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty_is_that_behind_the_step(library, dtype):
    cases = cases_of("momentum", (dtype, dtype), SIZES)
    hypers = [every_hyper("momentum", {**TERMS, "l1": i / 8, "l2": 1 / (1 + i)}) for i in range(len(cases))]
    call = Call(library, [variable_of(**case) for case in cases])
    assert call.fill_steps("momentum", hypers) == 0
    penalty = call.apply(report_penalty=True)
    for i, (case, hyper) in enumerate(zip(cases, hypers, strict=True)):
        numbers = [hyper[name] for name in native.gradient_hypers]
        assert penalty[i] == native.norm(case["grad"], case["param"], None, numbers)[1], i


@pytest.mark.parametrize("width", [1, 3, 4, 64, 1001])
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("rule", ["adam", "lamb"])
def test_sparse_rows(library, rule, layout, width):
    rng = np.random.default_rng(3)
    for count in (0, 1, 37):
        rows = rng.permutation(50)[:count]
        (whole,) = cases_of(rule, layout, [50 * width], ["accumulator", "average"])
        hyper = every_hyper(rule, TERMS | {"ema_momentum": 0.75})

        def of_rows(array, rows=rows):
            return array.reshape(50, width)[rows].reshape(-1)

        few = copy_of(whole, of_rows)
        stepped = copy_of(whole, misaligned if count == 1 else guarded) | {"grad": guarded(few["grad"])}
        call = Call(library, [variable_of(**stepped, rows=rows, width=width)])
        assert call.fill_steps(rule, [hyper, hyper][: 1 + RULES[rule][1]["trust"]]) == 0
        norm, penalty, _ = call.norms()
        numbers = [hyper[name] for name in native.gradient_hypers]
        assert (norm[0], penalty[0]) == native.norm(few["grad"], few["param"], few["accumulator"], numbers)[:2]
        assert call.apply() == 0
        apply_on_cpu(rule, few, hyper, 0)
        del few["grad"]
        for name, array in few.items():
            pairs = zip(array, whole[name], stepped[name], strict=True)
            for want, before, got in pairs if name == "slots" else [(array, whole[name], stepped[name])]:
                before.reshape(50, width)[rows] = want.reshape(count, width)
                assert_same_bits(got, before, name)


# Tiles that are not full, in either direction; a batch of none, of one panel and of more.
FACTORED_SHAPES = [(0, 3, 5), (1, 1, 1), (16, 64, 64), (17, 65, 31), (40, 3, 130), (5, 129, 68), (3, 0, 4), (3, 4, 0)]


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("rule", ["adam", "lamb"])
def test_factored_gradients(library, rule, layout):
    dense = cases_of(rule, layout, [70])[0]
    cases, variables = [dense], [copy_of(dense)]
    for seed, (batch, height, width) in enumerate(FACTORED_SHAPES):
        x, dz = (random_case("sgd", layout[0], batch * n, seed + n)[0].reshape(batch, n) for n in (height, width))
        (case,) = cases_of(rule, layout, [height * width], ["accumulator", "average"] if seed % 2 else [])
        stepped = copy_of(case, guarded) | {"n": height * width, "batch": batch, "width": width}
        stepped |= {"x": guarded(x), "dz": guarded(dz)}
        del stepped["grad"]
        if batch == 0:
            del stepped["x"], stepped["dz"]
        cases.append({**case, "grad": product_of(x, dz).reshape(-1)})
        variables.append(stepped)
    hypers = [every_hyper(rule, {**TERMS, "ema_momentum": 0.75, "l1": i / 8}) for i in range(len(cases))]
    call = Call(library, [variable_of(**v) for v in variables])
    assert call.fill_steps(rule, hypers) == 0
    norm, of_penalty, finite = call.norms()
    assert finite == 1
    penalty = call.apply(report_penalty=True)
    for i, (case, hyper, got) in enumerate(zip(cases, hypers, variables, strict=True)):
        numbers = [hyper[name] for name in native.gradient_hypers]
        arrays = case["param"], case.get("accumulator"), numbers
        # A sum over tiles has another order than one over chunks.
        np.testing.assert_allclose((norm[i], of_penalty[i]), native.norm(case["grad"], *arrays)[:2], rtol=1e-14)
        apply_on_cpu(rule, case, hyper, 0)
        np.testing.assert_allclose(penalty[i], native.norm(case["grad"], *arrays)[1], rtol=1e-14)
        for name in case.keys() - {"grad"}:
            pairs = zip(got[name], case[name], strict=True) if name == "slots" else [(got[name], case[name])]
            for g, want in pairs:
                if rule == "lamb" and layout[0] == "float64":  # the ratio is of sums
                    np.testing.assert_allclose(g, want, rtol=1e-14, atol=1e-15)
                else:
                    assert_same_bits(g, want, f"{name} of {FACTORED_SHAPES[i - 1]}")


@pytest.mark.parametrize("norms", [[], [0.0], [3.0, 4.0], [0.1] * 1000, [1e200, 1e200], [2.0, np.nan], [np.inf]])
def test_clip_scale(library, norms):
    norm, scale = np.array(norms), np.full(1, 7.0)
    pointers = [ctypes.c_void_p(pointer(x)) for x in (norm, scale)]
    assert library.wdops_cuda_clip_scale(pointers[0], len(norms), ctypes.c_double(2.5), pointers[1], None) == 0
    with np.errstate(over="ignore"):
        total = np.sqrt(np.sum(norm**2))
    np.testing.assert_allclose(scale, 2.5 / max(2.5, total) if np.isfinite(total) else 0, rtol=1e-15)


# Outer, channels and inner: channels that fill a block alone, ones whose planes are large and small, rows that are
# shorter and longer than blocks, and arrays of nothing.
ACTIVATED_SHAPES = [
    *((1, n, 1) for n in (1, 7, 8, 9, 63, 64, 65)),
    (259, 3, 1),
    (256 * 171 + 1, 3, 1),  # a block with one row, which is not full
    (70001, 1, 1),
    (5, 1027, 1),
    (515, 1100, 1),
    (600, 3, 5),
    (3, 7, 256),
    (2, 3, 90001),
    (1, 1, 70001),
    (0, 4, 1),
    (3, 0, 2),
    (2, 3, 0),
]
ACTIVATIONS = {"elu": (0, [0.3, 1.25]), "relu": (1, []), "leaky_relu": (2, [0.3])}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(library, activation, dtype, biased):
    number, numbers = ACTIVATIONS[activation]
    hyper, hypers = np.array(numbers), [tf.constant(h, tf.float64) for h in numbers]
    for shape in ACTIVATED_SHAPES:
        n = int(np.prod(shape))
        x, grad = (random_case("sgd", dtype, n, seed)[0] for seed in (1, 2))
        bias = random_case("sgd", dtype, shape[1], 3)[0] if biased else None
        if n:
            x[[0, -1, n // 2]] = np.nan, np.inf, -0.0
        head = number, DTYPE_NUMBERS[dtype], ctypes.c_void_p(pointer(hyper))
        sizes = [ctypes.c_int64(size) for size in shape]

        given, output, x_grad = guarded(x), guarded(x), guarded(grad)
        bias_grad = np.full(shape[1], 7, DTYPES[dtype]) if biased else None
        arrays = [ctypes.c_void_p(pointer(a)) for a in (given, bias, output, None)]
        assert library.wdops_cuda_activate(*head, *sizes, *arrays) == 0
        in_place = guarded(x)
        arrays = [ctypes.c_void_p(pointer(a)) for a in (in_place, bias, in_place, None)]
        assert library.wdops_cuda_activate(*head, *sizes, *arrays) == 0
        assert_same_bits(in_place, output, f"output in place of {shape}")
        # A channel's sum is then that of finite numbers.
        if n:
            grad[[0, -1]] = x_grad[[0, -1]] = 0
        scratch = np.full(library.wdops_cuda_activate_scratch_bytes(*sizes) // 8 + 1, np.nan)
        arrays = [ctypes.c_void_p(pointer(a)) for a in (x_grad, output, x_grad, bias_grad, scratch, None)]
        assert library.wdops_cuda_activate_grad(*head, *sizes, *arrays) == 0

        forward, backward = (getattr(raw_ops, f"wdops_{activation}{end}") for end in ("", "_grad"))
        with tf.device("CPU"):
            want = forward(x.reshape(shape), [bias] if biased else [], *hypers, data_format="NCHW")
            want_grads = backward(grad.reshape(shape), want, *hypers, B=int(biased), data_format="NCHW")
        assert_same_bits(output, want.numpy().reshape(-1), f"output of {shape}")
        assert_same_bits(x_grad, want_grads[0].numpy().reshape(-1), f"x_grad of {shape}")
        if biased:
            assert_same_bits(bias_grad, want_grads[1][0].numpy(), f"bias_grad of {shape}")


def test_refusals_change_nothing(library):
    (case,) = cases_of("adam", ("float32", "float32"), [20])
    rows, x, dz = np.arange(4), np.ones((3, 4), np.float32), np.ones((3, 5), np.float32)
    factors = {"x": x, "dz": dz, "batch": 3, "width": 5}
    wrong = [
        {"n": -1},
        {"dtype": -1},
        {"dtype": len(DTYPES)},
        {"slot_dtype": DTYPE_NUMBERS["float64"]},
        {"grad": None},
        {"rows": rows, "width": 0},
        {"rows": rows, "width": 6},
        factors,  # beside a gradient
        {**factors, "grad": None, "rows": rows},
        {**factors, "grad": None, "dz": None},
        {**factors, "grad": None, "batch": -1},
    ]

    def variable(**fields):
        made = variable_of(**case)
        for name, value in fields.items():
            setattr(made, name, pointer(value) if isinstance(value, np.ndarray) else value)
        return made

    assert Call(library, [variable()]).error == 0
    assert Call(library, [variable(**factors, grad=None)]).error == 0
    for fields in wrong:
        call = Call(library, [variable(), variable(**fields)])
        assert call.error == INVALID, fields
        assert not call.table.any(), fields

    hyper = every_hyper("lamb", TERMS)
    call = Call(library, [variable()])
    assert call.fill_steps("lamb", [hyper]) == INVALID  # shared
    assert not call.steps.any()
    before = copy_of(case)
    for fields in ({"param": None}, {"slot": (ctypes.c_void_p * 3)(pointer(case["slots"][0]))}):
        call = Call(library, [variable(), variable(**fields)])
        assert call.fill_steps("adam", [every_hyper("adam", TERMS)]) == 0
        assert call.apply() == INVALID, fields
    for rule in (-1, len(RULES)):
        call.rule = rule
        assert call.apply() == INVALID
    assert_same_case(case, before)

    array = np.ones(4, np.float32)
    arrays = [ctypes.c_void_p(pointer(array)), None, ctypes.c_void_p(pointer(array)), None]
    for activation, dtype, outer in ((-1, 0, 1), (3, 0, 1), (1, -1, 1), (1, 4, 1), (1, 0, -1)):
        sizes = [ctypes.c_int64(size) for size in (outer, 4, 1)]
        assert library.wdops_cuda_activate(activation, dtype, None, *sizes, *arrays) == INVALID
        grads = [*arrays[::2], arrays[0], None, None, None]
        assert library.wdops_cuda_activate_grad(activation, dtype, None, *sizes, *grads) == INVALID
    assert (array == 1).all()


def test_a_table_of_no_variables(library):
    call = Call(library, [])
    assert call.fill_steps("adam", [every_hyper("adam", {})]) == 0
    assert call.apply() == 0
    assert call.apply(report_penalty=True).size == 0
    assert call.norms()[2] == 1


def test_a_row_beyond_32_bits(library):
    width, rows = 8, np.array([2**28 + 1, 3])
    room = np.zeros((2**28 + 2, width), np.uint16)  # 4 GiB of which few pages are ever touched
    param = room.view(DTYPES["bfloat16"])
    param[rows] = 1
    grad = np.arange(2 * width).astype(param.dtype)
    call = Call(library, [variable_of(param=param, grad=grad, rows=rows, width=width)])
    assert call.fill_steps("sgd", [every_hyper("sgd", {"lr": 1})]) == 0
    assert call.apply() == 0
    assert (param[rows].reshape(-1) == 1 - grad).all()
    assert not param[[0, 2, 4, 5]].any()


def test_the_machine(library):
    library.wdops_cuda_error.restype = ctypes.c_char_p
    assert library.wdops_cuda_available() == 0
    assert library.wdops_cuda_error(0) == b"no error"
    assert library.wdops_cuda_error(INVALID) == b"invalid argument"


# Where CMake finds no nvcc there is no such library; the kernels themselves are tested above all the same, by g++.
@pytest.mark.skipif(wdops.build_info()["cuda"] is None, reason="built without a CUDA compiler")
def test_the_library_for_a_card_loads_without_one():
    built = ctypes.CDLL(str(Path(wdops.__file__).with_name("libwdops_cuda.so")))
    interface = (ROOT / "csrc/cuda/interface.h").read_text()
    functions = re.findall(r"WDOPS_CUDA_API [\w *]*?(wdops_cuda_\w+)\(", interface)
    assert len(functions) == interface.count("WDOPS_CUDA_API ") - 1  # its definition
    for name in functions:
        getattr(built, name)
    built.wdops_cuda_error.restype = ctypes.c_char_p
    assert built.wdops_cuda_error(built.wdops_cuda_available())
