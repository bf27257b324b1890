"""Folded regularizers: the trajectory, and the loss that is reported, of the model that was not folded."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_optimizers import data

import wdops
from wdops import optimizers, regularizers


def difference(a, b):
    """The largest relative to the largest weight: a bias that has only just left 0 is what gradients left over."""
    return max(np.max(np.abs(x - y)) for x, y in zip(a, b, strict=True)) / max(np.max(np.abs(y)) for y in b)


class Custom(keras.regularizers.L2):
    """Says something else than L2, so that folding it would be wrong."""

    def __call__(self, x):
        return 2 * super().__call__(x)


def model_of(l1=0.004, l2=0.006, custom=False):
    keras.utils.set_random_seed(3)
    last = Custom(0.01) if custom else keras.regularizers.L1L2(l1, l2)
    return keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(
                16, "elu", kernel_regularizer=keras.regularizers.L1(l1), bias_regularizer=keras.regularizers.L2(l2)
            ),
            keras.layers.Dense(8, "elu"),
            keras.layers.Dense(3, kernel_regularizer=last),
        ]
    )


def compiled(model, optimizer, jit):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=jit)
    return model


def train(model, epochs=3, **arguments):
    return model.fit(*data(), batch_size=32, epochs=epochs, shuffle=False, verbose=0, **arguments).history["loss"]


AROUND = [{}, {"global_clipnorm": 0.3}, {"clipnorm": 0.2}, {"gradient_accumulation_steps": 3},
          {"gradient_accumulation_steps": 2, "global_clipnorm": 0.3, "use_ema": True, "ema_momentum": 0.5,
           "ema_overwrite_frequency": 2}]  # fmt: skip


@pytest.mark.parametrize(("name", "jit"), [("SGD", True), ("AdamW", False)])
@pytest.mark.parametrize("around", AROUND, ids=str)
def test_weights_and_reported_losses_are_those_of_the_model_before(around, name, jit):
    more = {"weight_decay": None, "epsilon": 1e-3} if name == "AdamW" else {"momentum": 0.9}
    arguments = {"learning_rate": 0.02, **more, **around}
    if name == "AdamW":
        arguments["weight_decay"] = 0.0
    # Keras's Adam is another one in the first steps, by 1e-5.
    module = keras.optimizers if name == "SGD" else optimizers
    plain = compiled(model_of(), getattr(module, name)(**arguments), jit)
    folded = compiled(model_of(), getattr(optimizers, name)(**arguments), jit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = wdops.fold_regularizers(folded, folded.optimizer)
    assert [p.rpartition("/")[2] for p in report.folded] == ["kernel", "bias", "kernel"] and not report.left
    assert list(report.folded.values()) == [(pytest.approx(0.004), 0.0), (0.0, 0.006), (0.004, 0.006)]
    losses = [train(m) for m in (folded, plain)]
    np.testing.assert_allclose(*losses, rtol=2e-6)
    # 1e-5, and where rounding puts a weight on the other side of 0, a step of lr*l1 the other way.
    assert difference(folded.get_weights(), plain.get_weights()) <= 1e-5 + 0.02 * 0.004
    without = compiled(model_of(0.0, 0.0), getattr(keras.optimizers, name)(**arguments), False)
    train(without)
    assert difference(without.get_weights(), plain.get_weights()) > 2e-3
    evaluated = [m.evaluate(*data(), verbose=0) for m in (folded, plain)]
    np.testing.assert_allclose(*evaluated, rtol=2e-6)


def test_the_step_reports_the_penalty_without_a_pass_of_its_own():
    model = compiled(model_of(), optimizers.SGD(0.1), False)
    wdops.fold_regularizers(model, model.optimizer)
    variables = model.trainable_variables

    @tf.function
    def step(*grads):
        with tf.GradientTape():
            loss = sum(model.losses)
        model.optimizer.apply(list(grads), variables)
        return loss

    graph = step.get_concrete_function(*[tf.ones(v.shape) for v in variables]).graph
    shapes = [v.shape for v in variables if len(v.shape) == 2]
    touching = {op.type for op in graph.get_operations() for t in op.outputs if t.shape in shapes}
    assert touching <= {"Placeholder", "Identity"}
    assert sum(op.type == "Wdops>ApplySgd" for op in graph.get_operations()) == 1


def test_custom_regularizers_are_left_and_named():
    plain = compiled(model_of(custom=True), keras.optimizers.SGD(0.1), False)
    folded = compiled(model_of(custom=True), optimizers.SGD(0.1), False)
    report = wdops.fold_regularizers(folded, folded.optimizer)
    assert {path: type(r) for path, r in report.left.items()} == {folded.layers[-1].kernel.path: Custom}
    np.testing.assert_allclose(train(folded), train(plain), rtol=2e-6)
    assert difference(folded.get_weights(), plain.get_weights()) <= 1e-5


def test_a_layer_that_is_decayed_as_well_gets_one_warning():
    model = model_of()
    opt = optimizers.AdamW(0.1, weight_decay=0.1)
    opt.exclude_from_weight_decay(paths=model.layers[-1].path)
    with pytest.warns(UserWarning) as caught:
        wdops.fold_regularizers(model, opt)
    assert [str(w.message) for w in caught] == [
        f"layer '{model.layers[0].path}' has both a regularizer and the optimizer's weight_decay"
    ]


def test_every_way_to_write_a_variable_is_seen_by_the_loss(tmp_path):
    model = compiled(model_of(), optimizers.SGD(0.1, use_ema=True), False)
    wdops.fold_regularizers(model, model.optimizer)
    fresh = model_of()

    def check():
        fresh.set_weights(model.get_weights())
        with tf.GradientTape():  # as in a training step, which reads back what was reported
            np.testing.assert_allclose(float(sum(model.losses)), float(sum(fresh.losses)), rtol=2e-6)

    check()
    model.set_weights([w + 1 for w in model.get_weights()])
    check()
    model.save_weights(tmp_path / "w.weights.h5")
    train(model, 1)
    check()
    model.load_weights(tmp_path / "w.weights.h5")
    check()
    model.trainable_variables[0].assign_add(np.ones((12, 16)))
    check()
    model.optimizer.finalize_variable_values(model.trainable_variables)
    check()
    model.trainable_variables[0].constraint = keras.constraints.NonNeg()
    train(model, 1)
    check()
    model.layers[0].trainable = fresh.layers[0].trainable = False  # Keras does not count the frozen
    check()


def test_a_variable_without_a_gradient_is_penalized_as_its_regularizer_would():
    used, unused = (keras.layers.Dense(2, kernel_regularizer=keras.regularizers.L2(0.25)) for _ in range(2))
    results = []
    for fold in (False, True):
        inputs = keras.Input((3,))
        keras.utils.set_random_seed(1)
        used, unused = (keras.layers.Dense(2, kernel_regularizer=keras.regularizers.L2(0.25)) for _ in range(2))
        model = keras.Model(inputs, [used(inputs), unused(inputs)])
        opt = (optimizers if fold else keras.optimizers).SGD(0.1)
        opt.build([used.kernel, unused.kernel])
        if fold:
            regularizers.fold_regularizers(keras.Model(inputs, used(inputs)), opt)
            regularizers.fold_regularizers(keras.Model(inputs, unused(inputs)), opt)
        for _ in range(3):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(used(tf.ones((1, 3))) ** 2) + sum(model.losses)
            opt.apply(tape.gradient(loss, [used.kernel, unused.kernel]), [used.kernel, unused.kernel])
        results.append([used.kernel.numpy(), unused.kernel.numpy()])
    assert difference(*results) < 1e-6


@pytest.mark.parametrize("wrap", [False, True])
def test_a_saved_model_has_its_regularizers_and_may_be_folded_again(wrap, tmp_path):
    opt = optimizers.SGD(0.1, momentum=0.9)
    model = compiled(model_of(), optimizers.LossScaleOptimizer(opt, 8.0) if wrap else opt, False)
    wdops.fold_regularizers(model, model.optimizer)
    train(model)
    model.save(tmp_path / "m.keras")
    plain, again = (keras.saving.load_model(tmp_path / "m.keras") for _ in range(2))
    assert len(wdops.fold_regularizers(again, again.optimizer).folded) == 3
    losses = [train(m) for m in (model, plain, again)]
    np.testing.assert_allclose(losses[1:], losses[:1] * 2, rtol=1e-6)
    for m in (plain, again):
        assert difference(m.get_weights(), model.get_weights()) < 1e-6


@pytest.mark.filterwarnings("ignore:the regularizers of")
@pytest.mark.parametrize("fold_again", [False, True])
def test_another_optimizer_takes_over(fold_again):
    """Compiled anew, the model is regularized as one that never was folded, folded again or not."""
    results = []
    for fold in (False, True):
        model = compiled(model_of(), optimizers.SGD(0.1), False)
        if fold:
            wdops.fold_regularizers(model, model.optimizer)
        losses = train(model, 1)
        compiled(model, optimizers.SGD(0.05, momentum=0.5), False)
        if fold and fold_again:
            assert len(wdops.fold_regularizers(model, model.optimizer).folded) == 3
        results.append(
            [*losses, *train(model, 2), *map(float, np.concatenate([w.ravel() for w in model.get_weights()]))]
        )
    np.testing.assert_allclose(*results, atol=1e-5)


def test_compiling_with_another_optimizer_warns_and_with_the_same_does_not():
    model = compiled(model_of(), optimizers.SGD(0.1), False)
    opt = model.optimizer
    wdops.fold_regularizers(model, opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(model, opt, False)
    assert opt._own.folded
    with pytest.warns(UserWarning, match="folded into another optimizer"):
        compiled(model, keras.optimizers.SGD(0.1), False)
    assert not opt._own.folded and opt._own.penalties is None


def test_two_models_that_share_layers():
    """The variables change over to the optimizer that folds last; the others stay with the first."""
    inputs = keras.Input((12,))
    shared = keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(0.1), name="shared")
    heads = [keras.layers.Dense(2, kernel_regularizer=keras.regularizers.L2(0.1), name=f"head{i}") for i in range(2)]
    models = [keras.Model(inputs, head(shared(inputs))) for head in heads]
    first, second = optimizers.SGD(0.1), optimizers.SGD(0.1)
    for model, opt in zip(models, (first, second), strict=True):
        wdops.fold_regularizers(model, opt)
    assert [len(o._own.folded) for o in (first, second)] == [1, 2]
    wdops.unfold_regularizers(models[1])
    assert [len(o._own.folded) for o in (first, second)] == [1, 0]
    assert shared.kernel.regularizer is shared.kernel_regularizer


def test_what_is_no_training_step_reads_the_variables():
    model = compiled(model_of(), optimizers.SGD(0.1), False)
    plain = compiled(model_of(), keras.optimizers.SGD(0.1), False)
    wdops.fold_regularizers(model, model.optimizer)
    for m in (model, plain):
        m.layers[0].kernel.value.assign(tf.ones((12, 16)))  # past the keras.Variable
    np.testing.assert_allclose(*(float(sum(m.losses)) for m in (model, plain)), rtol=1e-6)
    np.testing.assert_allclose(*(m.evaluate(*data(), verbose=0) for m in (model, plain)), rtol=1e-6)
    doubled = [2 * tf.convert_to_tensor(v) for v in model.trainable_variables]
    losses = [m.stateless_call(doubled, [], data()[0], return_losses=True)[2] for m in (model, plain)]
    np.testing.assert_allclose(*(float(sum(x)) for x in losses), rtol=1e-6)


def test_float64_models_have_float64_losses():
    layer = keras.layers.Dense(2, kernel_regularizer=keras.regularizers.L2(0.1), dtype="float64")
    model = keras.Sequential([keras.Input((3,), dtype="float64"), layer])
    wdops.fold_regularizers(model, optimizers.SGD(0.1))
    with tf.GradientTape():
        assert model.losses[0].dtype == tf.float64


def test_unfolding_gives_the_model_back():
    plain = compiled(model_of(), keras.optimizers.SGD(0.1), False)
    folded = compiled(model_of(), optimizers.SGD(0.1), False)
    wdops.fold_regularizers(folded, folded.optimizer)
    wdops.fold_regularizers(folded, folded.optimizer)  # again: nothing new
    losses = [train(m) for m in (folded, plain)]
    wdops.unfold_regularizers(folded)
    losses = [a + train(m) for a, m in zip(losses, (folded, plain), strict=True)]
    np.testing.assert_allclose(*losses, rtol=2e-6)
    assert difference(folded.get_weights(), plain.get_weights()) <= 1e-5
    assert [type(v.regularizer).__name__ for v in folded.trainable_variables if v.regularizer] == ["L1", "L2", "L1L2"]


def test_what_cannot_be_folded_is_refused():
    model = model_of()
    with pytest.raises(ValueError, match=r"wdops\.optimizers"):
        wdops.fold_regularizers(model, keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match="not built"):
        wdops.fold_regularizers(keras.Sequential([keras.layers.Dense(3)]), optimizers.SGD(0.1))
    other = optimizers.SGD(0.1)
    other.build([keras.Variable([1.0])])
    with pytest.raises(ValueError, match="Unknown variable"):
        wdops.fold_regularizers(model, other)
    assert [type(v.regularizer).__name__ for v in model.trainable_variables if v.regularizer] == ["L1", "L2", "L1L2"]
    folded = optimizers.SGD(0.1)
    wdops.fold_regularizers(model, folded)
    with pytest.raises(ValueError, match="folded regularizer"):
        optimizers.to_keras(folded)
