"""The registry that builds tasks, shards and trainers from the participants' settings."""

from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from clients.data import Examples, Task, take, with_validation
from clients.partition import (
    Shards,
    class_shards,
    dirichlet_shards,
    equal_shards,
    proportional_shards,
)
from clients.settings import ParticipantSettings
from clients.tasks.own_data import with_held_out
from clients.tasks.sources import SOURCES, ImportedTask, Source
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
    """Return the task that the settings name with its whole data set, loaded once a process.

    In a simulation every participant trains on its part of this data set.

    Raises
    ------
    ColearnError
        If there is no such task, or its data is not there.
    """
    return _validated(_source(settings).load(settings), settings)


def own_task(settings: ParticipantSettings) -> Task:
    """Return the task with a site's own data: all of `data_dir`, of which a part is held out.

    Raises
    ------
    ColearnError
        If there is no such task, or the folder has no training examples or an unknown class.
    """
    folder = Path(settings.data_dir or "data")
    if not folder.is_dir():
        raise ColearnError(
            "node config 'data-dir': expected the folder of this site's own data, found no folder "
            f"{str(folder)!r}; start the SuperNode with --node-config 'data-dir=\"/srv/data\"', or "
            "in a simulation with 'partition-id' and 'num-partitions'"
        )
    task = _source(settings).own(settings, folder)
    if len(task.train_set) == 0:
        raise ColearnError(
            f"task {settings.task!r}: expected training examples in {folder}, found none"
        )
    return with_held_out(task, settings, folder)


def server_task(settings: ParticipantSettings) -> Task:
    """Return the task of the server: with the test set if the server has one, else without data.

    Raises
    ------
    ColearnError
        If there is no such task, or the settings lack what defines its model, such as `classes`.
    """
    task = _source(settings).server(settings, Path(settings.data_dir or "data"))
    # A server without the whole data set is one of a deployment, whose sites have their own.
    return _validated(task, settings) if len(task.train_set) else task


def _validated(task: Task, settings: ParticipantSettings) -> Task:
    size = settings.validation_examples
    return with_validation(task, size) if size else task


def agreement(settings: ParticipantSettings) -> str:
    """Return the digest of what all sites must have alike besides the settings, see `Task`."""
    return _source(settings).agreement(settings)


def _source(settings: ParticipantSettings) -> Source:
    if ":" in settings.task:
        return ImportedTask(settings.task)
    if settings.task not in SOURCES:
        raise ColearnError(
            f"run config 'task': expected one of {', '.join(SOURCES)}, or a function of an "
            f"installed package, 'package.module:function', found {settings.task!r}"
        )
    return SOURCES[settings.task]


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
    labels = getattr(task.train_set, "labels", np.empty(len(task.train_set)))
    if settings.examples:
        # Every task's examples are in random order, so the first ones are a random subset.
        labels = labels[: settings.examples]
    if settings.partition == "iid":
        return equal_shards(len(labels), num_partitions, settings.seed)
    if settings.partition == "shares":
        return proportional_shards(len(labels), num_partitions, settings.shares, settings.seed)
    if settings.partition in ("dirichlet", "classes") and not hasattr(task.train_set, "labels"):
        raise ColearnError(
            f"run config 'partition': expected 'iid' for task {settings.task}, whose data set has "
            f"no array of labels, found {settings.partition!r}"
        )
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
        "run config 'partition': expected iid, shares, dirichlet or classes, found "
        f"{settings.partition!r}"
    )


def participant_trainer(
    settings: ParticipantSettings, partition_id: int, num_partitions: int
) -> Trainer:
    """Return the trainer of one participant, which trains and evaluates on its own shard only."""
    task = load_task(settings)
    # Test examples stay with the server, so a participant evaluates on its training shard.
    shard = take(task.train_set, shards(settings, num_partitions)[partition_id])
    return _participant_trainer(settings, replace(task, train_set=shard, test_set=shard))


def site_trainer(settings: ParticipantSettings, task: Task | None = None) -> Trainer:
    """Return the trainer of a site with data of its own: the given task, else `own_task`."""
    return _participant_trainer(settings, own_task(settings) if task is None else task)


def common_trainer(settings: ParticipantSettings, simulated: bool) -> Trainer | None:
    """Return a trainer that evaluates on the test set that all sites have; None without one.

    Parameters
    ----------
    settings : ParticipantSettings
        The settings; `common_test` is the folder of a site with data of its own.
    simulated : bool
        Whether the site is one of a simulation, whose common data set has a test set.

    Raises
    ------
    ColearnError
        If the folder has no examples.
    """
    task = load_task(settings) if simulated else _common_task(settings)
    if not len(task.test_set):
        return None
    # One device is enough to evaluate, and a trainer over several has a process for each.
    settings = replace(settings, devices=settings.devices.partition(",")[0])
    task = replace(task, train_set=task.test_set)  # trainers refuse an empty training set
    return framework(settings).participant_trainer(settings, task)


def _common_task(settings: ParticipantSettings) -> Task:
    """Return the task with the test set in `common_test`, by preference its test part."""
    if not settings.common_test:
        return Task()
    folder = Path(settings.common_test)
    task = _source(settings).own(replace(settings, data_dir=str(folder)), folder)
    test = task.test_set if len(task.test_set) else task.train_set
    if not len(test):
        raise ColearnError(f"node config 'common-test': expected examples in {folder}, found none")
    return replace(task.for_other_data(), test_set=test)


def _participant_trainer(settings: ParticipantSettings, task: Task) -> Trainer:
    return framework(settings).participant_trainer(settings, task.for_other_data())


def server_trainer(settings: ParticipantSettings, task: Task | None = None) -> Trainer:
    """Return the server's trainer, with the initial model.

    Parameters
    ----------
    settings : ParticipantSettings
        The settings of the run.
    task : Task, optional
        The task, on whose test set the trainer evaluates; by default the whole one of `load_task`.
        A task without a test set is enough for the model.
    """
    task = load_task(settings) if task is None else task
    # Trainers refuse an empty training set. The server never trains, so any data will do.
    any_data = task.test_set if len(task.test_set) else _placeholder(task.train_set)
    task = replace(task, train_set=any_data, test_set=any_data)
    return framework(settings).server_trainer(settings, task)


def _placeholder(examples: Examples) -> Examples:
    """Return one example of zeros in the shape of the given ones."""
    arrays = (examples.inputs, examples.labels)
    return Examples(*(np.zeros((1, *array.shape[1:]), array.dtype) for array in arrays))


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
