"""The tasks with PyTorch: models, augmentation on the device, and trainers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from clients import audio_models
from clients.data import Examples, Task
from clients.models import densenet40, mnist_cnn, resnet8, small_cnn
from clients.settings import ParticipantSettings
from clients.tasks import cifar10
from clients.tasks.kit import Kit, kit_for
from clients.torch_normalization import convert
from clients.torch_parallel import ParallelTrainer
from clients.torch_trainer import TorchTrainer
from flwr_colearn import ColearnError, Frozen, Recalibrated


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
    "mnist": Kit({"cnn": mnist_cnn}, no_transform, no_transform),
    "cifar10": Kit({"resnet8": resnet8, "densenet40": densenet40}, normalise, augment),
    "speech": Kit(audio_models.SPEECH, no_transform, no_transform),
    "audioset": Kit(audio_models.AUDIOSET, no_transform, no_transform),
}


def build_model(settings: ParticipantSettings, task: Task) -> nn.Module:
    """Return the model, freshly initialised from the settings' seed, normalised as they say.

    Raises
    ------
    ColearnError
        If the task has no such model.
    """
    build = kit_for(KITS, settings).model(settings)
    torch.manual_seed(settings.seed)
    return convert(build(**task.model_options), settings.scheme)


def participant_trainer(
    settings: ParticipantSettings, task: Task
) -> TorchTrainer | ParallelTrainer:
    """Return a participant's trainer, over all of its devices."""
    devices = settings.devices.split(",") if settings.devices else []
    if len(devices) > 1:
        _check_scheme(settings)
        return ParallelTrainer(*_parts(settings, task), devices=devices, **_options(settings, task))
    device = devices[0] if devices else None
    return TorchTrainer(*_parts(settings, task), device=device, **_options(settings, task))


def _check_scheme(settings: ParticipantSettings) -> None:
    """Raise a ColearnError if the scheme asks for what a trainer over several devices lacks."""
    if isinstance(settings.scheme, Frozen | Recalibrated):
        raise ColearnError(
            f"run config 'normalization': expected a scheme other than {Frozen.name} and "
            f"{Recalibrated.name} where a site trains on several devices, found "
            f"{settings.normalization!r} with {settings.devices!r}; name one device"
        )


def server_trainer(settings: ParticipantSettings, task: Task) -> TorchTrainer:
    """Return the server's trainer, on a device of its own choice."""
    return TorchTrainer(*_parts(settings, task), **_options(settings, task))


def _parts(
    settings: ParticipantSettings, task: Task
) -> tuple[nn.Module, Dataset[Any], Dataset[Any]]:
    """Return the model, and the data sets to train and to evaluate on."""
    as_dataset = DATASETS.get(settings.task, tensors_of)
    return (
        build_model(settings, task),
        as_dataset(task.train_set, settings.augment),
        as_dataset(task.test_set, False),
    )


def tensors_of(examples: Examples, augment: bool = False) -> TensorDataset:
    """Return examples in memory; images [N, H, W, C] as PyTorch has them, [N, C, H, W].

    Whether to augment does not matter here: batches are augmented on the device.
    """
    inputs = examples.inputs
    if inputs.ndim == 4:
        inputs = np.ascontiguousarray(inputs.transpose(0, 3, 1, 2))
    return TensorDataset(torch.from_numpy(inputs), torch.from_numpy(examples.labels))


DATASETS: dict[str, Callable[[Examples, bool], Dataset[Any]]] = {}
"""Data sets of the tasks whose examples are read from files while training."""


def _options(settings: ParticipantSettings, task: Task) -> dict[str, Any]:
    return {
        "objective": task.objective,
        "batch_size": settings.batch_size,
        "momentum": settings.momentum,
        "weight_decay": settings.weight_decay,
        "transform": kit_for(KITS, settings).transform(settings),
        "precision": settings.precision,
        "channels_last": settings.channels_last,
        "jit_compile": settings.jit_compile,
        "clip_norm": settings.clip_norm or None,
        "workers": settings.workers,
    }
