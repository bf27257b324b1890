"""The search of `python -m wdops grid`: all settings side by side, one after another, and by model.fit.

A step here is the whole training by all settings, tracing included; that by model.fit goes by a few of them.
"""

import itertools
import time
from collections.abc import Callable

from wdops.__main__ import LRS, STRENGTHS
from wdops.bench.timing import Settings, Table
from wdops.grid import Search

DECAY = "weight_decay"
SIDE_BY_SIDE, ONE_AFTER_ANOTHER, FIT = "side by side", "one after another, in one tf.function", "by model.fit"


def measure(settings: Settings, progress: Callable[[str], None]) -> list[Table]:
    pairs = [{DECAY: strength, "lr": lr} for strength, lr in itertools.product(STRENGTHS[DECAY], LRS)]
    epochs, rounds = 60, min(settings.rounds, 3)  # a round takes a minute
    if settings.short:
        pairs, epochs, rounds = pairs[::4], 5, 1
    search = Search(pairs, rule="adam", epochs=epochs, hidden=16, batch=16, seed=0)
    search.warm_up()
    ways = {
        SIDE_BY_SIDE: search.side_by_side,
        ONE_AFTER_ANOTHER: search.one_after_another,
        FIT: search.sample_by_model_fit,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            progress(f"{name}, round {number + 1} of {rounds}")
            begin = time.perf_counter()
            way()
            part = len(search.sample) / len(pairs) if name == FIT else 1
            seconds[name].append((time.perf_counter() - begin) / part)
    facts = {"settings": len(pairs), "settings by model.fit": len(search.sample)}
    return [Table(f"{len(pairs)} settings, {epochs} epochs", seconds, facts=facts)]
