"""Synchronous SGD over real torch participants, against single-site SGD on the joint batch."""

import copy

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import TensorDataset

from clients.client_app import make_client_app, normalising
from clients.torch.trainer import TorchTrainer
from flwr_colearn import (
    CoLearn,
    ColearnError,
    Frozen,
    InProcessGrid,
    Pooled,
    Recalibrated,
    Recovery,
    Synchronised,
    SynchronousSGD,
    ThreadedGrid,
)
from flwr_colearn.records import data_bytes
from flwr_colearn.torch import roles

K, STEPS, BATCHES = 3, 6, (4, 5, 7)  # examples of each participant, all in one batch


def network(norm=None):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), norm and norm(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)]
    return nn.Sequential(*(layer for layer in layers if layer)).double()


def batch_norm_act(channels):
    return pytest.importorskip("timm.layers", reason="timm is not installed").BatchNormAct2d(
        channels
    )


def data():
    generator = torch.Generator().manual_seed(1)
    shards = []
    for k, size in enumerate(BATCHES):  # unlike each other
        x = torch.randn(size, 1, 6, 6, generator=generator, dtype=torch.float64) * (k + 1) + k
        shards.append(TensorDataset(x, torch.randint(0, 3, (size,), generator=generator)))
    return shards


def participants(model, shards, **options):
    trainers = [
        TorchTrainer(copy.deepcopy(model), shard, batch_size=16, device="cpu", **options)
        for shard in shards
    ]
    return make_client_app(lambda context: trainers[context.node_config["partition-id"]])


def record_of(model):
    state = model.state_dict()
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in state.items()})


def single_site(model, shards, steps, **sgd):
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), **sgd)
    x, y = (torch.cat([shard.tensors[i] for shard in shards]) for i in (0, 1))
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def synchronous(model, shards, steps, lr, grid=InProcessGrid, normalization=None, **sgd):
    options = {} if normalization is None else {"normalization": normalization}
    strategy = SynchronousSGD(K, learning_rate=lr, roles=roles(model), **sgd, **options)
    app = participants(model, shards)
    result = strategy.start(grid(app, K), record_of(model), num_rounds=steps)
    return {name: array.numpy() for name, array in result.arrays.items()}, strategy


@pytest.mark.parametrize("sgd", [{}, {"momentum": 0.9, "weight_decay": 0.01}])
def test_equals_single_site_sgd_on_the_joint_batch(sgd):
    model, shards = network(), data()
    wanted = single_site(model, shards, STEPS, lr=0.1, **sgd)
    found, strategy = synchronous(model, shards, STEPS, lr=0.1, **sgd)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-10, atol=1e-12)
    assert len(strategy.history) == STEPS


def test_plain_batch_norm_interferes():
    # The counterpart of the test above: the equality is not for free.
    model, shards = network(nn.BatchNorm2d), data()
    wanted = single_site(model, shards, STEPS, lr=0.1)
    found, _ = synchronous(model, shards, STEPS, lr=0.1)
    assert np.abs(found["0.weight"] - wanted["0.weight"]).max() > 1e-3


def test_batches_of_a_pass_are_disjoint_and_complete_and_orders_differ():
    shard = TensorDataset(torch.arange(10.0)[:, None], torch.zeros(10, dtype=torch.int64))
    trainer = TorchTrainer(nn.Linear(1, 2), shard, batch_size=4, device="cpu")
    seen = [trainer._batch(step, seed=3)[0].flatten().tolist() for step in range(1, 7)]
    first, second = ([x for batch in half for x in batch] for half in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert seen[1] == trainer._batch(2, seed=3)[0].flatten().tolist()
    assert seen[0] != trainer._batch(1, seed=4)[0].flatten().tolist()


def test_frozen_and_unused_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.requires_grad = False
    shard = TensorDataset(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))
    trainer = TorchTrainer(model, shard, device="cpu")
    arrays, result = trainer.gradients(["0.weight", "1.weight"], 1, seed=0)
    assert not arrays["0.weight"].any()
    assert arrays["1.weight"].any()
    assert np.array_equal(arrays["1.bias"], model[1].bias.detach().numpy())  # not asked for
    assert result.num_examples == 4


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, batch_norm_act])
def test_synchronised_batch_norm_equals_single_site_sgd_too(norm):
    model, shards = network(norm), data()
    sgd = {"momentum": 0.9}
    wanted = single_site(model, shards, STEPS, lr=0.1, **sgd)
    found, strategy = synchronous(
        model, shards, STEPS, lr=0.1, grid=ThreadedGrid, normalization=Synchronised(), **sgd
    )
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-9, atol=1e-11)
    # 4 channels: sums, count and examples; squares; two sums of gradients; to and fro.
    moved = 2 * K * 8 * (4 + 2 + 4 + 8)
    models = 2 * K * data_bytes(record_of(model))
    sizes = [record.bytes_down + record.bytes_up for record in strategy.history]
    assert sizes == [models + moved] * STEPS
    model_bytes = sum(len(array.data) for array in record_of(model).values())
    assert strategy.history.bytes_total == STEPS * (2 * K * model_bytes + moved)


def test_synchronised_needs_participants_in_threads_and_steps():
    model = network(nn.BatchNorm2d)
    with pytest.raises(ColearnError, match="a ThreadedGrid"):
        synchronous(model, data(), 1, lr=0.1, normalization=Synchronised())
    with pytest.raises(ColearnError, match="SynchronousSGD"):
        CoLearn(K, local_epochs=1, learning_rate=0.1, normalization=Synchronised())


def test_synchronised_with_a_participant_that_fails_ends_with_the_reason():
    model, shards = network(nn.BatchNorm2d), data()
    app = participants(model, shards)
    strategy = SynchronousSGD(
        K,
        learning_rate=0.1,
        roles=roles(model),
        normalization=Synchronised(),
        recovery=Recovery(max_restarts=0),
    )
    grid = ThreadedGrid(app, K)
    grid.contexts[2].node_config["partition-id"] = 99  # there is no such trainer
    with pytest.raises(
        ColearnError, match=r"lost participant .*: the participant failed \(code 2\): "
    ):
        strategy.start(grid, record_of(model), num_rounds=1)


def test_frozen_and_recalibrated_run_through_the_app():
    model, shards = network(nn.BatchNorm2d), data()
    found, strategy = synchronous(model, shards, 4, lr=0.1, normalization=Recalibrated(every=2))
    sizes = [record.bytes_down + record.bytes_up for record in strategy.history]
    plain = 2 * K * data_bytes(record_of(model))
    assert [size > plain for size in sizes] == [False, True, False, True]
    net = network(nn.BatchNorm2d)
    net.load_state_dict({name: torch.from_numpy(array) for name, array in found.items()})
    update_bn([torch.cat([shard.tensors[0] for shard in shards])], net)
    # Uniform weights: means of the participants' means; here compared by number of examples.
    values = [net[0](shard.tensors[0]).transpose(0, 1).flatten(1) for shard in shards]
    sizes = np.array([len(shard) for shard in shards])
    means = np.stack([v.mean(1).detach().numpy() for v in values])
    variances = np.stack([v.var(1, unbiased=False).detach().numpy() for v in values])
    mean = (sizes[:, None] * means).sum(0) / sizes.sum()
    between = (sizes[:, None] * (means - mean) ** 2).sum(0) / sizes.sum()
    variance = (sizes[:, None] * variances).sum(0) / sizes.sum() + between
    np.testing.assert_allclose(found["1.running_mean"], mean, rtol=1e-9)
    np.testing.assert_allclose(found["1.running_var"], variance, rtol=1e-9)
    np.testing.assert_allclose(found["1.running_mean"], net[1].running_mean, rtol=1e-9)
    two, _ = synchronous(model, shards, 2, lr=0.1, normalization=Pooled())
    four, _ = synchronous(model, shards, 4, lr=0.1, normalization=Frozen(after=2))
    assert np.array_equal(two["1.running_var"], four["1.running_var"])
    assert not np.array_equal(two["1.weight"], four["1.weight"])


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"normalization": "synchronised"}, "normalised"),
        ({"normalization-frozen": True}, "normalised"),
    ],
)
def test_a_trainer_without_what_the_server_asks_for_says_so(config, method):
    with pytest.raises(ColearnError, match=method):
        normalising(object(), config)
    with normalising(object(), {"normalization": "pooled"}):
        pass
