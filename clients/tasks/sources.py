"""Where the data of each task comes from: the common data set, a site's folder, or no data."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from clients.data import Examples, Task
from clients.imports import imported
from clients.settings import ParticipantSettings
from flwr_colearn import ColearnError


class Source(Protocol):
    """The three ways to a task."""

    def load(self, settings: ParticipantSettings) -> Task:
        """Return the task with the whole data set that a simulation divides."""

    def own(self, settings: ParticipantSettings, folder: Path) -> Task:
        """Return the task with the data of a site's folder; the test set may be empty."""

    def server(self, settings: ParticipantSettings, folder: Path) -> Task:
        """Return the task with the test set that a server has, if any, and no other data."""

    def agreement(self, settings: ParticipantSettings) -> str:
        """Return the digest of what all sites must have alike besides the settings."""


@dataclass(frozen=True)
class TaskModule:
    """A task of this repository, in a module of `clients.tasks` that is imported on first use.

    The module has the functions ``definition(settings) -> Task``, without data, and
    ``read(settings, folder, part) -> Examples | None`` for part "train" or "test" of a site's
    folder, besides the one that loads the common data set.

    Attributes
    ----------
    name : str
        The module.
    common : callable
        ``(module, settings) -> Task``: loads the common data set.
    files : tuple of str
        Patterns of which one is in the folder of the common data set; empty if it needs no folder.
    """

    name: str
    common: Callable[[Any, ParticipantSettings], Task]
    files: tuple[str, ...] = ()

    @property
    def _module(self) -> Any:
        return import_module(f"clients.tasks.{self.name}")

    def load(self, settings: ParticipantSettings) -> Task:
        """Return the task with the common data set."""
        return self.common(self._module, settings)

    def own(self, settings: ParticipantSettings, folder: Path) -> Task:
        """Return the task with the training and test examples of a site's folder."""
        train, test = (self._module.read(settings, folder, part) for part in ("train", "test"))
        task: Task = self._module.definition(settings)
        return replace(task, **_given(train_set=train, test_set=test))

    def server(self, settings: ParticipantSettings, folder: Path) -> Task:
        """Return the common data set if the server has it, else a test set in the folder, if any.

        Nothing is downloaded: a server without data is the normal case in a deployment.
        """
        if not self.files or any(any(folder.glob(pattern)) for pattern in self.files):
            return self.load(settings)
        test = self._module.read(settings, folder, "test") if folder.is_dir() else None
        task: Task = self._module.definition(settings)
        return replace(task, **_given(test_set=test))

    def agreement(self, settings: ParticipantSettings) -> str:
        """Return the digest of the task's definition."""
        task: Task = self._module.definition(settings)
        return task.agreement


def _given(**parts: Examples | None) -> dict[str, Any]:
    return {name: part for name, part in parts.items() if part is not None}


@dataclass(frozen=True)
class ImportedTask:
    """A task of the user: a function ``settings -> Task`` in an installed package.

    At a site ``settings.data_dir`` is the site's folder. At the server it is the run config's; a
    server without data gets a task without examples.

    Attributes
    ----------
    name : str
        "package.module:function".
    """

    name: str

    def load(self, settings: ParticipantSettings) -> Task:
        """Return the task that the function returns, which is called once for the same settings.

        Raises
        ------
        ColearnError
            If it cannot be imported, or returns something else.
        """
        return imported_task(self.name, settings)

    def own(self, settings: ParticipantSettings, folder: Path) -> Task:
        """Return the same; the settings have the folder."""
        return self.load(settings)

    def server(self, settings: ParticipantSettings, folder: Path) -> Task:
        """Return the same."""
        return self.load(settings)

    def agreement(self, settings: ParticipantSettings) -> str:
        """Return the digest that the user's function gives."""
        return self.load(settings).agreement


@lru_cache(maxsize=8)
def imported_task(name: str, settings: ParticipantSettings) -> Task:
    """Return the task of a user's function, see `ImportedTask`."""
    task = imported("task", name)(settings)
    if not isinstance(task, Task):
        raise ColearnError(
            f"run config 'task': expected {name}(settings) to return a clients.data.Task, for "
            f"example Task(Examples(inputs, labels)), found {type(task).__name__}"
        )
    return task


SOURCES: dict[str, Source] = {
    "digits": TaskModule("digits", lambda module, settings: module.load()),
    "mnist": TaskModule(
        "mnist", lambda module, settings: module.load(settings.data_dir or "data"), ("MNIST/raw",)
    ),
    "cifar10": TaskModule(
        "cifar10",
        lambda module, settings: module.load(settings.data_dir or "data"),
        ("cifar-10-batches-py",),
    ),
    "imagefolder": TaskModule(
        "imagefolder",
        lambda module, settings: module.load(settings.data_dir or "data", settings.class_names),
        ("train",),
    ),
    "toxic": TaskModule(
        "toxic",
        lambda module, settings: module.load(
            settings.data_dir or "data", settings.vectors, settings.vocabulary
        ),
        ("train.csv", "jigsaw/train.csv"),
    ),
    "speech": TaskModule(
        "speech",
        lambda module, settings: module.load(
            settings.data_dir or "data", settings.split, settings.class_names
        ),
        ("SpeechCommands", "*/*_nohash_*.wav"),
    ),
    "audioset": TaskModule(
        "audioset",
        lambda module, settings: module.load(settings.data_dir or "data"),
        ("train.h5", "train.npz"),
    ),
}
"""The tasks by name."""
