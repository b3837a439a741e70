"""Training every participant by itself and judging their averaged outputs; vanilla has one."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from clients.settings import ParticipantSettings
from clients.tasks.registry import load_task, participant_trainer, server_trainer
from clients.trainer import NDArray, Trainer, derive_seed, follow
from flwr_colearn import LocalPlan
from simulations.arms import Arm, at_one_site, schedules
from simulations.settings import RunSettings
from simulations.study.units import Curves

Measure = Callable[[Sequence[Trainer]], dict[str, float]]
"""A function from the participants' trainers to metrics of their models."""


def train_alone(
    arm: Arm,
    participants: ParticipantSettings,
    settings: RunSettings,
    scratch: Path | None = None,
    measure: Measure | None = None,
) -> tuple[list[int], Curves]:
    """Train every participant by itself and average their output probabilities (paper, 4.1).

    With the data pooled there is one participant: vanilla learning, one uninterrupted training.

    Parameters
    ----------
    arm, participants, settings
        Of the training.
    scratch : Path, optional
        Folder from which an interrupted training goes on.
    measure : callable, optional
        What is measured after every T0 local epochs; by default the metrics of the averaged outputs
        on the test set.

    Returns
    -------
    epochs : list of int
        Every T0 local epochs.
    metrics : dict
        What was measured after so many epochs.
    """
    if arm.pooled_data:
        participants, settings = at_one_site(participants, settings)
    k = settings.num_participants
    measure = measure or ensemble_metrics(participants)
    trainers = [participant_trainer(participants, index, k) for index in range(k)]
    state = AloneState(None if scratch is None else scratch / "alone.npz")
    epochs, metrics = state.restore(trainers)
    for plan in plans_alone(arm, settings):
        if epochs and plan.epochs_done < epochs[-1]:
            continue
        for index, trainer in enumerate(trainers):
            follow(plan, trainer, derive_seed(participants.seed, index))
        epochs.append(plan.epochs_done + plan.local_epochs)
        for key, value in measure(trainers).items():
            metrics.setdefault(key, []).append(value)
        state.save(trainers, epochs, metrics)
    return epochs, metrics


def ensemble_metrics(participants: ParticipantSettings) -> Measure:
    """Return a function that measures the averaged outputs of models on the test set."""
    objective, averaged = load_task(participants).objective, averaged_outputs(participants)
    return lambda trainers: dict(objective.metrics(*averaged(trainers)))


def averaged_outputs(
    participants: ParticipantSettings,
) -> Callable[[Sequence[Trainer]], tuple[NDArray, NDArray]]:
    """Return a function of trainers: their mean probabilities, and the targets, on the test set."""
    objective, evaluator = load_task(participants).objective, server_trainer(participants)

    def average(trainers: Sequence[Trainer]) -> tuple[NDArray, NDArray]:
        probabilities = []
        for trainer in trainers:
            evaluator.set_weights(trainer.get_weights())
            outputs, targets = evaluator.predict()
            probabilities.append(objective.probabilities(outputs))
        return np.mean(probabilities, axis=0), targets

    return average


def plans_alone(arm: Arm, settings: RunSettings) -> list[LocalPlan]:
    """Return the plans of T0 epochs each that make up a training with the exponential rate."""
    rate, total = schedules(arm, settings)["learning_rate"], settings.total_epochs
    return [
        LocalPlan.of(rate, index + 1, min(settings.initial_epochs, total - done), done)
        for index, done in enumerate(range(0, total, settings.initial_epochs))
    ]


class AloneState:
    """What an interrupted `train_alone` goes on from: models, optimizers and curves, in one file.

    Parameters
    ----------
    path : Path or None
        None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def save(self, trainers: list[Trainer], epochs: list[int], metrics: Curves) -> None:
        """Write everything; a crash leaves the file of before."""
        if self.path is None:
            return
        arrays: dict[str, NDArray] = {"epochs": np.array(epochs)}
        arrays.update({f"metric/{name}": np.array(values) for name, values in metrics.items()})
        for index, trainer in enumerate(trainers):
            for kind, part in (
                ("weights", trainer.get_weights()),
                ("optimizer", trainer.get_optimizer_state()),
            ):
                arrays.update({f"{kind}/{index}/{name}": array for name, array in part.items()})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp.npz")
        np.savez(scratch, **arrays)  # type: ignore[arg-type]
        scratch.replace(self.path)

    def restore(self, trainers: list[Trainer]) -> tuple[list[int], Curves]:
        """Load the trainers, and return epochs and metrics so far; both empty at the beginning."""
        if self.path is None or not self.path.exists():
            return [], {}
        with np.load(self.path) as arrays:
            saved = {name: arrays[name] for name in arrays.files}
        for index, trainer in enumerate(trainers):
            trainer.set_weights(_below(f"weights/{index}/", saved))
            trainer.set_optimizer_state(_below(f"optimizer/{index}/", saved))
        metrics = {name: values.tolist() for name, values in _below("metric/", saved).items()}
        return saved["epochs"].tolist(), metrics


def _below(prefix: str, arrays: dict[str, NDArray]) -> dict[str, NDArray]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
