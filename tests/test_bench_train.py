"""The suite of training end to end: what its rivals compute, what it reports, and its picture."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from matplotlib.figure import Figure

import wdops
from wdops.bench import train
from wdops.bench.timing import Settings


def trained(rival, **arguments):
    return train.Training(train.perceptron(short=True), train.RIVALS[rival], steps=2, **arguments)


def test_every_rival_has_the_same_losses():
    trainings = {rival: trained(rival) for rival in train.RIVALS}
    losses = {rival: [training.loss() for _ in range(4)] for rival, training in trainings.items()}
    train.check_agreement(losses)
    for values in losses.values():
        assert values[-1] < values[0]


def test_other_losses_are_found():
    with pytest.raises(AssertionError, match="the losses of late are"):
        train.check_agreement({"first": [2.0, 1.0], "late": [2.0, 1.001]})


@pytest.mark.filterwarnings("error::UserWarning")  # the optimizer warns of a gradient that is not factored
def test_wdops_has_switched_on_what_helps():
    training = trained("wdops")
    training.run(1)
    layers, optimizer = training.model.layers, training.model.optimizer
    assert all(isinstance(layer, wdops.layers.Dense) and layer.kernel.factored_gradient for layer in layers)
    report = []
    optimizer.decay_report(report.append)
    assert report[0].count("folded regularizer") == len(layers)


@pytest.mark.parametrize("rival", ["Keras, tf.function", "Keras, jit_compile=True"])
def test_forward_and_backward_make_the_gradients_and_no_step(rival):
    training = trained(rival, updates=False)
    before = training.model.get_weights()
    training.run(1)
    for was, now in zip(before, training.model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
    assert all(np.any(kept) for kept in training.model.optimizer.kept)


def test_dense_gradient_embedding_has_the_gradient_of_embedding():
    rows = tf.constant([[1, 1, 2], [3, 1, 0]])
    weights = tf.random.stateless_normal([2, 3, 4], (0, 0))
    table = np.random.default_rng(0).normal(size=(5, 4))
    gradients = []
    for layer in (keras.layers.Embedding(5, 4), train.DenseGradientEmbedding(5, 4)):
        layer.build()
        layer.set_weights([table])
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(rows) * weights)
        gradients.append(tape.gradient(loss, layer.embeddings.value))
    sparse, dense = gradients
    assert isinstance(sparse, tf.IndexedSlices) and isinstance(dense, tf.Tensor)
    np.testing.assert_allclose(dense, tf.convert_to_tensor(sparse), rtol=1e-6)


def test_peak_bytes(monkeypatch):
    monkeypatch.setitem(train.TASKS, "perceptron", lambda short: train.perceptron(short=True))
    peak = train.peak_bytes("perceptron", "Keras, tf.function")
    assert 0 < peak < 2**30


@pytest.fixture(scope="module")
def tables():
    said = []
    tables = train.measure(Settings(short=True, rounds=2, patience=0.0), said.append)
    assert [text.rpartition(": ")[0] for text in said[::2]] == [table.title for table in tables]
    return tables


def test_tables(tables):
    assert len(tables) == len(train.TASKS)
    for table in tables:
        rivals = list(table.seconds)
        assert rivals == ["wdops", "Keras, tf.function"]
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in table.seconds.values())
        assert table.elements > 0
        for fact in ("losses", "forward and backward", "share of the step"):
            assert list(table.facts[fact]) == rivals
        for rival in rivals:
            assert len(table.facts["losses"][rival]) == train.SHORT_CALLS
            assert table.facts["share of the step"][rival] < 1
        json.dumps(table.facts)


def test_picture(tables, tmp_path):
    figure = Figure(layout="constrained")
    train.draw(tables, figure)
    assert len(figure.axes) == 2 * len(tables)
    for table, curves, bars in zip(tables, figure.axes[::2], figure.axes[1::2], strict=True):
        assert [line.get_label() for line in curves.lines] == list(table.seconds)
        assert [len(line.get_xdata()) for line in curves.lines] == [train.SHORT_CALLS] * len(table.seconds)
        assert [text.get_text() for text in bars.get_yticklabels()] == list(table.seconds)
    figure.savefig(tmp_path / "train.png")
