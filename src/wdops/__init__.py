"""Fused optimizer steps with L1/L2 weight decay for TensorFlow: each step one op, and one pass over memory.

`wdops.optimizers` are Keras's own with the step fused, `wdops.layers` its Dense with bias and activation fused,
`wdops.ops` the ops under them, `wdops.reference` the same in plain TensorFlow, `wdops.isa` the instruction set in use,
`wdops.kernels` the kernels on NumPy arrays.
"""

import sys
from typing import Any


def build_info() -> dict[str, Any]:
    """What wdops was built against: its version, TensorFlow, compiler, C++11 ABI, CUDA (or None), instruction sets.

    And `gpu`: "loaded", or why the kernels for a GPU are not.
    """
    from wdops import _build_info, _load

    built = {name.lower(): value for name, value in vars(_build_info).items() if name.isupper()}
    return built | {"gpu": _load.gpu}


# `python -m wdops` runs this file before __main__.py, which starts TensorFlow itself, and quietly.
_is_program = sys.argv[:1] == ["-m"] and sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["wdops"]
if not _is_program:
    from wdops import isa, kernels, layers, ops, optimizers, reference
    from wdops.layers import convert
    from wdops.packed import exportable
    from wdops.regularizers import fold_regularizers, unfold_regularizers

    __version__ = build_info()["version"]
    __all__ = [
        "build_info", "convert", "exportable", "fold_regularizers", "isa", "kernels", "layers", "ops", "optimizers",
        "reference", "unfold_regularizers",
    ]  # fmt: skip
