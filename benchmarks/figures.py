"""Writes the figures in README.md: what stands between <!-- bench:NAME --> and <!-- /bench --> is made of results.json,
and behind <!-- bench:MACHINE/NAME --> of results_MACHINE.json, of which each is of one machine; what stands between
<!-- gpu:CARD --> and <!-- /gpu -->, of gpu_CARD.json.

python -m wdops bench --json benchmarks/results.json --png benchmarks
python benchmarks/gpu.py --output FOLDER        on a machine with a card: its gpu.json
python benchmarks/figures.py
"""

import json
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from wdops.bench.timing import STREAM, Table, gigabytes_per_second, milliseconds, onednn_in_words, ratio

README = Path(__file__).parents[1] / "README.md"
INSTRUCTION_SETS = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "x86-64"}
JIT = "Keras, jit_compile=True"
VERSIONS = {"tensorflow": "TensorFlow", "keras": "Keras", "torch": "PyTorch", "deepspeed": "DeepSpeed"}


@dataclass(frozen=True)
class Results:
    machine: dict[str, Any]
    settings: dict[str, Any]
    suites: dict[str, list[Table]]

    @classmethod
    def read(cls, path: Path) -> "Results":
        found = json.loads(path.read_text())
        suites = {name: [Table(**table) for table in tables] for name, tables in found["suites"].items()}
        return cls(found["machine"], found["settings"], suites)


def measured() -> dict[str, Results]:
    """By machine, as the README calls it; the first one has no name."""
    files = sorted(Path(__file__).parent.glob("results*.json"))
    return {path.stem.removeprefix("results").removeprefix("_"): Results.read(path) for path in files}


def digits(x: float) -> str:
    """Three that count, and all before the point."""
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def rows(head: list[str], cells: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *cells]
    return "\n" + "".join(f"| {' | '.join(line)} |\n".replace("|  ", "| ") for line in lines)


def side_by_side(corner: str, tables: list[Table]) -> str:
    """A column for each table, a row for each rival: milliseconds, and times the first."""
    firsts = [next(iter(table.seconds.values())) for table in tables]

    def cell(table: Table, first: list[float], rival: str) -> str:
        if rival not in table.seconds:
            return ""
        seconds = table.seconds[rival]
        times = "" if seconds is first else f" ({ratio(seconds, first):.2f})"
        return digits(milliseconds(seconds)) + times

    rivals = dict.fromkeys(rival for table in tables for rival in table.seconds)
    body = [[name, *(cell(table, first, name) for table, first in zip(tables, firsts, strict=True))] for name in rivals]
    return rows([corner, *(table.title for table in tables)], body)


def paragraph(text: str) -> str:
    return f"\n{textwrap.fill(text, 120)}\n"


def machine(results: Results) -> str:
    facts = results.machine
    versions = [f"{name} {facts['versions'][key]}" for key, name in VERSIONS.items() if key in facts["versions"]]
    versions[0] += onednn_in_words(facts)
    return paragraph(
        f"{facts['processor']} with {INSTRUCTION_SETS[facts['isa']]}, {facts['threads']} threads, "
        f"{', '.join(versions)}; medians of up to {results.settings['rounds']} rounds"
        f"{' of the short mode' if results.settings['short'] else ''}."
    )


def step(results: Results) -> str:
    return side_by_side("ms (and times wdops)", results.suites["step"])


def whole_step(results: Results) -> str:
    return side_by_side("ms (and times wdops)", results.suites["whole_step"])


def drift(results: Results) -> str:
    seconds = results.suites["whole_step"][0].seconds
    ratios = [k / w for k, w in zip(seconds["Keras, tf.function"], seconds["wdops"], strict=True)]
    return paragraph(
        "The machine is shared and its bandwidth drifts: over the rounds of the whole step, Keras under `tf.function` "
        f"took {min(ratios):.1f} to {max(ratios):.1f} times as long."
    )


def small(results: Results) -> str:
    return side_by_side("ms (and times wdops)", [t for t in results.suites["small"] if t.elements])


def small_training(results: Results) -> str:
    body = []
    for table in results.suites["small"]:
        for rival, added in table.facts.get("seconds that the optimizer adds", {}).items():
            values = added, median(table.seconds[rival])
            first_call = table.facts["seconds of the first call"][rival]
            body.append([f"{rival}, {table.facts['tensors']} tensors", *(digits(1e3 * s) for s in values)])
            body[-1].append(digits(first_call))
    return rows(["", "ms that the optimizer adds", "ms of the step", "seconds of the first call"], body)


def activations(results: Results) -> str:
    return side_by_side("ms (and times wdops)", results.suites["activations"])


def dense_updates(results: Results) -> str:
    body = []
    for table in results.suites["dense"][:-1]:
        product, factors = table.seconds["product, then step"], table.seconds["factors"]
        times = (milliseconds(product), milliseconds(factors), ratio(product, factors))
        body.append([table.title, *map(digits, times)])
    return rows(["ms", "product, then step", "factors", "times factors"], body)


def dense_training(results: Results) -> str:
    table = results.suites["dense"][-1]
    first = next(iter(table.seconds.values()))
    body = []
    for rival, seconds in table.seconds.items():
        peak = table.facts["peak bytes"].get(rival)
        memory = [digits(peak / 1e6), digits(peak / table.facts["parameters"])] if peak else ["", ""]
        body.append([rival, f"{digits(milliseconds(seconds))} ({ratio(seconds, first):.2f})", *memory])
    layers = f"MB of the step of {table.facts['layers']} layers"
    return rows([table.title, "ms (and times the first)", layers, "bytes a parameter"], body)


def rules(results: Results) -> str:
    """By instruction set, the parts of the stream's speed, and what bfloat16 slots are worth."""
    *of_rules, slots = results.suites["rules"]
    active = results.machine["isa"]
    others = [name.removeprefix("wdops, ") for name in of_rules[0].seconds if name.startswith("wdops, ")]

    def on(isa: str, name: str) -> str:
        return name if isa == active else f"{name}, {isa}"

    body: dict[str, list[str]] = {}
    for isa in (active, *others):
        parts = {t.title: ratio(t.seconds[STREAM], t.seconds[on(isa, "wdops")]) for t in of_rules}
        slowest = min(parts, key=parts.get)
        usual = sorted(part for rule, part in parts.items() if rule != slowest)
        body.setdefault("all rules but the slowest, of the stream's speed", []).append(
            f"{usual[0]:.2f} to {usual[-1]:.2f}"
        )
        body.setdefault("the slowest", []).append(f"`{slowest}`: {parts[slowest]:.2f}")
        float32 = slots.seconds[on(isa, "float32 slots")]
        for name in ("bfloat16 slots", "bfloat16 slots, rounded stochastically"):
            times = ratio(slots.seconds[on(isa, name)], float32)
            body.setdefault(f"AdamW with {name}, of the time with float32 slots", []).append(f"{times:.2f}")
    return rows(["", *(INSTRUCTION_SETS[isa] for isa in (active, *others))], [[k, *v] for k, v in body.items()])


def grid(results: Results) -> str:
    (table,) = results.suites["grid"]
    together, alone, fit = (median(seconds) for seconds in table.seconds.values())
    return paragraph(
        f"`python -m wdops grid` (suite `grid`): {table.facts['settings']} settings side by side take "
        f"{digits(together)} s, one after another in one `tf.function` {digits(alone)} s, and by `model.fit` "
        f"{digits(fit)} s, tracing included."
    )


def scaling(results: Results) -> str:
    """The constants of each regime: of a call, of a tensor, of a parameter."""
    tables = results.suites["scaling"]
    threads = max(table.facts["threads"] for table in tables)

    def points(axis: str, threads: int) -> dict[int, Table]:
        chosen = [t for t in tables if t.facts["axis"] == axis and t.facts["threads"] == threads]
        return {table.facts["count"]: table for table in chosen}

    def seconds(table: Table, rival: str) -> float:
        return median(table.seconds[rival])

    of_parameters, of_tensors = points("parameters", threads), points("tensors", threads)
    fewest, most = of_parameters[min(of_parameters)], of_parameters[max(of_parameters)]
    whole = of_parameters[max(n for n, t in of_parameters.items() if JIT in t.seconds)]
    one = of_tensors[min(of_tensors)]
    # The price of a tensor rises with their number, so that all rivals' is of as many.
    shared = of_tensors[max(n for n, t in of_tensors.items() if JIT in t.seconds)]
    crowd = of_tensors[max(of_tensors)]

    def of_each(constant: Callable[[str], float]) -> str:
        """By wdops and, in brackets, by Keras."""
        ours, keras, jit = (digits(constant(name)) for name in ("wdops", "Keras, tf.function", JIT))
        return f"{ours} ({keras}, under XLA {jit})"

    def of_a_call(rival: str) -> float:
        return 1e6 * seconds(fewest, rival)

    def of_a_tensor(rival: str) -> float:
        return 1e6 * (seconds(shared, rival) - seconds(one, rival)) / (shared.facts["count"] - one.facts["count"])

    def of_a_parameter(rival: str) -> float:
        return 1e9 * seconds(whole, rival) / whole.elements

    parameters = float(f"{1e3 * of_a_tensor('wdops') / of_a_parameter('wdops'):.1g}")
    alone = points("parameters", 1)[most.elements]
    return paragraph(
        f"However little there is to do, a step in a loop takes µs: {of_each(of_a_call)}, in brackets Keras's. For "
        f"each further tensor, up to {shared.facts['count']:,}, it takes µs: {of_each(of_a_tensor)}; a step of "
        f"{crowd.facts['count']:,} takes ms: {digits(milliseconds(crowd.seconds['wdops']))} "
        f"({digits(milliseconds(crowd.seconds['Keras, tf.function']))}). For each parameter of one tensor of "
        f"{whole.elements:,} it takes ns: {of_each(of_a_parameter)}. So a further tensor costs wdops as much as some "
        f"{parameters:,.0f} parameters. {most.elements:,} parameters are stepped at "
        f"{gigabytes_per_second(most, 'wdops'):.0f} GB/s, and by one thread in "
        f"{ratio(alone.seconds['wdops'], most.seconds['wdops']):.1f} times the time of {threads}."
    )


def training(results: Results) -> str:
    """Of each training what a step takes, how much of it is the optimizer's, and what it holds beside its variables."""
    body = []
    for table in results.suites["train"]:
        first = next(iter(table.seconds.values()))
        for rival, seconds in table.seconds.items():
            peak = table.facts["peak bytes"].get(rival)
            share = f"{100 * table.facts['share of the step'][rival]:.0f} %"
            times = f"{digits(milliseconds(seconds))} ({ratio(seconds, first):.2f})"
            body.append([table.title, rival, times, share, digits(peak / 1e6) if peak else ""])
    return rows(["", "", "ms of a step (and times wdops)", "of which the optimizer's", "MB beside variables"], body)


FIGURES: dict[str, Callable[[Results], str]] = {
    "machine": machine,
    "step": step,
    "whole-step": whole_step,
    "drift": drift,
    "small": small,
    "small-training": small_training,
    "activations": activations,
    "dense-updates": dense_updates,
    "dense-training": dense_training,
    "rules": rules,
    "grid": grid,
    "scaling": scaling,
    "training": training,
}


def filled(text: str, results: dict[str, Results]) -> str:
    """`text` with its figures made of `results`."""

    def figure(match: re.Match) -> str:
        return f"{match[1]}{FIGURES[match[3]](results[match[2] or ''])}<!-- /bench -->"

    return re.sub(r"(<!-- bench:(?:(\w+)/)?(\S+) -->).*?<!-- /bench -->", figure, text, flags=re.DOTALL)


COPY = "a copy of as many bytes"  # as gpu.py calls it


def gpu(path: Path) -> str:
    """Milliseconds beside PyTorch and a copy; of what has but a copy beside it, the share of the copy's speed."""
    found = json.loads(path.read_text())
    body, shares = [], []
    for table in found["tables"]:
        times = {rival: milliseconds(seconds) for rival, seconds in table["seconds"].items()}
        ours = next(iter(times))
        others = {rival: time for rival, time in times.items() if rival not in (ours, COPY)}
        if not others:
            title, _, elements = table["title"].rpartition(", ")
            shares.append(f"{title} {times[COPY] / times[ours]:.2f}")
            continue
        beside = "; ".join(f"{digits(time)} {rival}" for rival, time in others.items())
        body.append([table["title"], digits(times[ours]), digits(times[COPY]) if COPY in times else "", beside])
    machine = f"{found['machine']['card']}, PyTorch {found['machine']['versions']['torch']}"
    of_a_copy = paragraph(f"{machine}. Of a copy's speed, steps of {elements}: {'; '.join(shares)}.")
    return rows(["ms", "wdops", COPY, "others"], body) + of_a_copy


def with_gpus(text: str) -> str:
    """`text` with the figures of every card."""
    folder = Path(__file__).parent
    return re.sub(
        r"(<!-- gpu:(\S+) -->).*?<!-- /gpu -->",
        lambda match: f"{match[1]}{gpu(folder / f'gpu_{match[2]}.json')}<!-- /gpu -->",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    README.write_text(with_gpus(filled(README.read_text(), measured())))
