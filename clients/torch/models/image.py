"""The co-learning paper's image networks for CIFAR-10 and ImageNet in PyTorch."""

from typing import Any

from torch import Tensor, nn

from flwr_colearn import ColearnError

SMALLEST_INCEPTION = 107
"""The height and width in pixels to which the Inception networks enlarge smaller images.

The networks accept 75 pixels, but then their last stages have so few positions that the outer
weights of many kernels are only multiplied with padding. The share of weights without a gradient is
23 % in Inception-V4 and 8 % in Inception-ResNet-V2 at 75 pixels, 13 % and 4 % at 106, and 0 from
107 on.
"""


class AtLeast(nn.Module):
    """Bilinear enlargement to `size` of images [N, C, H, W] whose shorter side is below `size`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Return the images, scaled to `size` x `size` if one of their sides is shorter."""
        if min(images.shape[-2:]) >= self.size:
            return images
        return nn.functional.interpolate(images, size=(self.size, self.size), mode="bilinear")


def vgg19_bn(num_classes: int = 10) -> nn.Module:
    """Return VGG-19 for 32x32 images: torchvision's features with batch norm, one linear layer.

    It has 20,040,522 parameters for 10 classes. ImageNet's three linear layers (119 million) are
    left out, because after five poolings one position of 512 channels remains.
    """
    # Here, since torchvision takes a second to import, and Flower starts a process a message.
    from torchvision.models.vgg import cfgs, make_layers

    model = nn.Sequential(
        make_layers(cfgs["E"], batch_norm=True), nn.Flatten(), nn.Linear(512, num_classes)
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # the initial weights of torchvision's VGG
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return model


def resnet152(num_classes: int = 10) -> nn.Module:
    """Return torchvision's ResNet-152 for 32x32 images (58,164,298 parameters for 10 classes).

    The 7x7 first convolution has stride 1 and no pooling follows, so the four stages work on 32,
    16, 8 and 4 pixels. Neither change affects the number of parameters.
    """
    from torchvision import models

    model = models.resnet152(num_classes=num_classes)
    model.conv1.stride = (1, 1)
    model.maxpool = nn.Identity()
    return model  # type: ignore[no-any-return]


def inception_v4(num_classes: int = 10) -> nn.Module:
    """Return timm's Inception-V4 behind `AtLeast` (41,158,186 parameters for 10 classes).

    Raises
    ------
    ColearnError
        If timm is not installed.
    """
    network = _timm().create_model("inception_v4", num_classes=num_classes)
    return nn.Sequential(AtLeast(SMALLEST_INCEPTION), network)


def inception_resnet_v2(num_classes: int = 10) -> nn.Module:
    """Return timm's Inception-ResNet-V2 behind `AtLeast` (54,321,834 parameters for 10 classes).

    Raises
    ------
    ColearnError
        If timm is not installed.
    """
    network = _timm().create_model("inception_resnet_v2", num_classes=num_classes)
    return nn.Sequential(AtLeast(SMALLEST_INCEPTION), network)


def vgg19(num_classes: int = 1000) -> nn.Module:
    """Return torchvision's VGG-19 without batch norm (143,667,240 parameters for 1000 classes)."""
    from torchvision import models

    return models.vgg19(num_classes=num_classes)  # type: ignore[no-any-return]


def resnetv2_101(num_classes: int = 1000) -> nn.Module:
    """Return timm's ResNet-V2-101 (44,541,480 parameters for 1000 classes).

    Raises
    ------
    ColearnError
        If timm is not installed.
    """
    return _timm().create_model("resnetv2_101", num_classes=num_classes)  # type: ignore[no-any-return]


def _timm() -> Any:
    # Imported on use: only the extra "study" installs timm.
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ColearnError(
            "run config 'model': expected timm, which has this model, to be installed, found no "
            f"module {error.name!r}; pip install 'flwr-colearn[study]'"
        ) from error
    return timm
