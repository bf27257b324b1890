"""`python -m wdops`: what was built (`info`), a first look (`demo`), the right decay (`grid`), timings (`bench`)."""

import argparse
import ast
import ctypes
import importlib
import math
import os
import sys
from pathlib import Path

LRS = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
STRENGTHS = {
    "weight_decay": [0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10],
    "l2": [0, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
    "l1": [0, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
    "proximal_l1": [0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
}
# The files of the suites by name; all of that folder but what they share.
SUITES = {
    path.stem.replace("_", "-"): path
    for path in sorted(Path(__file__).with_name("bench").glob("[!_]*.py"))
    if path.stem != "timing"
}


def describe_suites() -> None:
    """Without importing them, which takes seconds."""
    for name, path in SUITES.items():
        print(f"{name:14}{ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]}")


def start_tensorflow() -> None:
    """Imports TensorFlow without its greetings: some are written past every log level, before one can be set."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        importlib.import_module("tensorflow")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def info() -> None:
    start_tensorflow()
    import keras
    import numpy
    import tensorflow

    import wdops
    from wdops import isa, reference

    build = wdops.build_info()
    folder = Path(wdops.__file__).parent
    loaded = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    cuda = ctypes.CDLL(str(folder / "libwdops_cuda.so")) if build["cuda"] else None
    card = ""
    if cuda is not None:
        cuda.wdops_cuda_error.restype = ctypes.c_char_p
        error = cuda.wdops_cuda_available()
        card = f"; card: {cuda.wdops_cuda_error(error).decode() if error else 'found'}"
    rows = {
        "wdops": f"{build['version']}, in {folder}",
        "built with": f"TensorFlow {build['tensorflow']}, {build['compiler']}, C++11 ABI {build['cxx11_abi']}, "
        f"CUDA {build['cuda'] or 'not found'}",
        "kernels for a GPU": build["gpu"] + card,
        "runs with": f"TensorFlow {tensorflow.__version__}, Keras {keras.__version__} on {keras.backend.backend()}, "
        f"NumPy {numpy.__version__}, Python {sys.version.split()[0]}",
        "instruction sets": ", ".join(f"{name} (in use)" if name == isa.active() else name for name in isa.available())
        + f"; built: {', '.join(build['isas'])}",
        "rules": ", ".join(reference.RULES),
        "libraries": ", ".join(
            f"{path.name} ({'loaded' if path in loaded else 'not loaded'})" for path in sorted(folder.glob("*.so"))
        ),
    }
    for name, value in rows.items():
        print(f"{name:18}{value}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m wdops", description="Fused optimizer steps for TensorFlow.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "info", help="print versions, instruction sets and libraries", description="Prints what was built and loaded."
    )
    demo = commands.add_parser(
        "demo",
        help="train beside Keras, and time a step",
        description="Trains a network on scikit-learn's handwritten digits with keras.optimizers.AdamW and with "
        "wdops.optimizers.AdamW from the same seed, times the step of a larger model with both, prints a table and "
        "writes both curves to a PNG.",
    )
    demo.add_argument("--epochs", type=int, default=20, help="over the digits; default: 20")
    demo.add_argument("--steps", type=int, default=20, help="timed, of each optimizer; default: 20")
    demo.add_argument("--png", type=Path, default=Path("wdops_demo.png"), help="default: wdops_demo.png")
    grid = commands.add_parser(
        "grid",
        help="train by many decays and learning rates at once",
        description="Trains a small network on scikit-learn's handwritten digits by every pair of a decay and a "
        "learning rate, all side by side with one op a step, writes a heat map of the validation loss to a PNG and "
        "prints the best setting.",
    )
    grid.add_argument("--decay", choices=STRENGTHS, default="weight_decay", help="default: weight_decay")
    grid.add_argument(
        "--strengths", type=float, nargs="+", metavar="X", help="of the decay; default: 0 and 7 that suit it"
    )
    grid.add_argument(
        "--lrs", type=float, nargs="+", metavar="X", default=LRS, help=f"default: {' '.join(map(str, LRS))}"
    )
    grid.add_argument("--rule", choices=("adam", "momentum"), default="adam", help="default: adam")
    grid.add_argument("--epochs", type=int, default=60, help="default: 60")
    grid.add_argument("--hidden", type=int, default=16, help="units of the hidden layer; default: 16")
    grid.add_argument("--batch", type=int, default=16, help="examples of a batch, at most 500; default: 16")
    grid.add_argument("--seed", type=int, default=0, help="of the split, the start and the batches; default: 0")
    grid.add_argument(
        "--compare", action="store_true", help="also train one after another, without and with model.fit, and time it"
    )
    grid.add_argument("--png", type=Path, default=Path("wdops_grid.png"), help="default: wdops_grid.png")
    bench = commands.add_parser(
        "bench",
        help="time wdops beside its rivals",
        description="Times wdops beside Keras, TensorFlow, PyTorch and DeepSpeed, those of them that are installed, "
        "and beside a bare stream over memory; all take turns. Prints a table for each case.",
    )
    bench.add_argument("suites", nargs="*", metavar="suite", help=f"of {', '.join(SUITES)}; default: all")
    bench.add_argument("--list", action="store_true", help="print what each suite times, and end")
    bench.add_argument("--short", action="store_true", help="small sizes and few rounds: all suites in 2 minutes")
    bench.add_argument("--rounds", type=int, help="in which all rivals take turns; default: 15, or 3 with --short")
    bench.add_argument(
        "--patience",
        type=float,
        help="seconds to wait and repeat the rounds of a table that others disturb; default: 60, or 0 with --short",
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write all seconds, and the machine's facts")
    bench.add_argument("--png", type=Path, metavar="FOLDER", help="write a picture of each suite")
    bench.add_argument("--compare", type=Path, metavar="OLD.json", help="print the ratio to what --json wrote before")
    arguments = vars(parser.parse_args())
    command = arguments.pop("command")
    if command == "info":
        info()
        return
    modules = [f"wdops.{command}"]
    if command == "bench":
        if arguments.pop("list"):
            describe_suites()
            return
        if unknown := set(arguments["suites"]) - set(SUITES):
            parser.error(f"suite {', '.join(sorted(unknown))}: the suites are {', '.join(SUITES)}")
        if arguments["compare"] and not arguments["compare"].is_file():
            parser.error(f"--compare: there is no file {arguments['compare']}")
        arguments["suites"] = [SUITES[name].stem for name in arguments["suites"] or SUITES]
        modules += [f"wdops.bench.{name}" for name in arguments["suites"]] + ["matplotlib"] * bool(arguments["png"])
    for name in ("epochs", "steps", "hidden", "batch", "rounds"):
        if arguments.get(name) is not None and arguments[name] < 1:
            parser.error(f"--{name} must be at least 1")
    if command in ("demo", "grid") and (arguments["png"].suffix != ".png" or not arguments["png"].parent.is_dir()):
        parser.error(f"--png must be a name in a folder that there is, and end in .png, unlike {arguments['png']}")
    if command == "grid":
        arguments["strengths"] = arguments["strengths"] or STRENGTHS[arguments["decay"]]
        if not all(0 <= x < math.inf for x in arguments["strengths"]):
            parser.error("--strengths must be at least 0")
        if not all(0 < x < math.inf for x in arguments["lrs"]):
            parser.error("--lrs must be greater than 0")
        if arguments["batch"] > 500:
            parser.error("--batch must be at most 500")
        if not 0 <= arguments["seed"] < 2**32:
            parser.error("--seed must be from 0 to 2^32 - 1")
    start_tensorflow()
    try:
        program, *_ = map(importlib.import_module, modules)
    except ModuleNotFoundError as error:
        parser.exit(1, f'{command} needs {error.name}: pip install "wdops[demo]"\n')
    program.run(**arguments)


if __name__ == "__main__":
    main()
