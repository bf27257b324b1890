"""Checks that this TensorFlow is the one that wdops was built for, and loads the libraries in the order it needs."""

import ctypes
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

try:
    from wdops import _build_info
except ImportError as error:
    raise ImportError(
        "wdops is not built here: run `pip install .` in the folder that holds its pyproject.toml"
    ) from error

_MINOR = _build_info.TENSORFLOW.rpartition(".")[0]
_MEND = (
    f"Either install that TensorFlow (pip install 'tensorflow-cpu=={_MINOR}.*'), or build wdops again, from its source "
    "folder, for the one that is here: pip install --no-build-isolation --force-reinstall --no-deps ."
)


def check_tensorflow(found: str) -> None:
    """Raises ImportError unless `found` is of the minor version that wdops was built for."""
    if found.split(".")[:2] != _MINOR.split("."):
        raise ImportError(
            f"wdops {_build_info.VERSION} was built for TensorFlow {_build_info.TENSORFLOW}, and found TensorFlow "
            f"{found}. {_MEND}"
        )


try:
    import tensorflow as tf
except ImportError as error:
    raise ImportError(
        f"wdops {_build_info.VERSION} needs TensorFlow {_build_info.TENSORFLOW}, and found none: "
        'pip install "wdops[cpu]" or "wdops[gpu]"'
    ) from error

check_tensorflow(tf.__version__)

from tensorflow.python.framework import kernels  # noqa: E402  (private, and there is no public way to ask)

try:
    from wdops import _native  # opens libwdops_cpu, which the op library links
except ImportError as error:
    raise ImportError(
        f"wdops {_build_info.VERSION} was built for another Python than {sys.version.split()[0]}: build it again with "
        "`pip install .` in its source folder"
    ) from error


def _load(name: str) -> ModuleType:
    path = Path(__file__).with_name(f"lib{name}.so")
    try:
        return tf.load_op_library(str(path))
    except tf.errors.NotFoundError as error:
        raise ImportError(
            f"{path.name} of wdops {_build_info.VERSION}, built for TensorFlow {_build_info.TENSORFLOW}, does not load "
            f"under TensorFlow {tf.__version__}. {_MEND}"
        ) from error


def _load_gpu() -> str:
    """Loads the kernels for a GPU where they can be of use; what there is to say of them."""
    if _build_info.CUDA is None:
        return "not built: CMake found no CUDA compiler"
    if not tf.test.is_built_with_cuda():
        return "not loaded: this TensorFlow is built without CUDA"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "not loaded: there is no CUDA driver (libcuda.so.1)"
    _load("wdops_gpu")
    return "loaded"


native = _native
try:
    native.use_isa(os.environ.get("WDOPS_ISA") or native.available_isas()[0])
except ValueError as error:
    raise ValueError(f"the environment variable WDOPS_ISA: {error}") from error
raw_ops = _load("wdops_ops")
gpu = _load_gpu()
# After the ops, and not later than `import wdops`: XLA takes its kernels once, at the first compilation, and aborts on
# one whose op is not registered.
_load("wdops_xla")
if any(k.device_type.startswith("XLA_") for k in kernels.get_registered_kernels_for_op("AddV2").kernel):
    warnings.warn(
        "wdops was imported after XLA's first compilation in this process, and XLA no longer takes its ops: they run "
        "everywhere but under jit_compile=True. Import wdops first.",
        stacklevel=2,
    )
