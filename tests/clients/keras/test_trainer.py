"""KerasTrainer against PyTorch and scikit-learn, from equal weights."""

import ctypes
import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from torch.utils.data import TensorDataset

from clients.data import Examples
from clients.keras import trainer as keras_trainer
from clients.keras.models import densenet40, resnet8, small_cnn
from clients.keras.trainer import KerasTrainer
from clients.tensorflow.setup import keras, tf
from clients.torch.trainer import TorchTrainer
from clients.trainer import follow
from flwr_colearn import ColearnError, Frozen, GroupNorm, LocalPlan, Role
from flwr_colearn.keras import convert
from flwr_colearn.keras import roles as roles_of
from tests.flwr_colearn.keras.network import network

layers = keras.layers

EPOCHS = [(0.1, 11), (0.05, 12), (0.2, 13)]  # learning rate, seed


def examples(n=50, seed=0):
    """Vectors [4] of three classes that a small network can tell apart."""
    labels = np.arange(n) % 3
    noise = np.random.default_rng(seed).standard_normal((n, 4))
    return Examples((noise + 2 * labels[:, None]).astype(np.float32), labels)


def make(model=None, train_set=None, test_set=None, **options):
    data = train_set or examples()
    return KerasTrainer(model or network(), data, test_set, **{"batch_size": 16, **options})


def train(trainer, epochs=EPOCHS):
    return [trainer.train_epoch(*epoch) for epoch in epochs]


def weights_after(epochs=EPOCHS, **options):
    trainer = make(**options)
    train(trainer, epochs)
    return trainer.get_weights()


def same(first, second):
    """Whether two models are equal: names, order, types, shapes and bits."""
    return list(first) == list(second) and all(
        a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
        for a, b in zip(first.values(), second.values(), strict=True)
    )


# Training


@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.0}, {"weight_decay": 0.01}, {"weight_decay": 0.01, "clip_norm": 0.3}],
    ids=str,
)
def test_steps_are_pytorchs_even_if_the_rate_changes(options):
    data = examples(16)  # one batch, so that the order does not matter
    ours = make(train_set=data, **options)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    theirs = TorchTrainer(
        model,
        TensorDataset(torch.from_numpy(data.inputs), torch.from_numpy(data.labels)),
        batch_size=16,
        device="cpu",
        **options,
    )
    names = {  # PyTorch's name and ours
        "0.weight": "dense/kernel",
        "0.bias": "dense/bias",
        "1.weight": "batch_normalization/gamma",
        "1.bias": "batch_normalization/beta",
        "1.running_mean": "batch_normalization/moving_mean",
        "3.weight": "dense_1/kernel",
        "3.bias": "dense_1/bias",
    }
    initial = ours.get_weights()
    theirs.set_weights(
        {**theirs.get_weights(), **{torchs: initial[mine].T for torchs, mine in names.items()}}
    )
    for ours_result, theirs_result in zip(train(ours), train(theirs), strict=True):
        assert ours_result.loss == pytest.approx(theirs_result.loss, rel=1e-5)
    trained = theirs.get_weights()
    for torchs, mine in names.items():
        moved = ours.get_weights()[mine]
        np.testing.assert_allclose(moved.T, trained[torchs], rtol=2e-5, atol=2e-6, err_msg=mine)
        if mine != "dense/bias":  # whose gradient batch norm makes zero
            assert not np.allclose(moved, initial[mine])


def test_an_epoch_sees_every_example_once_in_an_order_of_its_own():
    seen = []

    def record(inputs, training, seed):
        tf.py_function(lambda batch: seen.extend(batch.numpy()[:, 0]), [inputs], [])
        return inputs

    numbers = Examples(np.arange(50, dtype=np.float32)[:, None], np.zeros(50, np.int64))
    model = keras.Sequential([keras.Input((1,)), layers.Dense(3)])
    trainer = make(model, numbers, transform=record)
    train(trainer, [(0.0, 1), (0.0, 2), (0.0, 1)])
    first, second, third = seen[:50], seen[50:100], seen[100:]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first == third != second


def test_the_seed_decides_everything_dropout_included():
    trainer = make(network(dropout=0.5), batch_size=50)  # the order hardly matters then
    initial = trainer.get_weights()

    def run(*seeds):
        trainer.set_weights(initial)
        train(trainer, [(0.1, seed) for seed in seeds])
        return trainer.get_weights()

    first = run(1, 2)
    assert same(run(1, 2), first)  # whatever was drawn before
    assert np.abs(run(1, 3)["dense_1/kernel"] - first["dense_1/kernel"]).max() > 1e-3
    other = make(network(seed=9, dropout=0.5), batch_size=50)
    other.set_weights(initial)
    train(other, [(0.1, 1), (0.1, 2)])
    assert same(other.get_weights(), first)


@pytest.mark.parametrize(("n", "trained"), [(33, 32), (34, 34)])
def test_only_a_single_left_over_example_is_left_out(n, trained):
    assert make(train_set=examples(n)).train_epoch(0.1, seed=0).num_examples == trained


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bfloat16"},
        {"precision": "float16", "clip_norm": 5.0},
        {"precision": "bfloat16", "jit_compile": True},
    ],
    ids=str,
)
def test_every_precision_learns_and_keeps_float32_weights(options):
    trainer = make(test_set=examples(60, seed=1), **options)
    losses = [result.loss for result in train(trainer, [(0.05, seed) for seed in range(10)])]
    assert losses[-1] < 0.6 * losses[0]
    assert trainer.evaluate()["accuracy"] > 0.6  # chance is a third
    assert {a.dtype for a in trainer.get_weights().values()} == {np.dtype("f4")}
    assert trainer.predict()[0].dtype == np.float32


def test_precision_reaches_the_layers():
    model = network()
    make(model, precision="bfloat16")
    assert model(np.zeros((2, 4), np.float32)).dtype == tf.bfloat16


def test_xla_changes_the_speed_not_the_result():
    compiled, plain = weights_after(jit_compile=True), weights_after()
    for name, array in plain.items():
        np.testing.assert_allclose(compiled[name], array, rtol=1e-3, atol=1e-4)


def test_a_float16_step_that_overflows_is_left_out_and_the_scale_is_halved(monkeypatch):
    monkeypatch.setattr(keras_trainer, "FIRST_LOSS_SCALE", 2.0**30)  # float16 ends at 65,504
    trainer = make(train_set=examples(16), precision="float16")
    before = trainer.get_weights()
    trainer.train_epoch(0.1, seed=0)
    np.testing.assert_array_equal(before["dense/kernel"], trainer.get_weights()["dense/kernel"])
    assert float(trainer._loss_scale) == 2.0**29
    assert not any(array.any() for array in trainer.get_optimizer_state().values())


@pytest.mark.parametrize("limit", [0.01, 1e3])
def test_a_float16_gradient_is_clipped_to_the_norm_without_its_scale(limit):
    def moved(precision):
        trainer = make(train_set=examples(16), precision=precision, clip_norm=limit, momentum=0.0)
        before = trainer.get_weights()
        trainer.train_epoch(1.0, seed=0)
        after = trainer.get_weights()
        return np.concatenate([(after[n] - before[n]).ravel() for n in trainer._trained])

    half, single = moved("float16"), moved("float32")
    assert np.linalg.norm(half) == pytest.approx(min(limit, np.linalg.norm(single)), rel=1e-2)
    np.testing.assert_allclose(half, single, atol=1e-2 * np.linalg.norm(single))


def steep():
    """48 examples, whose scaled float16 gradients overflow at first."""
    data = examples(48)
    return Examples(300 * data.inputs, data.labels)


@pytest.mark.parametrize("epochs", [1, 8])
def test_few_float16_batches_with_steep_gradients_learn(epochs, monkeypatch):
    monkeypatch.setattr(keras_trainer, "FIRST_LOSS_SCALE", 2.0**20)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    trainer = make(model, steep(), test_set=steep(), precision="float16")
    before = trainer.evaluate()["loss"]
    metrics = follow(LocalPlan(1, epochs, 1e-5), trainer, seed=0)
    assert trainer.evaluate()["loss"] < 0.99 * before
    assert metrics["skipped-steps"] >= 3  # all steps of a first epoch


def test_the_loss_scale_lives_through_a_round_and_grows_again(monkeypatch):
    monkeypatch.setattr(keras_trainer, "STEPS_TO_GROW", 8)
    trainer = make(precision="float16")  # four steps an epoch
    trainer._loss_scale.assign(2.0)
    trainer.train_epoch(0.01, 1)
    assert float(trainer._loss_scale) == 2.0
    trainer.train_epoch(0.01, 2)
    assert float(trainer._loss_scale) == 4.0
    trainer.set_weights(trainer.get_weights())
    assert float(trainer._loss_scale) == keras_trainer.FIRST_LOSS_SCALE


def test_regularizers_and_constraints_of_the_model_count():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.5)),
            layers.Dense(3, use_bias=False, kernel_constraint=keras.constraints.NonNeg()),
        ]
    )
    data = examples(16)
    kernel = model.weights[0].numpy()
    plain = log_loss(data.labels, tf.nn.softmax(model(data.inputs)).numpy())
    trainer = make(model, data)
    loss = trainer.train_epoch(0.1, seed=0).loss
    assert loss == pytest.approx(plain + 0.5 * (kernel**2).sum(), rel=1e-5)
    assert trainer.get_weights()["dense_1/kernel"].min() == 0


def test_frozen_layers_stay_as_they_are():
    model = network()
    model.layers[0].trainable = False
    trainer = make(model, weight_decay=0.1)
    before = trainer.get_weights()
    train(trainer)
    after = trainer.get_weights()
    assert np.array_equal(before["dense/kernel"], after["dense/kernel"])
    assert not np.array_equal(before["dense_1/kernel"], after["dense_1/kernel"])


def test_another_loss_can_be_given():
    data = Examples(examples(16).inputs, np.ones((16, 3), np.float32))
    model = network()
    expected = float(np.mean((model(data.inputs, training=True).numpy() - 1) ** 2))
    model = network()
    result = make(model, data, loss=keras.losses.MeanSquaredError()).train_epoch(0.1, 0)
    assert result.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train_set": Examples(np.zeros((0, 4)), np.zeros(0))},
            "at least one example, found none",
        ),
        ({"precision": "half"}, "expected float32, bfloat16 or float16, found 'half'"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"device": "GPU:7"}, r"device: expected one of CPU:0.*found 'GPU:7'"),
        ({"model": keras.Sequential([layers.Dense(2)])}, "expected a built one with weights"),
    ],
)
def test_bad_arguments_say_what_was_expected(options, message):
    with pytest.raises(ColearnError, match=message):
        KerasTrainer(**{"model": network(), "train_set": examples(), **options})


def test_a_device_can_be_named():
    assert make(device="cpu").train_epoch(0.1, 0).num_examples == 50


# Weights


@pytest.mark.parametrize("build", [network, resnet8, small_cnn])
def test_weights_travel_and_return_exactly(build):
    model = build()
    generator = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(generator.standard_normal(weight.shape))
    inputs = np.zeros((1, *model.input_shape[1:]), np.float32)
    data = Examples(inputs, np.zeros(1, np.int64))
    sent = make(model, data).get_weights()
    record = ArrayRecord({name: Array(array) for name, array in sent.items()})
    receiver = make(build(), data)
    receiver.set_weights({name: array.numpy() for name, array in record.items()})
    assert same(receiver.get_weights(), sent)
    for mine, theirs in zip(model.weights, receiver.model.weights, strict=True):
        assert np.array_equal(mine.numpy(), theirs.numpy())


def test_weights_are_a_snapshot():
    trainer = make()
    taken = trainer.get_weights()
    copies = {name: array.copy() for name, array in taken.items()}
    train(trainer)
    assert same(taken, copies)
    assert not same(taken, trainer.get_weights())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("dense/bias"), r"1 arrays missing \['dense/bias'\]"),
        (lambda weights: weights.update(x=np.zeros(3)), r"1 unknown \['x'\]"),
        (lambda weights: weights.update({"dense/bias": np.zeros(4, "f4")}), r"float32 \(4,\) in p"),
        (lambda weights: weights.update({"dense/bias": np.zeros(6)}), "float64"),
    ],
)
def test_weights_of_another_model_are_refused(change, message):
    trainer = make()
    weights = trainer.get_weights()
    change(weights)
    with pytest.raises(ColearnError, match=f"this participant's Keras model.*{message}"):
        trainer.set_weights(weights)


# Optimizer


def test_rounds_that_keep_the_optimizer_are_one_uninterrupted_training():
    trainer = make(weight_decay=0.01)
    start = trainer.get_weights()
    train(trainer)
    uninterrupted = trainer.get_weights()
    trainer.set_weights(start)
    train(trainer, EPOCHS[:2])
    weights, state = trainer.get_weights(), trainer.get_optimizer_state()
    assert set(state) == {name for name, role in trainer.roles().items() if role == "trainable"}
    successor = make(network(seed=9), weight_decay=0.01)
    successor.set_weights(weights)
    successor.set_optimizer_state(state)
    train(successor, EPOCHS[2:])
    assert same(successor.get_weights(), uninterrupted)
    successor.set_weights(weights)  # comes with a new optimizer
    train(successor, EPOCHS[2:])
    assert not same(successor.get_weights(), uninterrupted)


def test_sgd_without_momentum_has_no_state_to_keep():
    trainer = make(momentum=0.0)
    assert trainer.get_optimizer_state() == {}
    trainer.set_optimizer_state({})
    with pytest.raises(ColearnError, match="momentum of Keras model"):
        trainer.set_optimizer_state({"dense/kernel": np.zeros(1)})


# Evaluation


def test_evaluation_agrees_with_scikit_learn_in_the_order_of_the_test_set():
    test_set = examples(300, seed=1)  # more than one batch
    trainer = make(network(dropout=0.5), test_set=test_set)
    train(trainer, EPOCHS[:1])
    before = trainer.get_weights()
    metrics = trainer.evaluate()
    outputs, targets = trainer.predict()
    expected = trainer.model(test_set.inputs, training=False).numpy()
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(targets, test_set.labels)
    probabilities = np.exp(outputs.astype(np.float64))
    probabilities /= probabilities.sum(1, keepdims=True)
    assert metrics["num-examples"] == 300
    assert metrics["accuracy"] == accuracy_score(targets, probabilities.argmax(1))
    assert metrics["loss"] == pytest.approx(log_loss(targets, probabilities), rel=1e-5)
    assert same(trainer.get_weights(), before)


def test_the_transform_is_told_whether_it_is_for_training():
    def shift(inputs, training, seed):
        return inputs + (1000.0 if training else 0.0)

    trainer = make(test_set=examples(), transform=shift, momentum=0.0)
    plain = make(test_set=examples())
    np.testing.assert_array_equal(trainer.predict()[0], plain.predict()[0])
    trainer.train_epoch(0.0, seed=0)
    assert trainer.get_weights()["batch_normalization/moving_mean"].max() > 50


def test_evaluation_without_a_test_set_is_refused():
    with pytest.raises(ColearnError, match="expected a data set to evaluate on, found None"):
        make().evaluate()


# The networks


@pytest.mark.parametrize(
    ("build", "parameters"), [(small_cnn, 9_978), (resnet8, 78_042), (densenet40, 1_019_722)]
)
def test_networks_have_the_parameters_of_their_pytorch_namesakes(build, parameters):
    model = build()
    assert sum(np.prod(v.shape) for v in model.trainable_variables) == parameters
    assert model.output_shape == (None, 10)
    assert all(role != Role.BUFFER for role in roles_of(model).values())


def test_random_layers_at_any_depth_are_seeded():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.Dropout(0.5)])
    model = keras.Sequential([keras.Input((4,)), inner, layers.GaussianDropout(0.5)])
    assert len(make(model)._seeds) == 2


# Unusual models and shards


@pytest.mark.parametrize(("n", "batch_size"), [(1, 16), (4, 1)])
def test_a_batch_of_one_under_batch_norm_is_an_error_of_ours(n, batch_size):
    trainer = make(train_set=examples(n), batch_size=batch_size)
    found = f"found a batch of 1 of this site's {n} examples"
    with pytest.raises(ColearnError, match=found):
        trainer.train_epoch(0.1, 0)
    with pytest.raises(ColearnError, match=found):
        trainer.gradients([], 1, 0)


def frozen_norm():
    model = network()
    model.layers[1].trainable = False
    return model


def images_normed():
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Reshape((2, 2, 1)),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


@pytest.mark.parametrize(
    "model",
    [
        lambda: keras.Sequential([keras.Input((4,)), layers.Dense(3)]),
        images_normed,
        frozen_norm,
        lambda: convert(network(), GroupNorm(1)),
    ],
    ids=["none", "2d", "frozen", "group norm"],
)
def test_one_example_is_enough_where_batch_norm_has_values(model):
    trainer = make(model(), examples(1))
    before = trainer.get_weights()
    assert trainer.train_epoch(0.1, 0).num_examples == 1
    assert any((before[name] != array).any() for name, array in trainer.get_weights().items())


def test_one_example_is_enough_with_shared_statistics():
    trainer = make(convert(network(), Frozen(1)), examples(1))
    with trainer.normalised({"normalization-frozen": True}):
        assert trainer.train_epoch(0.1, 0).num_examples == 1
    with pytest.raises(ColearnError, match="found a batch of 1"):
        trainer.train_epoch(0.1, 0)


def test_a_frozen_model_is_refused():
    model = network()
    model.trainable = False
    with pytest.raises(ColearnError, match="one parameter that is trained, found none"):
        make(model)


# bfloat16 models


def in_bfloat16(seed=0):
    keras.utils.set_random_seed(seed)
    kind = {"dtype": "bfloat16"}
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, **kind),
            layers.BatchNormalization(momentum=0.9, **kind),
            layers.ReLU(**kind),
            layers.Dense(3, **kind),
        ]
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_bfloat16_model_learns_and_travels_as_float32(precision):
    model = in_bfloat16()
    trainer = make(model, test_set=examples(60, seed=1), precision=precision, clip_norm=5.0)
    losses = [result.loss for result in train(trainer, [(0.05, seed) for seed in range(10)])]
    assert losses[-1] < 0.6 * losses[0]
    assert trainer.evaluate()["accuracy"] > 0.6  # chance is a third
    assert {v.dtype for v in model.trainable_variables} == {"bfloat16"}
    weights = trainer.get_weights()
    assert {array.dtype.name for array in weights.values()} == {"float32"}
    other = make(in_bfloat16(seed=1))
    other.set_weights(weights)
    assert same(other.get_weights(), weights)


def test_optimizer_gradients_and_statistics_of_a_bfloat16_model_are_arrays_too():
    trainer = make(in_bfloat16())
    train(trainer, EPOCHS[:1])
    state = trainer.get_optimizer_state()
    assert {array.dtype.name for array in state.values()} == {"float32"}
    other = make(in_bfloat16(seed=1))
    other.set_optimizer_state(state)
    assert same(other.get_optimizer_state(), state)
    arrays, _ = trainer.gradients(["dense/kernel"], 1, 0)
    assert arrays["dense/kernel"].dtype == np.float32
    statistics, _ = trainer.recalibrated()
    assert {array.dtype.name for array in statistics.values()} == {"float32"}


# Layers that compute from their variables; memory


def test_a_trainer_computes_with_the_normalization_that_it_has_loaded():
    def normalising(seed):
        keras.utils.set_random_seed(seed)
        norm = layers.Normalization()
        model = keras.Sequential([keras.Input((4,)), norm, layers.Dense(3)])
        norm.adapt(examples(seed=seed).inputs * (1 + seed))
        return make(model, test_set=examples(60, seed=9))

    own, other = normalising(0), normalising(3)
    train(own, EPOCHS[:1])
    own.predict()
    own.set_weights(other.get_weights())
    np.testing.assert_array_equal(own.predict()[0], other.predict()[0])
    train(own, EPOCHS[:1])
    train(other, EPOCHS[:1])
    assert same(own.get_weights(), other.get_weights())


def resident():
    """The process's resident memory in bytes, without what it could give back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_the_memory_of_a_trainer_is_returned():
    def message():
        # Not `network`, whose seed makes TensorFlow drop its kernels too.
        model = keras.Sequential([keras.Input((4,)), layers.Dense(6), layers.Dense(3)])
        make(model).train_epoch(0.1, 0)

    for _ in range(20):
        message()
    before = resident()
    for _ in range(30):
        message()
    assert resident() - before < 30 * 2**17
