"""Keras participants of synchronous SGD and of the normalization schemes that need a trainer."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import nn

from clients.client_app import make_client_app
from clients.data import Examples
from clients.keras.trainer import KerasTrainer
from clients.tensorflow.setup import keras, tf
from flwr_colearn import (
    BatchRenorm,
    CoLearn,
    ColearnError,
    Frozen,
    GroupNorm,
    InProcessGrid,
    Pooled,
    Recalibrated,
    Recovery,
    Synchronised,
    SynchronousSGD,
    ThreadedGrid,
)
from flwr_colearn.keras import convert

layers = keras.layers

K, BATCHES = 3, (4, 5, 7)  # examples of each participant, all in one batch
NAMES = {  # of the network below: PyTorch's and ours
    "0.weight": "dense/kernel",
    "0.bias": "dense/bias",
    "1.weight": "batch_normalization/gamma",
    "1.bias": "batch_normalization/beta",
    "3.weight": "dense_1/kernel",
    "3.bias": "dense_1/bias",
}
FREEZE = {"normalization": "frozen", "normalization-frozen": True}


def examples(n, seed=0):
    rng = np.random.default_rng(seed)
    return Examples(rng.normal(seed, seed + 1, (n, 4)).astype(np.float32), rng.integers(0, 3, n))


def network(norm=True, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, **options),
            *([layers.BatchNormalization(momentum=0.9, epsilon=1e-5)] if norm else []),
            layers.Activation("tanh"),
            layers.Dense(3),
        ]
    )
    rng = np.random.default_rng(7)
    for variable in model.weights:
        draw = rng.normal(0, 0.5, variable.shape) if len(variable.shape) > 1 else None
        variable.assign(rng.uniform(0.5, 1.5, variable.shape) if draw is None else draw)
    return model


def trainer_of(model, data, **options):
    return KerasTrainer(model, data, **{"batch_size": 16, "device": "cpu", **options})


def trained(trainer):
    return [name for name, role in trainer.roles().items() if role == "trainable"]


def test_gradients_are_pytorchs():
    data = examples(16)
    ours = trainer_of(network(), data)
    start = ours.get_weights()
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    for name, parameter in model.named_parameters():
        parameter.data = torch.from_numpy(start[NAMES[name]].T.copy())
    loss = nn.functional.cross_entropy(
        model(torch.from_numpy(data.inputs)), torch.from_numpy(data.labels)
    )
    loss.backward()
    arrays, result = ours.gradients(trained(ours), step=1, seed=3)
    assert (result.loss, result.num_examples) == (pytest.approx(loss.item(), rel=1e-5), 16)
    for name, parameter in model.named_parameters():
        found = arrays[NAMES[name]]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found.T, parameter.grad, rtol=1e-4, atol=1e-6, err_msg=name)
    # The others are the arrays after the forward pass, and the weights themselves stay.
    hidden = data.inputs @ start["dense/kernel"] + start["dense/bias"]
    mean = 0.9 * start["batch_normalization/moving_mean"] + 0.1 * hidden.mean(0)
    np.testing.assert_allclose(arrays["batch_normalization/moving_mean"], mean, rtol=1e-5)
    after = ours.get_weights()
    assert all(np.array_equal(after[name], start[name]) for name in trained(ours))


def test_gradients_are_the_tapes_on_the_steps_own_batch_with_the_models_own_losses():
    data, names = examples(20), ["dense/kernel"]
    model = network(norm=False, kernel_regularizer=keras.regularizers.L2(0.1))
    trainer = trainer_of(model, data, batch_size=8)
    seen = []
    trainer.transform = lambda inputs, training, seed: (
        tf.py_function(lambda x: seen.append(x.numpy()), [inputs], []),
        inputs,
    )[1]
    found = [trainer.gradients(names, step, seed=5) for step in range(1, 7)]
    for batch, (arrays, result) in zip(seen, found, strict=True):
        labels = np.array([data.labels[(data.inputs == row).all(1)][0] for row in batch])
        with tf.GradientTape() as tape:
            outputs = model(batch, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(labels, outputs, from_logits=True)
            kernel = model.layers[0].kernel
            loss = tf.reduce_mean(losses) + 0.1 * tf.reduce_sum(kernel.value**2)
        wanted = tape.gradient(loss, kernel.value)
        np.testing.assert_allclose(arrays["dense/kernel"], wanted, rtol=1e-5, atol=1e-7)
        assert result.num_examples == len(batch)
        assert np.array_equal(arrays["dense_1/bias"], model.layers[-1].bias)  # not asked for
    # Two passes over the data, each complete and in an order of its own.
    first, second = (np.concatenate(half) for half in (seen[:3], seen[3:]))
    assert (
        sorted(map(tuple, first)) == sorted(map(tuple, second)) == sorted(map(tuple, data.inputs))
    )
    assert not np.array_equal(first, second)
    again = [trainer.gradients(names, 2, seed)[0]["dense/kernel"] for seed in (5, 6)]
    assert np.array_equal(again[0], found[1][0]["dense/kernel"])
    assert not np.array_equal(again[0], again[1])


def test_what_takes_no_part_has_gradient_zero():
    model = network()
    model.layers[0].trainable = False
    trainer = trainer_of(model, examples(16))
    arrays, _ = trainer.gradients(["dense/kernel", "dense_1/kernel"], 1, seed=0)
    assert not arrays["dense/kernel"].any()
    assert arrays["dense_1/kernel"].any()


@pytest.mark.parametrize("examples_of", [(300, 300), (257, 256)], ids=["all", "less the lonely"])
def test_recalibrated_statistics_are_those_of_the_whole_data(examples_of):
    count, used = examples_of
    data = examples(count, seed=1)
    trainer = trainer_of(network(), data, transform=lambda x, training, seed: x * (2.0 + training))
    start = trainer.get_weights()
    arrays, number = trainer.recalibrated()
    hidden = 2.0 * data.inputs[:used].astype(float) @ start["dense/kernel"] + start["dense/bias"]
    assert number == used
    assert sorted(arrays) == [f"batch_normalization/moving_{kind}" for kind in ("mean", "variance")]
    np.testing.assert_allclose(
        arrays["batch_normalization/moving_mean"], hidden.mean(0), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        arrays["batch_normalization/moving_variance"], hidden.var(0), rtol=1e-5
    )
    after = trainer.get_weights()
    assert all(np.array_equal(after[name], start[name]) for name in start)


def in_evaluation(model, data):
    """The gradient of dense_1/kernel where batch norm uses its moving statistics."""
    with tf.GradientTape() as tape:
        outputs = model(data.inputs, training=False)
        losses = keras.losses.sparse_categorical_crossentropy(
            data.labels, outputs, from_logits=True
        )
        loss = tf.reduce_mean(losses)
    return tape.gradient(loss, model.layers[-1].kernel.value)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_frozen_layers_train_with_their_statistics_and_do_not_move_them(jit_compile):
    data, statistics = examples(16), ["moving_mean", "moving_variance"]
    trainer = trainer_of(convert(network(), Frozen(1)), data, jit_compile=jit_compile)
    start = trainer.get_weights()
    assert list(start) == list(trainer_of(network(), data).get_weights())

    def moved():
        after = trainer.get_weights()
        return {name for name in start if not np.array_equal(start[name], after[name])}

    with trainer.normalised(FREEZE):
        arrays, _ = trainer.gradients(trained(trainer), 1, seed=0)
        np.testing.assert_allclose(
            arrays["dense_1/kernel"], in_evaluation(trainer.model, data), rtol=1e-4, atol=1e-7
        )
        assert moved() == set()
        trainer.train_epoch(0.1, seed=0)
        assert moved() == set(trained(trainer))
    trainer.set_weights(start)
    trainer.train_epoch(0.0, seed=0)
    assert moved() == {f"batch_normalization/{name}" for name in statistics}


def shards():
    return [examples(size, seed=k) for k, size in enumerate(BATCHES)]  # unlike each other


def joint():
    parts = shards()
    return Examples(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("inputs", "labels")))


def record_of(trainer):
    return ArrayRecord({name: Array(array) for name, array in trainer.get_weights().items()})


def run(strategy_of, data, scheme=None, rounds=5, norm=True, grid=InProcessGrid, **options):
    """Train a strategy's rounds with one participant for each part of the data."""
    scheme = scheme or Pooled()
    trainers = [trainer_of(convert(network(norm), scheme), part, **options) for part in data]
    app = make_client_app(lambda context: trainers[context.node_config["partition-id"]])
    strategy = strategy_of(len(data), roles=trainers[0].roles(), normalization=scheme)
    result = strategy.start(grid(app, len(data)), record_of(trainers[0]), rounds)
    return {name: array.numpy() for name, array in result.arrays.items()}


def synchronous(k, **kwargs):
    return SynchronousSGD(k, learning_rate=0.1, momentum=0.9, weight_decay=0.01, **kwargs)


def colearn(k, **kwargs):
    return CoLearn(k, local_epochs=1, learning_rate=0.1, fraction_evaluate=0.0, **kwargs)


def test_synchronous_sgd_is_sgd_on_the_joint_batch():
    found = run(synchronous, shards(), norm=False)
    alone = trainer_of(network(norm=False), joint(), momentum=0.9, weight_decay=0.01)
    start = alone.get_weights()
    for _ in range(5):
        alone.train_epoch(0.1, seed=0)  # one batch: a step of the trainer's own SGD
    one = run(synchronous, [joint()], norm=False)
    for name, wanted in alone.get_weights().items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(found[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)
        assert np.abs(wanted - start[name]).max() > 1e-3


def test_plain_batch_norm_interferes():
    # The counterpart of the test above: the equality is not for free.
    found, one = run(synchronous, shards()), run(synchronous, [joint()])
    assert np.abs(found["dense/kernel"] - one["dense/kernel"]).max() > 1e-3


@pytest.mark.parametrize("jit_compile", [False, True])
def test_synchronised_batch_norm_is_sgd_on_the_joint_batch_too(jit_compile):
    def doubled(inputs, training, seed):
        assert tf.is_tensor(inputs)  # eagerly too
        assert tf.is_tensor(seed)
        return 2.0 * inputs

    options = {"transform": doubled, "jit_compile": jit_compile}
    found = run(synchronous, shards(), Synchronised(), grid=ThreadedGrid, **options)
    alone = trainer_of(network(), joint(), momentum=0.9, weight_decay=0.01, **options)
    for _ in range(5):
        alone.train_epoch(0.1, seed=0)  # one batch: a step of the trainer's own SGD
    for name, wanted in alone.get_weights().items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_synchronised_in_mixed_precision_is_near_that_of_float32():
    found = [
        run(synchronous, shards(), Synchronised(), grid=ThreadedGrid, precision=precision)
        for precision in ("float32", "bfloat16")
    ]
    for name, wanted in found[0].items():
        assert found[1][name].dtype == wanted.dtype
        np.testing.assert_allclose(found[1][name], wanted, rtol=0.05, atol=0.05, err_msg=name)


def test_after_the_block_gradients_are_compiled_again():
    trainer = trainer_of(network(), examples(16))
    compiled = trainer._gradients
    with (
        pytest.raises(ColearnError, match="that is alone"),
        trainer.normalised({"normalization": "synchronised"}),
    ):
        pass
    assert trainer._gradients is compiled


def test_synchronised_with_a_participant_that_fails_ends_with_the_reason():
    trainers = [trainer_of(network(), part) for part in shards()]
    app = make_client_app(lambda context: trainers[context.node_config["partition-id"]])
    strategy = synchronous(
        K,
        roles=trainers[0].roles(),
        normalization=Synchronised(),
        recovery=Recovery(max_restarts=0),
    )
    grid = ThreadedGrid(app, K)
    grid.contexts[2].node_config["partition-id"] = 99  # there is no such trainer
    with pytest.raises(ColearnError, match=r"list index out of range|one has left"):
        strategy.start(grid, record_of(trainers[0]), num_rounds=1)


def test_recalibrated_runs_through_the_app():
    found = run(synchronous, shards(), Recalibrated(every=5))
    hidden = joint().inputs.astype(float) @ found["dense/kernel"] + found["dense/bias"]
    for name, wanted in (("mean", hidden.mean(0)), ("variance", hidden.var(0))):
        statistic = found[f"batch_normalization/moving_{name}"]
        np.testing.assert_allclose(statistic, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy_of", [synchronous, colearn])
def test_frozen_statistics_are_those_of_the_first_phase(strategy_of):
    two = run(strategy_of, shards(), rounds=2)
    four = run(strategy_of, shards(), Frozen(after=2), rounds=4)
    for name in two:
        assert np.array_equal(two[name], four[name]) == ("moving" in name), name


@pytest.mark.parametrize("scheme", [Pooled(), BatchRenorm(), GroupNorm(2), Frozen(1)], ids=str)
def test_schemes_train_and_recalibrate_in_mixed_precision_as_in_float32(scheme):
    data, found = examples(16), []
    for precision in ("float32", "bfloat16"):
        trainer = trainer_of(convert(network(), scheme), data, precision=precision)
        arrays, result = trainer.gradients(["dense_1/kernel"], 1, seed=0)
        statistics = {} if isinstance(scheme, GroupNorm) else trainer.recalibrated()[0]
        found.append({**arrays, **statistics, "loss": np.float32(result.loss)})
    for name, wanted in found[0].items():
        assert found[1][name].dtype == wanted.dtype
        np.testing.assert_allclose(found[1][name], wanted, rtol=0.05, atol=0.02, err_msg=name)


def test_a_converted_layer_keeps_the_names_of_what_remains():
    plain = trainer_of(network(), examples(8)).get_weights()
    grouped = trainer_of(convert(network(), GroupNorm(2)), examples(8)).get_weights()
    assert list(grouped) == [name for name in plain if "moving" not in name]
