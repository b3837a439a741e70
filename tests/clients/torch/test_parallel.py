"""A site with several devices trains as one device with the same batch would."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from clients.torch.parallel import ParallelTrainer, _Replica, convert_sync_batchnorm
from clients.torch.trainer import TorchTrainer
from clients.trainer import derive_seed
from flwr_colearn import ColearnError


def net():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def data(examples):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, 8, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 3, (examples,), generator=generator))


@pytest.fixture(scope="module")
def two_devices():
    return ParallelTrainer(net(), data(64), data(64), batch_size=16, devices=["cpu", "cpu"])


def test_two_devices_train_as_one_does(two_devices):
    one = TorchTrainer(net(), data(64), data(64), batch_size=16, device="cpu")
    weights = one.get_weights()
    one.set_weights(weights)
    two_devices.set_weights(weights)
    for seed, rate in enumerate([0.1, 0.05, 0.02]):
        alone, together = one.train_epoch(rate, seed), two_devices.train_epoch(rate, seed)
        assert together.num_examples == alone.num_examples == 64
        assert together.loss == pytest.approx(alone.loss, rel=1e-5)
    for name, array in one.get_weights().items():
        np.testing.assert_allclose(two_devices.get_weights()[name], array, rtol=1e-4, atol=1e-6)
    assert two_devices.evaluate() == pytest.approx(one.evaluate(), rel=1e-4)
    np.testing.assert_allclose(two_devices.predict()[0], one.predict()[0], rtol=1e-3, atol=1e-5)
    assert two_devices.roles() == one.roles()


def test_the_optimizer_state_travels(two_devices):
    weights = two_devices.get_weights()
    two_devices.train_epoch(0.1, 0)
    halfway, momentum = two_devices.get_weights(), two_devices.get_optimizer_state()
    two_devices.train_epoch(0.1, 1)
    straight_on = two_devices.get_weights()
    two_devices.set_weights(halfway)
    two_devices.set_optimizer_state(momentum)
    two_devices.train_epoch(0.1, 1)
    for name, array in straight_on.items():
        np.testing.assert_array_equal(two_devices.get_weights()[name], array)
        assert not np.array_equal(array, weights[name])


def test_examples_that_do_not_split_evenly_are_left_out():
    trainer = ParallelTrainer(net(), data(37), batch_size=16, devices=["cpu", "cpu"])
    assert trainer.train_epoch(0.1, 0).num_examples == 36
    assert trainer.batches_per_epoch() == 3
    assert trainer.train_epoch(0.1, 0, 2).num_examples == 32


def test_a_fault_on_a_device_is_told(two_devices):
    with pytest.raises(ColearnError, match=r"(?s)device 0.*Missing key"):
        two_devices.set_weights({"unknown": np.zeros(2, np.float32)})


def test_bad_arguments_say_what_was_expected():
    with pytest.raises(ColearnError, match="at least 2 devices"):
        ParallelTrainer(net(), data(8), batch_size=1, devices=["cpu", "cpu"])
    with pytest.raises(ColearnError, match="an example for each of 2 devices, found 1"):
        ParallelTrainer(net(), data(1), devices=["cpu", "cpu"])
    norm = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    with pytest.raises(ColearnError, match="CUDA devices"):
        ParallelTrainer(norm, data(8), devices=["cpu", "cpu"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_batch_norm_is_synchronised_over_gpus():
    def with_norm():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    one = TorchTrainer(with_norm(), data(64), batch_size=16, device="cuda:0")
    two = ParallelTrainer(with_norm(), data(64), batch_size=16, devices=["cuda:0", "cuda:1"])
    two.set_weights(one.get_weights())
    one.train_epoch(0.1, 0)
    two.train_epoch(0.1, 0)
    for name, array in one.get_weights().items():
        np.testing.assert_allclose(two.get_weights()[name], array, rtol=1e-3, atol=1e-5)


def test_every_device_draws_augmentation_of_its_own_from_the_epochs_seed():
    seeds = [_Replica.own_seed(SimpleNamespace(rank=rank), 7) for rank in (0, 1)]
    assert seeds == [derive_seed(7, 0), derive_seed(7, 1)]
    assert len(set(seeds)) == 2


def test_a_layer_of_which_more_would_be_lost_is_refused():
    class Doubled(nn.BatchNorm2d):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    with pytest.raises(ColearnError, match="Doubled, whose forward does something else"):
        ParallelTrainer(nn.Sequential(Doubled(3)), data(8), devices=["cuda:0", "cuda:1"])


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_synchronised_layers_do_what_they_did(kind):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    if kind == "timm":
        norm = pytest.importorskip("timm.layers").BatchNormAct2d(3)
    model, inputs = nn.Sequential(norm).eval(), torch.randn(4, 3, 2, 2)
    expected = model(inputs)
    converted = convert_sync_batchnorm(model)
    assert isinstance(converted[0], nn.SyncBatchNorm)
    assert torch.equal(converted(inputs), expected)
    assert (expected.min() >= 0) == (kind == "timm")  # its activation is a ReLU
