"""What stands around the rule in the Keras classes: each option beside Keras, all together, and a step that fails."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_optimizers import MODES, data, difference, fit, problem, small_model

import wdops
from wdops import optimizers

modes = pytest.mark.parametrize("mode", MODES)
CLIPS = [{}, {"clipnorm": 0.5}, {"clipvalue": 0.2}, {"global_clipnorm": 0.5}]
EMA = {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3}
REST = {"gradient_accumulation_steps": 2, "loss_scale_factor": 8.0, **EMA}
L2 = 0.05


def state(optimizer, variables):
    """Everything that a step may change, by name."""
    own = {f"{i} {v.path}": v for i, v in enumerate(optimizer.variables)}
    return {name: np.array(v) for name, v in (own | {f"var {i}": v for i, v in enumerate(variables)}).items()}


def run(optimizer, mode, steps=13, missing=(), constraint=None, l2=0.0):
    """The state behind so many steps; `l2` is added to the gradients as a regularizer in the loss would."""
    start, grads = problem(steps)
    variables = [keras.Variable(x, name=f"w{i}") for i, x in enumerate(start)]
    for variable in variables:
        variable.constraint = constraint
    optimizer.build(variables)
    inputs = [tf.Variable(tf.zeros(x.shape)) for x in start]

    def step():
        values = [tf.convert_to_tensor(x) for x in inputs]
        values = [g + 2 * l2 * tf.convert_to_tensor(v) for g, v in zip(values, variables, strict=True)]
        scale = optimizer.loss_scale_factor or 1.0
        optimizer.apply([None if i in missing else scale * g for i, g in enumerate(values)], variables)

    step = MODES[mode](step)
    for values in grads:
        for input_, value in zip(inputs, values, strict=True):
            input_.assign(value)
        step()
    return state(optimizer, variables)


def assert_same(got, want, bound):
    assert len(got) == len(want)
    for (name, g), (_, w) in zip(got.items(), want.items(), strict=True):
        # Gradients are of order 1 or clipped to it: what is far smaller is what is left where they cancel.
        assert np.max(np.abs(g - w)) <= bound * max(1e-2, np.max(np.abs(w))), name


# Every combination in one mode; each clip and each of the rest once in the others.
RESTS = [{}, EMA, {"gradient_accumulation_steps": 3, "use_ema": True}, REST]
DIAGONAL = list(zip(CLIPS, RESTS, strict=True))


@pytest.mark.parametrize(
    ("clip", "rest", "mode"),
    [
        *((c, r, "graph") for c in CLIPS for r in RESTS),
        *((c, r, mode) for c, r in DIAGONAL for mode in ("eager", "jit")),
    ],
    ids=str,
)
def test_every_option_is_that_of_keras(clip, rest, mode):
    """Slots and averages too, behind 13 steps, so that one accumulation is under way."""
    arguments = {"learning_rate": 0.01, "weight_decay": 0.1, **clip, **rest}
    want = run(keras.optimizers.AdamW(**arguments), mode, l2=L2)
    got = run(optimizers.AdamW(**arguments, l2=L2), mode)
    # 5e-6 below: Keras makes 1 - beta_2^t in float32, which is off by 1e-5 in the first steps.
    if rest is not REST:
        # The sum that is under way has its penalty when the step is made; without penalties it is compared below.
        got, want = ({n: x for n, x in s.items() if "gradient_accumulator" not in n} for s in (got, want))
    assert_same(got, want, 5e-6)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, mode) for name in ("SGD", "Nadam", "Lion", "Lamb", "Ftrl") for mode in ("graph", "jit")),
        ("SGD", "eager"),
    ],
)
def test_all_options_together_with_constraints_and_missing_gradients(name, mode):
    # FTRL divides the rounding of a square root by lr, in Keras and here alike.
    arguments = {"learning_rate": 0.5 if name == "Ftrl" else 0.01, "global_clipnorm": 0.5, **REST}
    more = {"missing": (1, 4), "constraint": keras.constraints.NonNeg()}
    want = run(getattr(keras.optimizers, name)(**arguments), mode, **more)
    got = run(getattr(optimizers, name)(**arguments), mode, **more)
    assert_same(got, want, 1e-5)
    assert min(v.min() for n, v in got.items() if n in ("var 0", "var 2", "var 3")) >= 0


def operations_of(graph):
    """Those in the branches of a tf.cond too."""
    graphs = [graph, *(f.graph for f in graph._functions.values() if hasattr(f, "graph"))]
    return [op for g in graphs for op in g.get_operations()]


def test_the_step_is_two_ops_and_no_other_touches_a_variable():
    arguments = {"clip": {"global_clipnorm": 0.5}, "skip": {"skip_nonfinite": True}, "both": {"clipnorm": 1.0}}
    for name, argument in arguments.items():
        opt = optimizers.AdamW(0.01, weight_decay=0.1, l2=L2, use_ema=True, loss_scale_factor=8.0, **argument)
        variables = [keras.Variable(np.ones((20, 30), np.float32)) for _ in range(3)]
        opt.build(variables)
        step = tf.function(lambda *grads: opt.apply(list(grads), variables))  # noqa: B023
        graph = step.get_concrete_function(*[tf.ones((20, 30))] * 3).graph
        operations = operations_of(graph)
        if name != "skip":
            assert sum(op.type == "Wdops>Norms" for op in operations) == 1
            assert sum(op.type == "Wdops>ApplyAdam" for op in operations) == 1
        touching = {op.type for op in operations for t in op.outputs if t.shape == (20, 30)}
        assert touching <= {"Placeholder", "Identity"}, name


@modes
@pytest.mark.parametrize(
    ("name", "bad", "every"),
    [("AdamW", np.nan, None), ("AdamW", np.inf, 2), ("Nadam", -np.inf, None), ("Nadam", np.nan, 2)],
)
def test_a_step_that_is_not_finite_changes_nothing_and_does_not_count(name, bad, every, mode):
    start, grads = problem(9)
    arguments = {"weight_decay": 0.1, "global_clipnorm": 0.5, "gradient_accumulation_steps": every, **EMA}

    def train(with_bad):
        opt = getattr(optimizers, name)(0.01, skip_nonfinite=True, **arguments)
        variables = [keras.Variable(x, constraint=None) for x in start]
        variables[0].constraint = keras.constraints.UnitNorm()  # which moves last bits wherever it is applied
        opt.build(variables)
        inputs = [tf.Variable(tf.zeros(x.shape)) for x in start]
        step = MODES[mode](lambda: opt.apply([tf.convert_to_tensor(x) for x in inputs], variables))
        for k, values in enumerate(grads):
            for input_, value in zip(inputs, values, strict=True):
                input_.assign(value)
            step()
            assert opt.step_applied
            if with_bad and k in (0, 3, 4):
                before = state(opt, variables)
                inputs[k % 5].assign(tf.fill(inputs[k % 5].shape, np.float32(bad)))
                step()
                assert not opt.step_applied
                for (path, a), b in zip(before.items(), state(opt, variables).values(), strict=True):
                    assert a.tobytes() == b.tobytes(), path
        return state(opt, variables)

    clean, disturbed = train(False), train(True)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(clean.values(), disturbed.values(), strict=True))


# XLA sees no values while it compiles: as the README says, a variable that holds -1 goes unnoticed there.
FAILURES = [*(("shape", mode) for mode in MODES), ("hyperparameter", "eager"), ("hyperparameter", "graph")]
# Keras has the last from 3.14 on, and pyproject.toml allows 3.12.
WITH_STATE = [n for n in ("AdamW", "Nadam", "ScheduleFreeAdamW") if hasattr(optimizers, n)]


@pytest.mark.parametrize(("failure", "mode"), FAILURES)
@pytest.mark.parametrize("name", WITH_STATE)
def test_a_step_that_fails_leaves_everything_as_it_was(failure, name, mode):
    decay = tf.Variable(0.1)
    opt = getattr(optimizers, name)(0.01, weight_decay=decay, global_clipnorm=1.0, **EMA)
    variables = [keras.Variable(x) for x in problem(1)[0]]
    opt.build(variables)
    grads = [tf.ones(v.shape) for v in variables]
    step = MODES[mode](lambda *grads: opt.apply(list(grads), variables))
    step(*grads)
    before = state(opt, variables)
    if failure == "shape":
        grads[2] = tf.ones((7, 2))
    else:
        decay.assign(-1.0)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=r"grad\[2\]|weight_decay"):
        step(*grads)
    for (path, a), b in zip(before.items(), state(opt, variables).values(), strict=True):
        assert a.tobytes() == b.tobytes(), path


@pytest.mark.parametrize("module", [keras.optimizers, optimizers], ids=["keras", "wdops"])
def test_a_gradient_that_is_missing_in_the_last_micro_step(module):
    """What the others left for its variable does not reach the next step."""
    variables = [keras.Variable([1.0]), keras.Variable([1.0])]
    optimizer = module.SGD(0.1, gradient_accumulation_steps=2)
    optimizer.build(variables)
    one = tf.constant([1.0])
    for grads in ([one, one], [one, None], [one, one], [one, one]):
        optimizer.apply(grads, variables)
    np.testing.assert_allclose([v.numpy() for v in variables], [[0.8], [0.9]], rtol=1e-6)


@pytest.mark.parametrize("norm", ["clipnorm", "global_clipnorm"])
def test_of_two_limits_that_are_set_one_after_another_the_norm_counts(norm):
    results = []
    for module in (keras.optimizers, optimizers):
        variable = keras.Variable([1.0, 1.0])
        optimizer = module.SGD(0.1, **{norm: 1.0})
        optimizer.clipvalue = 0.1
        optimizer.apply([tf.ones(2)], [variable])
        results.append(variable.numpy())
    np.testing.assert_allclose(*results, rtol=1e-6)


@pytest.mark.parametrize("make", [keras.Variable, tf.Variable])
def test_a_variable_as_learning_rate_is_checkpointed_and_exported(make, tmp_path):
    lr = make(0.125)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizers.AdamW(lr), loss="mse")
    model.fit(tf.ones((4, 2)), tf.ones((4, 1)), verbose=0)
    checkpoints = [tf.train.Checkpoint(optimizer=model.optimizer), tf.train.Checkpoint(model=model)]
    paths = [c.save(tmp_path / str(i) / "c") for i, c in enumerate(checkpoints)]
    for checkpoint, path in zip(checkpoints, paths, strict=True):
        lr.assign(0.5)
        checkpoint.restore(path).assert_consumed()
        assert float(lr.numpy()) == float(model.optimizer.learning_rate.numpy()) == 0.125
    model.optimizer.learning_rate = 0.25
    assert float(lr.numpy()) == 0.25
    model.export(tmp_path / "export", verbose=False)
    tf.saved_model.save(model, tmp_path / "saved")
    assert len(model.get_state_tree()["optimizer_variables"]) > 0


def test_a_gradient_that_is_no_number_is_named():
    variable = keras.Variable([1.0], name="w")
    with pytest.raises(ValueError, match="the gradient of w has dtype string"):
        optimizers.SGD(0.1).apply([tf.constant(["a"])], [variable])
    assert variable.numpy() == 1


def test_lists_of_unequal_length_are_refused():
    variables = [keras.Variable([1.0]), keras.Variable([2.0])]
    with pytest.raises(ValueError, match="grads has 1 entries, but trainable_variables has 2"):
        optimizers.SGD(0.1).apply([tf.ones(1)], variables)


@modes
def test_decay_comes_once_per_real_step_and_not_per_micro_batch(mode):
    opt = optimizers.SGD(0.1, weight_decay=0.5, l2=0.25, gradient_accumulation_steps=4)
    variable = keras.Variable([2.0])
    opt.build([variable])
    step = MODES[mode](lambda: opt.apply([tf.zeros(1)], [variable]))
    seen = []
    for _ in range(8):
        step()
        seen.append(float(variable.numpy()[0]))
    # p - 0.1*0.5*p, and the penalty's gradient 2*0.25*p
    once = 2.0 - 0.1 * 0.5 * 2.0 - 0.1 * 2 * 0.25 * 2.0
    np.testing.assert_allclose(seen, [2, 2, 2, once, once, once, once, once * once / 2], rtol=1e-6)


class Scaled:
    """A training by hand in which some gradients overflow, with any LossScaleOptimizer."""

    def __init__(self, wrapper, module, mode, **inner):
        self.inner = module.AdamW(0.01, weight_decay=0.1, **inner)
        self.optimizer = wrapper(self.inner, initial_scale=2.0**10, dynamic_growth_steps=3)
        start, self.grads = problem(12)
        self.variables = [keras.Variable(x) for x in start]
        self.optimizer.build(self.variables)
        self.inputs = [tf.Variable(tf.zeros(x.shape)) for x in start]
        self.step = MODES[mode](self.apply)

    def apply(self):
        scale = tf.convert_to_tensor(self.optimizer.dynamic_scale)
        self.optimizer.apply([scale * tf.convert_to_tensor(x) for x in self.inputs], self.variables)

    def run(self):
        for k, values in enumerate(self.grads):
            for input_, value in zip(self.inputs, values, strict=True):
                input_.assign(value if k not in (2, 7) else np.inf * np.ones_like(value))
            self.step()
        return state(self.optimizer, self.variables)


@modes
@pytest.mark.parametrize("inner", [{}, {"global_clipnorm": 0.5}, {"gradient_accumulation_steps": 2, **EMA}], ids=str)
def test_loss_scale_optimizers(inner, mode):
    """Ours around ours, and Keras's around ours, are Keras's around Keras's: the scale and its counter too."""
    theirs = keras.optimizers.LossScaleOptimizer
    want = Scaled(theirs, keras.optimizers, mode, **inner).run()
    for wrapper in (optimizers.LossScaleOptimizer, theirs):
        assert_same(Scaled(wrapper, optimizers, mode, **inner).run(), want, 5e-6)


def test_unscaling_costs_no_op_on_gradients():
    scaled = Scaled(optimizers.LossScaleOptimizer, optimizers, "graph")
    graph = tf.function(lambda *g: scaled.optimizer.apply(list(g), scaled.variables)).get_concrete_function(
        *[tf.ones(v.shape) for v in scaled.variables]
    )
    shapes = {(20, 30), (30, 10)}
    operations = operations_of(graph.graph)
    assert {op.type for op in operations for t in op.outputs if t.shape in shapes} <= {"Placeholder", "Identity"}
    assert any(op.type == "Wdops>ApplyAdam" for op in operations)


@pytest.mark.parametrize(
    ("policy", "jit"), [("mixed_float16", True), ("mixed_float16", False), ("mixed_bfloat16", True), ("bfloat16", True)]
)
def test_precision_policies_train(policy, jit):
    """As well as Keras in float32. (In pure bfloat16 Keras's AdamW stands still: its 1 - beta_2^t is 0 there.)"""

    def loss(optimizer):
        model = small_model()
        fit(model, optimizer, 6, jit)
        return model.evaluate(*data(), verbose=0)

    want = loss(keras.optimizers.AdamW(0.01))
    assert want < 0.3
    keras.config.set_dtype_policy(policy)
    try:
        for opt in (optimizers.AdamW(0.01), optimizers.LossScaleOptimizer(optimizers.AdamW(0.01))):
            # 16 bits of forward pass wander by less than that; a model that does not move stays at 1.58.
            assert loss(opt) < want + 0.02
    finally:
        keras.config.set_dtype_policy("float32")


def test_a_decay_of_1e_5_does_not_vanish_in_bfloat16():
    """In Keras it does. Rounded stochastically it is right on average: 64 k elements, 2000 steps."""
    results = {}
    for name, opt in {
        "Keras": keras.optimizers.SGD(0.01, weight_decay=1e-3),
        "nearest": optimizers.SGD(0.01, weight_decay=1e-3, rounding="nearest"),
        "stochastic": optimizers.SGD(0.01, weight_decay=1e-3),
        "other seed": optimizers.SGD(0.01, weight_decay=1e-3, seed=1),
    }.items():
        variables = [keras.Variable(np.full(1 << 15, 1.5), dtype="bfloat16") for _ in range(2)]
        opt.build(variables)

        @tf.function
        def train():
            for _ in tf.range(2000):
                opt.apply([tf.zeros(v.shape, tf.bfloat16) for v in variables], variables)  # noqa: B023

        train()
        results[name] = [np.asarray(v, np.float32) for v in variables]
    want = 1.5 * (1 - 1e-5) ** 2000
    for name in ("Keras", "nearest"):
        assert all((x == 1.5).all() for x in results[name])
    a, b = results["stochastic"]
    # One element's rounding has a spread of at most half a step (2^-7) times the root of the count of jumps, about 4.
    deviation = 2.0**-8 * 4 / np.sqrt(a.size)
    for x in (a, b, *results["other seed"]):
        assert abs(x.mean() - want) < 5 * deviation
    assert (a != b).any() and (a != results["other seed"][0]).any()


@pytest.mark.parametrize(
    ("dtype", "slot_dtype", "mode"),
    [*(("float32", "bfloat16", mode) for mode in MODES), ("bfloat16", "float32", "jit"),
     ("bfloat16", "float32", "graph"), ("bfloat16", "bfloat16", "graph"), ("float16", "float32", "graph"),
     ("float16", "bfloat16", "graph"),
     ("float32", "float32", "graph")],
)  # fmt: skip
def test_slots_of_another_dtype(slot_dtype, dtype, mode):
    opt = optimizers.AdamW(0.01, weight_decay=0.1, slot_dtype=slot_dtype, gradient_accumulation_steps=2, **EMA)
    plain = optimizers.AdamW(0.01, weight_decay=0.1, gradient_accumulation_steps=2, **EMA)
    results = []
    for o in (opt, plain):
        variables = [keras.Variable(x, dtype=dtype) for x in problem(1)[0]]
        o.build(variables)
        step = MODES[mode](lambda: o.apply([tf.ones(x.shape, dtype) for x in variables], variables))  # noqa: B023
        for _ in range(10):
            step()
        results.append([np.asarray(v, np.float64) for v in variables])
    # Five real steps of 0.01 each, of which every one is rounded to 8 bits, and moments with an error of 2^-8.
    assert max(np.max(np.abs(a - b)) for a, b in zip(*results, strict=True)) < 0.05
    other = slot_dtype if (dtype, slot_dtype) != ("float16", "bfloat16") else dtype
    assert {v.dtype for v in opt._momentums + opt._velocities} == {other}
    assert {v.dtype for v in opt._accumulated_gradients + opt._model_variables_moving_average} == {dtype}


def test_bfloat16_slots_converge_on_real_data():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    losses = {}
    for slot_dtype, seed in itertools.product((None, "bfloat16"), range(3)):
        keras.utils.set_random_seed(seed)
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, "elu"), keras.layers.Dense(10)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizers.AdamW(3e-3, weight_decay=0.01, slot_dtype=slot_dtype), loss)
        history = model.fit(x[:1200], y[:1200], 64, 12, validation_data=(x[1200:], y[1200:]), verbose=0).history
        losses[slot_dtype, seed] = history["val_loss"][-1]
    full, half = (np.array([losses[d, seed] for seed in range(3)]) for d in (None, "bfloat16"))
    # Within the spread of the seeds, and far from no training at all (2.3).
    assert np.abs(half - full).mean() < max(0.02, full.std())
    assert half.max() < 0.5


@modes
def test_proximal_threshold_may_have_the_preconditioner(mode):
    results = [run(optimizers.AdamW(0.01, proximal_l1=0.5, scaled_proximal=s), mode) for s in (False, True)]
    zeros = [sum((v == 0).sum() for n, v in r.items() if n.startswith("var")) for r in results]
    assert min(zeros) > 0 and zeros[0] != zeros[1]


@pytest.mark.parametrize(
    "bad",
    [{"slot_dtype": "float16"}, {"rounding": "up"}, {"decay_coupling": "yes"}, {"seed": -1}, {"seed": 0.5},
     {"skip_nonfinite": "no"}, {"l1": -1.0}, {"proximal_l2": float("nan")}, {"l2": "much"}, {"weight_decay": "much"}],
    ids=str,
)  # fmt: skip
def test_options_are_checked_and_named(bad):
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        opt = optimizers.SGD(0.1, **bad)
        opt.apply([tf.ones(1)], [keras.Variable([1.0])])


@pytest.mark.parametrize("bad", [[1, 2], np.array([1.0, 2.0]), tf.constant([1.0, 2.0]), tf.Variable([1.0, 2.0]), "a"])
def test_hyperparameters_are_checked_where_they_are_given(bad):
    with pytest.raises(ValueError, match="`weight_decay` must be a number"):
        optimizers.SGD(0.1, weight_decay=bad)


def test_options_that_equal_a_choice_are_it():
    opt = optimizers.AdamW(0.1, scaled_proximal=1, seed=np.int64(3))
    assert opt.scaled_proximal is True and type(opt.seed) is int
    opt.apply([tf.ones(1)], [keras.Variable([1.0])])


SCHEDULE = keras.optimizers.schedules.PolynomialDecay(0.5, 10, 0.1)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*((kind, "graph") for kind in ("schedule", "callable", "keras.Variable", "tf.Variable", "tensor")),
     *((kind, mode) for kind in ("schedule", "keras.Variable") for mode in ("eager", "jit"))],
)  # fmt: skip
def test_any_hyperparameter_may_change_from_step_to_step(kind, mode):
    holders = {
        n: tf.Variable(0.5) for n in ("weight_decay", "beta_1", "clipvalue", "l2", "learning_rate", "ema_momentum")
    }
    if kind == "keras.Variable":
        holders = {n: keras.Variable(0.5) for n in holders}
    given = dict(holders)
    if kind == "schedule":
        given = dict.fromkeys(holders, SCHEDULE)
    elif kind == "callable":
        given = {n: (lambda h=h: h) for n, h in holders.items()}
    elif kind == "tensor":
        given = dict.fromkeys(holders, tf.constant(0.5))
    opt = optimizers.AdamW(**given, use_ema=True)
    start, grads = problem(5)
    variables = [keras.Variable(x) for x in start]
    opt.build(variables)
    inputs = [tf.Variable(tf.zeros(x.shape)) for x in start]
    step = MODES[mode](lambda: opt.apply([tf.convert_to_tensor(x) for x in inputs], variables))
    # The truth: a new optimizer with plain numbers for every step, which takes over the state.
    plain = [keras.Variable(x) for x in start]
    before = None
    for k, values in enumerate(grads):
        value = 0.5 if kind == "tensor" else float(SCHEDULE(k))
        for holder in holders.values():
            holder.assign(value)
        for input_, grad in zip(inputs, values, strict=True):
            input_.assign(grad)
        step()
        fixed = optimizers.AdamW(**dict.fromkeys(holders, value), use_ema=True)
        fixed.build(plain)
        for new, old in zip(fixed.variables, before.variables if before else [], strict=False):
            if "learning_rate" not in new.path:
                new.assign(old)
        fixed.apply([tf.constant(g) for g in values], plain)
        before = fixed
    # Alike but for a schedule that is evaluated in float32.
    assert difference([np.asarray(v) for v in variables], [np.asarray(v) for v in plain]) < 2e-6


def test_schedules_and_callables_are_saved_as_keras_saves_a_learning_rate():
    opt = optimizers.AdamW(keras.Variable(0.25), weight_decay=SCHEDULE, l1=SCHEDULE, beta_1=tf.Variable(0.75))
    config = keras.saving.serialize_keras_object(opt)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is optimizers.AdamW
    assert [float(again.weight_decay(3)), float(again.l1(3))] == [float(SCHEDULE(3))] * 2
    assert [float(again.learning_rate), again.beta_1] == [0.25, 0.75]
    assert again.get_config() == opt.get_config()


@modes
@pytest.mark.parametrize("coupling", ["lr", "schedule", "none"])
def test_decay_coupling(coupling, mode):
    """With gradients of 0, SGD is the decay alone, in closed form."""
    lr = keras.optimizers.schedules.CosineDecay(0.0, 4, warmup_target=0.2, warmup_steps=2, alpha=0.1)
    opt = optimizers.SGD(lr, weight_decay=0.1, decay_coupling=coupling)
    variable = keras.Variable([1.0])
    opt.build([variable])
    step = MODES[mode](lambda: opt.apply([tf.zeros(1)], [variable]))
    want = 1.0
    for t in range(6):
        step()
        want *= 1 - 0.1 * {"lr": float(lr(t)), "schedule": float(lr(t)) / 0.2, "none": 1.0}[coupling]
        np.testing.assert_allclose(variable.numpy(), [want], rtol=1e-6)


def test_the_base_of_a_learning_rate_that_is_set_anew_stays_and_is_saved():
    opt = optimizers.SGD(0.4, weight_decay=0.1, decay_coupling="schedule")
    opt.learning_rate = 0.1
    for o in (opt, optimizers.SGD.from_config(opt.get_config())):
        variable = keras.Variable([1.0])
        o.apply([tf.zeros(1)], [variable])
        np.testing.assert_allclose(variable.numpy(), [1 - 0.1 * 0.1 / 0.4], rtol=1e-6)
    with pytest.raises(ValueError, match="initial_learning_rate"):
        optimizers.SGD(lambda: 0.1, decay_coupling="schedule")


def test_accumulation_and_the_average_are_reached_by_save_and_load(tmp_path):
    model = small_model()
    opt = optimizers.AdamW(0.01, weight_decay=0.1, slot_dtype="bfloat16", **REST)
    fit(model, opt, 1)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert again.optimizer.get_config() == opt.get_config()
    for a, b in zip(again.optimizer.variables, opt.variables, strict=True):
        assert a.dtype == b.dtype and (np.asarray(a, np.float64) == np.asarray(b, np.float64)).all(), b.path


def layered():
    variables = [keras.Variable(np.full(3, 2.0, np.float32), name=n) for n in ("kernel", "bias", "gamma")]
    model = small_model()
    return variables, model


@modes
def test_groups_multiply_and_later_ones_override(mode):
    variables = layered()[0]
    opt = optimizers.SGD(0.1, weight_decay=0.5, l1=0.2, l2=0.3)
    opt.add_group([variables[0], "^bias"], lr=0.5, l2=2.0)
    opt.add_group("bias", lr=0.25, weight_decay=3.0)
    opt.add_group(lambda v: v.name == "gamma", l1=0.0, l2=0.0, weight_decay=0.0)
    opt.build(variables)
    MODES[mode](lambda: opt.apply([tf.ones(3)] * 3, variables))()

    def want(lr, weight_decay, l1, l2):
        return 2 - lr * weight_decay * 2 - lr * (1 + l1 + 2 * l2 * 2)

    expected = [want(0.05, 0.5, 0.2, 0.6), want(0.025, 1.5, 0.2, 0.6), want(0.1, 0, 0, 0)]
    np.testing.assert_allclose([v.numpy()[0] for v in variables], expected, rtol=1e-6)


def is_one_dimensional(variable):
    return len(variable.shape) == 1


EXCLUSIONS = {
    "variable": lambda model: {"var_list": [model.trainable_variables[1]]},
    "name": lambda model: {"var_names": ["bias"]},
    "path": lambda model: {"paths": r"/bias$"},
    "predicate": lambda model: {"predicate": is_one_dimensional},
}


@pytest.mark.parametrize(
    ("how", "when", "jit"),
    [
        *((how, when, False) for how in EXCLUSIONS for when in ("before build", "after build")),
        ("path", "before build", True),
    ],
)
def test_exclusions_and_groups_survive_save_and_load(how, when, jit, tmp_path):
    model = small_model()
    opt = optimizers.AdamW(0.01, weight_decay=0.5, epsilon=1e-3)
    if when == "after build":
        opt.build(model.trainable_variables)
    opt.exclude_from_weight_decay(**EXCLUSIONS[how](model))
    opt.add_group(model.trainable_variables[0], lr=0.5)
    fit(model, opt, 1, jit)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    reports = []
    for m in (model, again):
        m.optimizer.decay_report(reports.append)
        m.fit(*data(), batch_size=32, epochs=2, shuffle=False, verbose=0)
    assert difference(again.get_weights(), model.get_weights()) <= (1e-6 if jit else 0)
    # A model that is loaded has other paths: "dense/kernel" for "sequential/dense/kernel".
    rows = [[line.split()[1:] for line in report.splitlines()] for report in reports]
    assert rows[0] == rows[1]
    assert "excluded" in reports[0].splitlines()[2] and "x 0.5" in reports[0].splitlines()[1]


def test_the_report_names_every_decay_and_the_reason():
    variables = layered()[0]
    opt = optimizers.AdamW(0.1, weight_decay=SCHEDULE, l1=0.2, proximal_l2=0.3)
    opt.exclude_from_weight_decay(var_list=[variables[2]], paths=["^bias"])
    opt.add_group("kernel", lr=0.5, l1=3.0)
    with pytest.raises(ValueError, match="build"):
        opt.decay_report()
    opt.build(variables)
    lines = []
    opt.decay_report(lines.append)
    assert [line.split() for line in lines[0].splitlines()] == [
        ["variable", "shape", "lr", "weight_decay", "l1", "l2", "proximal_l1", "proximal_l2", "because"],
        ["kernel", "(3,)", "x", "0.5", "0.5", "0.6", "0", "0", "0.3", "path", "matches", "'kernel'"],
        ["bias", "(3,)", "x", "1", "0", "0.2", "0", "0", "0.3", "excluded:", "path", "matches", "'^bias'"],
        ["gamma", "(3,)", "x", "1", "0", "0.2", "0", "0", "0.3", "excluded:", "listed"],
    ]


def test_groups_are_checked():
    opt = optimizers.SGD(0.1)
    bad = [("[", {"lr": 2.0}, "regular expression"), (3, {"lr": 2.0}, "predicate"),
           ("a", {}, "multipliers"), ("a", {"beta": 1.0}, "beta"), ("a", {"lr": "x"}, "of lr"),
           ("a", {"l1": -1.0}, "l1"), ("a", {"lr": np.nan}, "lr")]  # fmt: skip
    for variables, multipliers, message in bad:
        with pytest.raises(ValueError, match=message):
            opt.add_group(variables, **multipliers)
    with pytest.raises(ValueError, match="var_names 3"):
        opt.exclude_from_weight_decay(var_names=[3])
    other = keras.Variable([1.0], name="elsewhere")
    opt.add_group(other, lr=2.0)
    with pytest.warns(UserWarning, match="elsewhere"):
        opt.build([keras.Variable([1.0], name="here")])


def test_conversion_carries_exclusions_and_refuses_what_keras_has_not():
    variables = layered()[0]
    for built in (False, True):
        theirs = keras.optimizers.AdamW(0.1, weight_decay=0.5)
        theirs.exclude_from_weight_decay(var_list=variables[:1], var_names=["bias"])
        if built:
            theirs.build(variables)
        ours = optimizers.from_keras(theirs)
        for o in (ours, optimizers.to_keras(ours)):
            o.build(variables)
            assert [o._use_weight_decay(v) for v in variables] == [False, False, True]
    wrapped = optimizers.from_keras(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)))
    assert type(wrapped) is optimizers.LossScaleOptimizer and type(wrapped.inner_optimizer) is optimizers.SGD
    back = optimizers.to_keras(wrapped)
    assert type(back) is keras.optimizers.LossScaleOptimizer and type(back.inner_optimizer) is keras.optimizers.SGD
    grouped = optimizers.SGD(0.1)
    grouped.add_group("a", lr=2.0)
    for bad in (grouped, optimizers.SGD(0.1, weight_decay=tf.Variable(0.5)), optimizers.SGD(0.1, l1=0.1),
                optimizers.SGD(0.1, skip_nonfinite=True)):  # fmt: skip
        with pytest.raises(ValueError, match=r"a group|a weight_decay that changes|l1|skip_nonfinite"):
            optimizers.to_keras(bad)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("around", [{}, {"global_clipnorm": 0.5}, {"use_ema": True}], ids=str)
def test_groups_and_schedules_reach_sparse_gradients(around, skip):
    def train(dense):
        table = keras.Variable(np.ones((6, 4), np.float32), name="table")
        other = keras.Variable(np.ones(3, np.float32), name="other")
        opt = optimizers.SGD(0.1, weight_decay=SCHEDULE, skip_nonfinite=skip, decay_coupling="none", **around)
        opt.add_group("table", lr=0.5, weight_decay=0.1)
        for _ in range(3):
            grad = tf.IndexedSlices(tf.ones((2, 4)), tf.constant([1, 3]), tf.constant([6, 4]))
            opt.apply([tf.convert_to_tensor(grad) if dense else grad, tf.ones(3)], [table, other])
        return [np.asarray(table), np.asarray(other)]

    assert difference(train(False), train(True)) < 1e-6
    assert train(False)[0].max() < 1


def test_mixed_devices_share_one_norm():
    """Two lists, as on two devices, are clipped by the norm of both."""
    opt = optimizers.SGD(0.1, global_clipnorm=1.0)
    norms = [tf.constant([3.0], tf.float64), tf.constant([4.0], tf.float64)]
    np.testing.assert_allclose([float(s) for s in opt._clip_scales(norms)], [0.2, 0.2])
    assert wdops.ops.global_norm([tf.constant([3.0]), tf.constant([4.0])])[0] == 5


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("name", ["weight_decay", "momentum", "clipnorm", "l1", "proximal_l1"])
@pytest.mark.parametrize("kind", ["schedule", "variable"])
def test_sparse_gradients_beside_a_hyperparameter_that_changes(kind, name, mode):
    start = np.ones((6, 4), np.float32)
    table, fixed = keras.Variable(start), keras.Variable(start)
    opt = optimizers.SGD(0.1, **{name: SCHEDULE if kind == "schedule" else tf.Variable(0.5)})
    plain = optimizers.SGD(0.1, **{name: 0.5})  # the schedule's first value
    for o, v in ((opt, table), (plain, fixed)):
        o.build([v])

        def step():
            grad = tf.IndexedSlices(tf.ones((2, 4)), tf.constant([1, 3]), tf.constant([6, 4]))
            o.apply([grad], [v])  # noqa: B023

        MODES[mode](step)()
    np.testing.assert_allclose(np.asarray(table), np.asarray(fixed), rtol=1e-6)


@pytest.mark.parametrize("constraint", [keras.constraints.MinMaxNorm(0.0, 1.0, 0.5), keras.constraints.NonNeg()])
def test_penalties_of_micro_steps_that_constraints_write_in(constraint):
    results = []
    for module in (optimizers, keras.optimizers):
        arguments = {"l2": 0.2} if module is optimizers else {}
        opt = module.SGD(0.1, gradient_accumulation_steps=3, **arguments)
        variable = keras.Variable(np.linspace(-1, 2, 12, dtype=np.float32).reshape(4, 3), constraint=constraint)
        opt.build([variable])
        for _ in range(6):
            penalty = 0 if module is optimizers else 2 * 0.2 * tf.convert_to_tensor(variable)
            opt.apply([tf.zeros((4, 3)) + penalty], [variable])
        results.append(np.asarray(variable))
    np.testing.assert_allclose(*results, rtol=2e-6)


def test_a_saved_choice_finds_its_variable_where_layers_are_numbered_anew():
    def model():
        return keras.Sequential([keras.Input((8,)), *(keras.layers.Dense(3) for _ in range(3))])

    keras.backend.clear_session()
    keras.layers.Dense(2)
    first = model()  # dense_1 to dense_3
    opt = optimizers.AdamW(weight_decay=0.1)
    opt.build(first.trainable_variables)
    opt.exclude_from_weight_decay(var_list=[first.layers[0].kernel])
    opt.add_group([first.layers[1].bias], lr=0.5)
    keras.backend.clear_session()
    second = model()  # dense to dense_2
    again = optimizers.AdamW.from_config(opt.get_config())
    again.build(second.trainable_variables)
    excluded = [v.path for v in second.trainable_variables if not again._use_weight_decay(v)]
    assert excluded == [second.layers[0].kernel.path]
    assert again._choice(second.layers[1].bias).multipliers["lr"] == 0.5


def test_a_choice_that_is_saved_before_the_optimizer_is_built(tmp_path):
    model = small_model()
    opt = optimizers.AdamW(0.01, weight_decay=0.5)
    opt.exclude_from_weight_decay(var_list=[model.layers[0].kernel])
    model.compile(opt, "mse")
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert [again.optimizer._use_weight_decay(v) for v in again.trainable_variables] == [False, True, True, True]
    unbuilt = optimizers.AdamW(0.01)
    unbuilt.exclude_from_weight_decay(predicate=lambda v: "bias" in v.path)
    with pytest.raises(ValueError, match="registered"):
        unbuilt.get_config()


def test_a_choice_behind_the_traced_step_warns():
    opt = optimizers.SGD(0.1, weight_decay=0.5)
    variable = keras.Variable([1.0])
    opt.build([variable])
    opt.add_group(variable, lr=0.5)
    tf.function(lambda: opt.apply([tf.zeros(1)], [variable]))()
    with pytest.warns(UserWarning, match="traced"):
        opt.exclude_from_weight_decay(var_list=[variable])
    with pytest.warns(UserWarning, match="traced"):
        opt.add_group(variable, lr=0.5)


@pytest.mark.parametrize("name", ["SGD", "Nadam"])
def test_a_built_loss_scale_optimizer_is_converted_both_ways(name):
    theirs = keras.optimizers.LossScaleOptimizer(getattr(keras.optimizers, name)(0.1))
    variables = [keras.Variable([1.0])]
    theirs.build(variables)
    theirs.dynamic_scale.assign(64.0)
    theirs.step_counter.assign(7)
    for convert in (optimizers.from_keras, lambda o: optimizers.to_keras(optimizers.from_keras(o))):
        converted = convert(theirs)
        assert float(converted.dynamic_scale) == 64 and int(converted.step_counter) == 7
        converted.apply([tf.ones(1)], variables)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"learning_rate": tf.Variable(0.0), "decay_coupling": "schedule"}, "base"),
     ({"gradient_accumulation_steps": lambda: 2}, "gradient_accumulation_steps"),
     ({"ema_overwrite_frequency": tf.Variable(2), "use_ema": True}, "ema_overwrite_frequency")],
)  # fmt: skip
def test_what_cannot_change_or_has_no_base_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        optimizers.SGD(**arguments)
