"""Where slots lie in memory: they begin at places of their own, hold what Keras puts there, and stay where they are."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from wdops import optimizers, placement

LARGE = (600, 1000)  # of float32 and of bfloat16 beyond the size from which slots are placed


def address(tensor: tf.Tensor) -> int:
    bits = tf.bitcast(tensor, "uint16") if tensor.dtype == tf.bfloat16 else tensor
    return np.asarray(memoryview(bits)).ctypes.data


class Kept(keras.initializers.Constant):
    def __call__(self, shape, dtype=None):
        self.made = super().__call__(shape, dtype)
        return self.made


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("place", [1, 2, 5])
def test_values_are_a_view_behind_the_beginning(dtype, place):
    kept = Kept(0.5)
    values = placement.apart(kept, place)(LARGE, dtype)
    assert (values.shape, values.dtype) == (LARGE, dtype)
    np.testing.assert_array_equal(values, 0.5)
    assert address(values) - address(kept.made) == 768 * place


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (100, 1000)])
def test_small_arrays_are_as_keras_makes_them(shape):
    kept = Kept(2.0)
    values = placement.apart(kept, 3)(shape, "float32")
    assert kept.made.shape == shape
    np.testing.assert_array_equal(values, np.full(shape, 2, np.float32))


@pytest.mark.parametrize("initializer", ["random_normal", keras.initializers.Constant(np.ones(LARGE)), np.ones])
def test_what_is_not_one_constant_is_left_alone(initializer):
    assert placement.apart(initializer, 1) is initializer


def test_no_two_places_of_a_step_share_a_line_of_a_page():
    # The variable, three slots, the average and the accumulator; and what is fetched 2 KiB ahead of each.
    begins = [placement._DISTANCE * place % 4096 for place in range(6)]
    lines = {(begin + ahead) // 64 % 64 for begin in begins for ahead in (0, 2048)}
    assert len(lines) == 2 * len(begins)


@pytest.mark.parametrize("slot_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_slots_are_keras_s_and_stay_where_they_are(slot_dtype, compiled):
    start = np.random.default_rng(0).standard_normal(LARGE, np.float32)
    variable = keras.Variable(start)
    options = {"amsgrad": True, "use_ema": True, "weight_decay": 0.01}
    optimizer = optimizers.AdamW(1e-2, slot_dtype=slot_dtype, **options)
    optimizer.build([variable])
    theirs = keras.optimizers.AdamW(1e-2, **options)
    theirs.build([keras.Variable(start)])
    slots = [v for v in optimizer.variables if v.shape == LARGE]
    for slot, other in zip(slots, (v for v in theirs.variables if v.shape == LARGE), strict=True):
        np.testing.assert_array_equal(tf.cast(slot.value, "float32"), other.value)
    assert sorted(optimizer._own.places.values()) == [len(slots)]  # each has a place of its own
    before = [address(v.value.read_value()) for v in slots]

    def step() -> None:
        optimizer.apply([tf.ones(LARGE)], [variable])

    for _ in range(2):
        (tf.function(step) if compiled else step)()
    # A view that were taken for shared memory would be copied at each step.
    assert [address(v.value.read_value()) for v in slots] == before
