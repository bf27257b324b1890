"""A list of variables as one tensor of handles, because a `tf.function` pays in every call for each tensor it captures.

Such a tensor hides from `tf.function` which variables an op writes to; so this also tells it, and what else reads or
writes to a slot in the same function still comes before or after the step as it is written.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import auto_control_deps

from wdops import devices
from wdops._load import raw_ops

_exportable = contextvars.ContextVar("exportable", default=False)


@contextlib.contextmanager
def exportable() -> Iterator[None]:
    """Within, steps are traced in the form that `tf.saved_model.save` can export, which takes longer to call.

    Otherwise it says of a function that steps that it refers to an untracked resource: the one tensor that stands for
    all slots.
    """
    token = _exportable.set(True)
    try:
        yield
    finally:
        _exportable.reset(token)


def pack(handles: list[tf.Tensor]) -> list[tf.Tensor]:
    """The handles of a list of variables as an op takes them: one tensor where that is possible, else themselves.

    XLA looks at every variable by itself; eagerly nothing is captured.
    """
    if len(handles) < 2 or tf.executing_eagerly() or _exportable.get():
        return handles
    places = {handle.device for handle in handles}
    if any(map(tf.is_symbolic_tensor, handles)) or len(places) > 1 or devices.in_xla():
        return handles
    with tf.init_scope(), tf.device(places.pop()):
        packed = raw_ops.wdops_pack(handles)
    packed.packed_handles = handles
    return [packed]


@auto_control_deps.register_acd_resource_resolver
def _resolve(op: Any, reads: Any, writes: Any) -> bool:
    """Adds to the resources that an op writes to what its packed handles stand for; whether there was anything to add.

    An op may be one with a body that captures the handles, as of `tf.cond`.
    """
    vectors = [tensor for tensor in writes if tensor.shape.rank == 1]
    captures = getattr(op.graph, "function_captures", None)
    if not vectors or captures is None:
        return False
    inside = captures.by_val_internal
    packed = {
        key: {id(handle) for handle in outside.packed_handles}
        for key, outside in captures.by_val_external.items()
        if hasattr(outside, "packed_handles")
    }
    written = set().union(*(ids for key, ids in packed.items() if any(inside[key] is t for t in vectors)))
    touched = [inside[i] for i in written if i in inside]
    touched += [inside[key] for key, ids in packed.items() if ids & written]
    new = [tensor for tensor in touched if tensor not in writes]
    writes.update(new)
    return bool(new)
