"""What a framework brings to a task: its models for it, and how it prepares a batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clients.settings import ParticipantSettings
from flwr_colearn import ColearnError


@dataclass(frozen=True)
class Kit:
    """One task in one framework.

    Attributes
    ----------
    models : mapping
        Models by name, in whatever form the framework's trainer takes them; the first is the
        default.
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

    def transform(self, settings: ParticipantSettings) -> Callable[..., Any]:
        """Return the transform that the settings ask for."""
        return self.augmented if settings.augment else self.plain
