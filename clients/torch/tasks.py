"""The models and trainers of the tasks in PyTorch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from clients.data import Examples, Task
from clients.settings import ParticipantSettings
from clients.tasks.kit import OWN, Kit, check_model, kit_for
from clients.torch.image_files import image_files
from clients.torch.models import audio, image
from clients.torch.models.small import densenet40, mnist_cnn, resnet8, resnet8_half, small_cnn
from clients.torch.models.text import BiGRU, Capsules, WordMean, bigru_small
from clients.torch.parallel import ParallelTrainer
from clients.torch.trainer import TorchTrainer
from clients.torch.transforms import augment, no_transform, normalise, normalise_imagenet
from flwr_colearn import ColearnError, Frozen, Recalibrated
from flwr_colearn.torch import convert

KITS = {
    "digits": Kit({"cnn": small_cnn}, no_transform, no_transform),
    "mnist": Kit({"cnn": mnist_cnn}, no_transform, no_transform),
    "cifar10": Kit(
        {
            "resnet8": resnet8,
            "resnet8-half": resnet8_half,
            "densenet40": densenet40,
            "vgg19": image.vgg19_bn,
            "resnet152": image.resnet152,
            "inception_v4": image.inception_v4,
            "inception_resnet_v2": image.inception_resnet_v2,
        },
        normalise,
        augment,
    ),
    "imagefolder": Kit(
        {
            "resnet8": resnet8,
            "resnet8-half": resnet8_half,
            "vgg19": image.vgg19,
            "inception_v4": image.inception_v4,
            "resnetv2_101": image.resnetv2_101,
        },
        normalise_imagenet,
        normalise_imagenet,  # the files are augmented as they are read
    ),
    "toxic": Kit(
        {"bigru": BiGRU, "capsule": Capsules, "bigru-small": bigru_small, "word-mean": WordMean},
        no_transform,
        no_transform,
    ),
    "speech": Kit(audio.SPEECH, no_transform, no_transform),
    "audioset": Kit(audio.AUDIOSET, no_transform, no_transform),
    OWN: Kit({}, no_transform, no_transform),
}


def build_model(settings: ParticipantSettings, task: Task) -> nn.Module:
    """Return the model, initialised from the settings' seed and converted to their scheme.

    Raises
    ------
    ColearnError
        If the task has no such model, or the user's function returns no module.
    """
    build = kit_for(KITS, settings).model(settings)
    # Seeded, so that the initial weights do not depend on what the process drew before.
    torch.manual_seed(settings.seed)
    model = build(**task.model_options)
    check_model(model, nn.Module, settings)
    return convert(model, settings.scheme)


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
    """Raise a ColearnError if the scheme needs a method that `ParallelTrainer` lacks."""
    if isinstance(settings.scheme, Frozen | Recalibrated):
        raise ColearnError(
            f"run config 'normalization': expected a scheme other than {Frozen.name} and "
            f"{Recalibrated.name} where a site trains on several devices, found "
            f"{settings.normalization!r} with {settings.devices!r}; name one device"
        )


def server_trainer(settings: ParticipantSettings, task: Task) -> TorchTrainer:
    """Return the server's trainer, on the default device: `devices` is for participants."""
    return TorchTrainer(*_parts(settings, task), **_options(settings, task))


def _parts(
    settings: ParticipantSettings, task: Task
) -> tuple[nn.Module, Dataset[Any], Dataset[Any]]:
    """Return the model, and the data sets to train and to evaluate on."""
    train = _dataset(settings, task.train_set)
    # The same object for the same examples, so that the device holds them once.
    test = train if task.test_set is task.train_set else _dataset(settings, task.test_set)
    return build_model(settings, task), train, test


def _dataset(settings: ParticipantSettings, examples: Examples) -> Dataset[Any]:
    if settings.task in DATASETS:
        return DATASETS[settings.task](examples, settings)
    if settings.image_size:
        raise ColearnError(
            f"run config 'image-size': expected 0, since the examples of task {settings.task!r} "
            f"are of one size, found {settings.image_size}"
        )
    return tensors_of(examples) if isinstance(examples, Examples) else examples


def tensors_of(examples: Examples) -> TensorDataset:
    """Return examples as tensors; images [N, H, W, C] in PyTorch's order [N, C, H, W]."""
    inputs = examples.inputs
    if inputs.ndim == 4:
        inputs = np.ascontiguousarray(inputs.transpose(0, 3, 1, 2))
    return TensorDataset(torch.from_numpy(inputs), torch.from_numpy(examples.labels))


DATASETS: dict[str, Callable[[Examples, ParticipantSettings], Dataset[Any]]] = {
    "imagefolder": image_files
}
"""The data sets of the tasks whose examples are read from files while training.

They augment only after a call of ``seeded`` (see `TorchTrainer`), so never in evaluation.
"""


def _options(settings: ParticipantSettings, task: Task) -> dict[str, Any]:
    return {
        **kit_for(KITS, settings).options(settings, task),
        "precision": settings.precision,
        "channels_last": settings.channels_last,
        "jit_compile": settings.jit_compile,
        "workers": settings.workers,
    }
