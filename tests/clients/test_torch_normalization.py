import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import TensorDataset
from torchvision.models import resnet18

from clients.models import resnet8
from clients.torch_normalization import BatchRenormLayer, convert, normalised, recalibrated
from clients.torch_trainer import TorchTrainer, roles_of
from flwr_colearn import (
    BatchRenorm,
    ColearnError,
    GroupNorm,
    LayerNorm,
    LocalBN,
    Pooled,
    Role,
    RunningMean,
)
from flwr_colearn.normalization import layer_arrays
from flwr_colearn.sidebyside import Meeting, _meetings

CHANNELS = 4


def batches(sizes, seed=0, features=3):
    """Batches of participants that are unlike each other."""
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, features, 5, 5, generator=g, dtype=torch.float64) * (k + 1) + 3 * k
        for k, n in enumerate(sizes)
    ]


def network(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), norm(CHANNELS), nn.ReLU(), nn.Flatten(),
                        nn.Linear(CHANNELS * 9, 2)).double()  # fmt: skip
    return scramble(net)


def deep():
    torch.manual_seed(0)
    return scramble(
        nn.Sequential(
            nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.Tanh(),
            nn.Conv2d(CHANNELS, 5, 2), nn.BatchNorm2d(5), nn.Tanh(),
            nn.Flatten(), nn.Linear(20, 6), nn.BatchNorm1d(6), nn.Linear(6, 2),
        ).double()
    )  # fmt: skip


def scramble(net):
    """Give every gamma, beta and statistic a value of its own."""
    for layer in net.modules():
        if hasattr(layer, "running_mean") or isinstance(layer, nn.GroupNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -1, 1)
        if hasattr(layer, "running_mean"):
            nn.init.uniform_(layer.running_mean, -1, 1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return net


# Recalibration -----------------------------------------------------------------------------------


def pooled(net, each, weights):
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    roles = roles_of(net)
    names = [name for name in state if roles[name] in (Role.MEAN, Role.VARIANCE)]
    mean = RunningMean({n: state[n] for n in names}, {n: roles[n] for n in names})
    for data, weight in zip(each, weights, strict=True):
        mean.add(recalibrated(net, data), weight)
    return mean.mean()


def test_recalibrated_equals_update_bn_on_the_joint_data():
    net, data = network(), batches([4, 6, 11])
    found = pooled(net, [[x] for x in data], [len(x) for x in data])
    update_bn([torch.cat(data)], net)
    count = 21 * 9  # values of a channel; torch keeps the unbiased variance
    np.testing.assert_allclose(found["1.running_mean"], net[1].running_mean, rtol=1e-12)
    np.testing.assert_allclose(
        found["1.running_var"], net[1].running_var * (count - 1) / count, rtol=1e-12
    )


def test_recalibrated_does_not_depend_on_how_the_data_are_cut():
    net, (x,) = network(), batches([12])
    whole, cut = recalibrated(net, [x]), recalibrated(net, x.split([5, 1, 6]))
    for name in whole:
        np.testing.assert_allclose(whole[name], cut[name], rtol=1e-12)


def test_recalibrated_at_depth_is_the_moments_of_what_reaches_each_layer():
    net, data = deep(), batches([8, 8, 8])
    found = pooled(net, [x.split(4) for x in data], [1, 1, 1])
    reached = {}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.register_forward_pre_hook(
                lambda _, args, name=name: reached.setdefault(name, []).append(args[0])
            )
    update_bn([part for x in data for part in x.split(4)], net)
    assert list(reached) == ["1", "4", "8"]
    for name, parts in reached.items():
        values = torch.cat(parts).transpose(0, 1).flatten(1).detach().numpy()
        np.testing.assert_allclose(found[f"{name}.running_mean"], values.mean(1), rtol=1e-9)
        np.testing.assert_allclose(found[f"{name}.running_var"], values.var(1), rtol=1e-9)
        np.testing.assert_allclose(
            found[f"{name}.running_mean"], net.get_submodule(name).running_mean, rtol=1e-9
        )


def test_recalibration_leaves_the_model_as_it_was():
    net = deep().eval()
    before = copy.deepcopy(net.state_dict())
    recalibrated(net, batches([4]))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not any(module.training for module in net.modules())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_recalibration_without_data_is_refused():
    with pytest.raises(ColearnError, match="at least one batch"):
        recalibrated(network(), [])


# Synchronised ------------------------------------------------------------------------------------


def side_by_side(net, data, work):
    """Run ``work(net_k, data_k)`` for every participant, at a meeting, in threads."""
    meeting = Meeting(len(data))
    _meetings[999] = meeting
    nets = [copy.deepcopy(net) for _ in data]
    errors = []

    def run(rank):
        config = {"normalization": "synchronised", "meeting": 999, "meeting-rank": rank}
        try:
            with normalised(nets[rank], config):
                work(nets[rank], data[rank])
        except Exception as error:
            errors.append(error)
            meeting.leave()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(data))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del _meetings[999]
    if errors:
        raise errors[0]
    return nets, meeting


@pytest.mark.parametrize("make", [network, deep])
def test_synchronised_equals_one_batch_norm_over_the_joint_batch(make):
    net, data = make().train(), batches([4, 6, 11])
    for x in data:
        x.requires_grad_()
    outputs = {}

    def work(own, x):
        y = own(x)
        outputs[len(x)] = y
        (y**2 + y).mean().backward()

    nets, meeting = side_by_side(net, data, work)
    joint = torch.cat([x.detach() for x in data]).requires_grad_()
    y = net(joint)
    (y**2 + y).mean().backward()
    parts = torch.cat([outputs[4], outputs[6], outputs[11]])
    torch.testing.assert_close(parts, y, rtol=1e-10, atol=1e-12)
    # Backward: to the inputs, each seen from the mean loss of its own batch, and to all weights.
    total = 21
    gradient = torch.cat([x.grad * len(x) / total for x in data])
    torch.testing.assert_close(gradient, joint.grad, rtol=1e-9, atol=1e-13)
    for name, parameter in net.named_parameters():
        mean = sum(
            own.get_parameter(name).grad * len(x) / total for own, x in zip(nets, data, strict=True)
        )
        torch.testing.assert_close(mean, parameter.grad, rtol=1e-9, atol=1e-12)
    for own in nets:
        for name, buffer in net.named_buffers():
            torch.testing.assert_close(own.get_buffer(name), buffer, rtol=1e-10, atol=1e-12)
    layers = 1 if make is network else 3
    widths = CHANNELS if make is network else CHANNELS + 5 + 6
    # A layer moves, each way: sums, count and examples; squares; two sums of gradients.
    assert meeting.bytes == 2 * 3 * 8 * (4 * widths + 2 * layers)


def test_in_evaluation_synchronised_layers_meet_nobody():
    net, (x,) = network().eval(), batches([4])
    nets, meeting = side_by_side(net, [x, x], lambda own, x: own(x))
    assert meeting.bytes == 0
    assert all(type(layer).forward is layer.forward.__func__ for layer in nets[0].modules())


def test_one_that_leaves_ends_the_meeting_of_all():
    def work(own, x):
        if len(x) == 6:
            raise RuntimeError("boom")
        own(x)

    with pytest.raises(RuntimeError, match="boom"):
        side_by_side(network().train(), batches([4, 6, 11]), work)


def test_synchronised_elsewhere_is_refused_with_the_reason():
    with (
        pytest.raises(ColearnError, match="every layer exchanges sums at every step"),
        normalised(network(), {"normalization": "synchronised"}),
    ):
        pass


# Frozen ------------------------------------------------------------------------------------------


def test_frozen_layers_normalise_with_the_shared_statistics_while_training():
    net, (x,) = deep(), batches([6])
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.eval()
    wanted = net(x)
    with normalised(net, {"normalization": "frozen", "normalization-frozen": True}):
        net.train()
        found = net(x)
        found.sum().backward()
        assert net[0].training
        assert all(net[i].weight.grad.abs().sum() > 0 for i in (1, 4))  # gamma learns
    torch.testing.assert_close(found, wanted)
    assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())
    net.train()
    assert net[1].training
    assert not torch.allclose(net(x), wanted)


def test_other_schemes_change_nothing():
    net, (x,) = network(), batches([6])
    wanted = copy.deepcopy(net).train()(x)
    with normalised(net, {"normalization": "frozen", "normalization-frozen": False}):
        assert torch.equal(net.train()(x), wanted)


# Conversions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [resnet8, resnet18])
@pytest.mark.parametrize("scheme", [GroupNorm(4), LayerNorm(), BatchRenorm()])
def test_every_layer_is_converted_by_type_and_weights_are_kept(build, scheme):
    net = scramble(build(num_classes=10))
    new = convert(net, scheme)
    plain = nn.modules.batchnorm._BatchNorm
    assert any(isinstance(layer, plain) for layer in net.modules())  # the model given is as it was
    kept = new.state_dict()
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name, tensor in net.state_dict().items():
        if isinstance(scheme, BatchRenorm) or not name.endswith(statistics):
            assert torch.equal(kept[name], tensor), name
        else:
            assert name not in kept
    left = [layer for layer in new.modules() if isinstance(layer, plain)]
    assert all(isinstance(layer, BatchRenormLayer) for layer in left)
    assert bool(left) == isinstance(scheme, BatchRenorm)
    new(torch.randn(2, 3, 32, 32)).sum().backward()


def test_other_schemes_convert_nothing():
    net = network()
    assert str(convert(net, Pooled())) == str(net)


def test_group_norm_of_one_sample_and_one_channel_a_group_is_batch_norm_of_that_sample():
    net, (x,) = network(), batches([1])
    new = convert(net, GroupNorm(CHANNELS))
    torch.testing.assert_close(new(x), net.train()(x), rtol=1e-10, atol=1e-12)


def test_layer_norm_is_torchs_over_channels_and_positions():
    net, (x,) = network(), batches([3])
    new = convert(net, LayerNorm())
    inside = net[0](x)
    wanted = nn.functional.layer_norm(inside, inside.shape[1:])
    wanted = wanted * net[1].weight.view(1, -1, 1, 1) + net[1].bias.view(1, -1, 1, 1)
    torch.testing.assert_close(new[1](inside), wanted, rtol=1e-10, atol=1e-12)


def test_batch_renorm_evaluates_as_batch_norm():
    net, (x,) = deep().eval(), batches([5])
    assert torch.equal(convert(net, BatchRenorm())(x), net(x))


def test_batch_renorm_with_r_1_and_d_0_is_batch_norm_forward_and_backward():
    net, (x,) = deep().train(), batches([5])
    new = convert(net, BatchRenorm(warmup=10**9)).train()
    for each in (net, new):
        (each(x) ** 2).sum().backward()
    torch.testing.assert_close(new(x), net(x), rtol=1e-10, atol=1e-12)
    for a, b in zip(new.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-11)
    for a, b in zip(new.buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_batch_renorm_with_open_limits_is_the_running_statistics_without_their_gradient():
    layer = BatchRenormLayer(3, BatchRenorm(r_max=1e9, d_max=1e9, warmup=0)).double().train()
    scramble(layer)
    (x,) = batches([6])
    x.requires_grad_()
    reference = copy.deepcopy(layer).eval()
    y = layer(x)
    torch.testing.assert_close(y, reference(x), rtol=1e-9, atol=1e-11)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    # Ioffe: r and d are constants, so the gradient is that of batch norm times r.
    r = (x.var((0, 2, 3), unbiased=False) + 1e-5).sqrt() / (reference.running_var + 1e-5).sqrt()
    scale = (r * layer.weight).detach().view(1, 3, 1, 1)
    normal = nn.functional.batch_norm(x, None, None, training=True)
    (wanted,) = torch.autograd.grad((normal * scale * weights).sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-11)


def test_a_layer_that_does_more_than_batch_norm_is_not_converted_in_silence():
    timm_layers = pytest.importorskip("timm.layers")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), timm_layers.BatchNormAct2d(4))  # with its ReLU
    for scheme in (GroupNorm(2), LayerNorm(), BatchRenorm()):
        with pytest.raises(ColearnError, match=r"expected batch-norm.*found timm.*BatchNormAct2d"):
            convert(net, scheme)
    assert convert(net, Pooled())(torch.zeros(1, 3, 5, 5)).shape == (1, 4, 3, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batch_renorm_takes_statistics_of_half_precision_in_float32(dtype):
    # Far from zero: in half precision the variance would be lost, or not finite.
    x = (100 + torch.randn(64, 3, generator=torch.Generator().manual_seed(0))).to(dtype)
    found, wanted = BatchRenormLayer(3).train(), BatchRenormLayer(3).train()
    outputs, reference = found(x), wanted(x.float())
    assert outputs.dtype == dtype
    torch.testing.assert_close(outputs, reference.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(found.running_var, wanted.running_var, rtol=0, atol=0)
    variance = 0.9 + 0.1 * x.double().var(0)
    torch.testing.assert_close(found.running_var.double(), variance, rtol=1e-5, atol=0)


def test_batch_renorm_clips():
    layer = BatchRenormLayer(1, BatchRenorm(r_max=2.0, d_max=0.5, warmup=0)).double().train()
    x = torch.tensor([[-40.0], [60.0]], dtype=torch.float64)  # mean 10, sigma 50; running 0 and 1
    assert layer(x).flatten().tolist() == pytest.approx([-2 + 0.5, 2 + 0.5], abs=1e-5)


def test_layers_of_a_torchvision_model_are_found_by_type():
    net = resnet18()
    arrays = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    found = layer_arrays(arrays, roles_of(net))
    wanted = [
        name for name in arrays
        if isinstance(net.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d)
    ]  # fmt: skip
    assert found == wanted
    assert any(name.startswith("layer2.0.downsample.1.") for name in found)
    assert LocalBN().kept(arrays, roles_of(net)) == wanted


# Trainer -----------------------------------------------------------------------------------------


def test_trainers_recalibrate_over_their_whole_shard_without_augmentation():
    seen = []

    def transform(x, training):
        seen.append((len(x), training))
        return x

    (x,) = batches([257])
    shard = TensorDataset(x, torch.zeros(257, dtype=torch.int64))
    trainer = TorchTrainer(network(), shard, device="cpu", transform=transform)
    arrays, examples = trainer.recalibrated()
    assert examples == 256  # a single one that is left over cannot be normalised
    assert seen == [(256, False)]
    values = trainer.model[0](x[:256]).transpose(0, 1).flatten(1).detach().numpy()
    np.testing.assert_allclose(arrays["1.running_var"], values.var(1), rtol=1e-10)
