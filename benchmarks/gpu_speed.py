"""What gpu.py times: steps as a share of the speed of a copy, and beside PyTorch's optimizers where it is installed.

All rivals run in turn in every round, on one stream, between two events: a drift of the card meets them alike. Ratios
are medians of the ratios within a round. A step of wdops includes making its constants on the host and sending them.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from gpu_cases import HYPERS, NEUTRAL, store
from gpu_libraries import Library, Memory, Plan, Tables, Variable

Run = Callable[[], None]
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
COPY = "a copy of as many bytes"
WDOPS = "wdops"
NO_TORCH = "PyTorch is not installed"
COPY_BUFFER = 1 << 30  # bytes, of which there are two; a larger copy goes over them again
LR, WEIGHT_DECAY, CLIPNORM, EMA_MOMENTUM = 1e-3, 0.01, 1.0, 0.99


@dataclass(frozen=True)
class Sizes:
    one: int  # elements of the large tensor
    each: int  # of those that every rule steps
    small: int  # tensors
    small_each: int  # elements of each
    layers: int  # of BERT-large
    narrower: int  # times, than BERT-large is
    activations: tuple[int, int]
    factors: tuple[int, int]  # rows and columns
    rounds: int
    seconds: float  # for each table
    sample: float  # seconds of a rival in a round


FULL = Sizes(1 << 28, 1 << 26, 10_000, 1000, 24, 1, (16384, 4096), (4096, 4096), 21, 4.0, 1e-2)
# To run every line on a machine without a card; its times mean nothing.
TINY = Sizes(1 << 13, 1 << 12, 20, 100, 1, 128, (64, 32), (64, 48), 3, 1.0, 0.0)


@dataclass(frozen=True)
class Table:
    title: str
    seconds: dict[str, list[float]]  # of one step of each rival, in each round
    bytes: dict[str, int] = field(default_factory=dict)  # that a step reads and writes, where it is known
    notes: list[str] = field(default_factory=list)

    @property
    def is_share(self) -> bool:
        """Whether there is but a copy to compare with."""
        return list(self.seconds) == [WDOPS, COPY]

    def ratio(self, above: str, below: str) -> float:
        return median(a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True))

    def share(self, rival: str) -> float | None:
        """Of the speed of the copy."""
        if rival not in self.bytes or COPY not in self.seconds:
            return None
        return self.ratio(COPY, rival) * self.bytes[rival] / self.bytes[COPY]


def bert_large(layers: int, narrower: int) -> list[int]:
    """The elements of each tensor."""
    hidden, words, places = 1024 // narrower, 30522 // narrower, 512 // narrower
    layer = [
        *[hidden * hidden, hidden] * 4,
        *[hidden] * 4,
        4 * hidden * hidden,
        4 * hidden,
        4 * hidden * hidden,
        hidden,
    ]
    embeddings = [words * hidden, places * hidden, 2 * hidden, hidden, hidden]
    return [*embeddings, *layer * layers, hidden * hidden, hidden]


# ---- the clock


class Bench:
    """A library with its clock, and what is said of rivals that cannot run."""

    def __init__(self, library: Library, tables: Tables, sizes: Sizes, on_card: bool, torch: Any) -> None:
        """`torch`: the module, or None."""
        self.library, self.tables, self.sizes, self.on_card, self.torch = library, tables, sizes, on_card, torch
        self.events = [library.made("new_event") for _ in range(2)]
        self.milliseconds = np.zeros(1, np.float32)

    def seconds_of(self, run: Run, times: int) -> float:
        library = self.library
        library.device_record(self.events[0], library.stream)
        for _ in range(times):
            run()
        library.device_record(self.events[1], library.stream)
        library.device_wait(library.stream)
        library.device_milliseconds(self.milliseconds.ctypes.data, *self.events)
        return float(self.milliseconds[0]) / 1e3 / times

    def in_turn(
        self, title: str, runs: dict[str, Run], bytes_: dict[str, int] | None = None, notes: list[str] | None = None
    ) -> Table:
        times, kept, notes = {}, {}, list(notes or [])
        for name, run in runs.items():
            try:
                run()
                self.seconds_of(run, 1)
                times[name] = max(1, round(self.sizes.sample / max(self.seconds_of(run, 1), 1e-7)))
                kept[name] = run
            except Exception as error:  # a rival that does not run here is no failure
                notes.append(f"{name} does not run here: {str(error).splitlines()[0] if str(error) else type(error)}")
        seconds: dict[str, list[float]] = {name: [] for name in kept}
        deadline = time.perf_counter() + self.sizes.seconds
        for _ in range(self.sizes.rounds):
            for name, run in kept.items():
                seconds[name].append(self.seconds_of(run, times[name]))
            if time.perf_counter() > deadline:
                break
        return Table(title, seconds, bytes_ or {}, notes)

    # ---- what is run

    def copy(self, held: list[Any], bytes_: int) -> tuple[dict[str, Run], dict[str, int]]:
        """A rival that reads half of `bytes_` and writes the other, and what it moves."""
        half = max(bytes_ // 8 * 4, 4)
        source = self.filled(min(half, COPY_BUFFER) // 4, "float32")
        target = Memory(self.library, source.bytes)
        held += [source, target]

        def run() -> None:
            for begin in range(0, half, source.bytes):
                n = min(source.bytes, half - begin)
                self.library.device_copy(target.at, source.at, n, self.library.stream)

        return {COPY: run}, {COPY: 2 * half}

    def filled(self, n: int, dtype: str, positive: bool = False) -> Memory:
        """`n` normal numbers, a million of which are drawn."""
        drawn = np.random.default_rng(0).standard_normal(min(n, 1 << 20))
        piece = store(np.abs(drawn) if positive else drawn, dtype)
        memory = Memory(self.library, n * piece.itemsize)
        have = piece.nbytes
        self.library.device_copy(memory.at, piece.ctypes.data, have, self.library.stream)
        while have < memory.bytes:
            more = min(have, memory.bytes - have)
            self.library.device_copy(memory.at + have, memory.at, more, self.library.stream)
            have += more
        self.library.device_wait(self.library.stream)
        return memory

    def stepped(
        self, held: list[Any], rule: str, sizes: list[int], dtype: str = "float32", slot_dtype: str = "float32",
        average: bool = False,
    ) -> Stepped:  # fmt: skip
        return Stepped(self, held, rule, sizes, dtype, slot_dtype, average)

    @property
    def torch_stream(self) -> AbstractContextManager:
        """PyTorch on the same stream: it waits for no other, and the same events time it."""
        return (
            self.torch.cuda.stream(self.torch.cuda.ExternalStream(self.library.stream))
            if self.on_card
            else nullcontext()
        )

    def on_torch(self, run: Run) -> Run:
        def on_stream() -> None:
            with self.torch_stream:
                run()

        return on_stream

    def graph_of(self, run: Run) -> Run:
        """Captured once; what is sent from the host in it is sent anew each time."""
        self.library.device_begin_capture(self.library.stream)
        run()
        graph = self.library.made("end_capture", self.library.stream)
        return lambda: self.library.device_launch(graph, self.library.stream)

    def torch_graph_of(self, run: Run) -> Run:
        graph = self.torch.cuda.CUDAGraph()
        self.on_torch(run)()
        self.library.device_wait(self.library.stream)
        with self.torch.cuda.graph(graph):
            run()
        return self.on_torch(graph.replay)


class Stepped:
    """Variables of wdops on the card, and the ways to step them."""

    def __init__(
        self, bench: Bench, held: list[Any], rule: str, sizes: list[int], dtype: str, slot_dtype: str, average: bool
    ) -> None:
        self.bench, self.library = bench, bench.library
        slots = bench.tables.rules[rule]["slots"]
        aligned = [-(-n // 64) * 64 for n in sizes]
        begins = np.cumsum([0, *aligned])

        def buffer(dtype: str, positive: bool = False) -> Memory:
            memory = bench.filled(int(begins[-1]), dtype, positive)
            held.append(memory)
            return memory

        param, grad = buffer(dtype), buffer(dtype)
        slot = [buffer(slot_dtype, name.startswith("v")) for name in slots]
        averages = buffer(dtype) if average else None

        def at(memory: Memory | None, k: int, dtype: str) -> int | None:
            return None if memory is None else memory.at + int(begins[k]) * BYTES[dtype]

        self.variables = [
            Variable(
                n=n, dtype=bench.tables.dtypes.index(dtype), slot_dtype=bench.tables.dtypes.index(slot_dtype),
                param=at(param, k, dtype), grad=at(grad, k, dtype), slot=tuple(at(s, k, slot_dtype) for s in slot),
                average=at(averages, k, dtype),
            )
            for k, n in enumerate(sizes)
        ]  # fmt: skip
        usual = HYPERS | NEUTRAL | {"lr": LR, "decay_lr": LR, "weight_decay": WEIGHT_DECAY, "step": 1000.0}
        usual |= {"ema_momentum": EMA_MOMENTUM, "beta1": 0.9, "beta2": 0.999}
        hypers = np.array([usual[name] for name in bench.tables.hypers(rule)], np.float64)
        trust = bench.tables.rules[rule]["trust"]
        self.hypers = np.tile(hypers, (len(sizes), 1)) if trust else hypers
        self.plan = Plan(self.library, self.variables, bench.tables.rule(rule), self.hypers)
        gradient = hypers[: bench.tables.gradient_hypers].copy()
        self.norm_plan = Plan(self.library, self.variables, None, gradient)
        self.results = Memory(self.library, 8 * (2 * len(sizes) + 2))
        held += [self.plan, self.norm_plan, self.results]
        moved = 3 * BYTES[dtype] + 2 * len(slots) * BYTES[slot_dtype] + 2 * BYTES[dtype] * average
        # A rule with a norm of the variable reads everything before.
        self.bytes = sum(sizes) * (moved + trust * (2 * BYTES[dtype] + len(slots) * BYTES[slot_dtype]))
        self.norm_bytes = sum(sizes) * 2 * BYTES[dtype]

    def step(self) -> None:
        self.plan.fill(self.hypers)
        self.plan.send()
        self.plan.apply()

    def launched(self) -> None:
        """What a graph holds of `step`: constants are made before it is launched."""
        self.plan.send()
        self.plan.apply()

    def clipped(self) -> None:
        """With the norm of all gradients before."""
        self.plan.fill(self.hypers)
        self.launched_clipped()

    def launched_clipped(self) -> None:
        norm, count = self.results.at, self.plan.count
        scale, finite = norm + 16 * count, norm + 16 * count + 8
        self.plan.send()
        self.norm_plan.norms(norm, norm + 8 * count, finite)
        self.library.clip_scale(norm, count, CLIPNORM, scale, self.library.stream)
        self.plan.apply(clip_scale=scale)


class Torch:
    """The same parameters and gradients in PyTorch."""

    def __init__(self, bench: Bench, sizes: list[int]) -> None:
        self.bench, self.torch = bench, bench.torch
        device = "cuda" if bench.on_card else "cpu"
        with bench.torch_stream:
            self.params = [self.torch.nn.Parameter(self.torch.randn(n, device=device)) for n in sizes]
            for param in self.params:
                param.grad = self.torch.randn_like(param)

    def optimizer(self, name: str, **arguments: Any) -> Any:
        return getattr(self.torch.optim, name)(self.params, **{"lr": LR} | arguments)

    def rivals(self, name: str, **arguments: Any) -> dict[str, Run]:
        """Whichever of the ways PyTorch has for this optimizer here; the others are left out."""
        found = {}
        for way in ("fused", "foreach"):
            try:
                found[f"torch {name}, {way}"] = self.bench.on_torch(
                    self.optimizer(name, **{way: True}, **arguments).step
                )
            except (RuntimeError, TypeError):
                continue
        return found

    def captured(self, name: str, notes: list[str], **arguments: Any) -> dict[str, Run]:
        if not self.bench.on_card:
            return {}
        rival = f"torch {name}, fused, in a graph"
        try:
            # SGD has no counter of steps, which would have to be on the card.
            capturable = {} if name == "SGD" else {"capturable": True}
            optimizer = self.optimizer(name, fused=True, **capturable, **arguments)
            return {rival: self.bench.torch_graph_of(optimizer.step)}
        except (RuntimeError, TypeError) as error:
            notes.append(f"{rival}: {error}")
            return {}

    def clipped(self) -> dict[str, Run]:
        optimizer = self.optimizer("AdamW", fused=True, weight_decay=WEIGHT_DECAY)
        with self.bench.torch_stream:
            averages = [param.detach().clone() for param in self.params]

        @self.torch.no_grad()
        def step() -> None:
            self.torch.nn.utils.clip_grad_norm_(self.params, CLIPNORM, foreach=True)
            optimizer.step()
            self.torch._foreach_lerp_(averages, self.params, 1 - EMA_MOMENTUM)

        return {"torch: clip_grad_norm_, fused AdamW, foreach average": self.bench.on_torch(step)}


# ---- the tables


def measure(library: Library, tables: Tables, sizes: Sizes, on_card: bool) -> Iterator[list[Table]]:
    """Suite after suite; what cannot run is a note, because times never fail."""
    torch = None
    with suppress(ImportError):  # only here: it takes seconds, which compute-sanitizer would multiply
        torch = importlib.import_module("torch")
    bench = Bench(library, tables, sizes, on_card, torch)
    for suite in (_rules, _one, _bert, _small, _whole, _activations, _factors):
        held: list[Any] = []
        found: list[Table] = []
        try:
            found.extend(suite(bench, held))
        except Exception as error:
            found.append(Table(suite.__name__.strip("_"), {}, notes=[f"{suite.__name__.strip('_')} stopped: {error}"]))
        yield found
        _release(bench, held)


def _release(bench: Bench, held: list[Any]) -> None:
    bench.library.device_wait(bench.library.stream)
    for memory in held:
        memory.free()
    held.clear()
    gc.collect()
    if bench.torch is not None and bench.on_card:
        bench.torch.cuda.empty_cache()


def _fitting(bench: Bench, wanted: int, bytes_each: int) -> tuple[int, list[str]]:
    """As many elements as fit into two thirds of the free memory."""
    fit = int(bench.library.free_bytes / 1.5) // bytes_each if bench.on_card else wanted
    if fit >= wanted:
        return wanted, []
    fit = fit // 1024 * 1024
    return fit, [f"{fit:,} elements and not {wanted:,}, for which the card has too little memory"]


def _rules(bench: Bench, held: list[Any]) -> Iterator[Table]:
    """Every rule beside a copy; and AdamW in other types."""
    n, notes = _fitting(bench, bench.sizes.each, 48)
    rules = {rule: (rule, "float32", "float32") for rule in bench.tables.rules}
    rules |= {
        f"adam, {p} with {s} slots": ("adam", p, s) for p, s in bench.tables.layouts if (p, s) != ("float32",) * 2
    }
    for title, (rule, dtype, slot_dtype) in rules.items():
        stepped = bench.stepped(held, rule, [n], dtype, slot_dtype)
        copy, bytes_ = bench.copy(held, stepped.bytes)
        runs = {WDOPS: stepped.step} | copy
        yield bench.in_turn(f"{title}, {n:,} elements", runs, {WDOPS: stepped.bytes} | bytes_, notes)
        _release(bench, held)


OPTIMIZERS: dict[str, dict[str, dict[str, Any]]] = {
    "adam": {"AdamW": {"weight_decay": WEIGHT_DECAY}, "Adam": {}},
    "sgd": {"SGD": {}},
    "momentum": {"SGD": {"momentum": 0.9}},
    "adagrad": {"Adagrad": {}},
}


def _beside_torch(
    bench: Bench, held: list[Any], title: str, rule: str, sizes: list[int], notes: list[str], graph: bool = False
) -> Table:
    stepped = bench.stepped(held, rule, sizes)
    copy, bytes_ = bench.copy(held, stepped.bytes)
    runs = {WDOPS: stepped.step} | copy
    if graph:
        runs[f"{WDOPS}, in a graph"] = bench.graph_of(stepped.launched)
    if bench.torch is None:
        notes = [*notes, NO_TORCH]
    else:
        of_torch = Torch(bench, sizes)
        for optimizer, arguments in OPTIMIZERS[rule].items():
            runs |= of_torch.rivals(optimizer, **arguments)
            if graph:
                runs |= of_torch.captured(optimizer, notes, **arguments)
    # Those that make one pass over memory; what temporaries foreach has is its own affair.
    bytes_ |= {name: stepped.bytes for name in runs if name not in bytes_ and "foreach" not in name}
    return bench.in_turn(title, runs, bytes_, notes)


def _one(bench: Bench, held: list[Any]) -> Iterator[Table]:
    # Ours, PyTorch's ways each with a state of its own, temporaries of foreach, and the copy.
    n, notes = _fitting(bench, bench.sizes.one, 88)
    for rule in OPTIMIZERS:
        yield _beside_torch(bench, held, f"{rule}, {n:,} elements in one tensor", rule, [n], notes)
        _release(bench, held)


def _bert_large(bench: Bench, bytes_each: int) -> tuple[list[int], list[str]]:
    """The sizes of its tensors; where they do not fit with so many bytes an element, it has fewer layers."""
    sizes = bert_large(bench.sizes.layers, bench.sizes.narrower)
    fit, notes = _fitting(bench, sum(sizes), bytes_each)
    layers = bench.sizes.layers * fit // sum(sizes)
    return bert_large(layers, bench.sizes.narrower), notes and [f"{layers} layers of BERT-large: {notes[0]}"]


def _bert(bench: Bench, held: list[Any]) -> Iterator[Table]:
    sizes, notes = _bert_large(bench, 80)
    title = f"adam, the {len(sizes)} tensors of BERT-large, {sum(sizes):,} elements"
    yield _beside_torch(bench, held, title, "adam", sizes, notes)


def _small(bench: Bench, held: list[Any]) -> Iterator[Table]:
    sizes = [bench.sizes.small_each] * bench.sizes.small
    for rule in ("adam", "sgd"):
        title = f"{rule}, {len(sizes):,} tensors of {sizes[0]:,} elements"
        yield _beside_torch(bench, held, title, rule, sizes, [], graph=True)
        _release(bench, held)


def _whole(bench: Bench, held: list[Any]) -> Iterator[Table]:
    """Norm and clipping, AdamW, and the moving average."""
    sizes, notes = _bert_large(bench, 60)
    stepped = bench.stepped(held, "adam", sizes, average=True)
    bytes_ = stepped.bytes + stepped.norm_bytes
    runs, of_copy = bench.copy(held, bytes_)
    graph = f"{WDOPS}, in a graph"
    runs = {WDOPS: stepped.clipped} | runs | {graph: bench.graph_of(stepped.launched_clipped)}
    if bench.torch is None:
        notes = [*notes, NO_TORCH]
    else:
        runs |= Torch(bench, sizes).clipped()
    title = f"the whole step on the {len(sizes)} tensors of BERT-large: norm, clip, AdamW, average"
    yield bench.in_turn(title, runs, {WDOPS: bytes_, graph: bytes_} | of_copy, notes)


def _activations(bench: Bench, held: list[Any]) -> Iterator[Table]:
    rows, channels = bench.sizes.activations
    n = rows * channels
    library = bench.library
    x, y, grad, x_grad, bias, bias_grad = (bench.filled(size, "float32") for size in (n, n, n, n, channels, channels))
    scratch = Memory(library, library.activate_scratch_bytes(rows, channels, 1))
    held += [x, y, grad, x_grad, bias, bias_grad, scratch]
    hypers = np.array([1.0, 1.0])
    elu = (list(bench.tables.activations).index("Elu"), bench.tables.dtypes.index("float32"), hypers.ctypes.data)
    shape = (rows, channels, 1)

    def forward() -> None:
        library.activate(*elu, *shape, x.at, bias.at, y.at, library.stream)

    def backward() -> None:
        library.activate_grad(*elu, *shape, grad.at, y.at, x_grad.at, bias_grad.at, scratch.at, library.stream)

    of_torch: tuple[dict[str, Run], dict[str, Run]] = ({}, {})
    if torch := bench.torch:
        device = "cuda" if bench.on_card else "cpu"
        with bench.torch_stream:
            tx, tgrad = (torch.randn(rows, channels, device=device) for _ in range(2))
            tbias = torch.randn(channels, device=device)
            ty = torch.nn.functional.elu(tx + tbias)

        def torch_backward() -> None:
            torch.ops.aten.elu_backward(tgrad, 1.0, 1.0, 1.0, True, ty).sum(0)

        of_torch = (
            {"torch: elu(x + bias)": bench.on_torch(lambda: torch.nn.functional.elu(tx + tbias))},
            {"torch: elu_backward, sum": bench.on_torch(torch_backward)},
        )
    for title, run, passes, rivals in (("forward", forward, 2, of_torch[0]), ("backward", backward, 3, of_torch[1])):
        copy, bytes_ = bench.copy(held, passes * 4 * n)
        yield bench.in_turn(f"ELU of {rows:,} x {channels:,} behind a bias, {title}", {WDOPS: run} | copy | rivals,
                            {WDOPS: passes * 4 * n} | bytes_)  # fmt: skip


def _factors(bench: Bench, held: list[Any]) -> Iterator[Table]:
    """AdamW on a matrix whose gradient stays factored, beside the gradient as a product and then the step."""
    rows, columns = bench.sizes.factors
    stepped = bench.stepped(held, "adam", [rows * columns])
    for batch in (8, 32, 128):
        x, dz = bench.filled(batch * rows, "float32"), bench.filled(batch * columns, "float32")
        variable = Variable.from_buffer_copy(stepped.variables[0])
        variable.grad, variable.x, variable.dz, variable.batch, variable.width = None, x.at, dz.at, batch, columns
        plan = Plan(bench.library, [variable], bench.tables.rule("adam"), stepped.hypers)
        held += [x, dz, plan]

        def factored(plan: Plan = plan) -> None:
            plan.fill(stepped.hypers)
            plan.send()
            plan.apply()

        runs: dict[str, Run] = {"wdops, factors": factored, "wdops, of a gradient that is there": stepped.step}
        if torch := bench.torch:
            of_torch = Torch(bench, [rows * columns])
            device = of_torch.params[0].device
            with bench.torch_stream:
                tx, tdz = (torch.randn(batch, side, device=device) for side in (rows, columns))
            optimizer = of_torch.optimizer("AdamW", fused=True, weight_decay=WEIGHT_DECAY)
            grad = of_torch.params[0].grad.view(rows, columns)

            def product(tx: Any = tx, tdz: Any = tdz, grad: Any = grad, optimizer: Any = optimizer) -> None:
                torch.mm(tx.T, tdz, out=grad)
                optimizer.step()

            runs["torch: product, fused AdamW"] = bench.on_torch(product)
        yield bench.in_turn(f"AdamW of {rows:,} x {columns:,}, a batch of {batch}", runs)
