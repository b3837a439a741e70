"""MNIST: 60,000 training and 10,000 test images of handwritten digits, 28x28 grey."""

from functools import cache
from pathlib import Path

from torch import nn
from torch.utils.data import TensorDataset
from torchvision.datasets import MNIST

from clients.tasks.image_task import ImageTask

MEAN, STD = 0.1307, 0.3081


@cache
def load(data_dir: str) -> ImageTask:
    """Return the task, images [1, 28, 28] of zero mean and unit variance.

    Parameters
    ----------
    data_dir : str
        Holds ``MNIST/raw``; torchvision downloads it there if it does not.
    """
    present = (Path(data_dir) / "MNIST" / "raw").is_dir()
    sets = [MNIST(data_dir, train=train, download=not present) for train in (True, False)]
    return ImageTask(*(_as_dataset(each) for each in sets), models={"cnn": small_cnn})


def small_cnn() -> nn.Module:
    """Return two 5x5 convolutions of 10 and 20 channels and two linear layers (21,840 parameters).

    The network of PyTorch's MNIST example, without its dropout.
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


def _as_dataset(images: MNIST) -> TensorDataset:
    inputs = (images.data[:, None].float() / 255 - MEAN) / STD
    return TensorDataset(inputs, images.targets)
