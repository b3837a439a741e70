import copy
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torchvision.models import resnet18

from clients.torch.models.small import resnet8
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
from flwr_colearn.grids import GROUP, RANK, AllReduceGroup
from flwr_colearn.grids.all_reduce import _groups
from flwr_colearn.normalization import layer_arrays
from flwr_colearn.torch import BatchRenormLayer, convert, normalised, recalibrated
from flwr_colearn.torch import roles as roles_of

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


def timm_layers():
    return pytest.importorskip("timm.layers", reason="timm is not installed")


class Shift(nn.Module):
    """Stands for dropout: changes its inputs in training only, but always in the same way."""

    def forward(self, inputs):
        return inputs - 0.3 if self.training else inputs


def acting():
    """Norms that timm's way of dropping and acting is a part of; in place, and with a weight."""
    norm = timm_layers().BatchNormAct2d
    torch.manual_seed(0)
    return scramble(
        nn.Sequential(
            nn.Conv2d(3, CHANNELS, 3), norm(CHANNELS, drop_layer=Shift),
            nn.Conv2d(CHANNELS, 5, 2), norm(5, drop_layer=Shift, act_layer="prelu"),
            nn.Flatten(), nn.Linear(20, 2),
        ).double()
    )  # fmt: skip


class Doubled(nn.BatchNorm2d):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


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


def test_dropout_within_a_layer_is_no_part_of_recalibrated_statistics():
    net, (x,) = acting().train(), batches([6])
    found = recalibrated(net, [x])
    inside = nn.functional.batch_norm(
        net[0](x), None, None, net[1].weight, net[1].bias, training=True
    )
    values = net[2](inside.relu()).transpose(0, 1).flatten(1).detach().numpy()
    np.testing.assert_allclose(found["3.running_mean"], values.mean(1), rtol=1e-9)
    np.testing.assert_allclose(found["3.running_var"], values.var(1), rtol=1e-9)
    assert all(module.training for module in net.modules())


def test_recalibration_without_data_is_refused():
    with pytest.raises(ColearnError, match="at least one batch"):
        recalibrated(network(), [])


# Synchronised ------------------------------------------------------------------------------------


def in_threads(net, data, work):
    """Run ``work(net_k, data_k)`` for every participant, in a group of threads."""
    group = AllReduceGroup(len(data))
    _groups[999] = group
    nets = [copy.deepcopy(net) for _ in data]
    errors = []

    def run(rank):
        config = {"normalization": "synchronised", GROUP: 999, RANK: rank}
        try:
            with normalised(nets[rank], config):
                work(nets[rank], data[rank])
        except Exception as error:
            errors.append(error)
            group.leave()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(data))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del _groups[999]
    if errors:
        raise errors[0]
    return nets, group


@pytest.mark.parametrize("make", [network, deep, acting])
def test_synchronised_equals_one_batch_norm_over_the_joint_batch(make):
    net, data = make().train(), batches([4, 6, 11])
    for x in data:
        x.requires_grad_()
    outputs = {}

    def work(own, x):
        y = own(x)
        outputs[len(x)] = y
        (y**2 + y).mean().backward()

    nets, group = in_threads(net, data, work)
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
    widths = {network: [CHANNELS], deep: [CHANNELS, 5, 6], acting: [CHANNELS, 5]}[make]
    # A layer moves, each way: sums, count and examples; squares; two sums of gradients.
    assert group.bytes == 2 * 3 * 8 * sum(4 * width + 2 for width in widths)


def test_what_follows_a_synchronised_layer_without_gamma_may_act_in_place():
    net = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.ReLU(inplace=True)).double()
    parts = [x.requires_grad_() for x in batches([6, 6])]
    in_threads(net, parts, lambda own, x: own(x).square().mean().backward())
    joint = torch.cat([x.detach() for x in parts]).requires_grad_()
    net(joint).square().mean().backward()
    gradient = torch.cat([x.grad / 2 for x in parts])
    torch.testing.assert_close(gradient, joint.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("make", [network, acting])
def test_in_evaluation_synchronised_layers_meet_nobody(make):
    net, (x,) = make().eval(), batches([4])
    outputs = []
    nets, group = in_threads(net, [x, x], lambda own, x: outputs.append(own(x)))
    assert group.bytes == 0
    assert all(torch.equal(output, net(x)) for output in outputs)
    assert all(type(layer).forward is layer.forward.__func__ for layer in nets[0].modules())


@pytest.mark.parametrize(
    ("other", "found"),
    [(Doubled, r"found .*\.Doubled"), (BatchRenormLayer, "found a layer with batch renorm")],
)
def test_synchronised_refuses_a_layer_that_does_anything_else_and_leaves_the_model_as_it_was(
    other, found
):
    net = nn.Sequential(nn.BatchNorm2d(3), other(3))
    _groups[999] = AllReduceGroup(1)
    config = {"normalization": "synchronised", GROUP: 999, RANK: 0}
    with pytest.raises(ColearnError, match=found), normalised(net, config):
        pass
    del _groups[999]
    assert not any("forward" in vars(layer) for layer in net)


def test_one_that_leaves_ends_the_group_of_all():
    def work(own, x):
        if len(x) == 6:
            raise RuntimeError("boom")
        own(x)

    with pytest.raises(RuntimeError, match="boom"):
        in_threads(network().train(), batches([4, 6, 11]), work)


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


def test_dropout_within_a_frozen_layer_goes_on():
    net, (x,) = acting().train(), batches([6])
    inside, norm = net[0](x), net[1]
    normal = nn.functional.batch_norm(
        inside, norm.running_mean, norm.running_var, norm.weight, norm.bias
    )
    with normalised(net, {"normalization": "frozen", "normalization-frozen": True}):
        torch.testing.assert_close(net[1](inside), (normal - 0.3).relu())
        torch.testing.assert_close(net.train()[1](inside), (normal - 0.3).relu())
        torch.testing.assert_close(net.eval()[1](inside), normal.relu())


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


@pytest.mark.parametrize(("name", "size"), [("resnetv2_50", 32), ("inception_v4", 75)])
def test_timm_networks_under_batch_renorm_with_r_1_and_d_0_compute_what_they_did(name, size):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    net = scramble(timm.create_model(name, num_classes=10)).double().train()
    net.get_classifier().reset_parameters()  # timm's has weights of 0.01: hardly any outputs
    new = convert(net, BatchRenorm(r_max=1, d_max=0, warmup=0))
    assert sum(isinstance(layer, BatchRenormLayer) for layer in new.modules()) > 40
    before, after = net.state_dict(), new.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(new(x), net(x), rtol=1e-8, atol=1e-8)
    for (name, found), wanted in zip(new.named_buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8, msg=name)


def test_a_timm_network_with_group_norm_acts_after_it():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    net = scramble(timm.create_model("resnetv2_50", num_classes=10)).train()
    new, kind = convert(net, GroupNorm(4)), timm_layers().BatchNormAct2d
    norms = {name: layer for name, layer in net.named_modules() if isinstance(layer, kind)}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert list(new.state_dict()) == [n for n in net.state_dict() if not n.endswith(statistics)]
    seen = []

    def check(name, layer, args, output):
        old = norms[name]
        wanted = nn.functional.group_norm(args[0], 4, old.weight, old.bias, old.eps).relu()
        torch.testing.assert_close(output, wanted)
        seen.append(name)

    for name in norms:
        new.get_submodule(name).register_forward_hook(partial(check, name))
    new(torch.randn(2, 3, 32, 32)).sum().backward()
    assert sorted(seen) == sorted(norms)


@pytest.mark.parametrize("scheme", [GroupNorm(2), LayerNorm(), BatchRenorm()])
def test_what_follows_a_norm_stays_with_its_arrays_and_its_mode(scheme):
    net = acting().train()
    net[1].drop.eval()
    new = convert(convert(net, BatchRenorm()), scheme)  # by way of a layer of our own
    assert torch.equal(new.state_dict()["3.act.weight"], net[3].act.weight)
    assert [new[1].drop.training, new[3].drop.training] == [False, True]
    (x,) = batches([4], features=CHANNELS)
    assert (new[1](x) >= 0).all()


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


@pytest.mark.parametrize("make", [deep, acting])
def test_batch_renorm_evaluates_as_batch_norm(make):
    net, (x,) = make().eval(), batches([5])
    assert torch.equal(convert(net, BatchRenorm())(x), net(x))


@pytest.mark.parametrize("make", [deep, acting])
def test_batch_renorm_with_r_1_and_d_0_is_batch_norm_forward_and_backward(make):
    net, (x,) = make().train(), batches([5])
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


@pytest.mark.parametrize("timm_is", ["installed", "absent"])
def test_a_layer_that_does_anything_else_is_not_converted_in_silence(timm_is, monkeypatch):
    if timm_is == "installed":
        timm_layers()
    else:
        monkeypatch.setitem(sys.modules, "timm.layers", None)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Doubled(4))
    for scheme in (GroupNorm(2), LayerNorm(), BatchRenorm()):
        with pytest.raises(ColearnError, match=r"expected batch-norm.*found .*\.Doubled"):
            convert(net, scheme)
        convert(net[:2], scheme)
    assert convert(net, Pooled())(torch.zeros(1, 3, 5, 5)).shape == (1, 4, 3, 3)


def test_a_timm_layer_of_another_forward_is_not_converted_in_silence():
    class Other(timm_layers().BatchNormAct2d):
        def forward(self, inputs):
            return self.drop(self.act(inputs))

    with pytest.raises(ColearnError, match=r"found .*Other"):
        convert(nn.Sequential(Other(4)), GroupNorm(2))


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
    assert LocalBN().local(arrays, roles_of(net)) == wanted
