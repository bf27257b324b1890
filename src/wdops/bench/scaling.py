"""The time of an AdamW step against the number of parameters, of tensors, and of threads.

The number of threads is fixed in a process, so that each has one of its own. What does not fit into the memory that is
available is left out, and so is XLA where it would compile for many minutes.
"""

from collections.abc import Callable
from dataclasses import asdict, astuple
from typing import TYPE_CHECKING, Any

import keras

from wdops import optimizers
from wdops.bench.step import BYTES, KERAS_COMPILED, adamw
from wdops.bench.timing import (
    MOST_TENSORS,
    STREAM,
    THREADS,
    Settings,
    Shapes,
    Table,
    each_way,
    elements,
    in_its_own_process,
    in_turn,
    memory_available,
    milliseconds,
    stream_of,
)

if TYPE_CHECKING:  # only to draw
    from matplotlib.figure import Figure

JIT = "Keras, jit_compile=True"
# Bytes a parameter that a rival holds at most, as measured: p, m, v and g are 16, the rest are results in between.
HELD = {"wdops": 16, STREAM: 16, JIT: 24, "Keras, tf.function": 30}
ROOM = 1.25  # times so much must be available: values are drawn before they are assigned
IN_ALL, SHORT_IN_ALL = 5_000_000, 100_000  # parameters, in however many tensors


def cases(short: bool) -> dict[str, dict[int, Shapes]]:
    """The shapes for each number of what a plot has on its axis."""
    of_tensors, n = ((1, 5, 20), SHORT_IN_ALL) if short else ((1, 10, 100, 1000, 5000), IN_ALL)
    powers = range(3, 8, 2) if short else range(3, 10)
    return {
        "parameters": {10**k: [(10**k,)] for k in powers},
        "tensors": {count: [(n // count,)] * count for count in of_tensors},
    }


def threads_of(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def fitting(shapes: Shapes) -> list[str]:
    """Those of HELD that fit into memory side by side."""
    names, room = [], memory_available()
    for name, held in HELD.items():
        room -= ROOM * held * elements(shapes)
        if room > 0 and (name != JIT or len(shapes) <= MOST_TENSORS):
            names.append(name)
    return names


def step(axis: str, count: int, shapes: Shapes, settings: Settings) -> Table:
    keras.backend.clear_session()
    n = elements(shapes)
    names = fitting(shapes)
    rivals = each_way(lambda: adamw(optimizers, shapes), {"wdops": "tf.function"})
    ways = {name: way for name, way in KERAS_COMPILED.items() if name in names}
    if ways:
        rivals |= each_way(lambda: adamw(keras.optimizers, shapes), ways)
    runs = {name: rival.run for name, rival in rivals.items()}
    if STREAM in names:
        runs[STREAM] = stream_of(n, (4, 3))
    title = f"{axis}: {count:,}; {threads_of(THREADS)}"
    facts = {"axis": axis, "count": count, "threads": THREADS}
    known = dict.fromkeys(("wdops", STREAM), BYTES)
    return in_turn(title, runs, settings, elements=n, bytes_per_element=known, facts=facts)


def in_this_process(*settings: Any) -> list[dict[str, Any]]:
    """The tables for its number of threads, ready for JSON; `settings` are the fields of Settings."""
    asked = Settings(*settings)
    points = [(axis, *point) for axis, points in cases(asked.short).items() for point in points.items()]
    return [asdict(step(axis, n, shapes, asked)) for axis, n, shapes in points if fitting(shapes)]


def measure(settings: Settings, progress: Callable[[str], None]) -> list[Table]:
    tables = []
    for threads in sorted({1, THREADS}):
        progress(threads_of(threads))
        found = in_its_own_process("scaling", f"in_this_process(*{astuple(settings)!r})", threads)
        tables += [Table(**table) for table in found]
    return tables


def draw(tables: list[Table], figure: "Figure") -> None:
    """Milliseconds against each axis; dashed: fewer threads."""
    figure.set_size_inches(12, 6)
    axes = sorted({table.facts["axis"] for table in tables})
    threads = sorted({table.facts["threads"] for table in tables}, reverse=True)
    for plot, axis in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
        for count, style in zip(threads, ("-", "--"), strict=False):
            of_line = [t for t in tables if t.facts["axis"] == axis and t.facts["threads"] == count]
            for k, rival in enumerate(HELD):
                points = [(t.facts["count"], milliseconds(t.seconds[rival])) for t in of_line if rival in t.seconds]
                label = f"{rival}, {threads_of(count)}"
                plot.plot(*zip(*points, strict=True), style, marker=".", color=f"C{k}", label=label)
        plot.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms of a step")
        plot.grid(alpha=0.3)
    figure.legend(*plot.get_legend_handles_labels(), loc="outside lower center", ncols=2)
