"""Small PyTorch networks for images and spectrograms, which torchvision does not have."""

import torch
from torch import Tensor, nn


def small_cnn() -> nn.Module:
    """Return a CNN for the digits: two convolutions with batch norm and one linear layer.

    It has 9,978 parameters.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def mnist_cnn() -> nn.Module:
    """Return two 5x5 convolutions of 10 and 20 channels and two linear layers (21,840 parameters).

    It is the network of PyTorch's MNIST example without its dropout.
    """
    return nn.Sequential(
        nn.Conv2d(1, 10, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(10, 20, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(320, 50),
        nn.ReLU(),
        nn.Linear(50, 10),
    )


def speech_cnn(num_classes: int = 10) -> nn.Module:
    """Return three strided convolutions with batch norm and a linear layer, for log-mel spectra.

    The inputs are [N, 1, 98, 40]; there are 12,538 parameters with 10 classes.
    """

    def block(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 8, 5),
        *block(8, 16, 3),
        *block(16, 32, 3),
        nn.AdaptiveAvgPool2d((4, 5)),
        nn.Flatten(),
        nn.Linear(640, num_classes),
    )


def resnet8(num_classes: int = 10) -> nn.Module:
    """Return a compact residual CNN for CPUs: three basic blocks of 16, 32 and 64 channels.

    It is the smallest of the CIFAR ResNets (He et al., 2016) with the projection shortcuts of
    torchvision's ``BasicBlock``, and has 78,042 parameters.
    """
    return _three_blocks(num_classes, width=16, stride=1)


def resnet8_half(num_classes: int = 10) -> nn.Module:
    """Return `resnet8` with 24, 48 and 96 channels on half the height and width of the image.

    Its first convolution has stride 2. It has 174,274 parameters, and with them takes half as long
    as `resnet8`: a study on CPUs can train it until it has converged.
    """
    return _three_blocks(num_classes, width=24, stride=2)


def _three_blocks(num_classes: int, width: int, stride: int) -> nn.Module:
    # Here, since torchvision takes a second to import, and Flower starts a process a message.
    from torchvision.models.resnet import BasicBlock

    def halved(inputs: int, outputs: int) -> nn.Module:
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs)
        )
        block: nn.Module = BasicBlock(inputs, outputs, stride=2, downsample=shortcut)
        return block

    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        BasicBlock(width, width),
        halved(width, 2 * width),
        halved(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )


class DenseLayer(nn.Module):
    """A BN-ReLU-3x3 convolution whose output is appended to its input's channels."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, channels, H, W] to [N, channels + growth, H, W]."""
        return torch.cat([inputs, self.conv(torch.relu(self.norm(inputs)))], 1)


def densenet40(num_classes: int = 10, growth: int = 12) -> nn.Module:
    """Return DenseNet-40 (k=12) without bottleneck and compression (Huang et al., 2017).

    The layers are a 3x3 convolution to 16 channels; three blocks of 12 dense layers; between them
    BN-ReLU-1x1 convolution and average pooling; BN-ReLU-global pooling-linear. There are 1,019,722
    parameters.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    channels = 16
    for block in range(3):
        for _ in range(12):
            layers.append(DenseLayer(channels, growth))
            channels += growth
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        if block < 2:
            layers += [nn.Conv2d(channels, channels, 1, bias=False), nn.AvgPool2d(2)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model
