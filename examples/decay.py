"""What each decay is worth: a wide ELU network on 200 handwritten digits, without decay and with each of four.

    python examples/decay.py [--epochs N] [--seeds N] [--output PNG]

The task is the digits as they are, with wrong labels, and with outliers among the images; the optimizer is Adam. All
strengths of all decays train side by side, as in `wdops.grid`. Of each decay that strength counts which has the best
mean accuracy on validation images, which are clean; the test images only say what the choice is worth.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from wdops import grid

LR, BATCH, LAYERS, UNITS = 1e-3, 20, 3, 192
EXAMPLES = 200  # to train on; 599 more to choose by, and 599 to test
STRENGTHS = {
    "l1": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
    "l2": [1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
    "weight_decay": [0.1, 1, 3, 10, 30, 100],
    "proximal_l1": [0.003, 0.03, 0.1, 0.3, 1, 3],
}
NO_DECAY = dict.fromkeys(STRENGTHS, 0.0)
SETTINGS = [NO_DECAY | {"lr": LR}]
SETTINGS += [NO_DECAY | {"lr": LR, decay: x} for decay, strengths in STRENGTHS.items() for x in strengths]
# The settings among which one is chosen, by the name of the row.
ROWS = {"none": [0]} | {decay: [k for k, s in enumerate(SETTINGS) if s[decay]] for decay in STRENGTHS}

WRONG_LABELS, OUTLIERS, OUTLIER_NOISE = 0.25, 0.3, 2.0  # parts of the training set; a deviation, of pixels in [0, 1]
TASKS = ["clean", f"{WRONG_LABELS:.0%} wrong labels", f"{OUTLIERS:.0%} outliers"]


class Trained(NamedTuple):
    """Of one task and seed, with an entry for each of SETTINGS in the last axis."""

    train_loss: np.ndarray  # by epoch, without penalties
    validation_accuracy: np.ndarray  # by epoch
    test_accuracy: np.ndarray  # at the end
    zeros: np.ndarray  # the part of all weights that is exactly 0 at the end


def network() -> keras.Model:
    hidden = [keras.layers.Dense(UNITS, activation="elu", kernel_initializer="he_normal") for _ in range(LAYERS)]
    return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])


def spoiled(task: str, images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The training set of a task: some labels become another class, or some images drown in noise."""
    rng = np.random.default_rng(seed)
    images, labels = images.copy(), labels.copy()
    order = rng.permutation(len(images))
    if "labels" in task:
        wrong = order[: round(WRONG_LABELS * len(order))]
        labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    if "outliers" in task:
        outliers = order[: round(OUTLIERS * len(order))]
        images[outliers] += OUTLIER_NOISE * rng.standard_normal(images[outliers].shape, np.float32)
    return images, labels


def train(seed: int, epochs: int, progress: Progress) -> list[Trained]:
    """All settings on each of TASKS, from the same start and in the same order."""
    data = grid.digits(seed)
    keras.utils.set_random_seed(seed)
    model = network()

    def loss(params: list[tf.Tensor], x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return grid.cross_entropy(y, model.stateless_call(params, [], x)[0])

    @tf.function
    def accuracy(params: list[tf.Tensor], x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        def of_one(copy: list[tf.Tensor]) -> tf.Tensor:
            right = tf.argmax(model.stateless_call(copy, [], x)[0], 1) == y
            return tf.reduce_mean(tf.cast(right, tf.float32))

        return tf.vectorized_map(of_one, params)

    copies = grid.Copies(model.get_weights(), loss, len(SETTINGS))
    validation, test = (tuple(map(tf.convert_to_tensor, part)) for part in (data.validation, data.test))
    results = []
    for task in TASKS:
        images, labels = spoiled(task, data.train[0][:EXAMPLES], data.train[1][:EXAMPLES], seed)
        order = grid.shuffled(EXAMPLES, BATCH, epochs, seed)
        curve = []

        def noting(order: list[np.ndarray] = order, curve: list[np.ndarray] = curve, task: str = task) -> Iterator:
            for batches in progress.track(order, description=f"seed {seed}, {task}"):
                yield batches
                curve.append(accuracy(copies.params(), *validation).numpy())

        train_loss = copies.fit(SETTINGS, images, labels, noting())
        zeros = np.mean([v.numpy() == 0 for v in copies.variables], axis=1)
        results.append(Trained(train_loss, np.array(curve), accuracy(copies.params(), *test).numpy(), zeros))
    return results


def chosen(trained: Trained) -> dict[str, int]:
    """By row the setting of the best validation accuracy at the end, over all seeds; of equals, the weakest."""
    final = trained.validation_accuracy[:, -1].mean(axis=0)
    return {row: settings[int(np.argmax(final[settings]))] for row, settings in ROWS.items()}


def draw(results: dict[str, Trained], png: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, len(TASKS), figsize=(12, 9.5), layout="constrained", sharey="row")
    for column, (task, trained) in zip(axes.T, results.items(), strict=True):
        for place, (row, k) in enumerate(chosen(trained).items()):
            for axis, values in zip(column, (trained.train_loss, trained.validation_accuracy), strict=False):
                of_seed = values[:, :, k]
                x = np.arange(1, of_seed.shape[1] + 1)
                axis.plot(x, of_seed.mean(axis=0), color=f"C{place}", lw=1.5, label=row)
                axis.fill_between(x, of_seed.min(axis=0), of_seed.max(axis=0), color=f"C{place}", alpha=0.12, lw=0)
            test = trained.test_accuracy[:, k]
            column[2].plot(np.full(len(test), place), test, "o", color=f"C{place}", alpha=0.4)
            column[2].plot([place - 0.3, place + 0.3], [test.mean()] * 2, color=f"C{place}", lw=3)
        column[0].set(title=task, yscale="log", xlabel="epoch")
        column[1].set(xlabel="epoch")
        column[2].set_xticks(range(len(ROWS)), [row.replace("_", "\n") for row in ROWS])
        for axis in column:
            axis.grid(alpha=0.3)
    for axis, label in zip(axes[:, 0], ("training loss", "validation accuracy", "test accuracy"), strict=True):
        axis.set_ylabel(label)
    final = [trained.validation_accuracy[:, -1, list(chosen(trained).values())] for trained in results.values()]
    axes[1, 0].set_ylim(np.min(final) - 0.1, 1)
    axes[0, 0].legend()
    figure.suptitle(
        "One network without decay and with four: lines are means over the seeds, shades reach from worst to best"
    )
    figure.savefig(png, dpi=110)


def table_of(results: dict[str, Trained]) -> Table:
    table = Table("decay", *results, box=box.MARKDOWN)
    choices = [chosen(trained) for trained in results.values()]
    for row in ROWS:
        cells = []
        for trained, choice in zip(results.values(), choices, strict=True):
            k = choice[row]
            test, zeros = 100 * trained.test_accuracy[:, k], trained.zeros[:, k].mean()
            strength = f"{SETTINGS[k].get(row, 0):g}"
            cells.append(f"{test.mean():.1f} ± {test.std(ddof=min(1, len(test) - 1)):.1f}; {strength}; {zeros:.1%}")
        table.add_row(row, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60, help="over the 200 digits; default: 60")
    parser.add_argument("--seeds", type=int, default=3, help="of the split, the start and the batches; default: 3")
    parser.add_argument("--output", type=Path, default=Path("decay.png"), help="default: decay.png")
    arguments = parser.parse_args()
    for name in ("epochs", "seeds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")

    console = Console(width=max(100, Console().width))  # of the table
    with Progress(console=console) as progress:
        of_seed = [train(seed, arguments.epochs, progress) for seed in range(arguments.seeds)]
    results = {
        task: Trained(*map(np.stack, zip(*of_task, strict=True)))
        for task, of_task in zip(TASKS, zip(*of_seed, strict=True), strict=True)
    }
    console.print("Test accuracy in %, mean ± deviation over the seeds; the strength chosen; the part of exact zeros")
    console.print(table_of(results))
    draw(results, arguments.output)
    console.print(f"curves: {arguments.output}")


if __name__ == "__main__":
    main()
