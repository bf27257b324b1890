"""Copies side by side against training alone, and the command line of the grid."""

import itertools
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import wdops
from wdops import grid, reference

# Each decay alone at two learning rates, and none.
NONE = {"l1": 0.0, "l2": 0.0, "weight_decay": 0.0, "proximal_l1": 0.0}
DECAYS = [{}, {"l1": 1e-2}, {"l2": 1e-1}, {"weight_decay": 1.0}, {"proximal_l1": 1e-1}]
SETTINGS = [NONE | decay | {"lr": lr} for decay, lr in itertools.product(DECAYS, (3e-3, 1e-2))]

# In float64 rounding is 1e-16 of weights near 1, and Adam, which divides a small gradient by itself, makes some 1e4 of
# it; two settings are 1e-3 apart.
ROUNDING = 1e-10


def perceptron():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(64, 6)) / 8, np.zeros(6), rng.normal(size=(6, 10)) / 3, np.zeros(10)]


def loss(params, x, y):
    hidden, hidden_bias, out, out_bias = params
    return grid.cross_entropy(y, tf.tanh(x @ hidden + hidden_bias) @ out + out_bias)


def data():
    images, labels = grid.digits(seed=0).train
    return images.astype(np.float64), labels, grid.shuffled(len(images), batch=64, epochs=3, seed=0)


def train_step_by_step(setting, rule, x, y, epochs):
    """With nothing of the grid's: one model, a variable for each parameter, eager."""
    params = [tf.Variable(p) for p in perceptron()]
    slots = [[tf.Variable(tf.zeros_like(p)) for p in params] for _ in reference.RULES[rule].slots]
    losses, steps = [], itertools.count(1)
    for batches in epochs:
        losses.append(0)
        for rows in batches:
            with tf.GradientTape() as tape:
                value = loss(params, x[rows], y[rows])
            losses[-1] += value.numpy() / len(batches)
            step = {"step": next(steps)} if "step" in reference.RULES[rule].hypers else {}
            getattr(wdops.ops, f"apply_{rule}")(params, *slots, tape.gradient(value, params), **setting, **step)
    return params, losses


def difference(params, other):
    return max(np.max(np.abs(p - q)) for p, q in zip(params, other, strict=True))


@pytest.mark.parametrize("rule", ["adam", "momentum", "rmsprop"])
def test_each_copy_is_trained_as_if_alone(rule):
    x, y, epochs = data()
    params, losses = grid.train(SETTINGS, perceptron(), loss, x, y, epochs, rule)
    copies = [[p[k].numpy() for p in params] for k in range(len(SETTINGS))]
    for k, setting in enumerate(SETTINGS):
        want, want_losses = train_step_by_step(setting, rule, x, y, epochs)
        assert difference(copies[k], want) < ROUNDING
        np.testing.assert_allclose(losses[:, k], want_losses, rtol=ROUNDING)
    for one, other in itertools.combinations(copies, 2):
        assert difference(one, other) > 1e-3


def test_one_copy_again_from_the_start_is_the_rival():
    x, y, epochs = data()
    params, _ = grid.train(SETTINGS, perceptron(), loss, x, y, epochs)
    one = grid.Copies(perceptron(), loss, 1)
    for k, setting in enumerate(SETTINGS[:4]):
        one.fit([setting], x, y, [np.concatenate(epochs)])
        assert difference([p[k] for p in params], [p[0] for p in one.params()]) < ROUNDING


def test_a_keras_model_is_trained_as_by_fit():
    """The batches of fit without shuffling are the rows in order."""
    (x, y), rows = grid.digits(seed=0).train, np.arange(576).reshape(1, 9, 64)
    model = grid.network(hidden=8, seed=1)

    def model_loss(params, x, y):
        return grid.cross_entropy(y, model.stateless_call(params, [], x)[0])

    settings = [{"lr": lr, "weight_decay": 0.1} for lr in (1e-3, 3e-3)]
    params, _ = grid.train(settings, model.trainable_variables, model_loss, x, y, rows)
    for k, setting in enumerate(settings):
        model = grid.network(hidden=8, seed=1)
        optimizer = keras.optimizers.AdamW(setting["lr"], weight_decay=setting["weight_decay"])
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(x[:576], y[:576], batch_size=64, shuffle=False, verbose=0)
        # Nine steps: in each Keras's bias corrections, in float32, are off by 1e-5, and either rounds weights below 1.
        assert difference([p[k] for p in params], model.get_weights()) < 9 * (1e-5 * setting["lr"] + 2.0**-23)


def test_batches_are_the_examples_in_a_new_order_each_epoch():
    first, second = grid.shuffled(examples=10, batch=3, epochs=2, seed=0)
    assert first.shape == (3, 3) and len(np.unique(first)) == 9 and first.max() < 10
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [([{"lr": 1.0}, {"l2": 1.0}], "sgd"), ([], "sgd"), ([{"lr": 1.0}], "lamb"), ([{"lr": -1.0, "l1": -1.0}], "sgd")],
)
def test_what_cannot_be_trained_side_by_side_is_refused(settings, rule):
    x, y, epochs = data()
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=r"settings must|rule is|l1"):
        grid.train(settings, perceptron(), loss, x, y, epochs, rule)


# ---- the command line


def run(*arguments, command="grid", cwd=None, **environment):
    command = [sys.executable, "-m", "wdops", command, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | environment)


@pytest.mark.parametrize("arguments", [(), ("--rule", "momentum", "--decay", "proximal_l1")])
def test_the_command_writes_a_heat_map_and_names_the_best(arguments, tmp_path):
    small = ["--epochs", "2", "--strengths", "0", "0.1", "--lrs", "0.001", "0.01", "0.1", "--hidden", "8", "--compare"]
    result = run(*small, *arguments, "--png", "map.png", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert (tmp_path / "map.png").read_bytes()[1:4] == b"PNG"
    for part in (
        "6 settings side by side",
        "one after another, each in one tf.function",
        "by model.fit",
        "times as long",
    ):
        assert part in result.stdout
    assert float(re.search(r"differ by (\S+) in the median", result.stdout)[1]) < 1e-4
    assert re.search(r"best: \w+=[\d.]+, lr=[\d.]+: validation loss .* test accuracy [\d.]+%", result.stdout)


def test_settings_that_diverge(tmp_path):
    small = ["--epochs", "1", "--strengths", "1", "--batch", "100"]
    result = run(*small, "--lrs", "0.001", "1e30", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == "" and "best: weight_decay=1, lr=0.001" in result.stdout
    result = run(*small, "--lrs", "1e30", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr == "Every setting diverged; smaller --lrs may not.\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "0"],
        ["--hidden", "0"],
        ["--batch", "501"],
        ["--seed", "-1"],
        ["--lrs", "0"],
        ["--lrs", "nan"],
        ["--strengths", "-1"],
        ["--strengths", "inf"],
        ["--strengths"],
        ["--decay", "l3"],
    ],
)
def test_a_bad_command_line_is_refused(arguments):
    result = run(*arguments)
    assert result.returncode == 2 and "usage:" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["demo", "grid"])
def test_what_is_not_installed_is_named(command, tmp_path):
    (tmp_path / "sklearn.py").write_text("raise ModuleNotFoundError('no sklearn', name='sklearn')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = run(command=command, PYTHONPATH=path)
    assert result.returncode == 1 and result.stderr == f'{command} needs sklearn: pip install "wdops[demo]"\n'
