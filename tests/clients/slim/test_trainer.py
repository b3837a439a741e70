"""SlimTrainer with the real tf-slim, against PyTorch and scikit-learn, from equal weights."""

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
from clients.slim.compat import nets, slim, tf
from clients.slim.models import resnet8, small_cnn, vgg_19
from clients.slim.trainer import SlimTrainer
from clients.tasks import cifar10
from clients.tensorflow.transforms import augment
from clients.torch.trainer import TorchTrainer
from flwr_colearn import ColearnError, Role
from flwr_colearn.roles import pair_statistics

EPOCHS = [(0.1, 11), (0.05, 12), (0.2, 13)]  # learning rate, seed


def examples(n=50, seed=0):
    """Vectors [4] of three classes that a small network can tell apart."""
    labels = np.arange(n) % 3
    noise = np.random.default_rng(seed).standard_normal((n, 4))
    return Examples((noise + 2 * labels[:, None]).astype(np.float32), labels)


def network(inputs, is_training, keep=1.0):
    norm = {"is_training": is_training, "decay": 0.9, "epsilon": 1e-5, "scale": True}
    with slim.arg_scope(
        [slim.fully_connected], normalizer_fn=slim.batch_norm, normalizer_params=norm
    ):
        net = slim.fully_connected(inputs, 6)
    net = slim.dropout(net, keep, is_training=is_training)
    return slim.fully_connected(net, 3, activation_fn=None)


def network_with_dropout(inputs, is_training):
    return network(inputs, is_training, keep=0.5)


VARIABLES = {
    "fully_connected/weights": Role.TRAINABLE,
    "fully_connected/BatchNorm/gamma": Role.TRAINABLE,
    "fully_connected/BatchNorm/beta": Role.TRAINABLE,
    "fully_connected/BatchNorm/moving_mean": Role.MEAN,
    "fully_connected/BatchNorm/moving_variance": Role.VARIANCE,
    "fully_connected_1/weights": Role.TRAINABLE,
    "fully_connected_1/biases": Role.TRAINABLE,
}


def make(model=network, train_set=None, test_set=None, **options):
    return SlimTrainer(model, train_set or examples(), test_set, **{"batch_size": 16, **options})


def train(trainer, epochs=EPOCHS):
    return [trainer.train_epoch(*epoch) for epoch in epochs]


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
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU())
    model.append(nn.Linear(6, 3))
    theirs = TorchTrainer(
        model,
        TensorDataset(torch.from_numpy(data.inputs), torch.from_numpy(data.labels)),
        batch_size=16,
        device="cpu",
        **options,
    )
    names = {  # PyTorch's name and ours
        "0.weight": "fully_connected/weights",
        "1.weight": "fully_connected/BatchNorm/gamma",
        "1.bias": "fully_connected/BatchNorm/beta",
        "1.running_mean": "fully_connected/BatchNorm/moving_mean",
        "3.weight": "fully_connected_1/weights",
        "3.bias": "fully_connected_1/biases",
    }
    initial = ours.get_weights()
    theirs.set_weights(
        {**theirs.get_weights(), **{torchs: initial[mine].T for torchs, mine in names.items()}}
    )
    for ours_result, theirs_result in zip(train(ours), train(theirs), strict=True):
        assert ours_result.loss == pytest.approx(theirs_result.loss, rel=1e-5)
    trained, moved = theirs.get_weights(), ours.get_weights()
    for torchs, mine in names.items():
        np.testing.assert_allclose(
            moved[mine].T, trained[torchs], rtol=2e-5, atol=2e-6, err_msg=mine
        )
        assert not np.allclose(moved[mine], initial[mine])


def test_an_epoch_sees_every_example_once_in_an_order_of_its_own():
    seen = []

    def record(inputs, training, seed):
        if not training:
            return inputs

        def note(batch):
            seen.extend(batch[:, 0])
            return batch

        noted = tf.numpy_function(note, [inputs], tf.float32)
        return tf.ensure_shape(noted, inputs.shape)

    numbers = Examples(np.arange(50, dtype=np.float32)[:, None], np.zeros(50, np.int64))
    train(make(train_set=numbers, transform=record), [(0.0, 1), (0.0, 2), (0.0, 1)])
    first, second, third = seen[:50], seen[50:100], seen[100:]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first == third != second


def test_the_seed_decides_everything_dropout_included():
    def dropped(**options):
        return make(network_with_dropout, batch_size=50, **options)  # the order hardly matters

    trainer = dropped()
    initial = trainer.get_weights()

    def run(*seeds):
        trainer.set_weights(initial)
        train(trainer, [(0.1, seed) for seed in seeds])
        return trainer.get_weights()

    first = run(1, 2)
    assert same(run(1, 2), first)  # whatever was drawn before
    last = "fully_connected_1/weights"
    assert np.abs(run(1, 3)[last] - first[last]).max() > 1e-3
    other = dropped(seed=9)
    assert not same(other.get_weights(), initial)
    other.set_weights(initial)
    train(other, [(0.1, 1), (0.1, 2)])
    assert same(other.get_weights(), first)


def test_dropout_still_drops_the_share_it_is_told_to_and_other_units_in_every_step():
    masks = []

    def model(inputs, is_training):
        kept = slim.dropout(tf.ones([1, 1000]), 0.7, is_training=is_training)
        if is_training:
            kept = tf.numpy_function(lambda a: masks.append(a > 0) or a, [kept], tf.float32)
            kept = tf.ensure_shape(kept, [1, 1000])
        return slim.fully_connected(inputs, 3) + 0 * tf.reduce_sum(kept)

    make(model, batch_size=25).train_epoch(0.1, seed=0)
    assert len(masks) == 2
    for mask in masks:
        assert 640 < mask.sum() < 760  # four standard deviations
    assert 0.4 < np.mean(masks[0] == masks[1]) < 0.75  # 0.58 if independent


def test_operations_that_cannot_follow_a_seed_are_told(flower_log):
    def model(inputs, is_training):
        return slim.fully_connected(tf.random.shuffle(inputs) if is_training else inputs, 3)

    make(model)
    assert "draws with RandomShuffle, which cannot follow the seed" in flower_log.text


@pytest.mark.parametrize(("n", "trained"), [(33, 32), (34, 34), (1, 1)])
def test_only_a_single_left_over_example_is_left_out(n, trained):
    assert make(train_set=examples(n)).train_epoch(0.1, seed=0).num_examples == trained


def test_regularizers_of_the_arg_scope_count():
    def model(inputs, is_training):
        with slim.arg_scope([slim.fully_connected], weights_regularizer=slim.l2_regularizer(0.5)):
            return slim.fully_connected(inputs, 3, activation_fn=None)

    data = examples(16)
    trainer = make(model, data, data)
    plain = trainer.evaluate()["loss"]
    weights = trainer.get_weights()["fully_connected/weights"]
    loss = trainer.train_epoch(0.1, seed=0).loss
    assert loss == pytest.approx(plain + 0.5 * (weights**2).sum() / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train_set": Examples(np.zeros((0, 4)), np.zeros(0))},
            "at least one example, found none",
        ),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"device": "GPU:7"}, r"device: expected one of CPU:0.*found 'GPU:7'"),
        ({"model": lambda inputs, is_training: inputs}, "a function that makes variables, found"),
    ],
)
def test_bad_arguments_say_what_was_expected(options, message):
    with pytest.raises(ColearnError, match=message):
        SlimTrainer(**{"model": network, "train_set": examples(), **options})


# Weights


def test_weights_travel_and_return_exactly_moving_averages_included():
    trainer = make(seed=1)
    train(trainer)
    sent = trainer.get_weights()
    assert set(sent) == set(VARIABLES)
    record = ArrayRecord({name: Array(array) for name, array in sent.items()})
    receiver = make(seed=2)
    receiver.set_weights({name: array.numpy() for name, array in record.items()})
    assert same(receiver.get_weights(), sent)
    train(receiver)
    assert not same(receiver.get_weights(), sent)
    assert same({name: array.numpy() for name, array in record.items()}, sent)  # left alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("fully_connected_1/biases"), r"1 arrays missing \['fully_connected_1/b"),
        (lambda w: w.update(x=np.zeros(3)), r"1 unknown \['x'\]"),
        (lambda w: w.update({"fully_connected_1/biases": np.zeros(4, "f4")}), r"float32 \(4,\) in"),
    ],
)
def test_weights_of_another_model_are_refused(change, message):
    trainer = make()
    weights = trainer.get_weights()
    change(weights)
    with pytest.raises(ColearnError, match=f"participant's TF-slim model 'network'.*{message}"):
        trainer.set_weights(weights)


def test_moving_averages_are_statistics_and_other_untrained_variables_are_not():
    def model(inputs, is_training):
        get = tf.compat.v1.get_variable
        get("moving_mean", [4])
        get("own/moving_mean", [4], trainable=False)
        get("steps", [], tf.int64, trainable=False)
        return network(inputs, is_training)

    trainer = make(model)
    assert trainer.roles() == {
        "moving_mean": Role.TRAINABLE,
        "own/moving_mean": Role.BUFFER,  # no variance belongs to it
        "steps": Role.COUNTER,
        **VARIABLES,
    }
    assert pair_statistics(trainer.get_weights(), trainer.roles()) == [
        ("fully_connected/BatchNorm/moving_mean", "fully_connected/BatchNorm/moving_variance")
    ]


# Optimizer


def test_rounds_that_keep_the_optimizer_are_one_uninterrupted_training():
    trainer = make(weight_decay=0.01)
    start = trainer.get_weights()
    train(trainer)
    uninterrupted = trainer.get_weights()
    trainer.set_weights(start)
    train(trainer, EPOCHS[:2])
    weights, state = trainer.get_weights(), trainer.get_optimizer_state()
    assert set(state) == {name for name, role in VARIABLES.items() if role is Role.TRAINABLE}
    successor = make(weight_decay=0.01, seed=9)
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


# Evaluation


def test_evaluation_agrees_with_scikit_learn_and_leaves_the_weights_alone():
    test_set = examples(300, seed=1)  # more than one batch
    trainer = make(network_with_dropout, test_set=test_set)
    train(trainer, EPOCHS[:1])
    before = trainer.get_weights()
    metrics = trainer.evaluate()
    outputs, targets = trainer.predict()
    # By hand: batch norm with the moving averages, and no dropout.
    layer = {name.rpartition("/")[2]: array for name, array in before.items() if "_1" not in name}
    hidden = test_set.inputs @ layer["weights"] - layer["moving_mean"]
    hidden = hidden / np.sqrt(layer["moving_variance"] + 1e-5) * layer["gamma"] + layer["beta"]
    last = before["fully_connected_1/weights"], before["fully_connected_1/biases"]
    expected = np.maximum(hidden, 0) @ last[0] + last[1]
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(targets, test_set.labels)
    probabilities = np.exp(outputs.astype(np.float64))
    probabilities /= probabilities.sum(1, keepdims=True)
    assert metrics["num-examples"] == 300
    assert metrics["accuracy"] == accuracy_score(targets, probabilities.argmax(1))
    assert metrics["loss"] == pytest.approx(log_loss(targets, probabilities), rel=1e-5)
    assert same(trainer.get_weights(), before)


def test_evaluation_without_a_test_set_is_refused():
    with pytest.raises(ColearnError, match="expected a data set to evaluate on, found None"):
        make().evaluate()


# The networks


def images(n, size=32, channels=3):
    """Real CIFAR-10 images where they are at hand, else random ones."""
    folder = os.environ.get("COLEARN_CIFAR10", "")
    if Path(folder, cifar10.FOLDER).is_dir() and size == 32:
        return cifar10.load(folder).train_set.take(np.arange(n))
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (n, size, size, channels), dtype=np.uint8)
    return Examples(pixels, generator.integers(0, 10, n))


@pytest.mark.parametrize(
    ("model", "parameters", "data"),
    [
        (small_cnn, 9_978, Examples(np.zeros((2, 8, 8, 1), np.float32), np.zeros(2, np.int64))),
        (resnet8, 78_042, images(8)),
    ],
)
def test_networks_have_the_parameters_of_their_pytorch_namesakes(model, parameters, data):
    options = {} if data.inputs.dtype == np.float32 else {"transform": augment}
    trainer = SlimTrainer(model, data, data, batch_size=8, **options)
    assert trainer.predict()[0].shape == (len(data), 10)
    weights, roles = trainer.get_weights(), trainer.roles()
    trained = [array.size for name, array in weights.items() if roles[name] is Role.TRAINABLE]
    assert sum(trained) == parameters
    assert set(roles.values()) == {Role.TRAINABLE, Role.MEAN, Role.VARIANCE}
    assert np.isfinite(trainer.train_epoch(0.01, seed=0).loss)


def test_the_papers_vgg_19_of_tf_slim_trains_on_images_of_cifar_10():
    data = images(4)
    trainer = SlimTrainer(vgg_19, data, data, batch_size=2, momentum=0.0, transform=augment)
    before = trainer.get_weights()
    assert sum(array.size for array in before.values()) == 139_611_210
    assert set(trainer.roles().values()) == {Role.TRAINABLE}
    result = trainer.train_epoch(0.01, seed=0)
    assert result.num_examples == 4
    assert result.loss == pytest.approx(np.log(10), abs=0.5)
    moved = trainer.get_weights()
    assert not any(np.array_equal(moved[name], before[name]) for name in before)
    trainer.set_weights(before)
    assert same(trainer.get_weights(), before)


def test_residual_networks_of_tf_slim_keep_their_names_and_pair_their_statistics():
    def resnet(inputs, is_training):  # ResNet-152's blocks, one unit each
        block = nets.resnet_v1.resnet_v1_block
        with slim.arg_scope(nets.resnet_v1.resnet_arg_scope(weight_decay=0.0)):
            logits, _ = nets.resnet_v1.resnet_v1(
                inputs,
                [block("block1", 8, 1, 2), block("block2", 16, 1, 1)],
                10,
                is_training,
                scope="resnet",
            )
        return tf.squeeze(logits, [1, 2])

    data = images(6)
    trainer = SlimTrainer(resnet, data, data, batch_size=3, transform=augment)
    before = trainer.get_weights()
    trainer.train_epoch(0.01, seed=0)
    after = trainer.get_weights()
    pairs = pair_statistics(after, trainer.roles())
    assert len(pairs) == 1 + 2 * 4  # the first convolution; three and a shortcut in each block
    assert ("resnet/conv1/BatchNorm/moving_mean", "resnet/conv1/BatchNorm/moving_variance") in pairs
    for pair in pairs:
        assert not any(np.array_equal(before[name], after[name]) for name in pair)
