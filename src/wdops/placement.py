"""Where the slots of large variables lie in memory: out of each other's way, and out of that of the variable.

An AMD core looks its L1 up by 12 bits of the address and a hash of the others (Lipp et al., Take A Way, ASIA CCS 2020).
Two lines of which both are the same push each other out, and between large arrays at distances of powers of two, as an
allocator lays them, so do all that a step needs at a time: for 2^26 parameters AdamW took 61 ms on AVX-512 and 126 on
AVX2, and 35 to 40 and 45 to 49 once its slots began at other places within a page. The gradient still lies where
TensorFlow puts it.
"""

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

# In bytes. No two of the arrays of a step, nor what is fetched 2 KiB ahead of one, share a line's place within a page;
# and it is a multiple of 256, by which memory on a GPU is aligned.
_DISTANCE = 768
_LEAST = 1 << 20  # what is smaller stays in an L2


def apart(initializer: Any, place: int) -> Any:
    """`initializer`, whose values begin `place` * 768 bytes behind where TensorFlow would lay a large tensor.

    Args:
      initializer: what Keras takes for one. One that is not of a constant is returned as it is.
      place: a number of its own for each of the arrays that one step needs, from 1.
    """
    constant = keras.initializers.get(initializer)
    kinds = keras.initializers.Zeros, keras.initializers.Ones, keras.initializers.Constant
    if not isinstance(constant, kinds) or not isinstance(getattr(constant, "value", 0), int | float):
        return initializer

    def values(shape: Sequence[int], dtype: Any = None) -> tf.Tensor:
        size = tf.as_dtype(dtype or keras.config.floatx()).size
        n = math.prod(shape)
        if n * size < _LEAST:
            return constant(shape, dtype)
        before = place * _DISTANCE // size
        # A view: TensorFlow copies no slice that begins at a multiple of 64 bytes.
        return tf.reshape(constant((before + n,), dtype)[before:], shape)

    return values
