"""A grid of settings at once: a copy of a small model for each, all trained side by side by one op a step."""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from wdops import ops, optimizers, reference

# Those whose slots start at 0 and that treat every element alike, wherever in a variable it stands.
RULES = ("sgd", "momentum", "adam", "amsgrad", "adamax", "lion", "rmsprop", "centered_rmsprop")
KERAS = {"adam": optimizers.Adam, "momentum": optimizers.SGD}
KERAS_SAMPLE = 3  # settings that model.fit is timed by

Setting = Mapping[str, float]
Loss = Callable[[list[tf.Tensor], tf.Tensor, tf.Tensor], tf.Tensor]
Bar = Callable[[Sequence[Any]], Iterable[Any]]  # goes through what it is given, and shows how far it is


class Copies:
    """`count` copies of one model that differ in nothing but their settings.

    A copy is one flat variable: what a step of a small model costs is not arithmetic but TensorFlow's price for every
    input of an op.
    """

    def __init__(self, params: Iterable[Any], loss: Loss, count: int, rule: str = "adam") -> None:
        if rule not in RULES:
            raise ValueError(f"rule is {rule!r}, but must be one of {RULES}")
        arrays = [np.asarray(p) for p in params]
        self.loss, self.rule, self.shapes = loss, reference.RULES[rule], [a.shape for a in arrays]
        self.start = np.concatenate([a.ravel() for a in arrays])
        self.step = tf.Variable(0.0, dtype=tf.float64)
        self.variables = [tf.Variable(self.start) for _ in range(count)]
        self.slots = [[tf.Variable(tf.zeros_like(v)) for v in self.variables] for _ in self.rule.slots]

    def fit(self, settings: Sequence[Setting], x: Any, y: Any, epochs: Iterable[np.ndarray]) -> np.ndarray:
        """From the start on, copy k by settings[k]; `x`, `y`, `epochs` and what it returns are those of `train`."""
        if len(settings) != len(self.variables) or len({frozenset(s) for s in settings}) != 1:
            raise ValueError("settings must be one for each copy, and all name the same hyperparameters")
        self.step.assign(0)
        for variable in self.variables:
            variable.assign(self.start)
        for slot in itertools.chain(*self.slots):
            slot.assign(tf.zeros_like(slot))
        hypers = {name: tf.constant([s[name] for s in settings], tf.float64) for name in settings[0]}
        x, y = tf.convert_to_tensor(x), tf.convert_to_tensor(y)
        return np.array([self._run(hypers, x, y, tf.convert_to_tensor(batches)) for batches in epochs])

    def params(self) -> list[tf.Tensor]:
        """Those of all copies, on a new first axis."""
        return self._unflatten(tf.stack(self.variables))

    def _unflatten(self, flat: tf.Tensor) -> list[tf.Tensor]:
        parts = tf.split(flat, [int(np.prod(s)) for s in self.shapes], axis=1)
        return [tf.reshape(part, [len(self.variables), *shape]) for part, shape in zip(parts, self.shapes, strict=True)]

    def _losses(self, params: list[tf.Tensor], x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        count = len(self.variables)
        if count == 1:  # A plain product is several times faster than a batch of one.
            return self.loss([p[0] for p in params], x, y)[None]
        # Left to itself, vectorized_map makes one wide product of a shared x, and pays for transposing the kernels.
        x, y = (tf.tile(t[None], [count] + [1] * len(t.shape)) for t in (x, y))
        return tf.vectorized_map(lambda copy: self.loss(*copy), (params, x, y))

    @tf.function
    def _run(self, hypers: dict[str, tf.Tensor], x: tf.Tensor, y: tf.Tensor, batches: tf.Tensor) -> tf.Tensor:
        total = tf.zeros(len(self.variables), self.start.dtype)
        for rows in batches:
            flat = tf.stack(self.variables)
            with tf.GradientTape() as tape:
                tape.watch(flat)
                losses = self._losses(self._unflatten(flat), tf.gather(x, rows), tf.gather(y, rows))
            grads = tf.unstack(tape.gradient(losses, flat))
            self.step.assign_add(1)
            step = {"step": self.step} if "step" in self.rule.hypers else {}
            getattr(ops, f"apply_{self.rule.name}")(self.variables, *self.slots, grads, **hypers, **step)
            total += losses
        return total / tf.cast(tf.shape(batches)[0], total.dtype)


def train(
    settings: Sequence[Setting],
    params: Iterable[Any],
    loss: Loss,
    x: Any,
    y: Any,
    epochs: Iterable[np.ndarray],
    rule: str = "adam",
) -> tuple[list[tf.Tensor], np.ndarray]:
    """Trains one copy of a model by each of `settings`, all side by side.

    Args:
      settings: for each copy the hyperparameters of `wdops.ops.apply_<rule>` by name, as
        `{"lr": 1e-3, "weight_decay": 0.1}`; every copy names the same. As in Keras, biases decay like kernels.
      params: what every copy starts from: arrays or variables of one dtype.
      loss: `loss(params, x, y)` of one copy and one batch, a scalar; `tf.vectorized_map` runs it for all of them. That
        of a Keras model calls `model.stateless_call(params, [], x)[0]`.
      x, y: the training data; rows are examples.
      epochs: for each epoch an integer array, a row of it the indices of one batch, which all copies see. A progress
        bar may be wrapped around it.
      rule: one of `RULES`.

    Returns:
      The trained `params` with a new first axis of copies, and the mean loss of every epoch and copy.
    """
    copies = Copies(params, loss, len(settings), rule)
    losses = copies.fit(settings, x, y, epochs)
    return copies.params(), losses


class Data(NamedTuple):
    """Images and labels in three parts: to train on, to choose a setting by, and to say what the choice is worth."""

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def digits(seed: int) -> Data:
    """A third of scikit-learn's handwritten digits each: few to train on, so that decay matters."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    images, test_images, labels, test_labels = train_test_split(
        images, labels, test_size=1 / 3, random_state=seed, stratify=labels
    )
    images, more_images, labels, more_labels = train_test_split(
        images, labels, test_size=1 / 2, random_state=seed, stratify=labels
    )
    return Data((images, labels), (more_images, more_labels), (test_images, test_labels))


def shuffled(examples: int, batch: int, epochs: int, seed: int) -> list[np.ndarray]:
    """For each epoch the batches of a new order; the examples that do not fill one are left out until the next."""
    rng = np.random.default_rng(seed)
    steps = examples // batch
    return [rng.permutation(examples)[: steps * batch].reshape(steps, batch) for _ in range(epochs)]


def network(hidden: int, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((64,)), keras.layers.Dense(hidden, activation="relu"), keras.layers.Dense(10)])


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))


def draw(
    loss: np.ndarray, accuracy: np.ndarray, best: int, decay: str, strengths: list[float], lrs: list[float], png: Path
) -> None:
    matplotlib.use("Agg")
    from matplotlib import colors, pyplot

    shape = len(strengths), len(lrs)
    figure, axis = pyplot.subplots(figsize=(2.5 + 0.8 * shape[1], 1.5 + 0.45 * shape[0]), layout="constrained")
    image = axis.imshow(loss.reshape(shape), norm=colors.LogNorm(), cmap="viridis_r", aspect="auto", origin="lower")
    for k, (row, column) in enumerate(np.ndindex(shape)):
        color = "white" if image.norm(loss[k]) > 0.5 else "black"
        axis.text(column, row, f"{accuracy[k]:.1%}", ha="center", va="center", color=color, fontsize=8)
    row, column = divmod(best, shape[1])
    axis.add_patch(pyplot.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", lw=3, label="best"))
    axis.set_xticks(range(shape[1]), [f"{lr:g}" for lr in lrs])
    axis.set_yticks(range(shape[0]), [f"{strength:g}" for strength in strengths])
    axis.set(xlabel="lr", ylabel=decay, title="validation accuracy; in red the least loss")
    figure.colorbar(image, label="validation loss")
    figure.savefig(png, dpi=120)


class Search:
    """Training on the digits by each of `settings`, in the three ways that `--compare` times."""

    def __init__(self, settings: list[Setting], *, rule: str, epochs: int, hidden: int, batch: int, seed: int) -> None:
        self.settings, self.rule = settings, rule
        self.epochs, self.hidden, self.batch, self.seed = epochs, hidden, batch, seed
        self.data = digits(seed)
        self.model = network(hidden, seed)
        self.start = self.model.get_weights()
        self.order = shuffled(len(self.data.train[0]), batch, epochs, seed)
        # That model.fit is timed by.
        self.sample = settings[:: -(-len(settings) // KERAS_SAMPLE)]

    def loss(self, params: list[tf.Tensor], x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return cross_entropy(y, self.model.stateless_call(params, [], x)[0])

    def warm_up(self) -> None:
        """Whoever comes first would pay for what TensorFlow does once."""
        for count in (1, 2):
            train(self.settings[:count], self.start, self.loss, *self.data.train, [self.order[0][:1]], self.rule)

    def side_by_side(self, bar: Bar = iter) -> list[tf.Tensor]:
        """The params of all copies."""
        return train(self.settings, self.start, self.loss, *self.data.train, bar(self.order), self.rule)[0]

    def one_after_another(self, bar: Bar = iter) -> list[tf.Tensor]:
        """The same. To be a fair rival, it traces once, and all steps of a setting are one call."""
        one = Copies(self.start, self.loss, 1, self.rule)
        steps = np.concatenate(self.order)
        trained = []
        for setting in bar(self.settings):
            one.fit([setting], *self.data.train, [steps])
            trained.append(one.params())
        return [tf.concat(copies, 0) for copies in zip(*trained, strict=True)]

    def sample_by_model_fit(self) -> None:
        """As users of Keras would, with the optimizers of wdops."""
        for setting in self.sample:
            hypers = dict(setting) | ({"momentum": 0.9} if self.rule == "momentum" else {})
            model = network(self.hidden, self.seed)
            model.compile(
                KERAS[self.rule](hypers.pop("lr"), **hypers),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            )
            model.fit(*self.data.train, batch_size=self.batch, epochs=self.epochs, verbose=0)

    def evaluate(self, params: list[tf.Tensor], x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
        """Loss and accuracy of each copy."""

        def of_one(copy: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
            logits = self.model.stateless_call(copy, [], x)[0]
            return cross_entropy(y, logits), tf.reduce_mean(tf.cast(tf.argmax(logits, 1) == y, tf.float32))

        return tuple(values.numpy() for values in tf.vectorized_map(of_one, params))


def run(
    decay: str,
    strengths: list[float],
    lrs: list[float],
    *,
    rule: str,
    epochs: int,
    hidden: int,
    batch: int,
    seed: int,
    compare: bool,
    png: Path,
) -> None:
    """Trains on the digits by every pair of a decay and an lr, draws the losses, and prints the best setting."""
    console = Console(soft_wrap=True)
    settings = [{decay: strength, "lr": lr} for strength, lr in itertools.product(strengths, lrs)]
    search = Search(settings, rule=rule, epochs=epochs, hidden=hidden, batch=batch, seed=seed)
    if compare:
        search.warm_up()

    with Progress(console=console) as progress:
        begin = time.perf_counter()
        params = search.side_by_side(
            lambda order: progress.track(order, description=f"{len(settings)} settings side by side")
        )
        seconds = time.perf_counter() - begin
        loss, accuracy = search.evaluate(params, *search.data.validation)
        console.print(
            f"side by side: {seconds:.1f} s for {len(settings)} settings, {len(search.order[0]) * epochs} steps each"
        )
        if compare:
            begin = time.perf_counter()
            alone = search.one_after_another(lambda each: progress.track(each, description="one after another"))
            rival = time.perf_counter() - begin
            differences = np.abs(loss / search.evaluate(alone, *search.data.validation)[0] - 1)
            console.print(
                f"one after another, each in one tf.function: {rival:.1f} s, {rival / seconds:.1f} times as long; "
                f"validation losses differ by {np.nanmedian(differences):.0e} in the median, "
                f"{np.nanmax(differences):.0e} where rounding grows most"
            )
            begin = time.perf_counter()
            search.sample_by_model_fit()
            rival = (time.perf_counter() - begin) * len(settings) / len(search.sample)
            console.print(
                f"one after another, by model.fit: {rival:.0f} s, {rival / seconds:.0f} times as long, "
                f"going by {len(search.sample)} of them"
            )
    loss = np.where(np.isfinite(loss), loss, np.nan)
    if np.isnan(loss).all():
        raise SystemExit("Every setting diverged; smaller --lrs may not.")
    best = int(np.nanargmin(loss))
    _, test_accuracy = search.evaluate([p[best : best + 1] for p in params], *search.data.test)
    draw(loss, accuracy, best, decay, strengths, lrs, png)
    console.print(f"heat map: {png}")
    console.print(
        f"best: {', '.join(f'{name}={value:g}' for name, value in settings[best].items())}: validation loss "
        f"{loss[best]:.4f}, accuracy {accuracy[best]:.1%}; test accuracy {test_accuracy[0]:.1%}"
    )
