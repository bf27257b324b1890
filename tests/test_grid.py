"""Copies side by side against training alone, and the command line of the grid."""

import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import wdops
from wdops import grid

DECAYS = ("l1", "l2", "weight_decay", "proximal_l1")


def perceptron(seed=0):
    """A small network in float64: rounding is then far below whatever a wrong step would do."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(64, 6)) / 8, np.zeros(6), rng.normal(size=(6, 10)) / 3, np.zeros(10)]


def loss(params, x, y):
    hidden, hidden_bias, out, out_bias = params
    return grid.cross_entropy(y, tf.tanh(x @ hidden + hidden_bias) @ out + out_bias)


@pytest.fixture(scope="module")
def data():
    images, labels = grid.digits(seed=0).train
    return images.astype(np.float64), labels, grid.shuffled(len(images), batch=64, epochs=3, seed=0)


def train_step_by_step(setting, rule, x, y, epochs):
    """Without anything of the grid but the loss: a variable for each parameter, and an eager op a step."""
    params = [tf.Variable(p) for p in perceptron()]
    slots = [[tf.Variable(tf.zeros_like(p)) for p in params] for _ in wdops.reference.RULES[rule].slots]
    losses = []
    for batches in epochs:
        losses.append(0)
        for rows in batches:
            with tf.GradientTape() as tape:
                value = loss(params, x[rows], y[rows])
            step = {"step": slots_step} if (slots_step := len(losses) * len(batches) - len(batches)) < 0 else {}
            losses[-1] += value / len(batches)
            getattr(wdops.ops, f"apply_{rule}")(params, *slots, tape.gradient(value, params), **setting, **step)
    return params, losses
