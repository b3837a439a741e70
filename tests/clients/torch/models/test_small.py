import pytest
import torch
from torch import nn

from clients.torch.models.small import densenet40, resnet8, resnet8_half, small_cnn, speech_cnn

torch.set_num_threads(1)  # small networks: more threads only get in each other's way


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize(
    ("build", "parameters", "image"),
    [
        (densenet40, 1_019_722, (3, 32, 32)),  # the number that the paper's authors' net has
        (resnet8, 78_042, (3, 32, 32)),
        (resnet8_half, 174_274, (3, 32, 32)),
        (small_cnn, 9_978, (1, 8, 8)),
        (speech_cnn, 12_538, (1, 98, 40)),
    ],
)
def test_parameters_and_output_shape(build, parameters, image):
    torch.manual_seed(0)
    model = build()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    assert model(torch.randn(2, *image)).shape == (2, 10)


def test_densenet40_has_forty_layers_with_weights_and_its_published_size():
    model = densenet40()
    assert count(model, nn.Conv2d) + count(model, nn.Linear) == 40
    assert [m.in_features for m in model.modules() if isinstance(m, nn.Linear)] == [448]
    floats = [t for t in model.state_dict().values() if t.is_floating_point()]
    assert round(sum(t.numel() for t in floats) * 4 / 2**20, 2) == 3.96  # MiB, with statistics


def test_densenet40_halves_the_image_twice():
    sizes = []
    model = densenet40().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda m, _, out: sizes.append(out.shape[-1]))
    model(torch.zeros(1, 3, 32, 32))
    assert sizes == [32] * 13 + [16] * 12 + [8] * 12  # the first convolution, then three blocks


def test_resnet8_half_computes_on_half_the_height_and_width():
    sizes = []
    model = resnet8_half().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda m, _, out: sizes.append(out.shape[1:]))
    model(torch.zeros(1, 3, 32, 32))
    assert sizes == [(24, 16, 16)] * 3 + [(48, 8, 8)] * 2 + [(96, 4, 4)] * 2


@pytest.mark.parametrize("build", [densenet40, resnet8, resnet8_half])
def test_the_number_of_classes_can_be_chosen(build):
    assert build(num_classes=7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("build", [densenet40, resnet8, resnet8_half, small_cnn])
def test_every_parameter_is_reached_by_the_gradient(build):
    torch.manual_seed(0)
    model = build()
    image = (1, 8, 8) if build is small_cnn else (3, 32, 32)
    nn.functional.cross_entropy(model(torch.randn(4, *image)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
