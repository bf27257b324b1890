"""The benchmarks: the suites that are asked for, as tables, JSON and pictures, and beside older figures.

A suite is a module of this folder with `measure(settings, progress)`, which returns its tables, and, where bars of
ratios do not suit them, `draw(tables, figure)`.
"""

import importlib
from dataclasses import asdict
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table as Grid

from wdops.bench import timing
from wdops.bench.timing import Settings, Table

if TYPE_CHECKING:  # only to draw
    from matplotlib.figure import Figure

WIDTH = 140  # of what is printed to a file


def show(table: Table) -> Grid:
    grid = Grid(title=table.title, title_justify="left", title_style="bold")
    first = next(iter(table.seconds))
    for column in ("", "ms", "quartiles", f"times {first}", "bytes a parameter", "GB/s"):
        grid.add_column(column, justify="right" if column else "left")
    for rival, seconds in table.seconds.items():
        low, high = timing.quartiles(seconds)
        speed = timing.gigabytes_per_second(table, rival)
        grid.add_row(
            rival,
            f"{timing.milliseconds(seconds):.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{timing.ratio(seconds, table.seconds[first]):.2f}",
            "" if speed is None else f"{table.bytes_per_element[rival]:g}",
            "" if speed is None else f"{speed:.1f}",
        )
    if table.facts.get("others", 0) > timing.QUIET:
        grid.caption = f"others took up to {table.facts['others']:.0%} of the machine in these rounds"
    return grid


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What else than wdops may be why two results differ: of the machine and of the settings, line by line."""
    return [
        f"{name}: was {old[part].get(name)}, is {value}"
        for part in ("machine", "settings")
        for name, value in new[part].items()
        if name != "build" and old[part].get(name) != value
    ]


def compared(old: dict[str, Any], new: dict[str, Any]) -> Grid:
    grid = Grid(title="against the older figures", title_justify="left", title_style="bold")
    for column in ("", "rival", "old ms", "new ms", "new / old"):
        grid.add_column(column, justify="right" if "ms" in column or "/" in column else "left")
    for suite, tables in new["suites"].items():
        before = {table["title"]: table["seconds"] for table in old["suites"].get(suite, [])}
        for table in tables:
            rivals = before.get(table["title"], {})
            for rival, seconds in table["seconds"].items():
                if rival in rivals:
                    was, now = timing.milliseconds(rivals[rival]), timing.milliseconds(seconds)
                    grid.add_row(f"{suite}: {table['title']}", rival, f"{was:.3f}", f"{now:.3f}", f"{now / was:.2f}")
    return grid


def draw_ratios(tables: list[Table], figure: "Figure") -> None:
    """A bar for each rival, and lines from quartile to quartile; an axis for each table."""
    figure.set_size_inches(9, 0.5 + sum(0.8 + 0.25 * len(table.seconds) for table in tables))
    heights = [2 + len(table.seconds) for table in tables]
    axes = figure.subplots(len(tables), squeeze=False, height_ratios=heights)[:, 0]
    for axis, table in zip(axes, tables, strict=True):
        rounds = np.array(list(table.seconds.values()))
        low, middle, high = np.quantile(rounds / rounds[0], (0.25, 0.5, 0.75), axis=1)
        colors = ["C0"] + ["C7"] * (len(rounds) - 1)
        axis.barh(list(table.seconds), middle, color=colors, xerr=(middle - low, high - middle))
        axis.invert_yaxis()
        axis.axvline(1, color="black", lw=1)
        first, seconds = next(iter(table.seconds.items()))
        axis.set(title=f"{table.title}: times {first}, {timing.milliseconds(seconds):.3g} ms")


def save_picture(suite: Any, tables: list[Table], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    getattr(suite, "draw", draw_ratios)(tables, figure)
    figure.savefig(path, dpi=120)


def run(
    suites: list[str],
    *,
    short: bool,
    rounds: int | None,
    patience: float | None,
    json: Path | None,
    png: Path | None,
    compare: Path | None,
) -> None:
    """Measures `suites`, prints their tables, and writes and compares what is asked for.

    Args:
      suites: names of modules of this folder.
      short: small sizes and few rounds.
      rounds, patience: of Settings; None: 3 and 0 if `short`, and else 15 and 60.
      json: a file to write all seconds and facts to, after each suite.
      png: a folder to write a picture of each suite to.
      compare: the file that an earlier run has written as its `json`.
    """
    tf.get_logger().setLevel("ERROR")  # every case is a new tf.function, which it takes for retracing
    settings = Settings(
        short,
        rounds=rounds or (3 if short else 15),
        patience=(0 if short else 60) if patience is None else patience,
    )
    old = loads(compare.read_text()) if compare else None
    new = {"machine": timing.machine(), "settings": asdict(settings), "suites": {}}
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    facts = new["machine"]
    console.print(
        f"{facts['processor']}, {facts['threads']} threads, {facts['isa']}, "
        f"TensorFlow {facts['versions']['tensorflow']}{timing.onednn_in_words(facts)}; "
        f"medians of up to {settings.rounds} rounds\n"
    )
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(suites))
        for name in suites:
            suite = importlib.import_module(f"{__name__}.{name}")
            tables = suite.measure(
                settings, lambda what, name=name: progress.update(task, description=f"{name}: {what}")
            )
            for table in tables:
                progress.console.print(show(table), "")
            new["suites"][name] = [asdict(table) for table in tables]
            if json:
                json.write_text(dumps(new, indent=1))
            if png:
                png.mkdir(parents=True, exist_ok=True)
                save_picture(suite, tables, png / f"{name}.png")
            progress.advance(task)
    if old:
        console.print(compared(old, new))
        for line in differences(old, new):
            console.print(f"not the same machine or settings: {line}")
