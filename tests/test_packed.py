"""Slots that a function takes as one tensor: what else touches them in it still comes in the order it is written."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import wdops
from wdops import ops


@pytest.fixture
def state():
    return [[tf.Variable(np.full(3, x, np.float32)) for _ in range(4)] for x in (1.0, 0.0)]


def descend(params, momenta):
    """A step that leaves 1 in a momentum of 0, and 10 more in each after that."""
    grads = [tf.ones(3)] * len(params)
    ops.apply_momentum(params, momenta, grads, lr=1.0, momentum=10.0)


def captures_of(function):
    return [t for t in function.get_concrete_function().captured_inputs if t.dtype == tf.resource]


def test_all_slots_are_one_capture(state):
    params, momenta = state
    assert len(captures_of(tf.function(lambda: descend(params, momenta)))) == 4 + 1
    assert len(captures_of(tf.function(lambda: descend(params, momenta), jit_compile=True))) == 4 + 4
    with wdops.exportable():
        assert len(captures_of(tf.function(lambda: descend(params, momenta)))) == 4 + 4


def around(steps):
    """Reads and writes a slot before, between and after the steps; what it read."""

    def run(params, momenta):
        momenta[2].assign(momenta[2] + 5.0)
        before = momenta[1] + 0.0
        steps(params, momenta)
        between = momenta[1] + 0.0
        momenta[1].assign(tf.zeros(3))
        steps(params, momenta)
        return tf.stack([before, between, momenta[1] + 0.0, momenta[2] + 0.0])

    return run


def in_a_branch(params, momenta):
    tf.cond(tf.reduce_sum(params[3]) > -1e9, lambda: descend(params, momenta), lambda: None)


def in_a_loop(params, momenta):
    tf.while_loop(lambda i: i < 1, lambda i: (descend(params, momenta), [i + 1])[1], [tf.constant(0)])


def in_a_function(params, momenta):
    tf.function(lambda: descend(params, momenta))()


@pytest.mark.parametrize("steps", [descend, in_a_branch, in_a_loop, in_a_function])
@pytest.mark.parametrize("trial", range(5))
def test_what_touches_a_slot_stays_in_order(state, steps, trial):
    """The minus 1 of a descent is in the parameters; five trials, since a race may be won."""
    params, momenta = state
    got = tf.function(lambda: around(steps)(params, momenta))().numpy()
    for variable in params:
        variable.assign(tf.ones(3))
    for variable in momenta:
        variable.assign(tf.zeros(3))
    np.testing.assert_array_equal(got, around(steps)(params, momenta).numpy())


@pytest.mark.parametrize("trial", range(5))
def test_two_lists_that_share_slots_stay_in_order(trial):
    """One op writes to accumulators that another reads, in another list of them."""
    params, momenta = ([tf.Variable(tf.zeros(1 << 16)) for _ in range(4)] for _ in range(2))
    accumulators = [tf.Variable(tf.ones(1 << 16)) for _ in range(4)]
    grads = [tf.ones(1 << 16)] * 4

    @tf.function
    def run():
        first = ops.norms(grads[:3], accumulator=accumulators[:3]).norm
        ops.apply_momentum(params, momenta, grads, lr=1.0, momentum=0.0, accumulator=accumulators)
        return first, ops.norms(grads[1:], accumulator=accumulators[1:]).norm

    first, second = run()
    np.testing.assert_array_equal(first, [2 * 2.0**8] * 3)
    np.testing.assert_array_equal(second, [2.0**8] * 3)


def test_a_slot_of_another_shape_is_named(state):
    params, momenta = state
    momenta[2] = tf.Variable(tf.zeros(5))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"m\[2\] has shape \[5\], but var\[2\] has shape \[3\]"):
        tf.function(lambda: descend(params, momenta))()
    assert all(np.all(p.numpy() == 1) for p in params)


class Training(tf.Module):
    def __init__(self):
        self.model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        self.optimizer = wdops.optimizers.AdamW(0.1)
        self.optimizer.build(self.model.trainable_variables)
        self.variables_to_save = [v.value for v in [*self.model.variables, *self.optimizer.variables]]

    @tf.function
    def step(self):
        self.optimizer.apply([tf.ones_like(v) for v in self.model.trainable_variables])
        return self.model.trainable_variables[0].value + 0.0


def test_a_step_can_be_exported(tmp_path):
    training = Training()
    with wdops.exportable():
        training.step.get_concrete_function()
        tf.saved_model.save(training, tmp_path)
    loaded = tf.saved_model.load(tmp_path)
    np.testing.assert_array_equal(loaded.step(), training.step())
    np.testing.assert_array_equal(loaded.step(), training.step())


def test_a_step_that_was_traced_otherwise_is_not_exported(tmp_path):
    training = Training()
    training.step()
    with pytest.raises(AssertionError, match="untracked"):
        tf.saved_model.save(training, tmp_path)
