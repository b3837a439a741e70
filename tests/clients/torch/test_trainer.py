"""TorchTrainer against plain PyTorch, written out by hand."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from torch.nn.functional import cross_entropy, l1_loss, softmax
from torch.utils.data import Dataset, TensorDataset

from clients.torch.models.small import resnet8, small_cnn
from clients.torch.trainer import TorchTrainer
from clients.trainer import follow
from flwr_colearn import ColearnError, LocalPlan
from flwr_colearn.torch import BatchRenormLayer
from tests.clients.torch.networks import small_convnet as network

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

EPOCHS = [(0.1, 11), (0.05, 12), (0.1, 13), (0.05, 14)]  # learning rate, seed


def examples(n=50, seed=0):
    """Images [3, 6, 6] of three classes that a small network can tell apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return TensorDataset(
        torch.randn(n, 3, 6, 6, generator=generator) + 2 * labels.view(-1, 1, 1, 1), labels
    )


def make(model=None, train_set=None, test_set=None, **options):
    data = examples() if train_set is None else train_set
    return TorchTrainer(
        model or network(), data, test_set, **{"batch_size": 16, "device": "cpu", **options}
    )


def train(trainer, epochs=EPOCHS):
    return [trainer.train_epoch(*epoch) for epoch in epochs]


def weights_after(epochs=EPOCHS, **options):
    trainer = make(**options)
    train(trainer, epochs)
    return trainer.get_weights()


def same(first, second):
    """Whether two models are equal: names, order, types, shapes and bits."""
    return list(first) == list(second) and all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(first.values(), second.values(), strict=True)
    )


def numpy_state(model):
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def train_by_hand(model, data, epochs, momentum, weight_decay, batch_size=16):
    """Stochastic gradient descent as defined: g += decay w; v = momentum v + g; w -= rate v."""
    inputs, targets = data.tensors
    velocities = [torch.zeros_like(p) for p in model.parameters()]
    losses = []
    model.train()
    for rate, seed in epochs:
        total = 0.0
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        for batch in order.split(batch_size):
            loss = cross_entropy(model(inputs[batch]), targets[batch])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            total += loss.item() * len(batch)
            with torch.no_grad():
                for p, g, v in zip(model.parameters(), gradients, velocities, strict=True):
                    v.mul_(momentum).add_(g.add(p, alpha=weight_decay))
                    p.add_(v, alpha=-rate)
        losses.append(total / len(data))
    return losses


# Training


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.01)])
def test_epochs_are_sgd_bit_for_bit(momentum, weight_decay):
    trainer = make(momentum=momentum, weight_decay=weight_decay)
    results = train(trainer)
    model = network()
    losses = train_by_hand(model, examples(), EPOCHS, momentum, weight_decay)
    assert same(trainer.get_weights(), numpy_state(model))
    assert [result.loss for result in results] == pytest.approx(losses, rel=1e-6)
    assert [result.num_examples for result in results] == [50] * 4


def test_an_epoch_sees_every_example_once_in_an_order_of_its_own():
    seen = []

    def record(inputs, training):
        seen.extend(inputs.tolist())
        return inputs

    numbers = TensorDataset(torch.arange(50.0).view(50, 1), torch.zeros(50, dtype=torch.int64))
    trainer = make(nn.Linear(1, 3), numbers, transform=record)
    train(trainer, [(0.0, 1), (0.0, 2), (0.0, 1)])
    first, second, third = (np.ravel(seen[start : start + 50]) for start in (0, 50, 100))
    assert sorted(first) == sorted(second) == list(range(50))
    assert list(first) != list(second)
    assert list(first) == list(third)


def test_the_same_seeds_give_the_same_weights_dropout_included():
    def run(*seeds):
        return weights_after([(0.1, seed) for seed in seeds], model=network(dropout=0.5))

    assert same(run(1, 2), run(1, 2))
    assert not same(run(1, 2), run(1, 3))


def test_the_seed_decides_dropout_too():
    one_batch = {"batch_size": 50, "momentum": 0.0}  # the order of the data hardly matters then
    plain = [weights_after([(0.1, seed)], **one_batch) for seed in (1, 2)]
    dropped = [weights_after([(0.1, s)], model=network(dropout=0.5), **one_batch) for s in (1, 2)]
    difference = [np.abs(a["5.weight"] - b["5.weight"]).max() for a, b in (plain, dropped)]
    assert difference[1] > 100 * difference[0]


def test_nothing_but_the_seed_decides():
    def run(whatever_went_before):
        trainer = make(network(dropout=0.5))
        torch.manual_seed(whatever_went_before)
        train(trainer)
        return trainer.get_weights()

    assert same(run(5), run(6))


def test_training_on_the_cpu_seeds_no_other_device(monkeypatch):
    def seed(value):
        raise AssertionError("who called is written down, for a device that nobody uses")

    trainer = make()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed)
    train(trainer)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_gradient_is_clipped_to_the_norm(precision):
    """In float16 the gradient itself, and not that of the scaled loss."""
    data = examples(16)
    model = network().train()
    loss = cross_entropy(model(data.tensors[0]), data.tensors[1])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    for limit, scale in ((norm / 4, 0.25), (norm * 4, 1.0)):
        model = network()
        before = [p.detach().clone() for p in model.parameters()]
        options = {"momentum": 0.0, "clip_norm": limit, "precision": precision}
        make(model, data, **options).train_epoch(1.0, seed=0)
        near = {"rtol": 1e-3, "atol": 1e-6} if precision == "float32" else {"rtol": 0, "atol": 1e-2}
        for start, p, gradient in zip(before, model.parameters(), gradients, strict=True):
            torch.testing.assert_close(start - p.detach(), scale * gradient, **near)


def test_another_loss_can_be_given():
    data = TensorDataset(torch.randn(8, 2), torch.zeros(8, 1))
    model = nn.Linear(2, 1)
    expected = l1_loss(model(data.tensors[0]), data.tensors[1]).item()
    result = make(model, data, loss=l1_loss).train_epoch(0.1, seed=0)
    assert result.loss == pytest.approx(expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bfloat16"},
        {"precision": "float16"},
        {"channels_last": True},
        {"precision": "bfloat16", "channels_last": True, "clip_norm": 1.0},
    ],
    ids=str,
)
def test_every_precision_and_memory_format_learns_and_keeps_float32_weights(options):
    trainer = make(test_set=examples(60, seed=1), **options)
    losses = [result.loss for result in train(trainer, [(0.02, seed) for seed in range(10)])]
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.evaluate()["accuracy"] > 0.75  # chance is a third
    assert {a.dtype for a in trainer.get_weights().values()} == {np.dtype("f4"), np.dtype("i8")}


def test_precision_and_memory_format_reach_the_network():
    model = network()
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    make(model, precision="bfloat16", channels_last=True).train_epoch(0.1, seed=0)
    images, output = seen[0]
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert not images.is_contiguous()
    assert output.dtype == torch.bfloat16


def test_inputs_reach_the_network_in_the_memory_format_of_the_transform():
    # What CIFAR-10's random crop returns is channels-last, and copying it back is slow.
    wide = TensorDataset(torch.randn(8, 3, 4, 4), torch.zeros(8, dtype=torch.int64))
    model = nn.Sequential(nn.Conv2d(3, 2, 4), nn.Flatten())
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    def rearranged(inputs, training):
        return inputs.to(memory_format=torch.channels_last) if training else inputs

    trainer = make(model, wide, wide, transform=rearranged)
    trainer.train_epoch(0.1, seed=0)
    trainer.evaluate()
    last = [images.is_contiguous(memory_format=torch.channels_last) for images in seen]
    assert last == [True, False]


def test_channels_last_changes_the_speed_not_the_result():
    for name, array in weights_after(channels_last=True).items():
        np.testing.assert_allclose(array, weights_after()[name], rtol=1e-3, atol=1e-4)


# Data sets


class Pairs(Dataset):
    """A data set that gives one example at a time."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


@pytest.mark.parametrize("options", [{}, {"workers": 1}], ids=str)
def test_any_data_set_trains_as_a_tensor_data_set_does(options):
    assert same(weights_after(train_set=Pairs(examples()), **options), weights_after())


def test_workers_change_nothing():
    assert same(weights_after(EPOCHS[:1], workers=1), weights_after(EPOCHS[:1]))


@pytest.mark.parametrize(("n", "trained"), [(33, 32), (32, 32), (34, 34), (17, 16), (15, 15)])
def test_only_a_single_left_over_example_is_left_out(n, trained):
    # Batch norm over one value per channel is an error in torch.
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    assert make(model, examples(n)).train_epoch(0.1, seed=0).num_examples == trained


def test_the_only_example_of_a_participant_is_trained_on():
    assert make(train_set=examples(1)).train_epoch(0.1, seed=0).num_examples == 1


def test_an_empty_shard_is_refused():
    empty = TensorDataset(torch.empty(0, 3, 6, 6), torch.empty(0, dtype=torch.int64))
    with pytest.raises(ColearnError, match="expected at least one example, found none"):
        make(train_set=empty)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ColearnError, match="expected float32, bfloat16 or float16, found 'half'"):
        make(precision="half")


# Weights


@pytest.mark.parametrize("build", [network, resnet8, small_cnn])
def test_weights_travel_and_return_exactly(build):
    model = build()
    for module in model.modules():  # statistics and counters of a trained model
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.num_batches_tracked += 2**40 + 1
    sent = make(model).get_weights()
    record = ArrayRecord({name: Array(array) for name, array in sent.items()})
    receiver = make(build())
    receiver.set_weights({name: array.numpy() for name, array in record.items()})
    assert same(receiver.get_weights(), sent)
    assert same(sent, numpy_state(model))
    counters = [array for name, array in sent.items() if name.endswith("num_batches_tracked")]
    assert {(array.shape, array.dtype.name) for array in counters} == {((), "int64")}


def test_weights_are_a_snapshot():
    trainer = make()
    taken = trainer.get_weights()
    copies = {name: array.copy() for name, array in taken.items()}
    train(trainer)
    assert same(taken, copies)
    assert not same(taken, trainer.get_weights())


def test_weights_given_may_be_read_only_and_stay_as_they_are():
    given = make(network(seed=1)).get_weights()
    copies = {name: array.copy() for name, array in given.items()}
    for array in given.values():
        array.flags.writeable = False
    trainer = make()
    trainer.set_weights(given)
    train(trainer)
    assert same(given, copies)


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("1.running_var"),
        lambda weights: weights.update(surplus=np.zeros(3, np.float32)),
        lambda weights: weights.update({"5.bias": np.zeros(4, np.float32)}),
    ],
    ids=["missing", "surplus", "shape"],
)
def test_weights_of_another_model_are_refused(change):
    trainer = make()
    weights = trainer.get_weights()
    change(weights)
    with pytest.raises(ColearnError, match="expected those of this participant's Sequential"):
        trainer.set_weights(weights)


# Optimizer


def test_new_weights_come_with_a_fresh_optimizer():
    trainer = make(momentum=0.9)
    start = trainer.get_weights()
    train(trainer)
    trained = trainer.get_weights()
    assert trainer.get_optimizer_state()
    trainer.set_weights(start)
    assert trainer.get_optimizer_state() == {}
    train(trainer)
    assert same(trainer.get_weights(), trained)


def test_rounds_that_keep_the_optimizer_are_one_uninterrupted_training():
    options = {"momentum": 0.9, "weight_decay": 0.01}
    trainer = make(**options)
    train(trainer, EPOCHS[:2])
    weights, state = trainer.get_weights(), trainer.get_optimizer_state()
    del trainer  # the participant's process ends; another one goes on
    successor = make(network(seed=9), **options)
    successor.set_weights(weights)
    successor.set_optimizer_state(state)
    train(successor, EPOCHS[2:])
    assert same(successor.get_weights(), weights_after(**options))
    successor.set_weights(weights)
    train(successor, EPOCHS[2:])
    assert not same(successor.get_weights(), weights_after(**options))


def test_the_optimizers_state_is_momentum_by_parameter_and_a_snapshot():
    trainer = make(momentum=0.9)
    assert trainer.get_optimizer_state() == {}
    train(trainer, EPOCHS[:1])
    state = trainer.get_optimizer_state()
    copies = {name: array.copy() for name, array in state.items()}
    shapes = [tuple(p.shape) for p in trainer.model.parameters()]
    assert [array.shape for array in state.values()] == shapes
    train(trainer, EPOCHS[1:])
    assert same(state, copies)


def test_sgd_without_momentum_has_no_state_to_keep():
    trainer = make(momentum=0.0)
    train(trainer)
    state = trainer.get_optimizer_state()
    assert state == {}
    trainer.set_optimizer_state(state)
    train(trainer)


def test_frozen_parameters_stay_as_they_are():
    model = network()
    model[0].requires_grad_(False)
    trainer = make(model, weight_decay=0.1)
    before = trainer.get_weights()
    train(trainer)
    after = trainer.get_weights()
    assert np.array_equal(before["0.weight"], after["0.weight"])
    assert not np.array_equal(before["5.weight"], after["5.weight"])


# Evaluation


def test_evaluation_agrees_with_scikit_learn():
    test_set = examples(300, seed=1)  # more than one batch
    trainer = make(test_set=test_set)
    train(trainer, EPOCHS[:1])
    before = trainer.get_weights()
    metrics = trainer.evaluate()
    model = network().eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in before.items()})
    inputs, targets = test_set.tensors
    probabilities = softmax(model(inputs), 1).detach().double()
    probabilities /= probabilities.sum(1, keepdim=True)
    assert metrics["num-examples"] == 300
    assert metrics["accuracy"] == accuracy_score(targets, probabilities.argmax(1))
    assert 0.3 < metrics["accuracy"] < 1.0
    assert metrics["loss"] == pytest.approx(log_loss(targets, probabilities), rel=1e-5)
    assert same(trainer.get_weights(), before)


def test_predictions_come_in_the_order_of_the_test_set():
    test_set = examples(300, seed=1)
    outputs, targets = make(test_set=test_set).predict()
    np.testing.assert_array_equal(targets, test_set.tensors[1])
    expected = network().eval()(test_set.tensors[0]).detach()
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    assert outputs.dtype == np.float32


def test_the_transform_is_told_whether_it_is_for_training():
    told = []

    def transform(inputs, training):
        told.append(training)
        return inputs

    trainer = make(test_set=examples(), transform=transform)
    train(trainer, EPOCHS[:1])
    assert set(told) == {True}
    told.clear()
    trainer.evaluate()
    assert set(told) == {False}


def test_evaluation_without_a_test_set_is_refused():
    with pytest.raises(ColearnError, match="expected a data set to evaluate on, found None"):
        make().evaluate()


# Recalibration


def test_trainers_recalibrate_over_their_whole_shard_without_augmentation():
    seen = []

    def transform(inputs, training):
        seen.append((len(inputs), training))
        return inputs.double()

    shard, model = examples(257), network().double()
    arrays, count = make(model, shard, transform=transform).recalibrated()
    assert count == 256  # a single one that is left over cannot be normalised
    assert seen == [(256, False)]
    reached = model[0](shard.tensors[0][:256].double()).transpose(0, 1).flatten(1)
    np.testing.assert_allclose(arrays["1.running_var"], reached.detach().var(1, unbiased=False))


# Loss scaling


def steep_problem():
    """A linear regression of 48 examples, whose scaled float16 gradients overflow at first."""
    generator = torch.Generator().manual_seed(0)
    inputs = 30.0 * torch.randn(48, 4, generator=generator)
    torch.manual_seed(0)
    return nn.Linear(4, 1), inputs, inputs.sum(1, keepdim=True)


def squared_error(model, inputs, targets):
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(inputs), targets))


def steep_round(epochs, problem, clip_norm=None):
    model, inputs, targets = problem
    trainer = TorchTrainer(
        model,
        TensorDataset(inputs, targets),
        batch_size=16,
        loss=nn.functional.mse_loss,
        device="cpu",
        precision="float16",
        clip_norm=clip_norm,
    )
    return follow(LocalPlan(1, epochs, 1e-4), trainer, seed=0)


@pytest.mark.parametrize("clip_norm", [None, 1e3])
@pytest.mark.parametrize("epochs", [1, 8])
def test_few_float16_batches_with_steep_gradients_learn(epochs, clip_norm):
    problem = steep_problem()
    before = squared_error(*problem)
    metrics = steep_round(epochs, problem, clip_norm)
    assert squared_error(*problem) < 0.95 * before
    assert metrics["skipped-steps"] >= 3  # all steps of a first epoch


def test_float16_examples_of_nan_end_the_round_with_an_error():
    model, inputs, targets = steep_problem()
    with pytest.raises(ColearnError, match=r"found all 3 skipped .*loss nan"):
        steep_round(2, (model, torch.full_like(inputs, float("nan")), targets))


def test_the_loss_scale_lives_through_a_round_and_not_longer():
    trainer = make(network(), precision="float16")
    trainer._scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.train_epoch(0.01, 1)
    assert trainer._scaler.get_scale() == 2.0
    trainer.set_weights(trainer.get_weights())
    assert trainer._scaler.get_scale() == 65_536.0


def test_float32_reports_no_skipped_steps():
    assert "skipped-steps" not in follow(LocalPlan(1, 1, 0.1), make(), seed=0)


def test_a_long_epoch_of_nan_in_float16_has_no_step_either():
    model, _, _ = steep_problem()
    inputs = torch.full((400, 4), float("nan"))  # more skipped steps than halvings until 0
    trainer = TorchTrainer(
        model,
        TensorDataset(inputs, torch.zeros(400, 1)),
        batch_size=1,
        loss=nn.functional.mse_loss,
        device="cpu",
        precision="float16",
    )
    with pytest.raises(ColearnError, match="found all 400 skipped"):
        follow(LocalPlan(1, 1, 1e-4), trainer, seed=0)


# Unusual models and shards


def batch_normed(layer=nn.BatchNorm1d):
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 5), layer(5), nn.Linear(5, 3))


@pytest.mark.parametrize(("n", "batch_size"), [(1, 16), (4, 1)])
@pytest.mark.parametrize("layer", [nn.BatchNorm1d, BatchRenormLayer])
def test_a_batch_of_one_under_batch_norm_is_an_error_of_ours(n, batch_size, layer):
    trainer = make(batch_normed(layer), examples(n), batch_size=batch_size)
    found = f"found a batch of 1 of this site's {n} examples"
    with pytest.raises(ColearnError, match=found):
        trainer.train_epoch(0.1, 0)
    with pytest.raises(ColearnError, match=found):
        trainer.gradients(["1.weight"], 1, 0)


@pytest.mark.parametrize(
    "model", [lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 3)), network], ids=["none", "2d"]
)
def test_one_example_is_enough_where_every_channel_has_values(model):
    model = model()
    before = numpy_state(model)
    assert make(model, examples(1)).train_epoch(0.1, 0).num_examples == 1
    assert not same(before, numpy_state(model))


class Extra(nn.Linear):
    def __init__(self, extra):
        super().__init__(108, 3)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), r"lazy ones \['1\.weight'"),
        (lambda: nn.LazyBatchNorm1d(), "lazy ones"),
        (lambda: network().requires_grad_(False), "one parameter that is trained, found none"),
        (nn.Flatten, "one parameter that is trained, found none"),
        (lambda: Extra({"steps": 3}), "found dict at '_extra_state'"),
    ],
)
def test_a_model_that_cannot_be_trained_together_is_refused_at_once(model, message):
    with pytest.raises(ColearnError, match=message):
        make(model())


def test_a_bfloat16_model_trains_and_keeps_its_momentum():
    def cast(inputs, training):
        return inputs.to(torch.bfloat16)

    trainer = make(network().to(torch.bfloat16), transform=cast)
    losses = [result.loss for result in train(trainer)]
    assert losses[-1] < losses[0]
    weights, state = trainer.get_weights(), trainer.get_optimizer_state()
    assert {a.dtype for a in state.values()} == {np.dtype(np.float32)}
    trainer.set_weights(weights)
    trainer.set_optimizer_state(state)
    assert same(trainer.get_weights(), weights)
    assert same(trainer.get_optimizer_state(), state)
    gradients, _ = trainer.gradients(["0.weight"], 1, 0)
    assert gradients["0.weight"].dtype == np.float32


def test_extra_state_that_is_a_tensor_travels():
    model = nn.Sequential(nn.Flatten(), Extra(torch.tensor([3.0])))
    trainer = make(model)
    weights = trainer.get_weights()
    assert weights["1._extra_state"] == [3.0]
    trainer.set_weights({**weights, "1._extra_state": np.array([4.0], np.float32)})
    assert model[1].extra == torch.tensor([4.0])


# bfloat16 models


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_bfloat16_model_learns_and_travels_as_float32(precision):
    model = network().bfloat16()
    trainer = make(model, test_set=examples(60, seed=1), precision=precision, clip_norm=5.0)
    losses = [result.loss for result in train(trainer, [(0.05, seed) for seed in range(10)])]
    assert losses[-1] < 0.6 * losses[0]
    assert trainer.evaluate()["accuracy"] > 0.6  # chance is a third
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    weights = trainer.get_weights()
    assert {array.dtype.name for array in weights.values()} == {"float32", "int64"}
    other = make(network(seed=1).bfloat16())
    other.set_weights(weights)
    assert same(other.get_weights(), weights)


def test_optimizer_gradients_and_statistics_of_a_bfloat16_model_are_arrays_too():
    trainer = make(network().bfloat16())
    train(trainer, EPOCHS[:1])
    state = trainer.get_optimizer_state()
    assert {array.dtype.name for array in state.values()} == {"float32"}
    other = make(network(seed=1).bfloat16())
    other.set_optimizer_state(state)
    assert same(other.get_optimizer_state(), state)
    arrays, _ = trainer.gradients(["0.weight"], 1, 0)
    assert arrays["0.weight"].dtype == np.float32
    statistics, _ = trainer.recalibrated()
    assert {array.dtype.name for array in statistics.values()} == {"float32"}
