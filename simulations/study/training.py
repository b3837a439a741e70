"""Train one arm with one seed, in process, and go on where an interrupted training stopped."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, MetricRecord

from clients.app import app, forget_trainers
from clients.settings import ParticipantSettings
from clients.tasks.registry import load_task, server_trainer
from flwr_colearn import CoLearn, ColearnError, History, InProcessGrid, codec_named
from flwr_colearn.reporting import doublings
from simulations.arms import Arm, arm_named, at_one_site
from simulations.server_app import evaluate_with, make_strategy, to_record
from simulations.settings import RunSettings
from simulations.study.ensemble import train_alone
from simulations.study.units import Curves, data_digest, unit_config

Evaluating = Callable[[CoLearn], Callable[[int, ArrayRecord], MetricRecord | None]]
"""A function that returns the server's evaluation of the models of a strategy."""


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
        round's time over their number, evaluation included. Empty without rounds,
        and with several processes, whose participants disturb one another.
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
    processes: int = 1,
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
    processes : int, default 1
        The number of worker processes in which participants train side by side.
    """
    if keeps_state(participants, settings):
        scratch = None
    arm, started = arm_named(name), time.perf_counter()
    if arm.alone and settings.local_steps:
        raise ColearnError(
            f"run config 'local-steps': expected 0 for the arm {name}, whose participants train "
            f"alone and take no plan, found {settings.local_steps}"
        )
    task = load_task(participants)
    model_bytes = sum(a.nbytes for a in server_trainer(participants).get_weights().values())
    rounds = moved = 0
    grown: list[int] = []
    round_seconds: list[float] = []
    if arm.alone:
        epochs, metrics = train_alone(arm, participants, settings, scratch)
    else:
        history = train_averaged(name, arm, participants, settings, scratch, processes=processes)
        epochs = [record.epochs_done for record in history]
        metrics = curves_of(history)
        grown = doublings(history.records)
        # Vanilla learning exchanges no models: its rounds are only where it is evaluated.
        if not arm.pooled_data:
            rounds, moved = len(history), history.bytes_total
            k = settings.num_participants
            if processes == 1:
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


def train_averaged(
    name: str,
    arm: Arm,
    participants: ParticipantSettings,
    settings: RunSettings,
    scratch: Path | None = None,
    evaluating: Evaluating | None = None,
    processes: int = 1,
) -> History:
    """Train an arm whose participants exchange models.

    Vanilla learning with the cyclical rate is one of them: co-learning of one participant.
    `evaluating` returns the server's evaluation for a strategy; by default every shared model is
    evaluated on the test set.
    """
    if arm.pooled_data:
        participants, settings = at_one_site(participants, settings)
    trainer = server_trainer(participants)
    strategy = make_strategy(
        replace(settings, arm=name), trainer, None, scratch, participants.scheme
    )
    k, config = settings.num_participants, participants.to_config()
    with InProcessGrid(app, k, config, processes=processes) as grid:
        strategy.start(
            grid,
            to_record(trainer),
            num_rounds=settings.num_server_rounds or None,
            timeout=float("inf"),
            evaluate_fn=evaluating(strategy) if evaluating else evaluate_with(trainer),
            resume="auto",
        )
    return strategy.history
