"""The registry that builds tasks, shards and trainers from the participants' settings."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol, cast

from clients.data import Task
from clients.partition import Shards, class_shards, dirichlet_shards, equal_shards
from clients.settings import ParticipantSettings
from clients.trainer import Trainer
from flwr_colearn import ColearnError

_FRAMEWORKS = {
    "torch": ("clients.torch.tasks", "torch"),
    "keras": ("clients.keras.tasks", "tensorflow"),
    "slim": ("clients.slim.tasks", "slim"),
}
"""The module of each framework, imported on first use, and the extra that installs it."""


class Framework(Protocol):
    """The interface of each framework's module: trainers for the tasks."""

    def participant_trainer(self, settings: ParticipantSettings, task: Task) -> Trainer:
        """Return the trainer of a participant that holds all of the task's examples."""

    def server_trainer(self, settings: ParticipantSettings, task: Task) -> Trainer:
        """Return the server's trainer: it has the initial model and evaluates every shared one."""


def load_task(settings: ParticipantSettings) -> Task:
    """Return the task that the settings name, its data loaded once a process.

    Raises
    ------
    ColearnError
        If there is no such task.
    """
    if settings.task not in _LOADERS:
        raise ColearnError(
            f"run config 'task': expected one of {', '.join(_LOADERS)}, found {settings.task!r}"
        )
    return _LOADERS[settings.task](settings)


def _loader(name: str) -> Any:
    return import_module(f"clients.tasks.{name}").load


_LOADERS: dict[str, Callable[[ParticipantSettings], Task]] = {
    "digits": lambda settings: _loader("digits")(),
    "mnist": lambda settings: _loader("mnist")(settings.data_dir or "data"),
    "cifar10": lambda settings: _loader("cifar10")(settings.data_dir or "data"),
    "imagefolder": lambda settings: _loader("imagefolder")(settings.data_dir or "data"),
    "toxic": lambda settings: _loader("toxic")(
        settings.data_dir or "data", settings.vectors, settings.vocabulary
    ),
    "speech": lambda settings: _loader("speech")(settings.data_dir or "data", settings.split),
    "audioset": lambda settings: _loader("audioset")(settings.data_dir or "data"),
}
"""The function that loads each task; it imports the task's module on first use."""


@lru_cache(maxsize=8)
def shards(settings: ParticipantSettings, num_partitions: int) -> Shards:
    """Return the indices of every participant's training examples.

    Raises
    ------
    ColearnError
        If the partition is unknown, leaves a participant without examples, or splits by class
        while examples have several labels.
    """
    task = load_task(settings)
    labels = task.train_set.labels
    if settings.examples:
        # Every task's examples are in random order, so the first ones are a random subset.
        labels = labels[: settings.examples]
    if settings.partition == "iid":
        return equal_shards(len(labels), num_partitions, settings.seed)
    if settings.partition in ("dirichlet", "classes") and task.objective.multi_label:
        raise ColearnError(
            f"run config 'partition': expected 'iid' for task {settings.task}, whose examples have "
            f"several labels in place of a class, found {settings.partition!r}"
        )
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
) -> Trainer:
    """Return the trainer of one participant, which trains and evaluates on its own shard only."""
    task = load_task(settings)
    # Test examples stay with the server, so a participant evaluates on its training shard.
    shard = task.train_set.take(shards(settings, num_partitions)[partition_id])
    objective = task.own_objective or task.objective
    own = replace(task, train_set=shard, test_set=shard, objective=objective)
    return framework(settings).participant_trainer(settings, own)


def server_trainer(settings: ParticipantSettings) -> Trainer:
    """Return the server's trainer, which evaluates on the common test set."""
    task = load_task(settings)
    # Trainers refuse an empty training set; the server never trains, so any data will do.
    return framework(settings).server_trainer(settings, replace(task, train_set=task.test_set))


def framework(settings: ParticipantSettings) -> Framework:
    """Return the module of the framework that the settings name; only that one is imported.

    Raises
    ------
    ColearnError
        If there is no such framework, or it is not installed.
    """
    if settings.framework not in _FRAMEWORKS:
        raise ColearnError(
            f"run config 'framework': expected one of {', '.join(_FRAMEWORKS)}, found "
            f"{settings.framework!r}"
        )
    module, extra = _FRAMEWORKS[settings.framework]
    try:
        return cast(Framework, import_module(module))
    except ModuleNotFoundError as error:
        raise ColearnError(
            f"run config 'framework': expected {settings.framework!r} to be installed, found no "
            f"module {error.name!r}; pip install 'flwr-colearn[{extra}]'"
        ) from error
