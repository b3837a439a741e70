"""The Trainer protocol, and following a plan with one: no framework in sight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flwr_colearn import ColearnError, LocalPlan, Role

NDArray = npt.NDArray[Any]


@dataclass(frozen=True)
class EpochResult:
    """What one local epoch gave: mean training loss, and the number of examples seen."""

    loss: float
    num_examples: int


class Trainer(Protocol):
    """A model with its participant's data: all that a framework has to offer to take part."""

    def get_weights(self) -> dict[str, NDArray]:
        """Return the model's arrays by name, statistics and counters included."""

    def set_weights(self, weights: Mapping[str, NDArray]) -> None:
        """Start again from these arrays, which may be read-only, with a new optimizer."""

    def roles(self) -> dict[str, Role]:
        """Return the role of every array, as the model's layers know it: ``CoLearn(roles=...)``."""

    def train_epoch(self, learning_rate: float, seed: int) -> EpochResult:
        """Train one full pass over the local data.

        Parameters
        ----------
        learning_rate : float
            For every step of the epoch.
        seed : int
            Decides the order of the data, augmentation and dropout: the same seed from the same
            weights gives the same weights.
        """

    def evaluate(self) -> dict[str, float]:
        """Evaluate on the evaluation data: ``num-examples``, ``loss`` and the task's metrics."""

    def predict(self) -> tuple[NDArray, NDArray]:
        """Return the model's outputs (float32) and the targets on the evaluation data, in order."""

    def get_optimizer_state(self) -> dict[str, NDArray]:
        """Return the optimizer's state as arrays, for participants that keep it between rounds."""

    def set_optimizer_state(self, state: Mapping[str, NDArray]) -> None:
        """Go on with an optimizer state returned earlier; call it after `set_weights`."""


def follow(plan: LocalPlan, trainer: Trainer, seed: int) -> dict[str, float]:
    """Train the local epochs of a plan.

    Parameters
    ----------
    plan : LocalPlan
        What the round asks for.
    trainer : Trainer
        Its weights are trained in place.
    seed : int
        The participant's. Every epoch of the run has a seed of its own, drawn from this one and
        the epoch's number in the run, so a restarted round repeats itself exactly.

    Returns
    -------
    dict
        ``num-examples`` of an epoch, and the last epoch's ``train-loss`` and ``learning-rate``.
    """
    for epoch in plan:
        epoch_seed = derive_seed(seed, plan.epochs_done + epoch.index)
        result = trainer.train_epoch(epoch.learning_rate, epoch_seed)
    return {
        "num-examples": result.num_examples,
        "train-loss": result.loss,
        "learning-rate": epoch.learning_rate,
    }


def check_weights(weights: Mapping[str, NDArray], own: Mapping[str, NDArray], model: str) -> None:
    """Raise a ColearnError that says what differs unless `weights` fit a participant's `own`.

    Parameters
    ----------
    weights : mapping
        What was received.
    own : mapping
        Arrays (or anything with a shape and a dtype) of the participant's model, by name.
    model : str
        What to call that model.
    """
    missing = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    differing = [
        f"'{name}' {_kind(weights[name])} in place of {_kind(array)}"
        for name, array in own.items()
        if name in weights and _kind(weights[name]) != _kind(array)
    ]
    if missing or unknown or differing:
        raise ColearnError(
            f"weights: expected those of this participant's {model}, found others; is it the "
            f"server's model, in the server's framework? {len(missing)} arrays missing "
            f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}, {len(differing)} of another "
            f"type or shape {differing[:3]}"
        )


def _kind(array: Any) -> str:
    # The type's name: numpy's and TensorFlow's types have one, Keras's are one.
    return f"{getattr(array.dtype, 'name', array.dtype)} {tuple(array.shape)}"


def accuracy(outputs: NDArray, targets: NDArray) -> float:
    """Return the share of examples whose largest output [N, classes] is the target's [N]."""
    return float((outputs.argmax(1) == targets).mean())


def derive_seed(*numbers: int) -> int:
    """Return a 32-bit seed drawn from whole numbers of at least 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
