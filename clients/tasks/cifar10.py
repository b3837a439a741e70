"""CIFAR-10, the paper's main data set: 50,000 training and 10,000 test images, 32x32 colour."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.datasets import CIFAR10

from clients.models import densenet40, resnet8
from clients.tasks.image_task import ImageTask

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


@cache
def load(data_dir: str) -> ImageTask:
    """Return the task, images as uint8 [3, 32, 32].

    Parameters
    ----------
    data_dir : str
        Holds ``cifar-10-batches-py``; torchvision downloads it there if it does not.
    """
    present = (Path(data_dir) / "cifar-10-batches-py").is_dir()
    sets = [CIFAR10(data_dir, train=train, download=not present) for train in (True, False)]
    return ImageTask(
        *(_as_dataset(each) for each in sets),
        models={"resnet8": resnet8, "densenet40": densenet40},
        transform=normalise,
        augmentation=augment,
    )


def normalise(inputs: Tensor, training: bool) -> Tensor:
    """Scale uint8 images [N, 3, 32, 32] to zero mean and unit variance per channel."""
    shape = (1, 3, 1, 1)
    mean = torch.tensor(MEAN, device=inputs.device).view(shape)
    std = torch.tensor(STD, device=inputs.device).view(shape)
    return (inputs.float() / 255 - mean) / std


def augment(inputs: Tensor, training: bool) -> Tensor:
    """Normalise; in training also crop at random from 4 pixels of padding and flip at random."""
    inputs = normalise(inputs, training)
    return random_flip(random_crop(inputs, padding=4)) if training else inputs


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Shift every image [N, C, H, W] by its own random offset, filling with zeros.

    The same as padding by `padding` and cropping to H x W at a random place, for a whole batch on
    its device at once (torchvision's transform draws one offset for all of a batch).
    """
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [padding] * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    index = torch.arange(n, device=images.device)[:, None, None]
    # Indexing puts the channels last; they go back in front of the rows.
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def random_flip(images: Tensor) -> Tensor:
    """Mirror every image [N, C, H, W] left to right with probability one half."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def _as_dataset(images: CIFAR10) -> TensorDataset:
    inputs = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()
    return TensorDataset(inputs, torch.tensor(images.targets))
