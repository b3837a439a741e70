"""Transforms of image batches in PyTorch, on the batch's device.

A transform is a function ``(inputs, training) -> inputs`` that draws from torch's own generator.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clients.tasks import cifar10, imagefolder

Transform = Callable[[Tensor, bool], Tensor]


def no_transform(inputs: Tensor, training: bool) -> Tensor:
    """Return the inputs unchanged."""
    return inputs


def normalise(inputs: Tensor, training: bool) -> Tensor:
    """Scale CIFAR-10's uint8 images [N, 3, 32, 32] to zero mean, unit variance per channel."""
    return _standardised(inputs, cifar10.MEAN, cifar10.STD)


def normalise_imagenet(inputs: Tensor, training: bool) -> Tensor:
    """Standardise uint8 images [N, 3, H, W] by the mean and deviation of ImageNet's channels."""
    return _standardised(inputs, imagefolder.MEAN, imagefolder.STD)


def _standardised(images: Tensor, means: Sequence[float], stds: Sequence[float]) -> Tensor:
    shape = (1, 3, 1, 1)
    mean = torch.tensor(means, device=images.device).view(shape)
    std = torch.tensor(stds, device=images.device).view(shape)
    return (images.float() / 255 - mean) / std


def augment(inputs: Tensor, training: bool) -> Tensor:
    """Normalise; in training also crop at random from 4 pixels of padding and flip at random."""
    inputs = normalise(inputs, training)
    return random_flip(random_crop(inputs, padding=4)) if training else inputs


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Shift every image [N, C, H, W] by its own random offset, filling with zeros.

    The result is that of padding by `padding` and cropping to H x W at a random place, for a whole
    batch at once (torchvision's transform draws one offset for all images of a batch).
    """
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [padding] * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    index = torch.arange(n, device=images.device)[:, None, None]
    # Indexing needs the channels last; the second permute puts them back before the rows.
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def random_flip(images: Tensor) -> Tensor:
    """Mirror every image [N, C, H, W] left to right with probability one half."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)
