"""The demo: the same training with Keras's AdamW and wdops's, also with slots of 2 bytes, and a larger model's step."""

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from wdops import isa, optimizers

WAYS = {
    "keras": keras.optimizers.AdamW,
    "wdops": optimizers.AdamW,
    "wdops, bfloat16 slots": functools.partial(optimizers.AdamW, slot_dtype="bfloat16"),
}
LEARNING_RATE, WEIGHT_DECAY, BATCH, SEED = 1e-3, 1e-2, 64, 7


def digits() -> list[np.ndarray]:
    """1797 handwritten digits of 8 x 8 pixels, in [0, 1]: train and test images, train and test labels."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(images.astype(np.float32) / 16, labels, test_size=0.25, random_state=SEED, stratify=labels)


def train(name: str, epochs: int, progress: Progress) -> tuple[list[dict[str, float]], list[np.ndarray]]:
    """Loss and accuracy after each epoch, and the weights at the end."""
    images, test_images, labels, test_labels = digits()
    keras.utils.set_random_seed(SEED)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(256, activation="elu"),
            keras.layers.Dense(256, activation="elu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        WAYS[name](LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    curve = []
    task = progress.add_task(f"digits, {name}", total=epochs)

    def note(epoch: int, logs: dict[str, float]) -> None:
        curve.append(dict(logs))
        progress.advance(task)

    model.fit(
        images,
        labels,
        batch_size=BATCH,
        epochs=epochs,
        validation_data=(test_images, test_labels),
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=note)],
    )
    return curve, model.get_weights()


def larger_model_step(name: str) -> Callable[[], None]:
    """One step of AdamW over the 25 M parameters of 8 blocks 512 wide, as a transformer has them."""
    block = [(512, 512), (512,)] * 4 + [(512, 2048), (2048,), (2048, 512), (512,)] + [(512,)] * 4
    variables = [keras.Variable(np.full(shape, 0.1, np.float32)) for shape in block * 8]
    grads = [tf.fill(v.shape, 1e-3) for v in variables]
    optimizer = WAYS[name](LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optimizer.build(variables)

    @tf.function
    def step() -> None:
        optimizer.apply(grads, variables)

    return step


def time_steps(steps: int, progress: Progress) -> dict[str, float]:
    """The median milliseconds of a step: they run in turn, so that a drift of the machine meets all."""
    runs = {name: larger_model_step(name) for name in WAYS}
    for run in runs.values():
        run()
    task = progress.add_task("a larger model's step", total=steps)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
        progress.advance(task)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def draw(curves: dict[str, list[dict[str, float]]], png: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, title in zip(axes, ("loss", "val_accuracy"), ("training loss", "test accuracy"), strict=True):
        for (name, curve), style in zip(curves.items(), ("-", "--", ":"), strict=True):
            axis.plot(range(1, len(curve) + 1), [point[key] for point in curve], style, label=name, lw=2)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_yscale("log")
    figure.suptitle("AdamW on handwritten digits, same seed")
    figure.savefig(png, dpi=120)


def run(epochs: int, steps: int, png: Path) -> None:
    console = Console()
    with Progress(console=console) as progress:
        results = {name: train(name, epochs, progress) for name in WAYS}
        milliseconds = time_steps(steps, progress)
    curves = {name: curve for name, (curve, _) in results.items()}
    weights = {name: np.concatenate([w.ravel() for w in ws]) for name, (_, ws) in results.items()}
    difference = np.max(np.abs(weights["keras"] - weights["wdops"]))
    count, largest = weights["keras"].size, np.max(np.abs(weights["keras"]))

    console.print(f"AdamW on the digits: {count:,} weights, {epochs} epochs; the step runs on {isa.active()}")
    table = Table()
    for column in ("", *WAYS):
        table.add_column(column, justify="left" if not column else "right")
    for label, key, form in (
        ("training loss", "loss", "{:.6f}"),
        ("test loss", "val_loss", "{:.6f}"),
        ("test accuracy", "val_accuracy", "{:.2%}"),
    ):
        table.add_row(label, *(form.format(curve[-1][key]) for curve in curves.values()))
    table.add_row("step of 25 M parameters", *(f"{ms:.2f} ms" for ms in milliseconds.values()))
    console.print(table)
    console.print(f"largest difference of weights  {difference:.1e} (largest weight {largest:.2f})")
    console.print(f"speed-up of the step           {milliseconds['keras'] / milliseconds['wdops']:.1f} times")
    draw(curves, png)
    console.print(f"curves                         {png}")
