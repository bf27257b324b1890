"""Gradients of a matrix that stay the factors x and dz of x^T dz, and how they are found in what a tape returns."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from wdops import devices
from wdops._load import native, raw_ops

# Up to so many rows, factors are kept where the step makes their product once, and where it makes it twice: a norm
# that is taken of each element needs the product before the step does. Beyond, a gradient that is made once, and
# written, costs less time. The suite `dense` of the bench times the first; the second is reckoned from it and the bytes
# that are saved, and was not timed.
MOST_ROWS = {1: 512, 2: 64}
# On a GPU a matrix product of TensorFlow's is so fast, and the step's own product, rounded as on a CPU, so slow beside
# it, that only bytes can be saved: reckoned from the rates of an H100, and not timed.
MOST_ROWS_ON_GPU = {1: 16, 2: 8}
_FLOATS = (tf.float32, tf.float64)
_WIDER = {
    tf.float16: (tf.float16, *_FLOATS),
    tf.bfloat16: (tf.bfloat16, *_FLOATS),
    tf.float32: _FLOATS,
    tf.float64: _FLOATS[1:],
}


@dataclass
class Handover:
    """Who makes and takes the eager FactoredGradients of a variable. It stays behind when the variable is copied."""

    optimizers: weakref.WeakSet = field(default_factory=weakref.WeakSet)  # of wdops that were built with the variable
    calls: weakref.WeakSet = field(default_factory=weakref.WeakSet)  # of its layers, which a tape holds

    def __reduce__(self) -> Any:
        return Handover, ()


def handover_of(variable: Any) -> Handover:
    """Kept as an attribute: no dictionary takes a variable."""
    if not hasattr(variable, "handover"):
        variable.handover = Handover()
    return variable.handover


class FactoredGradient(tf.IndexedSlices):
    """The gradient x^T dz of a matrix, which `wdops.ops` and the optimizers use without forming it.

    Everyone else sees a `tf.IndexedSlices` of all rows: `tf.convert_to_tensor` and `values` form the gradient.

    Args:
      x: what the matrix was multiplied by: a tensor [batch, rows].
      dz: the gradient of that product: a tensor [batch, columns] of the same dtype.
    """

    def __init__(self, x: tf.Tensor, dz: tf.Tensor) -> None:
        self.x, self.dz = tf.convert_to_tensor(x), tf.convert_to_tensor(dz)

    @property
    def values(self) -> tf.Tensor:
        return tf.matmul(self.x, self.dz, transpose_a=True)

    @property
    def indices(self) -> tf.Tensor:
        return tf.range(tf.shape(self.x)[1])

    @property
    def dense_shape(self) -> tf.Tensor:
        return tf.stack([tf.shape(self.x)[1], tf.shape(self.dz)[1]])

    # The names by which TensorFlow itself reads them.
    _values, _indices, _dense_shape = values, indices, dense_shape

    @property
    def shape(self) -> tf.TensorShape:
        return self.x.shape[1:].concatenate(self.dz.shape[1:])

    def get_shape(self) -> tf.TensorShape:
        return self.shape

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> tf.DType:
        return self.x.dtype

    @property
    def device(self) -> str:
        return self.dz.device

    @property
    def name(self) -> str:
        return "factored_gradient"

    def __str__(self) -> str:
        return f"FactoredGradient(x={self.x}, dz={self.dz})"

    __repr__ = __str__

    def numpy(self) -> Any:
        return self.values.numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self.numpy(), dtype)

    def cast(self, dtype: tf.DType) -> "FactoredGradient | tf.Tensor":
        """The same in another dtype: factors that are cast, and so rounded once as a product.

        A dtype that does not hold all that the factors may be gets the product, which may well fit.
        """
        dtype = tf.as_dtype(dtype)
        if dtype not in _WIDER[self.dtype]:
            return tf.cast(self.values, dtype)
        return FactoredGradient(tf.cast(self.x, dtype), tf.cast(self.dz, dtype))


def _by_values(operator: str) -> Any:
    def compute(grad: FactoredGradient, *others: Any) -> Any:
        others = tuple(x.values if isinstance(x, FactoredGradient) else x for x in others)
        return getattr(grad.values, operator)(*others)

    return compute


# What is computed from it is computed from the gradient.
for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod"),
    *("pow", "rpow", "matmul", "rmatmul", "neg", "abs", "lt", "le", "gt", "ge", "getitem", "len", "iter"),
):
    setattr(FactoredGradient, f"__{_name}__", _by_values(f"__{_name}__"))


def factors_of(grad: Any) -> FactoredGradient | None:
    """The factors of a gradient that a matrix product made, or a sum of several; None: it has none.

    In a graph they are found behind the gradient's tensor: the product itself is not run unless something else asks
    for it. An eager tensor is there already, so that `wdops.layers.Dense` hands over a FactoredGradient.
    """
    if isinstance(grad, FactoredGradient):
        return grad
    if not tf.is_tensor(grad) or not hasattr(grad, "graph") or grad.shape.rank != 2 or grad.dtype not in _WIDER:
        return None
    op = grad.op
    if op.type == "MatMul" and op.get_attr("transpose_a") and not op.get_attr("transpose_b"):
        return FactoredGradient(*op.inputs)
    if op.type in ("Identity", "Cast"):
        found = factors_of(op.inputs[0])
        return found.cast(grad.dtype) if found is not None and grad.dtype in _WIDER[found.dtype] else None
    if op.type == "AddN" or (op.type == "AddV2" and _are_of_one_shape(*op.inputs)):
        parts = [factors_of(x) for x in op.inputs]
        if all(part is not None for part in parts):
            return FactoredGradient(*(tf.concat([getattr(p, n) for p in parts], 0) for n in ("x", "dz")))
    return None


def _are_of_one_shape(a: tf.Tensor, b: tf.Tensor) -> bool:
    """Whether a sum surely broadcasts neither of them."""
    return a.shape.is_fully_defined() and a.shape == b.shape


def worthwhile(
    grad: FactoredGradient, products: int, device: str
) -> FactoredGradient | tf.Tensor | tuple[tf.Tensor, tf.Tensor]:
    """`grad`, or the tensor that it is the factors of, whichever a step with so many products uses in less time.

    Where the number of rows is only known when the step runs, it is a pair of tensors for `wdops.ops`: the factors, or
    the tensor and an empty vector.
    """
    on_gpu = devices.is_gpu(device)
    if not on_gpu and not native.has_fma():  # the step's own product would take 20 times TensorFlow's
        return grad.values
    most = (MOST_ROWS_ON_GPU if on_gpu else MOST_ROWS)[min(products, 2)]
    rows = grad.x.shape[0]
    if rows is None and on_gpu and not devices.in_xla():
        return tf.cond(
            tf.shape(grad.x)[0] <= most,
            lambda: (grad.x, grad.dz),
            lambda: (grad.values, tf.zeros([0], grad.dtype)),
        )  # fmt: skip
    if rows is None:
        return tuple(raw_ops.wdops_factored_gradient(x=grad.x, dz=grad.dz, most_rows=most))
    return grad if rows <= most else grad.values
