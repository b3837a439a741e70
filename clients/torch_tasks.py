"""The tasks with PyTorch: models, augmentation on the device, and trainers."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from clients.data import Examples
from clients.models import densenet40, resnet8, small_cnn
from clients.settings import ParticipantSettings
from clients.tasks import cifar10
from clients.tasks.kit import Kit
from clients.torch_parallel import ParallelTrainer
from clients.torch_trainer import TorchTrainer


def no_transform(inputs: Tensor, training: bool) -> Tensor:
    """Return the inputs unchanged."""
    return inputs


def normalise(inputs: Tensor, training: bool) -> Tensor:
    """Scale CIFAR-10's uint8 images [N, 3, 32, 32] to zero mean, unit variance per channel."""
    shape = (1, 3, 1, 1)
    mean = torch.tensor(cifar10.MEAN, device=inputs.device).view(shape)
    std = torch.tensor(cifar10.STD, device=inputs.device).view(shape)
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


KITS = {
    "digits": Kit({"cnn": small_cnn}, no_transform, no_transform),
    "cifar10": Kit({"resnet8": resnet8, "densenet40": densenet40}, normalise, augment),
}


def build_model(settings: ParticipantSettings) -> nn.Module:
    """Return the model, freshly initialised from the settings' seed.

    Raises
    ------
    ColearnError
        If the task has no such model.
    """
    build = KITS[settings.task].model(settings)
    torch.manual_seed(settings.seed)
    return build()  # type: ignore[no-any-return]


def participant_trainer(
    settings: ParticipantSettings, shard: Examples
) -> TorchTrainer | ParallelTrainer:
    """Return a participant's trainer, over all of its devices."""
    data, options = as_dataset(shard), _options(settings)
    devices = settings.devices.split(",") if settings.devices else []
    if len(devices) > 1:
        return ParallelTrainer(build_model(settings), data, data, devices=devices, **options)
    device = devices[0] if devices else None
    return TorchTrainer(build_model(settings), data, data, device=device, **options)


def server_trainer(settings: ParticipantSettings, test_set: Examples) -> TorchTrainer:
    """Return the server's trainer, on a device of its own choice."""
    data = as_dataset(test_set)
    return TorchTrainer(build_model(settings), data, data, **_options(settings))


def as_dataset(examples: Examples) -> TensorDataset:
    """Return images [N, H, W, C] as PyTorch has them, [N, C, H, W], with their labels."""
    images = np.ascontiguousarray(examples.inputs.transpose(0, 3, 1, 2))
    return TensorDataset(torch.from_numpy(images), torch.from_numpy(examples.labels))


def _options(settings: ParticipantSettings) -> dict[str, Any]:
    settings.refuse("jit_compile")
    return {
        "batch_size": settings.batch_size,
        "momentum": settings.momentum,
        "weight_decay": settings.weight_decay,
        "transform": KITS[settings.task].transform(settings),
        "precision": settings.precision,
        "channels_last": settings.channels_last,
        "clip_norm": settings.clip_norm or None,
        "workers": settings.workers,
    }
