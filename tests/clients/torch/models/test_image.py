import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from clients.torch.models import image
from clients.torch.models.image import SMALLEST_INCEPTION, AtLeast
from flwr_colearn import ColearnError, Role
from flwr_colearn.torch import roles as roles_of

torch.set_num_threads(1)  # small batches: more threads only get in each other's way

needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")

NETWORKS = [
    # Published counts of the 1000-class networks; for 10 classes the last layer has fewer.
    ("vgg19", 1000, 143_667_240),
    ("resnet152", 1000, 60_192_808),
    ("resnet152", 10, 58_164_298),
    # 16 convolutions with bias, 5,504 channels with scale and shift, and the head.
    ("vgg19_bn", 10, 20_024_384 + 2 * 5_504 + 5_130),
    pytest.param("inception_v4", 1000, 42_679_816, marks=needs_timm),
    pytest.param("inception_v4", 10, 41_158_186, marks=needs_timm),
    pytest.param("inception_resnet_v2", 10, 54_321_834, marks=needs_timm),
    pytest.param("resnetv2_101", 1000, 44_541_480, marks=needs_timm),
]


def build(name, num_classes):
    return getattr(image, name)(num_classes=num_classes)


@pytest.mark.parametrize(("name", "num_classes", "parameters"), NETWORKS)
def test_parameters_are_the_published_ones_and_all_are_trained(name, num_classes, parameters):
    with torch.device("meta"):
        model = build(name, num_classes)
    roles = roles_of(model)
    state = model.state_dict()
    trained = [name for name in state if roles[name] is Role.TRAINABLE]
    assert sum(state[name].numel() for name in trained) == parameters
    # What is not trained are batch norm's statistics and counters, and no buffer besides.
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for role in (Role.MEAN, Role.VARIANCE, Role.COUNTER):
        assert sum(found is role for found in roles.values()) == len(norms)
    assert len(roles) == len(state) == len(trained) + 3 * len(norms)


@pytest.mark.parametrize(
    ("name", "num_classes", "size"),
    [
        ("vgg19_bn", 10, 32),
        ("resnet152", 10, 32),
        pytest.param("inception_v4", 10, 32, marks=needs_timm),
        pytest.param("inception_v4", 7, 75, marks=needs_timm),
        pytest.param("inception_resnet_v2", 10, 32, marks=needs_timm),
        pytest.param("inception_resnet_v2", 10, 75, marks=needs_timm),
        ("vgg19", 20, 224),
        pytest.param("resnetv2_101", 20, 64, marks=needs_timm),
        pytest.param("inception_v4", 1000, 299, marks=needs_timm),
    ],
)
def test_images_of_the_tasks_sizes_become_logits(name, num_classes, size):
    with torch.device("meta"):
        model = build(name, num_classes)
        assert model(torch.zeros(2, 3, size, size)).shape == (2, num_classes)


def test_resnet152_works_on_32_16_8_and_4_pixels():
    with torch.device("meta"):
        model = image.resnet152()
        sizes = []
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            stage.register_forward_hook(lambda m, _, out: sizes.append(tuple(out.shape[-2:])))
        model(torch.zeros(2, 3, 32, 32))
    assert sizes == [(32, 32), (16, 16), (8, 8), (4, 4)]


def without_gradient(size):
    """The share of Inception-V4's kernel weights that one step on images of this size misses."""
    torch.manual_seed(0)
    model = image.inception_v4()[1]
    nn.functional.cross_entropy(model(torch.randn(2, 3, size, size)), torch.arange(2)).backward()
    kernels = [p.grad for p in model.parameters() if p.dim() == 4]
    return sum(int((g == 0).sum()) for g in kernels) / sum(g.numel() for g in kernels)


@needs_timm
def test_from_the_chosen_size_on_inception_v4_trains_all_of_its_weights():
    assert without_gradient(SMALLEST_INCEPTION - 1) > 0.1
    assert without_gradient(SMALLEST_INCEPTION) < 0.01  # dead rectifiers at a single step


def test_only_images_that_are_too_small_are_enlarged():
    enlarge = AtLeast(5)
    large = torch.rand(1, 3, 5, 9)
    assert enlarge(large) is large
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    # Bilinear by hand: the centre of pixel i of 5 lies at (i + 0.5) * 4 / 5 - 0.5 of the 4.
    expected = torch.tensor([0.0, 0.7, 1.5, 2.3, 3.0])
    assert enlarge(ramp).shape == (1, 1, 5, 5)
    torch.testing.assert_close(enlarge(ramp)[0, 0], expected.expand(5, 5))


@pytest.mark.parametrize("name", ["inception_v4", "inception_resnet_v2", "resnetv2_101"])
def test_without_timm_the_extra_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(ColearnError, match=r"'model': expected timm.*pip install .*\[study\]"):
        build(name, 10)
