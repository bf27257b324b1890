"""The kernels of csrc/cuda, compiled by g++ against tests/cuda_on_cpu, have the bits of the CPU's."""

import ctypes
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import DTYPES, LAYOUTS, TERMS, own_hypers, random_case

from wdops import reference
from wdops._load import native

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
    for name in ("table", "steps", "scratch"):
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

    def norms(self, grad_scale=None):
        norm, penalty = np.full((2, self.count), np.nan)
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
        # Every third is where no vector can be moved at once.
        stepped = [copy_of(case, misaligned if i % 3 == 2 else np.copy) for i, case in enumerate(cases)]
        call = Call(library, [variable_of(**case) for case in stepped])
        assert call.fill_steps(rule, hypers, options) == 0
        assert call.apply() == 0
        for case, hyper, got in zip(cases, hypers, stepped, strict=True):
            apply_on_cpu(rule, case, hyper, options)
            try:
                assert_same_case(got, case)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
