import numpy as np
import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torchvision.models import resnet18

from clients.torch.models.small import densenet40, resnet8, small_cnn
from flwr_colearn import ColearnError, InProcessGrid, Role, RunningMean, participant_mod, run
from flwr_colearn.records import to_record
from flwr_colearn.roles import assign_roles, pair_statistics
from flwr_colearn.torch import get_arrays, set_arrays
from flwr_colearn.torch import roles as roles_of


@pytest.mark.filterwarnings("error")  # as torch's for arrays that are read-only
def test_arrays_are_copies_and_are_loaded_as_copies():
    model = nn.BatchNorm1d(2)
    taken = get_arrays(model)
    model.running_mean += 1
    assert not taken["running_mean"].any()
    assert taken["num_batches_tracked"].dtype == np.int64
    for array in taken.values():
        array.flags.writeable = False
    set_arrays(model, taken)
    model.running_mean += 1
    assert not taken["running_mean"].any()


def test_bfloat16_travels_as_float32_and_returns_with_the_same_bits():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).to(torch.bfloat16)
    taken = get_arrays(model)
    assert {name: a.dtype for name, a in taken.items() if a.dtype != np.float32} == {
        "1.num_batches_tracked": np.dtype(np.int64)
    }
    other = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).to(torch.bfloat16)
    set_arrays(other, taken)
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    # Between 1 and 1 + 2^-7 lies an average; the even neighbour of the middle is 1.
    set_arrays(other, {**taken, "0.bias": np.array([1, 1 + 2**-8, 1 + 3 * 2**-9, 2, 3], "f4")})
    assert other[0].bias.tolist() == [1, 1, 1 + 2**-7, 2, 3]


@pytest.mark.parametrize("other", [nn.BatchNorm1d(3), nn.Linear(2, 2)])
def test_arrays_of_another_model_are_refused(other):
    with pytest.raises(ColearnError, match="expected those of this participant's BatchNorm1d"):
        set_arrays(nn.BatchNorm1d(2), get_arrays(other))


class Buffers(nn.Module):
    """Parameters and buffers whose names say one thing and whose types another."""

    def __init__(self):
        super().__init__()
        self.running_mean = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("running_var", torch.ones(2))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int32))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        self.norm = nn.InstanceNorm2d(2, affine=True, track_running_stats=True)
        self.plain_norm = nn.BatchNorm1d(2, track_running_stats=False)


def test_types_decide_the_roles_not_names():
    model = Buffers()
    roles = roles_of(model)
    assert list(roles) == list(model.state_dict())
    assert names_of(roles, Role.TRAINABLE) == {
        "running_mean",
        "norm.weight",
        "norm.bias",
        "plain_norm.weight",
        "plain_norm.bias",
    }
    assert names_of(roles, Role.COUNTER) == {"steps", "mask", "norm.num_batches_tracked"}
    # Only these two are pooled: the frozen parameter and the other buffers are not statistics.
    assert names_of(roles, Role.VARIANCE) == {"norm.running_var"}
    pairs = pair_statistics(get_arrays(model), roles)
    assert pairs == [("norm.running_mean", "norm.running_var")]


def names_of(roles, wanted):
    return {name for name, role in roles.items() if role is wanted}


def test_batch_norm_in_torchvisions_shortcuts_is_found():
    with torch.device("meta"):
        roles = roles_of(resnet18())
    layer = "layer2.0.downsample.1."
    assert {name.removeprefix(layer): roles[name] for name in roles if name.startswith(layer)} == {
        "weight": Role.TRAINABLE,
        "bias": Role.TRAINABLE,
        "running_mean": Role.MEAN,
        "running_var": Role.VARIANCE,
        "num_batches_tracked": Role.COUNTER,
    }
    assert sum(role is Role.VARIANCE for role in roles.values()) == 20


def test_a_lone_layer_has_roles_too():
    assert roles_of(nn.BatchNorm2d(2))["running_var"] is Role.VARIANCE


@pytest.mark.parametrize("build", [small_cnn, resnet8, densenet40])
def test_roles_of_a_plain_network_are_the_plugins_defaults(build):
    model = build()
    assert roles_of(model) == assign_roles(get_arrays(model))


@pytest.mark.parametrize("freeze", [False, True])
def test_running_statistics_pair_with_each_other_even_if_the_layer_is_frozen(freeze):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].requires_grad_(not freeze)
    pairs = pair_statistics(get_arrays(model), roles_of(model))
    assert pairs == [("1.running_mean", "1.running_var")]


# Arrays without a mean, by the modules' types


def spectral(kind, layer):
    if kind == "hook":
        return nn.utils.spectral_norm(layer())
    return nn.utils.parametrizations.spectral_norm(layer())


def largest_singular_value(site, axis):
    """The one of the weight with which the layer computes."""
    site.eval()
    with torch.no_grad():
        site(torch.zeros(1, site.weight.shape[1 - axis], *[4] * (site.weight.dim() - 2)))
    matrix = site.weight.detach().numpy()
    return np.linalg.svd(np.moveaxis(matrix, axis, 0).reshape(matrix.shape[axis], -1))[1][0]


LAYERS = [
    (lambda: nn.Linear(6, 5), 0),
    (lambda: nn.Linear(6, 6), 0),
    (lambda: nn.Conv2d(3, 4, 3), 0),
    (lambda: nn.ConvTranspose2d(4, 4, 3), 1),  # which could be a Conv2d by its sizes
    (lambda: nn.ConvTranspose2d(3, 5, 2), 1),
]


@pytest.mark.parametrize("kind", ["hook", "parametrization"])
@pytest.mark.parametrize("by", ["type", "name"])
@pytest.mark.parametrize(("layer", "axis"), LAYERS)
def test_a_shared_spectral_norm_normalises_as_one_at_a_site_does(kind, by, layer, axis):
    sites = []
    for seed in range(4):
        torch.manual_seed(seed)
        sites.append(spectral(kind, layer))
    arrays = [get_arrays(site) for site in sites]
    mean = RunningMean(arrays[0], roles_of(sites[0]) if by == "type" else None)
    for each in arrays:
        mean.add(each)
    set_arrays(sites[0], mean.mean())
    assert largest_singular_value(sites[0], axis) == pytest.approx(1, abs=0.01)


def test_a_shared_spectral_norm_of_zeros_keeps_its_vectors():
    site = spectral("hook", lambda: nn.Linear(3, 2))
    arrays = {n: a if n != "weight_orig" else np.zeros_like(a) for n, a in get_arrays(site).items()}
    mean = RunningMean(arrays)
    mean.add(arrays)
    np.testing.assert_allclose(mean.mean()["weight_u"], arrays["weight_u"], rtol=1e-6)


def test_a_stock_strategy_shares_a_spectral_norm_too():
    app = ClientApp(mods=[participant_mod])

    @app.train()
    def train(message, context):
        torch.manual_seed(context.node_config["partition-id"])
        arrays = to_record(get_arrays(spectral("hook", LAYERS[0][0])))
        content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    site = spectral("hook", LAYERS[0][0])
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=4, min_available_nodes=4)
    result = run(strategy, InProcessGrid(app, 4), to_record(get_arrays(site)), num_rounds=1)
    set_arrays(site, {name: array.numpy() for name, array in result.arrays.items()})
    assert largest_singular_value(site, 0) == pytest.approx(1, abs=0.01)


def test_extremes_of_observers_have_their_roles():
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    model = nn.Sequential(FakeQuantize(MovingAverageMinMaxObserver, reduce_range=False))
    found = roles_of(model)
    assert found["0.activation_post_process.min_val"] == "min"
    assert found["0.activation_post_process.max_val"] == "max"
    assert found["0.scale"] == "buffer"
