"""The Kit of a task in a framework: its models, and the transforms that prepare a batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clients.data import Task
from clients.settings import ParticipantSettings
from flwr_colearn import ColearnError


def kit_for(kits: Mapping[str, "Kit"], settings: ParticipantSettings) -> "Kit":
    """Return a framework's kit for the task that the settings name.

    Raises
    ------
    ColearnError
        If the framework has no kit for the task.
    """
    if settings.task not in kits:
        raise ColearnError(
            f"run config 'task': expected {' or '.join(kits)} with {settings.framework}, found "
            f"{settings.task!r}"
        )
    return kits[settings.task]


@dataclass(frozen=True)
class Kit:
    """One task in one framework.

    Attributes
    ----------
    models : mapping
        The models by name, as the framework's trainer expects them; the first is the default.
    plain, augmented : callable
        The trainer's ``transform`` without and with the task's standard augmentation.
    """

    models: Mapping[str, Callable[..., Any]]
    plain: Callable[..., Any]
    augmented: Callable[..., Any]

    def model(self, settings: ParticipantSettings) -> Callable[..., Any]:
        """Return the model that the settings name.

        Raises
        ------
        ColearnError
            If the framework has no such model for the task.
        """
        name = settings.model or next(iter(self.models))
        if name not in self.models:
            raise ColearnError(
                f"run config 'model': expected one of {', '.join(self.models)} for task "
                f"{settings.task} with {settings.framework}, found {name!r}"
            )
        return self.models[name]

    def options(self, settings: ParticipantSettings, task: Task) -> dict[str, Any]:
        """Return the arguments that the trainers of all frameworks take."""
        return {
            "objective": task.objective,
            "batch_size": settings.batch_size,
            "momentum": settings.momentum,
            "weight_decay": settings.weight_decay,
            "transform": self.transform(settings),
            # A run config has no None: 0 stands for no clipping.
            "clip_norm": settings.clip_norm or None,
        }

    def transform(self, settings: ParticipantSettings) -> Callable[..., Any]:
        """Return the transform that the settings ask for."""
        return self.augmented if settings.augment else self.plain
