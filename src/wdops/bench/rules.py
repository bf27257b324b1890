"""Times every rule, and Adam with bfloat16 slots, on one tensor of 33.5 M float32 elements.

    python benchmarks/rules.py [--rounds N] [--patience SECONDS] [--isa NAME] [--elements N] [--json FILE] [rule ...]

The first table sets the step of each rule beside a bare stream of the rule's own reads and writes, which is the speed
of memory: their ratio is the part of it that the rule reaches. LAMB reads all its arrays twice, because the norms come
before the step, and so does its stream. The second table sets Adam with slots of two bytes beside that with four.
"""

import inspect

import numpy as np
import tensorflow as tf
from timing import Run, loop, measure, milliseconds, parser_of, print_machine, ratio, stream_of, write_json

import wdops

ELEMENTS = 1 << 25
# Hyperparameters that have no default.
REQUIRED = {"lr": 1e-3, "step": 1000, "u_product": 0.1}
SLOTS = {"bfloat16 slots": {}, "bfloat16 slots, rounded stochastically": {"seed": 1}}


def step_of(rule_name: str, n: int, slot_dtype: tf.DType = tf.float32, **options: int) -> Run:
    rule = wdops.reference.RULES[rule_name]
    random = np.random.default_rng(0)
    var, grad = (random.standard_normal(n, np.float32) for _ in range(2))
    # Second moments as they stand in training; all other slots start at 0.
    slots = [tf.Variable(tf.fill([n], tf.cast(name.startswith("v"), slot_dtype))) for name in rule.slots]
    tensors = tf.Variable(var), *slots, tf.constant(grad)
    required = {name: REQUIRED[name] for name, d in rule.hypers.items() if d is inspect.Parameter.empty}
    apply = getattr(wdops.ops, f"apply_{rule_name}")
    return loop(lambda: apply(*tensors, **required, **options), jit=False)


def passes_of(rule_name: str) -> list[tuple[int, int]]:
    """Reads and writes: of the variable, its slots and the gradient, and of all but the gradient."""
    written = 1 + len(wdops.reference.RULES[rule_name].slots)
    return [(written + 1, 0)] * (rule_name == "lamb") + [(written + 1, written)]


def main() -> None:
    rules = list(wdops.reference.RULES)
    parser = parser_of(__doc__, rounds=15)
    parser.add_argument("rule", nargs="*", choices=[[], *rules], help="default: all")
    parser.add_argument("--isa", choices=wdops.isa.available(), default=wdops.isa.active(), help="default: the best")
    parser.add_argument("--elements", type=int, default=ELEMENTS, help=f"default: {ELEMENTS}")
    arguments = parser.parse_args()
    wdops.isa.use(arguments.isa)
    n = arguments.elements
    print_machine(f"{n / 1e6:.1f} M float32 elements")
    results = {}
    print("| rule | reads, writes | wdops, ms | bare stream, ms | stream / wdops |\n|---|---|---|---|---|")
    for name in arguments.rule or rules:
        passes = passes_of(name)
        runs = {"wdops": step_of(name, n), "bare stream": stream_of(n, *passes)}
        seconds = results[name] = measure(runs, arguments.rounds, arguments.patience)
        wdops_ms, stream_ms = map(milliseconds, seconds.values())
        part = ratio(seconds["bare stream"], seconds["wdops"])
        columns = " + ".join(f"{reads}, {writes}" for reads, writes in passes)
        print(f"| {name} | {columns} | {wdops_ms:.2f} | {stream_ms:.2f} | {part:.2f} |", flush=True)
    if "adam" in (arguments.rule or rules):
        runs = {"float32 slots": step_of("adam", n)}
        runs |= {name: step_of("adam", n, tf.bfloat16, **options) for name, options in SLOTS.items()}
        seconds = results["adam by slots"] = measure(runs, arguments.rounds, arguments.patience)
        print("\n| adam | wdops, ms | / float32 slots |\n|---|---|---|")
        for name, values in seconds.items():
            print(f"| {name} | {milliseconds(values):.2f} | {ratio(values, seconds['float32 slots']):.2f} |")
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
