"""How the suites time: rivals in turn, loops inside one call, and a bare stream over memory as the yardstick.

All rivals run in turn in every round, so that a drift of the machine meets them alike; tables give medians, and the
ratio of each to another as the median of the ratios within a round.
"""

import ctypes
import functools
import gc
import importlib.metadata
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf
from tensorflow.python.util import _pywrap_util_port  # private: whether oneDNN is on

from wdops import build_info, isa
from wdops._load import native

Shapes = list[tuple[int, ...]]
Run = Callable[[int], None]  # runs so many steps
Made = TypeVar("Made")

BERT_LAYER: Shapes = [
    *[(768, 768), (768,)] * 4,
    *[(768,)] * 4,
    (768, 3072),
    (3072,),
    (3072, 768),
    (768,),
]
BERT_BASE: Shapes = [
    (30522, 768),
    (512, 768),
    (2, 768),
    (768,),
    (768,),
    *BERT_LAYER * 12,
    (768, 768),
    (768,),
]
THREADS = len(os.sched_getaffinity(0))  # what TensorFlow's pool takes, too
MOST_TENSORS = 1000  # that XLA compiles a step of in a minute or two
QUIET = 0.04  # the part of the machine that others may take in a round that counts
WEIGHTS, GRADS = range(2)  # seeds
STREAM = "a bare stream of the same reads and writes"


@dataclass(frozen=True)
class Settings:
    short: bool  # the whole command in less than 2 minutes
    rounds: int
    patience: float  # seconds to wait and repeat the rounds of a table that others disturb


@dataclass(frozen=True)
class Table:
    title: str
    seconds: dict[str, list[float]]  # of one step of each rival, in each round; the first rival is wdops
    elements: int | None = None  # parameters, or elements of what is activated
    # Reads and writes of a step, by rival, where they are known; what a write fetches that is not read is not counted.
    bytes_per_element: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # what else was measured, and can be written as JSON


# ---- what is timed


def elements(shapes: Shapes) -> int:
    return sum(int(np.prod(s)) for s in shapes)


def normals(shapes: Shapes, seed: int) -> Iterator[tf.Tensor]:
    """The same values each time; one tensor at a time, since twice the largest model may not fit into memory."""
    for k, shape in enumerate(shapes):
        yield tf.random.stateless_normal(shape, (seed, k))


def make_room(n: int) -> None:
    """Has what is made next, of n float32 elements in each tensor or in all, lie side by side.

    Else TensorFlow lays large tensors at distances of powers of two. By a hash of the address, in which those are often
    the same, an AMD core looks its L1 up, so that one array is in the way of the other: Adam then takes 1.6 times as
    long in one thread on AVX-512, 2.6 times on AVX2, and a bare stream 1.2 and 1.6 times in two.
    """
    tf.zeros([8 * n])  # its room is free at once, and stays TensorFlow's


def each_way(make: Callable[[], Callable[[Any], Made]], ways: dict[str, Any], share: bool = True) -> dict[str, Made]:
    """By name, what `make()` makes of each way to run it.

    With `share`, all ways have one set of variables, to fit into memory; without, each has its own.
    """
    shared = make() if share else None
    return {name: (shared or make())(way) for name, way in ways.items()}


def loop(step: Callable[[], None], jit: bool) -> Run:
    """`step` in a loop inside one tf.function: the price of a call from Python is not the step's."""

    @tf.function(jit_compile=jit)
    def run(times: tf.Tensor) -> None:
        done = tf.constant(0)
        while done < times:  # over tf.range, XLA would compile once more for each number
            step()
            done += 1

    return lambda times: run(tf.constant(times))


def on_each_isa(name: str, run: Run) -> dict[str, Run]:
    """`run` under `name` on the instruction set in use, which comes first, and by their names on the others."""

    def on(other: str) -> Run:
        def run_on_other(times: int) -> None:
            before = isa.active()
            isa.use(other)
            run(times)
            isa.use(before)

        return run_on_other

    others = [other for other in isa.available() if other != isa.active()]
    return {name: run} | {f"{name}, {other}": on(other) for other in others}


def stream_of(n: int, *passes: tuple[int, int]) -> Run:
    """The bare stream of a step over n float32 elements: in each pass (reads, writes), that many arrays are read, and
    that many of these written.

    Where less than 8 MiB are read and written, in one thread. A pass is a call from Python, of some microseconds.
    """
    # NumPy asks for pages of 2 MiB, which TensorFlow does not: a stream of two arrays of 64 M took 9 % less time there.
    arrays = [np.frombuffer(mmap.mmap(-1, 4 * n), np.float32) for _ in range(max(reads for reads, _ in passes))]
    for array in arrays:
        array.fill(1)

    def run(times: int) -> None:
        for _ in range(times):
            for reads, writes in passes:
                native.stream(arrays, reads, writes, THREADS)

    return run


def in_its_own_process(module: str, call: str, processors: int = THREADS) -> Any:
    """What `call` returns in a new process that has so many processors, and to which nothing was done before."""
    program = (
        f"import json, os, sys; sys.path[:0] = {sys.path!r}; "
        f"os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{processors}]); "
        f"from wdops.bench import {module}; print(json.dumps({module}.{call}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{module}.{call} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def check_changes(changes: dict[str, list[np.ndarray]]) -> None:
    """Raises AssertionError if a rival has changed an array otherwise than the first."""
    first, *others = changes
    for name in others:
        for got, expected in zip(changes[name], changes[first], strict=True):
            difference = np.linalg.norm(got - expected) / np.linalg.norm(expected)
            # Keras and PyTorch make the bias corrections in float32.
            assert difference < 1e-4, f"{name} is {difference:.1e} from {first}"


# ---- timing


class _Others:
    """The part of the machine that other processes take from here on."""

    def __init__(self) -> None:
        self._begin, self._used = time.perf_counter(), self._seconds()

    def part(self) -> float:
        return (self._seconds() - self._used) / (time.perf_counter() - self._begin) / os.cpu_count()

    @staticmethod
    def _seconds() -> float:
        """Of all processors since the machine started, but for this process's."""
        user, nice, system, _idle, _iowait, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
        return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def _wait_for_quiet(deadline: float) -> None:
    while time.perf_counter() < deadline:
        others = _Others()
        time.sleep(0.2)
        if others.part() < QUIET:
            return


def _seconds_of(run: Run, times: int) -> float:
    begin = time.perf_counter()
    run(times)
    return (time.perf_counter() - begin) / times


def _seconds_not_in_cache(run: Run, times: int) -> float:
    """Of steps of which each finds nothing in a cache, and is a call from Python."""
    total = 0.0
    for _ in range(times):
        _flush_caches()(1)
        total += _seconds_of(run, 1)
    return total / times


@functools.cache
def _flush_caches() -> Run:
    # Four times the last level: a virtual machine may have more of it than it is told.
    return stream_of(max(caches().values()), (1, 1))


def in_turn(
    title: str,
    runs: dict[str, Run],
    settings: Settings,
    *,
    flushed: bool = False,
    elements: int | None = None,
    bytes_per_element: dict[str, float] | None = None,
    facts: dict[str, Any] | None = None,
) -> Table:
    """Times all in turn, after a first call that is not counted, and in each round after some steps that are not.

    A round in which others took a noticeable part of the machine is repeated once they leave off, for as many seconds
    as `settings.patience` says; then the quietest rounds count. The fact `others` is the part they took in the worst.

    Args:
      flushed: before each step something larger than the caches is streamed; its time is not the step's.
      elements, bytes_per_element, facts: of the table.
    """
    clock = _seconds_not_in_cache if flushed else _seconds_of
    enough = 0.02 if settings.short else 0.1  # seconds of each rival in a round
    times = {}
    for name, run in runs.items():
        run(1)
        times[name] = 1
        for _ in range(2):  # of a single short step, the call from Python is most
            times[name] = max(1, round(enough / _seconds_of(run, times[name])))
        if flushed:  # Most of the time goes into flushing.
            times[name] = min(times[name], 10)
    measured: list[tuple[float, dict[str, float]]] = []  # the others' part, and the seconds of a step
    deadline = time.perf_counter() + settings.patience
    while sum(part < QUIET for part, _ in measured) < settings.rounds:
        if len(measured) >= settings.rounds and time.perf_counter() > deadline:
            break
        _wait_for_quiet(deadline)
        others = _Others()
        seconds = {}
        for name, run in runs.items():
            # Who runs first behind a rest pays for it, with a slow clock, other processes' caches, and threads that a
            # scheduler wakes on one processor; so everybody runs a while before it counts.
            run(max(1, times[name] // 4))
            seconds[name] = clock(run, times[name])
        measured.append((others.part(), seconds))
    quietest = sorted(measured, key=lambda of_round: of_round[0])[: settings.rounds]
    return Table(
        title,
        {name: [seconds[name] for _, seconds in quietest] for name in runs},
        elements,
        bytes_per_element or {},
        (facts or {}) | {"others": quietest[-1][0]},
    )


# ---- what is weighed


def _bytes_in(file: str, name: str) -> int:
    """Of a file of lines `name: kilobytes kB`."""
    return int(next(line for line in Path(file).read_text().splitlines() if line.startswith(name)).split()[1]) << 10


def peak_bytes(run: Run) -> int:
    """The most memory that a second step holds beyond what the process has before the first.

    So what tracing and compiling leave behind counts, but not their own peak.
    """
    # Building a model leaves memory that a step could use unseen.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _bytes_in("/proc/self/status", "VmRSS:")
    run(1)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    run(1)
    return _bytes_in("/proc/self/status", "VmHWM:") - before


# ---- what the seconds say


def milliseconds(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def quartiles(seconds: list[float]) -> tuple[float, float]:
    """The first and the third, in milliseconds."""
    first, third = np.quantile(seconds, (0.25, 0.75)) * 1e3
    return float(first), float(third)


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def gigabytes_per_second(table: Table, rival: str) -> float | None:
    """None where it is not known what the rival reads and writes."""
    if table.elements is None or rival not in table.bytes_per_element:
        return None
    return table.bytes_per_element[rival] * table.elements / statistics.median(table.seconds[rival]) / 1e9


# ---- the machine


def caches() -> dict[str, int]:
    """Bytes of each cache of the first processor that holds data, by level."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (folder / "type").read_text().strip() != "Instruction":
            sizes[f"L{(folder / 'level').read_text().strip()}"] = int((folder / "size").read_text().strip("K\n")) << 10
    return sizes or {"unknown, taken to be": 64 << 20}


def memory_available() -> int:
    """In bytes."""
    return _bytes_in("/proc/meminfo", "MemAvailable:")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def onednn_in_words(facts: dict[str, Any]) -> str:
    """Behind the version of TensorFlow; nothing where it is not known."""
    known = facts.get("oneDNN")
    return "" if known is None else f" with oneDNN {'on' if known else 'off'}"


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    versions = {}
    for name in ("tensorflow", "keras", "numpy", "torch", "deepspeed"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "threads": THREADS,
        "isa": isa.active(),
        "caches": caches(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "oneDNN": _pywrap_util_port.IsMklEnabled(),
        "versions": versions | {"tensorflow": tf.__version__, "python": platform.python_version()},
        "build": build_info(),
    }
