"""From settings to tasks, models, shards and trainers."""

from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from clients.partition import Shards, class_shards, dirichlet_shards, equal_shards
from clients.settings import ParticipantSettings
from clients.tasks.image_task import ImageTask
from clients.torch_parallel import ParallelTrainer
from clients.torch_trainer import TorchTrainer
from flwr_colearn import ColearnError


def load_task(settings: ParticipantSettings) -> ImageTask:
    """Return the task that the settings name, its data loaded once a process.

    Raises
    ------
    ColearnError
        If there is no such task.
    """
    if settings.task == "digits":
        from clients.tasks import digits

        return digits.load()
    if settings.task == "cifar10":
        from clients.tasks import cifar10

        return cifar10.load(settings.data_dir or "data")
    raise ColearnError(f"run config 'task': expected digits or cifar10, found {settings.task!r}")


def build_model(settings: ParticipantSettings) -> nn.Module:
    """Return the model, freshly initialised from the settings' seed.

    Raises
    ------
    ColearnError
        If the task has no such model.
    """
    models = load_task(settings).models
    name = settings.model or next(iter(models))
    if name not in models:
        raise ColearnError(
            f"run config 'model': expected one of {', '.join(models)} for task {settings.task}, "
            f"found {name!r}"
        )
    torch.manual_seed(settings.seed)
    return models[name]()


@lru_cache(maxsize=8)
def shards(settings: ParticipantSettings, num_partitions: int) -> Shards:
    """Return the indices of every participant's training examples.

    Raises
    ------
    ColearnError
        If the partition is unknown or leaves a participant without examples.
    """
    labels = load_task(settings).train_labels.numpy()
    if settings.examples:
        # Both tasks come in random order, so the first ones are a random subset.
        labels = labels[: settings.examples]
    if settings.partition == "iid":
        return equal_shards(len(labels), num_partitions, settings.seed)
    if settings.partition == "dirichlet":
        alpha = settings.dirichlet_alpha
        return dirichlet_shards(labels, num_partitions, alpha, settings.seed)
    if settings.partition == "classes":
        return class_shards(labels, num_partitions, settings.classes_each, settings.seed)
    raise ColearnError(
        f"run config 'partition': expected iid, dirichlet or classes, found {settings.partition!r}"
    )


def participant_trainer(
    settings: ParticipantSettings, partition_id: int, num_partitions: int
) -> TorchTrainer | ParallelTrainer:
    """Return the trainer of one participant, who sees its own shard only."""
    indices = torch.from_numpy(shards(settings, num_partitions)[partition_id])
    shard = TensorDataset(*(t[indices] for t in load_task(settings).train_set.tensors))
    options = _trainer_options(settings)
    devices = settings.devices.split(",") if settings.devices else []
    if len(devices) > 1:
        return ParallelTrainer(build_model(settings), shard, shard, devices=devices, **options)
    device = devices[0] if devices else None
    return TorchTrainer(build_model(settings), shard, shard, device=device, **options)


def server_trainer(settings: ParticipantSettings) -> TorchTrainer:
    """Return a trainer that evaluates on the common test set; the server's own."""
    test_set = load_task(settings).test_set
    return TorchTrainer(build_model(settings), test_set, test_set, **_trainer_options(settings))


def _trainer_options(settings: ParticipantSettings) -> dict[str, Any]:
    task = load_task(settings)
    return {
        "batch_size": settings.batch_size,
        "momentum": settings.momentum,
        "weight_decay": settings.weight_decay,
        "transform": task.augmentation if settings.augment else task.transform,
        "precision": settings.precision,
        "channels_last": settings.channels_last,
        "clip_norm": settings.clip_norm or None,
        "workers": settings.workers,
    }
