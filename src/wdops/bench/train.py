"""Training end to end: an MLP, a transformer and word vectors on real data, from one start and in one order.

Every rival trains by Keras's own `train_function`, several steps to a call (`steps_per_execution`), and wdops has all
of its own that helps switched on. The first losses must agree before anything is timed. The share of the step is what
a training step takes beyond the forward and the backward pass, which are timed alone too, gradients written. Where it
is small, the step is not the bottleneck, and no optimizer helps much.
"""

import functools
import importlib.util
import pydoc_data.topics
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.utils import shuffle

from wdops import optimizers
from wdops.bench import timing
from wdops.bench.timing import Settings, Table, in_its_own_process, in_turn, ratio
from wdops.layers import convert
from wdops.regularizers import fold_regularizers

if TYPE_CHECKING:  # only to draw
    from matplotlib.figure import Figure

SEED = 0
STEPS, SHORT_STEPS = 8, 2  # of a call
CALLS, SHORT_CALLS = 30, 3  # of a loss curve
CHECKED = 2  # of them, from the first on
MOST_DIFFERENCE = 1e-4  # relative, of the losses that are checked; in training, differences in rounding grow


class Rival(NamedTuple):
    optimizers: ModuleType
    jit_compile: bool


RIVALS = {
    "wdops": Rival(optimizers, False),
    "wdops, jit_compile=True": Rival(optimizers, True),
    "Keras, tf.function": Rival(keras.optimizers, False),
    "Keras, jit_compile=True": Rival(keras.optimizers, True),
}


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and by what."""

    title: str
    source: str  # of the data
    batches: tuple[Any, np.ndarray]  # inputs and targets, over which training goes again and again
    network: Callable[[], keras.Model]
    loss: keras.losses.Loss
    optimizer: str
    options: dict[str, Any]
    factor_gradients: bool = False


# ---- what is trained


def in_batches(rows: np.ndarray, batch: int) -> np.ndarray:
    """Made here, since tf.data would cut out every row and join them again, in the time of a step."""
    count = len(rows) // batch
    return rows[: count * batch].reshape(count, batch, *rows.shape[1:])


def perceptron(short: bool) -> Task:
    width, layers, batch = (256 if short else 4096), 3, 32
    images, labels = shuffle(*load_digits(return_X_y=True), random_state=SEED)

    def network() -> keras.Model:
        decay = {"kernel_regularizer": keras.regularizers.L2(1e-5)}
        hidden = [keras.layers.Dense(width, activation="elu", **decay) for _ in range(layers)]
        return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10, **decay)])

    return Task(
        title=f"MLP, {layers} x Dense({width}, elu, L2), batch {batch}",
        source=f"scikit-learn's {len(images)} handwritten digits of 8 x 8 pixels",
        batches=(in_batches(images.astype(np.float32) / 16, batch), in_batches(labels, batch)),
        network=network,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer="Adam",  # and not AdamW, since L2 is the decay
        options={"learning_rate": 1e-4},
        factor_gradients=True,
    )


class Positions(keras.layers.Layer):
    """Adds a learned vector to each position."""

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.vectors = self.add_weight(shape=shape[1:], name="vectors")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x + self.vectors


def transformer(short: bool) -> Task:
    size, layers, length, batch = (32, 1, 16, 8) if short else (256, 4, 64, 8)
    text = np.frombuffer("\n".join(pydoc_data.topics.topics.values()).encode(), np.uint8).astype(np.int32)
    begins = np.random.default_rng(SEED).integers(len(text) - length, size=10_000)
    windows = text[begins[:, None] + np.arange(length + 1)]

    def network() -> keras.Model:
        inputs = keras.Input((length,), dtype="int32")
        of_byte = keras.layers.ReversibleEmbedding(256, size)
        x = Positions()(of_byte(inputs))
        for _ in range(layers):
            normal = keras.layers.LayerNormalization()(x)
            x += keras.layers.MultiHeadAttention(4, size // 4)(normal, normal, use_causal_mask=True)
            normal = keras.layers.LayerNormalization()(x)
            x += keras.layers.Dense(size)(keras.layers.Dense(4 * size, activation="relu")(normal))
        return keras.Model(inputs, of_byte(keras.layers.LayerNormalization()(x), reverse=True))

    return Task(
        title=f"causal transformer, {layers} layers of {size}, 4 heads, batch {batch} x {length}",
        source=f"the {len(text):,} bytes of Python's help topics (pydoc_data.topics)",
        batches=(in_batches(windows[:, :-1], batch), in_batches(windows[:, 1:], batch)),
        network=network,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer="AdamW",
        options={"learning_rate": 1e-3, "weight_decay": 0.01, "global_clipnorm": 1.0, "use_ema": True},
    )


class DenseGradientEmbedding(keras.layers.Embedding):
    """An Embedding whose gradient is a table like Adam's moments, and not a list of the rows that were looked up."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        @tf.custom_gradient
        def look_up(table: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
            return tf.gather(table, inputs), lambda grad: tf.math.unsorted_segment_sum(grad, inputs, self.input_dim)

        return look_up(tf.convert_to_tensor(self.embeddings))


@functools.cache
def source_words() -> list[str]:
    """The words and names in the Python files of Keras and NumPy, in their order."""
    words = []
    for package in ("keras", "numpy"):
        for file in sorted(Path(importlib.util.find_spec(package).origin).parent.rglob("*.py")):
            words += re.findall(r"[A-Za-z_]\w*", file.read_text(errors="ignore"))
    return words


def word_vectors(short: bool, embedding: type[keras.layers.Embedding] = keras.layers.Embedding) -> Task:
    """Skip-gram: a word, another at most 5 words away, and words drawn at random, which are to be told apart."""
    rows, size, batch, pairs, drawn = (2000, 32, 128, 2000, 8) if short else (32_000, 128, 1024, 400_000, 8)
    counts = dict(Counter(source_words()).most_common(rows))
    row_of = {word: row for row, word in enumerate(counts)}
    text = np.array([row_of[word] for word in source_words() if word in row_of], np.int32)
    random = np.random.default_rng(SEED)
    places = random.integers(5, len(text) - 5, pairs)
    neighbours = text[places + random.integers(1, 6, pairs) * random.choice([-1, 1], pairs)]
    frequency = np.array(list(counts.values())) ** 0.75
    others = random.choice(len(counts), (pairs, drawn), p=frequency / frequency.sum()).astype(np.int32)
    candidates = np.column_stack([neighbours, others])
    is_neighbour = np.tile(np.float32([1] + [0] * drawn), (pairs, 1))

    def network() -> keras.Model:
        inputs = keras.Input((), dtype="int32"), keras.Input((1 + drawn,), dtype="int32")
        word, others = (embedding(rows, size)(x) for x in inputs)
        return keras.Model(inputs, keras.layers.Dot(axes=(2, 1))([others, word]))

    return Task(
        title=f"skip-gram, 2 x {embedding.__name__}({rows}, {size}), {drawn} words drawn, batch {batch}",
        source=f"{pairs:,} pairs of the {len(source_words()):,} words and names in the source of Keras and NumPy",
        batches=((in_batches(text[places], batch), in_batches(candidates, batch)), in_batches(is_neighbour, batch)),
        network=network,
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        optimizer="AdamW",
        # Where Keras does not clip, its Adam adds up the squares of rows that occur twice, which is another step.
        options={"learning_rate": 1e-2, "weight_decay": 0.01, "global_clipnorm": 1.0},
    )


TASKS: dict[str, Callable[[bool], Task]] = {
    "perceptron": perceptron,
    "transformer": transformer,
    "word_vectors": word_vectors,
    "word_vectors_dense": functools.partial(word_vectors, embedding=DenseGradientEmbedding),
}


# ---- how it is trained


class KeepGradients(keras.optimizers.Optimizer):
    """Takes no step, but stores the gradients, so that the backward pass is run, and nothing behind it."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.0)

    def build(self, variables: Sequence[keras.Variable]) -> None:
        super().build(variables)
        self.kept = self.add_optimizer_variables(variables, "gradient")

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        for kept, grad in zip(self.kept, grads, strict=True):
            self.assign(kept, grad)  # of a list of rows, only these


class Training:
    """A model that is trained, so many steps in a call, or with `updates=False` only run forward and backward."""

    def __init__(self, task: Task, rival: Rival, steps: int, updates: bool = True) -> None:
        keras.utils.set_random_seed(SEED)
        model = task.network()
        if rival.optimizers is optimizers:
            model = convert(model).model
        optimizer = getattr(rival.optimizers, task.optimizer)(**task.options) if updates else KeepGradients()
        model.compile(optimizer, task.loss, jit_compile=rival.jit_compile, steps_per_execution=steps)
        optimizer.build(model.trainable_variables)
        if not updates:
            for variable in model.trainable_variables:
                variable.regularizer = None  # a penalty counts to the step
        elif rival.optimizers is optimizers:
            fold_regularizers(model, optimizer)
            if task.factor_gradients:
                optimizer.factor_gradients(model)
        model.make_train_function()
        batches = tf.data.Dataset.from_tensor_slices(task.batches)
        self.batches = iter(batches.repeat().prefetch(tf.data.AUTOTUNE))
        self.model = model

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.model.train_function(self.batches)

    def loss(self) -> float:
        """The mean over the steps of a call."""
        self.model.reset_metrics()
        return float(self.model.train_function(self.batches)["loss"])


def check_agreement(losses: dict[str, list[float]]) -> None:
    """Raises AssertionError if a rival's first losses are others than those of the first rival."""
    first, *_ = losses.values()
    for name, values in losses.items():
        difference = np.max(np.abs(np.divide(values[:CHECKED], first[:CHECKED]) - 1))
        assert difference < MOST_DIFFERENCE, f"the losses of {name} are {difference:.1e} off"


def peak_bytes(task: str, rival: str) -> int:
    """The most memory that training holds beyond weights, slots and data, in a process that has done nothing else.

    That of tracing and compiling is not counted, but what they leave behind is.
    """
    return timing.peak_bytes(Training(TASKS[task](False), RIVALS[rival], STEPS).run)


def train(name: str, settings: Settings, progress: Callable[[str], None]) -> Table:
    keras.backend.clear_session()
    task = TASKS[name](settings.short)
    steps, calls = (SHORT_STEPS, SHORT_CALLS) if settings.short else (STEPS, CALLS)
    progress(f"{task.title}: losses")
    # XLA takes seconds to compile each.
    rivals = [rival for rival in RIVALS if not (settings.short and RIVALS[rival].jit_compile)]
    trainings = {rival: Training(task, RIVALS[rival], steps) for rival in rivals}
    losses = {rival: [training.loss() for _ in range(calls)] for rival, training in trainings.items()}
    check_agreement(losses)
    passes = {rival: Training(task, RIVALS[rival], steps, updates=False) for rival in rivals}

    progress(f"{task.title}: time")
    runs = {rival: training.run for rival, training in trainings.items()}
    runs |= {f"{rival}, forward and backward": training.run for rival, training in passes.items()}
    table = in_turn(task.title, runs, settings, elements=trainings["wdops"].model.count_params())
    seconds = {run: [s / steps for s in of_calls] for run, of_calls in table.seconds.items()}
    passes_seconds = {rival: seconds.pop(f"{rival}, forward and backward") for rival in rivals}
    peaks = {}
    if not settings.short:  # each is a process that imports TensorFlow
        progress(f"{task.title}: memory")
        peaks = {rival: in_its_own_process("train", f"peak_bytes({name!r}, {rival!r})") for rival in rivals}
    facts = {
        "data": task.source,
        "optimizer": f"{task.optimizer}({', '.join(f'{n}={x}' for n, x in task.options.items())})",
        "steps of a loss": steps,
        "losses": losses,
        "forward and backward": passes_seconds,
        "share of the step": {rival: 1 - ratio(passes_seconds[rival], seconds[rival]) for rival in rivals},
        "peak bytes": peaks,
    }
    return replace(table, seconds=seconds, facts=table.facts | facts)


def measure(settings: Settings, progress: Callable[[str], None]) -> list[Table]:
    return [train(name, settings, progress) for name in TASKS]


def draw(tables: list[Table], figure: "Figure") -> None:
    """For each task the loss against the seconds of training, and the steps per second with the share of the step."""
    figure.set_size_inches(13, 3 * len(tables))
    rows = figure.subplots(len(tables), 2, squeeze=False, width_ratios=(2, 1))
    for (curves, bars), table in zip(rows, tables, strict=True):
        medians = {rival: statistics.median(seconds) for rival, seconds in table.seconds.items()}
        steps = table.facts["steps of a loss"]
        for rival, losses in table.facts["losses"].items():
            curves.plot(medians[rival] * steps * np.arange(1, len(losses) + 1), losses, label=rival)
        curves.set(title=table.title, xlabel="seconds", ylabel=f"loss, mean of {steps} steps")
        curves.grid(alpha=0.3)
        rates = [1 / seconds for seconds in medians.values()]
        drawn = bars.barh(list(medians), rates, color=[f"C{k}" for k in range(len(rates))])
        shares = table.facts["share of the step"]
        labels = [f"{rate:.1f}; {shares[rival]:.0%}" for rival, rate in zip(medians, rates, strict=True)]
        bars.bar_label(drawn, labels, padding=2)
        bars.margins(x=0.25)
        bars.invert_yaxis()
        bars.set_xlabel("steps per second; the share of the step")
    rows[0][0].legend()
