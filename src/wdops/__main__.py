"""`python -m wdops`: what was built (`info`), and a first look at what it does (`demo`)."""

import argparse
import importlib
import os
import sys
from pathlib import Path


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
    rows = {
        "wdops": f"{build['version']}, in {folder}",
        "built with": f"TensorFlow {build['tensorflow']}, {build['compiler']}, C++11 ABI {build['cxx11_abi']}, "
        f"CUDA {build['cuda'] or 'not found'}",
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
    arguments = parser.parse_args()
    if arguments.command == "info":
        info()
        return
    for name in ("epochs", "steps"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    start_tensorflow()
    try:
        from wdops import demo as program
    except ModuleNotFoundError as error:
        parser.exit(1, f'The demo needs {error.name}: pip install "wdops[demo]"\n')
    program.run(arguments.epochs, arguments.steps, arguments.png)


if __name__ == "__main__":
    main()
