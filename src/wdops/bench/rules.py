"""Every rule, and Adam with bfloat16 slots, on one tensor, beside a bare stream of the rule's own reads and writes.

Their ratio is the part of the speed of memory that the rule reaches. LAMB reads all its arrays twice, because the norms
come before the step, and so does its stream.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from wdops import ops, reference
from wdops.bench.timing import STREAM, Run, Settings, Table, in_turn, loop, make_room, on_each_isa, ratio, stream_of

if TYPE_CHECKING:  # only to draw
    from matplotlib.figure import Figure

# More than the L3 of a large Xeon holds of any rule: there, who followed another on the same variables was 10 % ahead.
ELEMENTS, SHORT_ELEMENTS = 64_000_000, 1_000_000
SLOTS = "adam by its slots"
# Hyperparameters that have no default.
REQUIRED = {"lr": 1e-3, "step": 1000, "u_product": 0.1}
BFLOAT16 = {"bfloat16 slots": {}, "bfloat16 slots, rounded stochastically": {"seed": 1}}


def step_of(rule_name: str, n: int, slot_dtype: tf.DType = tf.float32, **options: int) -> Run:
    rule = reference.RULES[rule_name]
    random = np.random.default_rng(0)
    var, grad = (random.standard_normal(n, np.float32) for _ in range(2))
    # Second moments as they stand in training; all other slots start at 0.
    slots = [tf.Variable(tf.fill([n], tf.cast(name.startswith("v"), slot_dtype))) for name in rule.slots]
    tensors = tf.Variable(var), *slots, tf.constant(grad)
    required = {name: REQUIRED[name] for name, d in rule.hypers.items() if d is inspect.Parameter.empty}
    apply = getattr(ops, f"apply_{rule_name}")
    return loop(lambda: apply(*tensors, **required, **options), jit=False)


def passes_of(rule_name: str) -> list[tuple[int, int]]:
    """Reads and writes: of the variable, its slots and the gradient, and of all but the gradient."""
    written = 1 + len(reference.RULES[rule_name].slots)
    return [(written + 1, 0)] * (rule_name == "lamb") + [(written + 1, written)]


def measure(settings: Settings, progress: Callable[[str], None]) -> list[Table]:
    n = SHORT_ELEMENTS if settings.short else ELEMENTS
    tables = []
    for name in reference.RULES:
        progress(name)
        make_room(n)
        passes = passes_of(name)
        runs = on_each_isa("wdops", step_of(name, n)) | {STREAM: stream_of(n, *passes)}
        moved = 4 * sum(reads + writes for reads, writes in passes)
        tables.append(in_turn(name, runs, settings, elements=n, bytes_per_element=dict.fromkeys(runs, moved)))
    progress(SLOTS)
    make_room(n)
    runs = on_each_isa("float32 slots", step_of("adam", n))
    for name, options in BFLOAT16.items():
        runs |= on_each_isa(name, step_of("adam", n, tf.bfloat16, **options))
    # p is read and written and g is read, with 4 bytes; two slots are read and written with 4 or 2.
    moved = {name: 3 * 4 + 4 * (2 if "bfloat16" in name else 4) for name in runs}
    return [*tables, in_turn(SLOTS, runs, settings, elements=n, bytes_per_element=moved)]


def draw(tables: list[Table], figure: "Figure") -> None:
    """The part of the stream's speed that each rule reaches on each instruction set."""
    figure.set_size_inches(8, 8)
    axis = figure.subplots()
    rules = [table for table in tables if STREAM in table.seconds]
    rivals = [name for name in rules[0].seconds if name != STREAM]
    height = 0.8 / len(rivals)
    for k, rival in enumerate(rivals):
        parts = [ratio(table.seconds[STREAM], table.seconds[rival]) for table in rules]
        axis.barh(np.arange(len(rules)) + k * height, parts, height, label=rival)
    axis.set_yticks(np.arange(len(rules)) + 0.4 - height / 2, [table.title for table in rules])
    axis.invert_yaxis()
    axis.axvline(1, color="black", lw=1)
    axis.set(xlabel="speed, of that of a bare stream with the same reads and writes")
    axis.legend()
