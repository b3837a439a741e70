"""The Kit of a task in a framework: its models, and the transforms that prepare a batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clients.data import Examples, Task
from clients.imports import imported
from clients.settings import ParticipantSettings
from flwr_colearn import ColearnError

OWN = "package.module:function"
"""The name of the kit for tasks of the user's own."""


def kit_for(kits: Mapping[str, "Kit"], settings: ParticipantSettings) -> "Kit":
    """Return a framework's kit for the task that the settings name.

    Raises
    ------
    ColearnError
        If the framework has no kit for the task.
    """
    name = OWN if ":" in settings.task else settings.task
    if name not in kits:
        raise ColearnError(
            f"run config 'task': expected {' or '.join(kits)} with {settings.framework}, found "
            f"{settings.task!r}"
        )
    return kits[name]


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
        """Return the model that the settings name, or the user's function for it.

        Raises
        ------
        ColearnError
            If the framework has no such model for the task.
        """
        if ":" in settings.model:
            return imported("model", settings.model)
        if not self.models and not settings.model:
            raise ColearnError(
                "run config 'model': expected a function of an installed package, "
                f"'package.module:function', for task {settings.task!r}, found none"
            )
        name = settings.model or next(iter(self.models))
        if name not in self.models:
            raise ColearnError(
                f"run config 'model': expected {' or '.join([*self.models, OWN])} for task "
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


def check_model(model: Any, kind: type, settings: ParticipantSettings) -> None:
    """Raise a ColearnError if the user's function returned something else than a model."""
    if not isinstance(model, kind):
        raise ColearnError(
            f"run config 'model': expected {settings.model}(**task.model_options) to return a "
            f"{kind.__module__}.{kind.__name__}, found {type(model).__name__}"
        )


def check_arrays(task: Task, settings: ParticipantSettings) -> None:
    """Raise a ColearnError unless the data sets are arrays, as TensorFlow's trainers need."""
    if not isinstance(task.train_set, Examples) or not isinstance(task.test_set, Examples):
        raise ColearnError(
            f"task {settings.task!r}: expected clients.data.Examples with framework "
            f"{settings.framework!r}, found {type(task.train_set).__name__}"
        )
