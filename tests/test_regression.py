"""Where training ends: elastic net, lasso and ridge on real data, against scikit-learn and the closed form.

At rest every coefficient w that is not 0 satisfies, with lr divided out,

    direction + weight_decay*w + scale * (proximal_l1*sign(w) + 2*proximal_l2*w) = 0

where the direction is the gradient g, with its penalty, times the rule's preconditioner. With `scaled_proximal` that is
the scale too, and drops out: whatever the rule, it is the elastic net. Without, the scale is 1, and the rules part:

    sgd       has no preconditioner, and ends at the elastic net
    momentum  has added g up to g/(1-momentum): each proximal coefficient counts only 1-momentum times
    adam      has v = g^2, so that |g|/(|g|+epsilon) = proximal_l1: the elastic net of another strength
    rmsprop   likewise |g|/sqrt(g^2+epsilon) = proximal_l1
    adagrad   has v without bound, so that the direction vanishes beside the threshold, and every w becomes 0
"""

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet

from wdops import ops, reference

ALPHA = 0.1
EPSILON = 0.05
# The Hessian's eigenvalues are up to 4.02, so that a rate below 2/4.02 does not diverge. That of Adam and RMSprop is at
# most lr/EPSILON, that of Adagrad falls until it is small enough. Without `scaled_proximal` v takes part in where they
# go, and a long memory of it makes the last digits wait: beta2 is 0.9, as RMSprop's rho.
STEPS = 5000
HYPERS = {
    "sgd": {"lr": 0.24},
    "momentum": {"lr": 0.05, "momentum": 0.8},
    "adam": {"lr": 0.2 * EPSILON, "epsilon": EPSILON, "beta2": 0.9},
    "rmsprop": {"lr": 0.2 * EPSILON, "epsilon": EPSILON**2},
    "adagrad": {"lr": 1.0},
}
ITS_OWN_STRENGTH = {
    "sgd": lambda l1: l1,
    "momentum": lambda l1: l1 / (1 - HYPERS["momentum"]["momentum"]),
    "adam": lambda l1: l1 / (l1 + EPSILON),
    "rmsprop": lambda l1: l1 / np.sqrt(l1**2 + EPSILON**2),
}


def standardized(a):
    return (a - a.mean(0)) / a.std(0)


X, Y = map(standardized, load_diabetes(return_X_y=True))
LEAST = np.linalg.eigvalsh(X.T @ X / len(Y))[0]  # eigenvalue of the Hessian, 0.0086


def fit(rule, dtype=np.float64, **decay):
    """The coefficients at which full-batch descent on |y - xw|^2 / (2n) ends."""
    x, y = tf.constant(X, dtype), tf.constant(Y, dtype)
    w = tf.Variable(tf.zeros(X.shape[1], dtype))
    slots = [tf.Variable(tf.zeros_like(w)) for _ in reference.RULES[rule].slots]

    @tf.function
    def descend():
        for step in tf.range(1, STEPS + 1):
            grad = tf.linalg.matvec(x, tf.linalg.matvec(x, w) - y, transpose_a=True) / len(Y)
            number = {"step": step} if "step" in reference.RULES[rule].hypers else {}
            getattr(ops, f"apply_{rule}")(w, *slots, grad, **HYPERS[rule], **decay, **number)

    descend()
    return w.numpy()


def elastic_net(l1, l2):
    """That of scikit-learn, where alpha*(1-l1_ratio)/2 is l2."""
    alpha = l1 + 2 * l2
    # Far below float64: descent goes on until nothing changes.
    return ElasticNet(alpha=alpha, l1_ratio=l1 / alpha, fit_intercept=False, tol=1e-16, max_iter=10**5).fit(X, Y).coef_


def rounding_of_gradient(dtype):
    """An element is a sum over n of products whose mean magnitude is at most 1: x has variance 1, y - xw no more.

    It may round by n half-ULPs of 1; that w stops where a step is less than half its ULP, by a few more: n for all.
    """
    return 2 * len(Y) * np.finfo(dtype).eps / 2


def assert_same(w, want, l2, dtype=np.float64):
    """The objective is strongly convex: as far as the gradient is off, over the least curvature, so far w can be."""
    bound = np.sqrt(len(w)) * (rounding_of_gradient(dtype) + rounding_of_gradient(np.float64)) / (LEAST + 2 * l2)
    assert bound < 1e-2 * np.max(np.abs(want))
    np.testing.assert_array_equal(w == 0, want == 0)
    np.testing.assert_allclose(w, want, rtol=0, atol=bound)


@pytest.mark.parametrize("l1_ratio", [0.5, 1.0], ids=["elastic_net", "lasso"])
@pytest.mark.parametrize("l2_by", ["l2", "proximal_l2"])
@pytest.mark.parametrize("rule", ["sgd", "adam", "rmsprop", "adagrad"])
def test_with_scaled_proximal_every_rule_ends_where_scikit_learn_does(rule, l2_by, l1_ratio):
    l1, l2 = ALPHA * l1_ratio, ALPHA * (1 - l1_ratio) / 2
    want = elastic_net(l1, l2)
    assert 0 < np.count_nonzero(want) < len(want)
    assert_same(fit(rule, proximal_l1=l1, scaled_proximal=True, **{l2_by: l2}), want, l2)


@pytest.mark.parametrize("l1_ratio", [0.5, 1.0], ids=["elastic_net", "lasso"])
@pytest.mark.parametrize("rule", ITS_OWN_STRENGTH)
def test_without_it_each_rule_has_its_own_strength(rule, l1_ratio):
    l1, l2 = ALPHA * l1_ratio, ALPHA * (1 - l1_ratio) / 2
    assert_same(fit(rule, proximal_l1=ITS_OWN_STRENGTH[rule](l1), l2=l2), elastic_net(l1, l2), l2)


def test_without_it_adagrad_forgets_everything():
    np.testing.assert_array_equal(fit("adagrad", proximal_l1=ALPHA), 0)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_in_float32(rule):
    l1, l2 = ALPHA / 2, ALPHA / 4
    w = fit(rule, np.float32, proximal_l1=l1, proximal_l2=l2, scaled_proximal=True)
    assert_same(w, elastic_net(l1, l2), l2, np.float32)


def ridge(l2):
    return np.linalg.solve(X.T @ X / len(Y) + 2 * l2 * np.eye(X.shape[1]), X.T @ Y / len(Y))


@pytest.mark.parametrize("rule", HYPERS)
def test_ridge_by_the_gradient(rule):
    assert_same(fit(rule, l2=ALPHA), ridge(ALPHA), ALPHA)


@pytest.mark.parametrize("rule", HYPERS)
def test_ridge_by_the_proximal_step(rule):
    counted = 1 - HYPERS[rule].get("momentum", 0)
    assert_same(fit(rule, proximal_l2=ALPHA / counted, scaled_proximal=True), ridge(ALPHA), ALPHA)


@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_decoupled_decay_is_ridge_without_a_preconditioner(rule):
    counted = 1 - HYPERS[rule].get("momentum", 0)
    assert_same(fit(rule, weight_decay=2 * ALPHA / counted), ridge(ALPHA), ALPHA)


def test_decoupled_decay_is_not_ridge_in_adam():
    """It rests where g/(|g|+epsilon) = -weight_decay*w, which for no l2 is the condition of ridge, g = -2*l2*w."""
    w = fit("adam", weight_decay=1)
    g = X.T @ (X @ w - Y) / len(Y)
    np.testing.assert_allclose(g / (np.abs(g) + EPSILON), -w, rtol=0, atol=rounding_of_gradient(np.float64) / EPSILON)
    l2 = -g / (2 * w)  # which ridge would have alike for all w
    assert np.max(l2) > 1.1 * np.min(l2)
