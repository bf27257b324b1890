"""Checks and times the kernels of csrc/cuda: no TensorFlow, no network, nothing that must be installed before.

    python benchmarks/gpu.py                on a machine with a card, nvcc, g++ and NumPy
    python benchmarks/gpu.py --device cpu   without a card: the same logic on small sizes, and times that mean nothing

1. builds csrc/cuda for the card with nvcc, and the kernels of this machine's CPU with g++, behind the same interface;
2. compares every kernel with an oracle in float64 (oracle.py) in a bound that is the rounding errors' own, and bit by
   bit with the CPU's kernels; and a captured graph, replayed with another learning rate, with the CPU's calls;
3. runs compute-sanitizer, where it is installed, over a small part of that;
4. times bandwidth as a share of a copy, and against PyTorch's fused and foreach optimizers where it is installed;
5. prints tables and writes gpu.json and gpu.png to --output. The exit status is 1 if a comparison failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import gpu_cases
import gpu_libraries
import gpu_speed
import numpy as np
from gpu_cases import Verdict
from gpu_libraries import ROOT, Library, Tables
from gpu_speed import WDOPS, Table

SMALL_RULES = ["adam", "lamb"]  # for compute-sanitizer: the second has sums before its step
SANITIZERS = ["memcheck", "racecheck"]
SANITIZER_SECONDS = 60
SHOWN = 5  # failures of each line that are printed

Rows = list[list[str]]


def show(title: str, head: list[str], rows: Rows) -> None:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    print(f"\n{title}")
    for row in (head, *rows):
        cells = (cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        print("  " + "   ".join(cells).rstrip())
    sys.stdout.flush()


# ---- the comparisons


def show_verdicts(verdicts: dict[str, Verdict]) -> None:
    dtypes = ["float32", "float64", "bfloat16", "float16"]
    rows = []
    for name, verdict in verdicts.items():
        worst = [f"{verdict.worst[d]:.2f}" if d in verdict.worst else "" for d in dtypes]
        bits = "" if not verdict.compared else "differ" if verdict.bit_failures else "the same"
        bits += ", but not of float64" * verdict.other_pow
        oracle = "wrong" if verdict.failures else "within" if verdict.elements else ""
        rows.append([name, str(verdict.cases), f"{verdict.elements:,}", oracle, *worst, bits])
    head = ["", "calls", "elements", "oracle", *(f"error {dtype}" for dtype in dtypes), "bits of the CPU"]
    show("Compared: the largest errors, as parts of their bounds", head, rows)
    for verdict in verdicts.values():
        for failures in (verdict.failures, verdict.bit_failures):
            for failure in failures[:SHOWN]:
                print(f"  {failure}")
            if len(failures) > SHOWN:
                print(f"  ... and {len(failures) - SHOWN} more")


def failed(verdicts: dict[str, Verdict]) -> bool:
    return any(verdict.failures or verdict.bit_failures for verdict in verdicts.values())


def sanitize(arguments: argparse.Namespace) -> dict[str, str]:
    """What each tool of compute-sanitizer says of a small part of the comparisons, in a process of its own."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        return dict.fromkeys(SANITIZERS, "not run: compute-sanitizer is not installed")
    found = {}
    for tool in SANITIZERS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--small"]
        command += ["--device", arguments.device]
        command += ["--build", str(arguments.build), "--csrc", str(arguments.csrc), "--arch", arguments.arch]
        try:
            done = subprocess.run(
                command,
                timeout=SANITIZER_SECONDS,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            found[tool] = f"not finished in {SANITIZER_SECONDS} s"
            continue
        lines = done.stdout.splitlines()
        refused = [line for line in lines if "not supported" in line]
        if done.returncode == 0:
            found[tool] = "no errors"
        elif refused:
            found[tool] = f"not run: {refused[0].strip('= ')}"
        else:
            found[tool] = "errors: " + "\n".join([line for line in lines if line.startswith("===")][:20] or lines[-5:])
    return found


# ---- the times


def show_suite(tables: list[Table]) -> None:
    """A table for each, but a line for each that has a copy alone beside it."""
    lines, notes = [], {}
    for table in tables:
        notes |= dict.fromkeys(table.notes)
        if table.is_share:
            seconds = median(table.seconds[WDOPS])
            speed = table.bytes[WDOPS] / seconds / 1e9
            lines.append([table.title, f"{seconds * 1e3:.4f}", f"{speed:.0f}", f"{table.share(WDOPS):.3f}"])
            continue
        first, rows = next(iter(table.seconds), None), []
        for rival, seconds in table.seconds.items():
            share = table.share(rival)
            speed = table.bytes.get(rival, 0) / median(seconds) / 1e9
            low, high = np.quantile(seconds, (0.25, 0.75)) * 1e3
            cells = [f"{median(seconds) * 1e3:.4f}", f"{low:.4f} to {high:.4f}", f"{table.ratio(rival, first):.2f}"]
            rows.append([rival, *cells, f"{speed:.0f}" if speed else "", "" if share is None else f"{share:.3f}"])
        show(table.title, ["", "ms", "quartiles", f"times {first}", "GB/s", "of the copy's speed"], rows)
    if lines:
        show("Beside a copy of as many bytes", ["", "ms", "GB/s", "of the copy's speed"], lines)
    for note in notes:
        print(f"  {note}")


def draw(tables: list[Table], title: str, path: Path) -> None:
    """The shares of the copy's speed, and below a bar for each rival beside the first."""
    from matplotlib.figure import Figure

    shares = {table.title: table.share(WDOPS) for table in tables if table.is_share}
    beside = [table for table in tables if table.seconds and not table.is_share]
    heights = [1 + len(shares), *(1 + len(table.seconds) for table in beside)]
    figure = Figure(figsize=(10, 1 + 0.3 * sum(heights)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    axes[0].barh(list(shares), list(shares.values()))
    axes[0].set_title("speed, of that of a copy", loc="left", fontsize="medium")
    for axis, table in zip(axes[1:], beside, strict=True):
        first = next(iter(table.seconds))
        axis.barh(list(table.seconds), [table.ratio(rival, first) for rival in table.seconds])
        axis.set_title(f"{table.title} (time, of that of {first})", loc="left", fontsize="medium")
    for axis in axes:
        axis.axvline(1, color="black", lw=1)
        axis.invert_yaxis()
    figure.savefig(path, dpi=100)


# ---- the machine


def facts(kernels: Library, tables: Tables, arguments: argparse.Namespace) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for name in ("torch", "matplotlib"):
        if name in sys.modules:
            versions[name] = sys.modules[name].__version__
    found: dict[str, Any] = {
        "card": kernels.name,
        "driver": kernels.driver,
        "isa": tables.isa,
        "device": arguments.device,
    }
    if arguments.device == "gpu":
        said = subprocess.run([gpu_libraries.nvcc(), "--version"], capture_output=True, text=True, check=False).stdout
        found["nvcc"] = said.strip().splitlines()[-1] if said else "?"
    return found | {"versions": versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu", help="cpu: by a stand-in for CUDA's runtime")
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc", help="the sources; default: those of this folder")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu", help="where libraries are built and kept")
    parser.add_argument("--arch", default="native", help="nvcc's -arch; default: native")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "gpu", help="the folder of gpu.json and gpu.png"
    )
    parser.add_argument("--small", action="store_true", help="few rules and sizes, and no times: for compute-sanitizer")
    arguments = parser.parse_args()
    begin = time.perf_counter()

    def part(title: str) -> None:
        print(f"[{time.perf_counter() - begin:5.1f} s] {title}", flush=True)

    why = gpu_libraries.why_no_card() if arguments.device == "gpu" else None
    if why:
        parser.exit(2, f"{why}; --device cpu runs the same logic without a card\n")
    part("building")
    csrc = arguments.csrc.resolve()
    paths = gpu_libraries.build(
        gpu_libraries.kernels(arguments.device, csrc, arguments.build, arguments.arch),
        gpu_libraries.kernels_of_cpu(arguments.device, csrc, arguments.build),
    )
    kernels, cpu = map(Library, paths)
    tables = Tables.of(paths[1])
    on_card = arguments.device == "gpu"

    part(f"comparing on {kernels.name}")
    large = not arguments.small and on_card
    rules = SMALL_RULES if arguments.small else None
    verdicts = gpu_cases.compare(kernels, cpu, tables, on_card=on_card, large=large, rules=rules)
    show_verdicts(verdicts)
    wrong = failed(verdicts)
    if arguments.small:
        return int(wrong)

    sanitizers = dict.fromkeys(SANITIZERS, "not run: there is no card")
    if on_card:
        part("compute-sanitizer")
        sanitizers = sanitize(arguments)
    show("compute-sanitizer", ["tool", "says"], [[tool, said] for tool, said in sanitizers.items()])
    wrong |= any(said.startswith("errors") for said in sanitizers.values())

    part("timing" if on_card else "timing, on a stand-in: these times mean nothing")
    timed = []
    for suite in gpu_speed.measure(kernels, tables, gpu_speed.FULL if on_card else gpu_speed.TINY, on_card):
        show_suite(suite)
        timed += suite

    machine = facts(kernels, tables, arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {
        "machine": machine,
        "passed": not wrong,
        "compared": {name: asdict(verdict) for name, verdict in verdicts.items()},
        "compute-sanitizer": sanitizers,
        "tables": [asdict(table) for table in timed],
    }
    (arguments.output / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    title = f"wdops on {machine['card']}" + ("" if on_card else ": times mean nothing")
    try:
        draw(timed, title, arguments.output / "gpu.png")
    except ImportError:
        print("no picture: matplotlib is not installed")
    part(f"{'FAILED' if wrong else 'passed'}; written to {(arguments.output / 'gpu.json').resolve()}")
    return int(wrong)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    sys.exit(main())
