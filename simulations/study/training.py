"""Train one arm with one seed, in process, and go on where an interrupted training stopped."""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clients.app import app, forget_trainers
from clients.settings import ParticipantSettings
from clients.tasks.registry import load_task, participant_trainer, server_trainer
from clients.trainer import NDArray, Trainer, derive_seed, follow
from flwr_colearn import ExponentialRate, History, InProcessGrid, LocalPlan
from flwr_colearn.report import doublings
from flwr_colearn.wire import codec_named
from simulations.arms import Arm, arm_named, schedules
from simulations.server_app import evaluate_with, make_strategy, to_record
from simulations.settings import RunSettings
from simulations.study.units import data_digest, unit_config

Curves = dict[str, list[float]]
"""Values by metric, after each round."""


@dataclass(frozen=True)
class ArmUnit:
    """The result of one arm with one seed.

    Attributes
    ----------
    arm : str
        Key of `simulations.arms.ARMS`.
    seed : int
        Of partition, initial model and training.
    epochs : list of int
        Local epochs per participant after which the shared model was evaluated.
    metrics : dict
        For each metric its values after so many epochs: of the shared model on the test set (of
        the averaged outputs, for the ensemble).
    headline : str
        The metric that stands for the model.
    doublings : list of int
        Local epochs after which T was increased.
    rounds : int
        Communication rounds; 0 where nothing is exchanged.
    bytes : int
        Of arrays, up and down, over all participants.
    model_bytes : int
        Of all arrays of one model.
    round_seconds : list of float
        Seconds of every round, for one participant: participants take turns here, so this is a
        round's time over their number, evaluation included. Empty without rounds.
    examples : int
        Trained on, over all participants and epochs.
    seconds : float
        Wall time; of the last part only, if it was interrupted.
    config : dict
        The settings that gave it.
    data : str
        `data_digest` of the task's data.
    """

    arm: str
    seed: int
    epochs: list[int]
    metrics: Curves
    headline: str
    doublings: list[int]
    rounds: int
    bytes: int
    model_bytes: int
    round_seconds: list[float]
    examples: int
    seconds: float
    config: dict[str, Any]
    data: str

    @property
    def values(self) -> list[float]:
        """The headline metric's values."""
        return self.metrics[self.headline]

    @property
    def interval(self) -> float | None:
        """Mean seconds between two exchanges before the first doubling; None if not measured."""
        rounds = self.round_seconds
        if self.doublings:
            rounds = rounds[: self.epochs.index(self.doublings[0]) + 1]
        return sum(rounds) / len(rounds) if rounds else None

    @property
    def score(self) -> float:
        """The headline metric at the end, in percent."""
        return 100 * self.values[-1]


def run_unit(
    name: str,
    participants: ParticipantSettings,
    settings: RunSettings,
    scratch: Path | None = None,
) -> ArmUnit:
    """Train one arm with one seed.

    Parameters
    ----------
    name : str
        Of the arm.
    participants, settings
        Of both sides; the seed is the participants'.
    scratch : Path, optional
        Folder for checkpoints, from which an interrupted training goes on; removed at the end. Not
        used where participants keep something that is in no checkpoint: their optimizer, their
        own part of the model, or what compression rounded away. Those begin anew.
    """
    if keeps_state(participants, settings):
        scratch = None
    arm, started = arm_named(name), time.perf_counter()
    task = load_task(participants)
    model_bytes = sum(a.nbytes for a in server_trainer(participants).get_weights().values())
    rounds = moved = 0
    grown: list[int] = []
    round_seconds: list[float] = []
    if arm.alone:
        epochs, metrics = train_alone(arm, participants, settings, scratch)
    else:
        history = train_averaged(name, arm, participants, settings, scratch)
        epochs = [record.epochs_done for record in history]
        metrics = curves_of(history)
        grown = doublings(history.records)
        # Vanilla learning exchanges no models: its rounds are only where it is evaluated.
        if not arm.pooled_data:
            rounds, moved = len(history), history.bytes_total
            k = settings.num_participants
            round_seconds = [round(record.seconds / k, 3) for record in history]
    unit = ArmUnit(
        name,
        participants.seed,
        epochs,
        metrics,
        task.objective.headline,
        grown,
        rounds,
        moved,
        model_bytes,
        round_seconds,
        (participants.examples or len(task.train_set)) * epochs[-1],
        round(time.perf_counter() - started, 1),
        unit_config(participants, settings),
        data_digest(task),
    )
    forget_trainers()  # a study has more of them than fit on a GPU
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)
    return unit


def keeps_state(participants: ParticipantSettings, settings: RunSettings) -> bool:
    """Return whether participants keep something between rounds."""
    codec = codec_named(settings.compression_up)
    return participants.keep_optimizer or participants.scheme.is_local or codec.differential


def curves_of(history: History) -> Curves:
    """Return the task's metrics of the shared model, round by round."""
    names = [n for n in history.records[0].server_metrics if n not in ("num-examples", "loss")]
    return {name: [record.server_metrics[name] for record in history] for name in names}


def at_one_site(
    participants: ParticipantSettings, settings: RunSettings
) -> tuple[ParticipantSettings, RunSettings]:
    """Return the settings of one participant with all the data, whose model travels nowhere."""
    plain = {"compression_up": "float32", "compression_down": "float32"}
    return (
        replace(participants, partition="iid"),
        replace(settings, num_participants=1, **plain),
    )


def train_averaged(
    name: str,
    arm: Arm,
    participants: ParticipantSettings,
    settings: RunSettings,
    scratch: Path | None = None,
) -> History:
    """Train an arm whose participants exchange models.

    Vanilla learning with the cyclical rate is one of them: co-learning of one participant.
    """
    if arm.pooled_data:
        participants, settings = at_one_site(participants, settings)
    trainer = server_trainer(participants)
    strategy = make_strategy(
        replace(settings, arm=name), trainer, None, scratch, participants.scheme
    )
    grid = InProcessGrid(app, settings.num_participants, run_config=participants.to_config())
    strategy.start(
        grid,
        to_record(trainer),
        num_rounds=settings.num_server_rounds or None,
        timeout=float("inf"),
        evaluate_fn=evaluate_with(trainer),
        resume="auto",
    )
    return strategy.history


def train_alone(
    arm: Arm,
    participants: ParticipantSettings,
    settings: RunSettings,
    scratch: Path | None = None,
) -> tuple[list[int], Curves]:
    """Train every participant by itself and average their output probabilities (paper, 4.1).

    With the data pooled there is one participant: vanilla learning, one uninterrupted training.

    Returns
    -------
    epochs : list of int
        Every T0 local epochs.
    metrics : dict
        Of the averaged outputs on the test set, after so many epochs.
    """
    if arm.pooled_data:
        participants, settings = at_one_site(participants, settings)
    k = settings.num_participants
    objective, judge = load_task(participants).objective, server_trainer(participants)
    trainers = [participant_trainer(participants, index, k) for index in range(k)]
    state = AloneState(None if scratch is None else scratch / "alone.npz")
    epochs, metrics = state.restore(trainers)
    for plan in plans_alone(arm, settings):
        if epochs and plan.epochs_done < epochs[-1]:
            continue
        probabilities = []
        for index, trainer in enumerate(trainers):
            follow(plan, trainer, derive_seed(participants.seed, index))
            judge.set_weights(trainer.get_weights())
            outputs, targets = judge.predict()
            probabilities.append(objective.probabilities(outputs))
        epochs.append(plan.epochs_done + plan.local_epochs)
        for key, value in objective.metrics(np.mean(probabilities, axis=0), targets).items():
            metrics.setdefault(key, []).append(value)
        state.save(trainers, epochs, metrics)
    return epochs, metrics


def plans_alone(arm: Arm, settings: RunSettings) -> list[LocalPlan]:
    """Return the plans of T0 epochs each that make up a training with the exponential rate."""
    rate, total = schedules(arm, settings)["learning_rate"], settings.total_epochs
    assert isinstance(rate, ExponentialRate)
    return [
        LocalPlan(
            round=index + 1,
            local_epochs=min(settings.initial_epochs, total - done),
            learning_rate=rate.start(index),
            schedule=rate.kind,
            decay=rate.decay,
            epochs_done=done,
            total_epochs=total,
        )
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
        np.savez(scratch, **arrays)
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
