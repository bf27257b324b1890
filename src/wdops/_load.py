"""Checks that this TensorFlow is the one that wdops was built for, and loads the libraries in the order it needs."""

import os
from pathlib import Path
from types import ModuleType

try:
    from wdops import _build_info
except ImportError as error:
    raise ImportError(
        "wdops is not built here: run `pip install .` in the folder that holds its pyproject.toml"
    ) from error

_MEND = (
    "Either install that TensorFlow (pip install 'tensorflow-cpu=={built}.*'), or build wdops again, from its source "
    "folder, for the one that is here: pip install --no-build-isolation --force-reinstall --no-deps ."
)


def check_tensorflow(found: str) -> None:
    """Raises ImportError unless `found` is of the minor version that wdops was built for."""
    built = _build_info.TENSORFLOW
    if found.split(".")[:2] != built.split(".")[:2]:
        raise ImportError(
            f"wdops {_build_info.VERSION} was built for TensorFlow {built}, and found TensorFlow {found}. "
            + _MEND.format(built=".".join(built.split(".")[:2]))
        )


try:
    import tensorflow as tf
except ImportError as error:
    raise ImportError(
        f"wdops {_build_info.VERSION} needs TensorFlow {_build_info.TENSORFLOW}, and found none: "
        'pip install "wdops[cpu]" or "wdops[gpu]"'
    ) from error

check_tensorflow(tf.__version__)

from wdops import _native  # noqa: E402  (opens libwdops_cpu, which the op library links)


def _load(name: str) -> ModuleType:
    path = Path(__file__).with_name(f"lib{name}.so")
    try:
        return tf.load_op_library(str(path))
    except tf.errors.NotFoundError as error:
        raise ImportError(
            f"{path.name} of wdops {_build_info.VERSION}, built for TensorFlow {_build_info.TENSORFLOW}, does not load "
            f"under TensorFlow {tf.__version__}. {_MEND.format(built=_build_info.TENSORFLOW)}"
        ) from error


native = _native
native.use_isa(os.environ.get("WDOPS_ISA") or native.available_isas()[0])
raw_ops = _load("wdops_ops")
# After the ops, and not later than `import wdops`: XLA takes its kernels once, at the first compilation, and aborts on
# one whose op is not registered.
_load("wdops_xla")
