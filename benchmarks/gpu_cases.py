"""What gpu.py compares: every kernel on random and special values, with the oracle and, bit by bit, with the CPU's.

All arrays of a case lie in one piece of memory, with a pattern around each, and that piece is compared as a whole: what
should not have been written counts, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import oracle
from gpu_libraries import SCALED_PROXIMAL, STOCHASTIC, CudaError, Library, Memory, Plan, Tables, Variable
from oracle import UNIT, Number

CHUNK = 16384  # elements over which the kernels sum at a time
SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 0, 31, 32, 33, 63, 64, 65, 1023]
LARGE = [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 65, 100_003]
SHIFTS = [0, 1, 3, 8]  # of an array from an aligned address, in elements
PATTERN = 0xA5

# Amplified, so that a term that is missing or doubled stands far above rounding.
HYPERS = {
    "lr": 0.1, "momentum": 0.7, "nesterov": 1.0, "beta1": 0.6, "beta2": 0.8, "epsilon": 1e-3, "step": 3.0,
    "u_product": 0.3, "rho": 0.8, "l1_strength": 0.4, "l2_strength": 0.3, "l2_shrinkage": 0.2, "beta": 0.5,
    "lr_power": -0.6,
}  # fmt: skip
NEUTRAL = {
    "grad_scale": 1.0, "accumulation_scale": 1.0, "l1": 0.0, "l2": 0.0, "clip_scale": 1.0, "clip_value": 0.0,
    "decay_lr": 0.0, "weight_decay": 0.0, "proximal_l1": 0.0, "proximal_l2": 0.0, "ema_momentum": 0.0,
    "ema_overwrite": 0.0, "seed": 0.0,
}  # fmt: skip
TERMS = {
    "grad_scale": 0.5, "accumulation_scale": 1.7, "l1": 0.3, "l2": 0.2, "clip_scale": 0.7, "clip_value": 0.9,
    "decay_lr": 0.3, "weight_decay": 0.4, "proximal_l1": 0.25, "proximal_l2": 0.15, "ema_momentum": 0.8,
    "seed": float(2**40 + 12345),
}  # fmt: skip
# One variable's hyperparameters are not another's.
SPREAD = [1.0, 0.5, 1.25]
FIXED = {"step", "nesterov", "ema_overwrite", "seed", "beta1", "beta2", "rho"}
# pow of double is that of each machine's own library, and a card's rounds the last bit otherwise: all else has the bits
# of the CPU there, and this is within the oracle's bound, as all else.
BITS_OF_A_LIBRARY = {("ftrl_power", "float64")}
# Rules with norms of the whole variable.
WHOLE = {"lamb"}
UNBOUNDED = 0.05  # the part of an array that may be without a bound
ACTIVATION_HYPERS = {"alpha": 1.3, "scale": 1.1}

NUMPY = {
    "float32": np.float32, "float64": np.float64, "bfloat16": np.uint16, "float16": np.float16, "int64": np.int64,
    "bool": np.uint8,
}  # fmt: skip


def store(x: np.ndarray, dtype: str) -> np.ndarray:
    """As it lies in memory; NumPy has no bfloat16, which is a float cut in half, rounded to nearest, ties to even."""
    if dtype != "bfloat16":
        return np.asarray(x).astype(NUMPY[dtype])
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def widen(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


@dataclass(frozen=True, eq=False)
class Array:
    at: int  # in its arena, in bytes
    stored: np.ndarray
    dtype: str

    @property
    def wide(self) -> np.ndarray:
        return widen(self.stored, self.dtype)

    def number(self) -> Number:
        return Number(self.wide, UNIT[self.dtype])

    def element(self, i: int) -> Array:
        return Array(self.at + i * self.stored.itemsize, self.stored[i : i + 1], self.dtype)

    def of(self, content: np.ndarray) -> np.ndarray:
        """As stored in another content of the arena."""
        flat = np.frombuffer(content, self.stored.dtype, self.stored.size, self.at)
        return flat.reshape(self.stored.shape)

    def wide_of(self, content: np.ndarray) -> np.ndarray:
        return widen(self.of(content), self.dtype)


class Arena:
    """Arrays in one piece of memory."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self.end = 0

    def add(self, values: np.ndarray, dtype: str, shift: int = 0) -> Array:
        stored = np.ascontiguousarray(store(values, dtype))
        array = Array(-(-(self.end + 64) // 256) * 256 + shift * stored.itemsize, stored, dtype)
        self.arrays.append(array)
        self.end = array.at + stored.nbytes + 64
        return array

    def content(self) -> np.ndarray:
        content = np.full(self.end, PATTERN, np.uint8)
        for array in self.arrays:
            content[array.at : array.at + array.stored.nbytes] = array.stored.reshape(-1).view(np.uint8)
        return content

    def comparable(self, content: np.ndarray) -> np.ndarray:
        """With every NaN the same: which of two NaNs an instruction keeps is not fixed."""
        content = content.copy()
        for array in self.arrays:
            if array.dtype in UNIT:
                nan = np.isnan(array.wide_of(content))
                if nan.any():
                    array.of(content)[nan] = store(np.array(np.nan), array.dtype)
        return content


@dataclass
class Verdict:
    """On one case, or on many together."""

    cases: int = 0
    elements: int = 0
    worst: dict[str, float] = field(default_factory=dict)  # the largest error, of its bound, by dtype
    compared: int = 0  # with the CPU, in bytes
    other_pow: bool = False  # whether BITS_OF_A_LIBRARY was left out of that
    failures: list[str] = field(default_factory=list)
    bit_failures: list[str] = field(default_factory=list)

    def __iadd__(self, other: Verdict) -> Verdict:
        self.cases += other.cases
        self.elements += other.elements
        for dtype, part in other.worst.items():
            self.worst[dtype] = max(self.worst.get(dtype, 0.0), part)
        self.compared += other.compared
        self.other_pow |= other.other_pow
        self.failures += other.failures
        self.bit_failures += other.bit_failures
        return self

    def within(self, name: str, dtype: str, got: np.ndarray, want: np.ndarray, bound: np.ndarray) -> None:
        """Where the oracle is not finite, the kernel must be NaN or infinite alike.

        Where a difference of rounded numbers may be 0 and divides, there is no bound; that may be so of few.
        """
        got, want, bound = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, np.float64)) for x in (got, want, bound)))
        self.elements += got.size
        with np.errstate(invalid="ignore", divide="ignore"):
            same = (got == want) | (np.isnan(got) & np.isnan(want)) | (np.isfinite(want) & ~np.isfinite(bound))
            part = np.where(same, 0.0, np.abs(got - want) / bound)
        wrong = ~(part <= 1)
        worst = float(np.max(np.where(np.isnan(part), np.inf, part), initial=0))
        self.worst[dtype] = max(self.worst.get(dtype, 0.0), worst)
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            at = f"{got[i]} and not {want[i]} +- {bound[i]:.2g}"
            self.failures.append(f"{name}: {wrong.sum()} of {wrong.size} beyond the bound, the first at {i}: {at}")
        unbounded = int(np.sum(np.isfinite(want) & ~np.isfinite(bound)))
        if unbounded > max(1, UNBOUNDED * got.size):
            self.failures.append(f"{name}: {unbounded} of {got.size} have no bound")

    def equal(self, name: str, arena: Arena, got: np.ndarray, cpu: np.ndarray, but: Sequence[Array] = ()) -> None:
        """Bit by bit, but for the arrays `but`."""
        pair = [arena.comparable(content) for content in (got, cpu)]
        for array in but:
            for content in pair:
                content[array.at : array.at + array.stored.nbytes] = 0
        self.compared += got.size
        different = np.flatnonzero(pair[0] != pair[1])
        if different.size:
            inside = [a for a in arena.arrays if a.at <= different[0] < a.at + a.stored.nbytes]
            where = (
                f"array {arena.arrays.index(inside[0])} ({inside[0].dtype})" if inside else "what lies between arrays"
            )
            self.bit_failures.append(f"{name}: {different.size} bytes are not those of the CPU, the first in {where}")


# ---- steps


@dataclass
class Target:
    """One variable of a case."""

    name: str
    n: int  # of grad
    dtype: str
    slot_dtype: str
    hypers: dict[str, float]
    param: Array | None
    slots: list[Array]
    grad: Array | None
    accumulator: Array | None = None
    average: Array | None = None
    rows: Array | None = None
    factors: tuple[Array, Array] | None = None
    width: int = 0

    def variable(self, base: int, tables: Tables) -> Variable:
        def at(array: Array | None) -> int | None:
            return None if array is None else base + array.at

        x, dz = self.factors or (None, None)
        return Variable(
            n=self.n, dtype=tables.dtypes.index(self.dtype), slot_dtype=tables.dtypes.index(self.slot_dtype),
            param=at(self.param), grad=at(self.grad), slot=tuple(at(s) for s in self.slots),
            accumulator=at(self.accumulator), average=at(self.average), rows=at(self.rows), x=at(x), dz=at(dz),
            batch=0 if x is None else len(x.stored), width=self.width,
        )  # fmt: skip

    def gradient(self) -> Number:
        if self.factors is None:
            return self.grad.number()
        x, dz = self.factors
        made = oracle.product(x.wide, dz.wide, self.dtype, lambda z: widen(store(z, self.dtype), self.dtype))
        return Number(made.value.ravel(), made.unit, made.error.ravel())

    @cached_property
    def touched(self) -> Any:
        """The elements of all arrays but grad, in the order of those of grad."""
        if self.rows is None:
            return np.s_[:]
        return (self.rows.stored[:, None] * self.width + np.arange(self.width)).ravel()

    def number(self, array: Array | None) -> Number | None:
        """What is touched of it, as it is computed with."""
        return None if array is None else Number(array.wide[self.touched], UNIT[self.dtype])


@dataclass
class Case:
    name: str
    rule: str | None  # None: norms
    arena: Arena
    targets: list[Target]
    options: int = 0
    shared: bool = False
    grad_scale: Array | None = None
    clip_scale: Array | None = None
    outputs: dict[str, Array] = field(default_factory=dict)
    other_pow: bool = False  # whether pow of double is not that of the CPU
    special: bool = False  # values: oracle and kernel need only agree on what is NaN, and where both are usual numbers

    def hypers(self, tables: Tables) -> np.ndarray:
        names = tables.step_hypers[: tables.gradient_hypers] if self.rule is None else tables.hypers(self.rule)
        sets = [[float(t.hypers[name]) for name in names] for t in self.targets]
        return np.array(sets[0] if self.shared else sets, np.float64)

    def run(self, library: Library, tables: Tables) -> np.ndarray:
        rule = None if self.rule is None else tables.rule(self.rule)
        with Memory(library, self.arena.content()) as memory:

            def at(array: Array | None) -> int | None:
                return None if array is None else memory.at + array.at

            variables = [target.variable(memory.at, tables) for target in self.targets]
            with Plan(library, variables, rule, self.hypers(tables), self.options) as plan:
                grad_scales, clip_scales = (
                    scale is not None and scale.stored.size > 1 for scale in (self.grad_scale, self.clip_scale)
                )
                if self.rule is None:
                    norm, penalty, finite = (at(self.outputs[name]) for name in ("norm", "penalty", "finite"))
                    plan.norms(norm, penalty, finite, grad_scale=at(self.grad_scale), grad_scales=grad_scales)
                else:
                    plan.apply(
                        grad_scale=at(self.grad_scale), grad_scales=grad_scales, clip_scale=at(self.clip_scale),
                        clip_scales=clip_scales, penalty=at(self.outputs.get("penalty")),
                    )  # fmt: skip
            return memory.read()

    def judge(self, got: np.ndarray, cpu: np.ndarray) -> Verdict:
        verdict = Verdict(cases=1)
        but = [array for i, target in enumerate(self.targets) for array in self._not_equal(i, target)]
        verdict.equal(self.name, self.arena, got, cpu, [array for array in but if array is not None])
        verdict.other_pow = any(map(self._has_other_pow, self.targets))
        with np.errstate(all="ignore"):
            for i, target in enumerate(self.targets):
                (self._judge_norm if self.rule is None else self._judge_step)(verdict, i, target, got)
        if self.rule is None:
            finite = all(np.isfinite(self._total(t, i).value).all() for i, t in enumerate(self.targets))
            verdict.within(f"{self.name}: finite", "bool", self.outputs["finite"].of(got), finite, 0.5)
        return verdict

    def _has_other_pow(self, target: Target) -> bool:
        return self.other_pow and (self.rule, target.dtype) in BITS_OF_A_LIBRARY

    def _not_equal(self, i: int, target: Target) -> list[Array | None]:
        """What need not have the bits of the CPU."""
        stepped = [target.param, target.average]
        if self._has_other_pow(target):
            return [*stepped, *target.slots, *(output.element(i) for output in self.outputs.values())]
        # Sums over a factored gradient are over its tiles, which each machine cuts as its caches are.
        if target.factors is not None:
            return [*self.outputs.values(), *(stepped if self.rule in WHOLE else [])]
        return []

    def _hypers(self, i: int, target: Target) -> dict[str, float]:
        h = dict(target.hypers)
        if self.grad_scale is not None:
            h["grad_scale"] *= float(self.grad_scale.stored[i % self.grad_scale.stored.size])
        if self.clip_scale is not None:
            h["clip_scale"] *= float(self.clip_scale.stored[i % self.clip_scale.stored.size])
        return h

    def _total(self, target: Target, i: int) -> Number:
        of = [target.number(array) for array in (target.param, target.accumulator)]
        return oracle.gradient(target.gradient(), *of, self._hypers(i, target))

    def _judge_norm(self, verdict: Verdict, i: int, target: Target, got: np.ndarray) -> None:
        name, total = f"{self.name}: {target.name}", self._total(target, i)
        norm, penalty = (self.outputs[output].of(got)[i] for output in ("norm", "penalty"))
        error = oracle.ORDERS[target.dtype] * total.norm_error()
        verdict.within(f"{name}: norm", target.dtype, norm, total.norm(), error + oracle.LEAST[target.dtype])
        of_param = 0.0
        if target.param is not None:
            touched = target.param.wide[target.touched]
            of_param = oracle.penalty(touched, target.hypers["l1"], target.hypers["l2"])
        verdict.within(f"{name}: penalty", "float64", penalty, of_param, oracle.SUM * abs(of_param))

    def _judge_step(self, verdict: Verdict, i: int, target: Target, got: np.ndarray) -> None:
        name, h = f"{self.name}: {target.name}", self._hypers(i, target)
        slots = [target.number(slot) for slot in target.slots]
        want = oracle.step(
            self.rule, target.number(target.param), target.gradient(), slots, target.number(target.accumulator),
            target.number(target.average), bool(self.options & SCALED_PROXIMAL), h,
        )  # fmt: skip
        usual = np.s_[:]
        if self.special:
            inputs = [a.wide for a in (target.param, target.grad, *target.slots)]
            # What underflows in a product of the least numbers is 0 in a kernel, and a rule may ask its sign.
            usual = np.all([(x == 0) | ~(np.abs(x) < 2.0**-100) for x in inputs], axis=0)
        arrays = [(target.param, want.param), *zip(target.slots, want.slots, strict=True)]
        for array, number_ in (*arrays, (target.average, want.average)):
            if array is None:
                continue
            found = array.wide_of(got)[target.touched]
            roundings = 2.0 if self.options & STOCHASTIC and array.dtype == "bfloat16" else 1.0
            value, bound = number_.value, number_.bound(target.dtype, 0) + self._stored(number_, array, roundings)
            if self.special:
                verdict.within(f"{name}: what is NaN", "bool", np.isnan(found), np.isnan(value), 0.5)
                both = np.isfinite(found) & np.isfinite(value) & np.isfinite(bound) & usual
                found, value, bound = found[both], value[both], bound[both]
            verdict.within(f"{name}: array {self.arena.arrays.index(array)}", array.dtype, found, value, bound)
        if target.accumulator is not None:
            emptied = target.accumulator.wide_of(got)[target.touched]
            verdict.within(f"{name}: accumulator", target.dtype, emptied, np.zeros_like(emptied), 0.0)
        if "penalty" in self.outputs:
            param = target.param.wide_of(got)[target.touched]
            of_param = oracle.penalty(param, h["l1"], h["l2"])
            penalty = self.outputs["penalty"].of(got)[i]
            verdict.within(f"{name}: penalty", "float64", penalty, of_param, oracle.SUM * abs(of_param))

    @staticmethod
    def _stored(number: Number, array: Array, roundings: float) -> np.ndarray:
        """What storing in the dtype of an array adds to the bound of what was computed."""
        return (
            roundings * oracle.STORED[array.dtype] * (np.abs(number.value) + number.error) + oracle.LEAST[array.dtype]
        )


class Draw:
    """Random values and hyperparameters; second moments are positive."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def values(self, shape: int | tuple[int, ...], positive: bool = False) -> np.ndarray:
        x = self.random.normal(size=shape) * 2.0 ** self.random.integers(-3, 2, size=shape)
        return np.abs(x) if positive else x

    @staticmethod
    def hypers(rule: str | None, terms: dict[str, float], i: int) -> dict[str, float]:
        """Of variable i, around those above."""
        own = {} if rule is None else {name: HYPERS[name] for name in ("lr", *oracle.hypers_of(rule))}
        spread = SPREAD[i % len(SPREAD)]
        return {n: x if n in FIXED else x * spread for n, x in (NEUTRAL | own | terms).items()}

    def target(
        self,
        arena: Arena,
        case: str,
        rule: str | None,
        layout: tuple[str, str],
        shape: int | tuple[int, ...],
        hypers: dict[str, float],
        *,
        shift: int = 0,
        accumulator: bool = False,
        average: bool = False,
        param: bool = True,
        rows: np.ndarray | None = None,
        batch: int | None = None,
    ) -> Target:
        """`shift`: 0, and all arrays are aligned; else each array has its own shift.

        With `rows`, the arrays have `shape` and the gradient has those rows of it; with `batch` it is one of factors.
        """
        dtype, slot_dtype = layout
        places = iter(np.roll(SHIFTS, shift).tolist() if shift else [])

        def add(dtype: str, positive: bool = False, shape: int | tuple[int, ...] = shape) -> Array:
            return arena.add(self.values(shape, positive).ravel(), dtype, next(places, 0))

        grad = factors = None
        if batch is not None:
            scale = 1 / np.sqrt(np.sqrt(max(batch, 1)))  # so that the gradient is about 1
            sides = (scale * self.values((batch, side)) for side in shape)
            factors = tuple(arena.add(side, dtype, next(places, 0)) for side in sides)
        elif rows is None:
            grad = add(dtype)
        else:
            grad = add(dtype, shape=(len(rows), shape[1]))
        n = int(np.prod(shape)) if grad is None else grad.stored.size
        return Target(
            name=f"{n} x {dtype}" + (f" with {slot_dtype} slots" if slot_dtype != dtype else ""),
            n=n,
            dtype=dtype,
            slot_dtype=slot_dtype,
            hypers=hypers,
            param=add(dtype) if param else None,
            slots=[add(slot_dtype, name.startswith("v")) for name in (oracle.slots_of(rule) if rule else ())],
            grad=grad,
            accumulator=add(dtype) if accumulator else None,
            average=add(dtype) if average else None,
            rows=None if rows is None else arena.add(rows, "int64"),
            factors=factors,
            width=shape[1] if isinstance(shape, tuple) else 0,
        )


@dataclass(frozen=True)
class Option:
    """A way to call a step."""

    name: str
    terms: dict[str, float]
    options: int = 0
    shared: bool = False
    accumulator: bool = False
    average: bool = False
    penalty: bool = False
    scales: int = 0  # on the card: 1 is for all, 2 is one for each variable
    kind: str = "dense"


OPTIONS = [
    Option("plain", {}, shared=True),
    Option("decay", TERMS),
    Option("accumulator, average, penalty", TERMS, accumulator=True, average=True, penalty=True),
    Option("overwritten by its average", TERMS | {"ema_overwrite": 1.0}, average=True, scales=1),
    Option("scaled proximal", TERMS, SCALED_PROXIMAL, accumulator=True, penalty=True),
    Option("rounded stochastically", TERMS, STOCHASTIC, average=True),
    Option("scales on the card", TERMS, scales=2, penalty=True),
    Option("rows", TERMS, kind="rows", accumulator=True, average=True, penalty=True),
    Option("rows, rounded stochastically", TERMS, STOCHASTIC | SCALED_PROXIMAL, kind="rows"),
    Option("factors", TERMS, kind="factors", accumulator=True, average=True, penalty=True),
    Option("factors, plain", {}, STOCHASTIC, kind="factors"),
]
# Of an embedding: rows, width, and how many rows have a gradient.
EMBEDDINGS = [(5, 1, 3), (9, 7, 9), (40, 64, 17), (7, 33, 0), (300, 130, 129), (3, CHUNK + 7, 2)]
# Of x^T dz: rows, columns, batch.
FACTORS = [(1, 1, 1), (8, 64, 3), (17, 65, 5), (0, 3, 2), (130, 71, 33), (16, 128, 300), (3, 4101, 2), (5, 9, 0)]


def _targets(draw: Draw, arena: Arena, rule: str, option: Option, tables: Tables, large: bool) -> Iterator[Target]:
    count = 0
    for k, layout in enumerate(tables.layouts):
        sizes: list[Any] = {"rows": EMBEDDINGS, "factors": FACTORS}.get(option.kind) or SIZES
        if option.kind == "dense" and large:
            sizes = [*SIZES, LARGE[k % len(LARGE)], LARGE[(k + 2) % len(LARGE)]]
        for j, size in enumerate(sizes):
            more: dict[str, Any] = {}
            if option.kind == "rows":
                more["rows"] = draw.random.permutation(size[0])[: size[2]]
                size = size[:2]
            elif option.kind == "factors":
                more["batch"] = size[2]
                size = size[:2]
            # One set for all means one for all dtypes, too.
            hypers = draw.hypers(rule, option.terms, 0 if option.shared else count)
            yield draw.target(
                arena, option.name, rule, layout, size, hypers, shift=(j + k) % 3,
                accumulator=option.accumulator, average=option.average, **more,
            )  # fmt: skip
            count += 1


def steps(rule: str, tables: Tables, large: bool, other_pow: bool = False) -> Iterator[Case]:
    """All options of a rule, over all layouts in one call."""
    for k, option in enumerate(OPTIONS):
        draw, arena = Draw(seed=k), Arena()
        targets = list(_targets(draw, arena, rule, option, tables, large))
        case = Case(f"{rule}, {option.name}", rule, arena, targets, option.options, other_pow=other_pow)
        case.shared = option.shared and not tables.rules[rule]["trust"]
        if option.penalty:
            case.outputs["penalty"] = arena.add(np.zeros(len(targets)), "float64")
        if option.scales:
            count = len(targets) if option.scales > 1 else 1
            case.grad_scale = arena.add(0.5 + draw.random.random(count), "float64")
            case.clip_scale = arena.add(0.5 + draw.random.random(count), "float64")
        yield case
    yield _special(rule, tables, other_pow)


def _special(rule: str, tables: Tables, other_pow: bool) -> Case:
    """All pairs of special values as param and grad, on slots that are finite: some are 0."""
    arena, targets = Arena(), []
    for dtype in tables.dtypes:
        tiny = {"float16": 2.0**-14, "float32": 2.0**-126, "bfloat16": 2.0**-126}.get(dtype)
        values = [0.0, -0.0, 1.0, -1.0, 1e-3, np.inf, -np.inf, np.nan, 3e4]
        # CUDA has no way to flush subnormal doubles to zero, as the CPU's kernels do.
        values += [] if tiny is None else [tiny, -tiny, tiny / 4]
        param, grad = (x.ravel() for x in np.meshgrid(values, values))
        finite = np.where(np.isfinite(param), param, 2.0)
        names = oracle.slots_of(rule)
        slots = [np.roll(np.abs(finite) if name.startswith("v") else finite, 5 + k) for k, name in enumerate(names)]
        targets.append(
            Target(
                "special values", param.size, dtype, dtype, Draw.hypers(rule, TERMS, 0), arena.add(param, dtype),
                [arena.add(slot, dtype) for slot in slots], arena.add(grad, dtype),
            )
        )  # fmt: skip
    return Case(f"{rule}, special values", rule, arena, targets, other_pow=other_pow, special=True)


def norms(tables: Tables) -> Iterator[Case]:
    """Of gradients alone, with param, with accumulator, of rows and of factors; then one that is not finite."""
    kinds = ["dense", "rows", "factors"]
    bad: list[tuple[str, str | None, float]] = [(kind, None, 0.0) for kind in kinds]
    bad += [("dense", dtype, x) for dtype in tables.dtypes for x in (np.nan, np.inf)]
    for k, (kind, dtype, value) in enumerate(bad):
        draw, arena, targets = Draw(seed=k), Arena(), []
        option = Option(kind, {}, kind=kind)
        for i, target in enumerate(_targets(draw, arena, "sgd", option, tables, large=dtype is None)):
            if target.dtype != target.slot_dtype:
                continue
            target.hypers = draw.hypers(None, TERMS if i % 4 else {}, i)
            if i % 3 == 0:
                target.param = None
            elif i % 3 == 1:
                target.accumulator = arena.add(draw.values(target.param.stored.size), target.dtype, i % 4)
            if kind == "dense" and target.n == 9 and target.dtype != "float64":
                target.grad.stored[3:5] = store(np.array([2.0**-128, -(2.0**-130)]), target.dtype)
            if target.dtype == dtype and target.n == SIZES[-1]:
                target.grad.stored[target.n // 2] = store(np.array(value), dtype)
            targets.append(target)
        case = Case(f"norms, {kind}" + (f" with {value} in {dtype}" if dtype else ""), None, arena, targets)
        case.outputs = {name: arena.add(np.full(len(targets), -1.0), "float64") for name in ("norm", "penalty")}
        case.outputs["finite"] = arena.add(np.full(1, 2), "bool")
        if k % 2:
            case.grad_scale = arena.add(0.5 + draw.random.random(len(targets) if k % 4 == 1 else 1), "float64")
        yield case


# ---- what is no step


@dataclass(frozen=True)
class Call:
    """`run(library, address of the arena's content)`, and what the oracle wants of the arrays: value and bound."""

    name: str
    arena: Arena
    run_at: Callable[[Library, int], None]
    wants: Callable[[np.ndarray], list[tuple[Array, np.ndarray, np.ndarray]]]

    def run(self, library: Library, _tables: Tables) -> np.ndarray:
        with Memory(library, self.arena.content()) as memory:
            self.run_at(library, memory.at)
            return memory.read()

    def judge(self, got: np.ndarray, cpu: np.ndarray) -> Verdict:
        verdict = Verdict(cases=1)
        verdict.equal(self.name, self.arena, got, cpu)
        with np.errstate(all="ignore"):
            for array, value, bound in self.wants(got):
                verdict.within(self.name, array.dtype, array.wide_of(got).ravel(), value.ravel(), bound.ravel())
        return verdict


def clip_scales() -> Iterator[Call]:
    random = np.random.default_rng(0)
    for count, limit, value in [(1, 1.0, 3.0), (0, 1.0, 0), (7, 100.0, 0.5), (1000, 2.0, None), (5000, 2.0, np.nan),
                                (3, 2.0, np.inf), (130, 2.0, 0.0)]:  # fmt: skip
        arena = Arena()
        norm = arena.add(random.random(count) if value is None or np.isnan(value) else np.full(count, value), "float64")
        if value is not None and np.isnan(value):
            norm.stored[count // 2] = value
        scale = arena.add(np.zeros(1), "float64")

        def run(library: Library, base: int, count: int = count, limit: float = limit, norm: Array = norm,
                scale: Array = scale) -> None:  # fmt: skip
            library.clip_scale(base + norm.at, count, limit, base + scale.at, library.stream)

        def wants(_: np.ndarray, limit: float = limit, norm: Array = norm, scale: Array = scale) -> list[Any]:
            total = np.sqrt(np.sum(norm.stored**2))
            want = limit / max(limit, total) if np.isfinite(total) else 0.0
            return [(scale, np.array([want]), np.array([oracle.SUM * want]))]

        yield Call(f"clip_scale of {count} norms", arena, run, wants)


# outer, channels, inner
SHAPES = [
    (1, 1, 1), (3, 7, 1), (33, 64, 1), (1, 5, 1023), (2, 3, 300), (600, 16, 1), (1, 1, 70_001), (5, 130, 9),
    (0, 4, 1), (2, 0, 3), (270, 66, 1), (3, 1030, 1),
]  # fmt: skip


def activations(tables: Tables) -> Iterator[Call]:
    for a, (name, hypers) in enumerate(tables.activations.items()):
        for dtype in tables.dtypes:
            for k, shape in enumerate(SHAPES):
                yield _activation(tables, name, hypers, dtype, shape, bool((k + a) % 3), bool(k % 2), k % 4)


def _activation(
    tables: Tables, name: str, hypers: list[str], dtype: str, shape: tuple[int, int, int], biased: bool, in_place: bool,
    shift: int,
) -> Call:  # fmt: skip
    """Forwards, and backwards from that output; `in_place`: the output lies where x was, and x_grad where grad was."""
    draw, arena = Draw(seed=sum(shape)), Arena()
    values = ACTIVATION_HYPERS if name == "Elu" else {"alpha": 0.3}
    given = np.array([values[hyper] for hyper in hypers], np.float64)
    forward, slope = oracle.ACTIVATIONS[name]

    def add(values: np.ndarray, k: int = 0) -> Array:
        return arena.add(values, dtype, SHIFTS[(shift + k) % 4] if shift else 0)

    x_values = draw.values(shape)
    if x_values.size > 100:
        # The last is a subnormal of float, which counts as 0.
        x_values.flat[:7] = [0.0, -0.0, np.nan, np.inf, -np.inf, -100.0, 0.0 if dtype == "float64" else 2.0**-128]
    x, grad, bias = add(x_values), add(draw.values(shape), 1), add(draw.values(shape[1]), 2) if biased else None
    output = x if in_place else add(np.zeros(shape), 3)
    x_grad = grad if in_place else add(np.zeros(shape))
    bias_grad = add(np.ones(shape[1]), 1) if biased else None
    size = (tables.dtypes.index(dtype), given.ctypes.data, *shape)

    def run(library: Library, base: int) -> None:
        def at(array: Array | None) -> int | None:
            return None if array is None else base + array.at

        activation = list(tables.activations).index(name)
        with Memory(library, library.activate_scratch_bytes(*shape)) as scratch:
            library.activate(activation, *size, at(x), at(bias), at(output), library.stream)
            library.activate_grad(
                activation, *size, at(grad), at(output), at(x_grad), at(bias_grad), scratch.at, library.stream
            )
            library.device_wait(library.stream)

    def wants(got: np.ndarray) -> list[tuple[Array, np.ndarray, np.ndarray]]:
        h = dict(zip(hypers, given, strict=True))
        z = x.number()
        if bias is not None:
            z = z + Number(bias.wide[:, None], UNIT[dtype])
        y = forward(z, **h)
        stored_y = Number(output.wide_of(got), UNIT[dtype])
        of_x = grad.number() * slope(stored_y, **h)
        found = [(output, y.value, y.bound(dtype)), (x_grad, of_x.value, of_x.bound(dtype))]
        if bias_grad is not None:
            sums = of_x.summed((0, 2))
            found.append((bias_grad, sums.value, sums.bound(dtype)))
        return found

    title = f"{name} of {dtype} {list(shape)}" + (", biased" if biased else "") + (", in place" if in_place else "")
    return Call(title, arena, run, wants)


# ---- a graph


def replayed(kernels: Library, cpu: Library, tables: Tables) -> Verdict:
    """Norms, clipping and the step, captured once and replayed with another lr each time, against the CPU's calls."""
    rates = [0.1, 0.03, 0.3]
    contents = [_clipped_steps(library, tables, rates, captured=library is kernels) for library in (kernels, cpu)]
    verdict = Verdict(cases=1)
    arena = contents[0][0]
    verdict.equal("a captured step, replayed", arena, contents[0][1], contents[1][1])
    return verdict


def _clipped_steps(library: Library, tables: Tables, rates: list[float], captured: bool) -> tuple[Arena, np.ndarray]:
    draw, arena = Draw(seed=0), Arena()
    option = Option("", TERMS, average=True)
    targets = list(_targets(draw, arena, "adam", option, tables, large=False))
    outputs = {name: arena.add(np.zeros(len(targets)), "float64") for name in ("norm", "penalty")}
    scale, finite = arena.add(np.zeros(1), "float64"), arena.add(np.zeros(1), "bool")
    case = Case("", "adam", arena, targets)
    with Memory(library, arena.content()) as memory:
        variables = [target.variable(memory.at, tables) for target in targets]
        hypers = case.hypers(tables)
        lr = tables.hypers("adam").index("lr")
        with Plan(library, variables, tables.rule("adam"), hypers) as plan:

            def step() -> None:
                plan.send()
                plan.norms(memory.at + outputs["norm"].at, memory.at + outputs["penalty"].at, memory.at + finite.at)
                library.clip_scale(
                    memory.at + outputs["norm"].at, len(targets), 1.0, memory.at + scale.at, library.stream
                )
                plan.apply(clip_scale=memory.at + scale.at)

            if captured:
                library.device_begin_capture(library.stream)
                step()
                graph = library.made("end_capture", library.stream)
            for rate in rates:
                hypers[:, lr] = rate
                plan.fill(hypers)
                if captured:
                    library.device_launch(graph, library.stream)
                else:
                    step()
                library.device_wait(library.stream)
        return arena, memory.read()


# ---- all of it


def refusals(library: Library, tables: Tables) -> Verdict:
    """A layout that there is not, and rows beside factors: what was to be filled stays as it is."""
    verdict = Verdict(cases=1)
    float32, float64 = (tables.dtypes.index(dtype) for dtype in ("float32", "float64"))
    wrong = {
        "float64 with float32 slots": {"dtype": float64, "slot_dtype": float32},
        "rows beside factors": {"rows": 256, "x": 256, "dz": 256},
    }
    for name, fields in wrong.items():
        host_table = np.full(library.table_bytes(1), PATTERN, np.uint8)
        refused = False
        try:
            library.fill_table((Variable * 1)(Variable(n=1, width=1, batch=1, **fields)), 1, host_table.ctypes.data)
        except CudaError:
            refused = True
        verdict.within(f"{name} is refused", "bool", np.array(refused), np.array(True), np.array(0.5))
        verdict.within(f"{name} fills nothing", "bool", host_table, np.full(host_table.size, PATTERN), np.array(0.5))
    return verdict


def compare(
    kernels: Library, cpu: Library, tables: Tables, *, on_card: bool, large: bool, rules: list[str] | None = None
) -> dict[str, Verdict]:
    """By what is compared."""
    unknown = {*tables.rules, *tables.activations} - {*oracle.RULES, *oracle.ACTIVATIONS}
    if unknown:
        raise RuntimeError(f"the oracle does not know {', '.join(sorted(unknown))}")
    groups: dict[str, Iterator[Case | Call]] = {
        r: steps(r, tables, large, other_pow=on_card) for r in rules or tables.rules
    }
    groups |= {"norms": norms(tables), "clip_scale": clip_scales(), "activations": activations(tables)}
    verdicts = {}
    for name, cases in groups.items():
        verdict = verdicts[name] = Verdict()
        for case in cases:
            verdict += case.judge(case.run(kernels, tables), case.run(cpu, tables))
    verdicts["a captured graph"] = replayed(kernels, cpu, tables)
    verdicts["refusals"] = refusals(kernels, tables)
    return verdicts
