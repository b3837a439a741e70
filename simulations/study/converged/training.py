"""Train one variant with one seed, and record what shows whether it has converged."""

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, MetricRecord

from clients.app import forget_trainers
from clients.data import Task, take
from clients.settings import ParticipantSettings
from clients.tasks.registry import load_task, server_trainer, shards
from clients.trainer import Trainer
from flwr_colearn import CoLearn, History
from simulations.server_app import evaluate_with
from simulations.study.converged.variants import Variant
from simulations.study.ensemble import averaged_outputs, train_alone
from simulations.study.training import keeps_state, train_averaged
from simulations.study.units import Curves, checkpoint_beside, data_digest, unit_config

TRAIN = "train-"
"""The beginning of the names of metrics on the training examples."""


@dataclass(frozen=True)
class Run:
    """The result of one variant with one seed.

    Attributes
    ----------
    variant : str
        The name.
    seed : int
        Of partition, initial model and training.
    epochs : list of int
        The local epochs per participant after which the shared model was evaluated.
    metrics : dict
        For each metric its values after so many epochs: those on the test set by their names, and
        those on the training examples, without augmentation, with "train-" before. Of participants
        that train alone they are those of the averaged outputs on the test set, and the means of
        each on its own training examples.
    headline : str
        The metric that stands for the model.
    rounds_at, bytes_at : list of int
        The rounds done, and the bytes moved, up and down, over all participants, at these epochs.
    local_epochs : list of int
        T of every round.
    relative_changes : list of float
        Of the shared model in every round.
    model_bytes : int
        Of all arrays of one model.
    examples : int
        Trained on, over all participants and epochs.
    seconds : float
        Wall time; of the last part only, if it was interrupted.
    config : dict
        The settings that gave it.
    data : str
        `data_digest` of the task's data.
    """

    variant: str
    seed: int
    epochs: list[int]
    metrics: Curves
    headline: str
    rounds_at: list[int]
    bytes_at: list[int]
    local_epochs: list[int]
    relative_changes: list[float]
    model_bytes: int
    examples: int
    seconds: float
    config: dict[str, Any]
    data: str

    @property
    def values(self) -> list[float]:
        """The headline metric's values on the test set."""
        return self.metrics[self.headline]

    @property
    def score(self) -> float:
        """The headline metric at the end, in percent."""
        return 100 * self.values[-1]

    @property
    def rounds(self) -> int:
        """The communication rounds; 0 where nothing is exchanged."""
        return self.rounds_at[-1]

    @property
    def bytes(self) -> int:
        """The bytes of arrays, up and down, over all participants."""
        return self.bytes_at[-1]


def run_config(variant: Variant, every: int) -> dict[str, Any]:
    """Return the settings that a result depends on."""
    config = unit_config(variant.participants, variant.settings)
    return {**config, "arm": variant.settings.arm, "every": every}


def train(variant: Variant, every: int, path: Path, processes: int = 1) -> Run:
    """Train a variant; `path` is that of its result, beside which its checkpoints are.

    Participants that train alone, as those of the ensemble, are trained in this process.
    """
    started = time.perf_counter()
    participants, settings, arm = variant.participants, variant.settings, variant.arm
    task = load_task(participants)
    config, data = run_config(variant, every), data_digest(task)
    scratch = checkpoint_beside(path, config, data)
    measured = Measured(participants, every)
    kept = None if keeps_state(participants, settings) else scratch
    if arm.alone:
        settings = replace(settings, initial_epochs=every)
        epochs, metrics = train_alone(arm, participants, settings, kept, measured.alone)
        history = History()
    else:
        name = settings.arm
        history = train_averaged(
            name, arm, participants, settings, kept, measured.shared, processes
        )
        epochs, metrics = curves_of(history)
    exchanged = [] if arm.pooled_data else history.records
    run = Run(
        variant.name,
        participants.seed,
        epochs,
        metrics,
        task.objective.headline,
        [sum(r.epochs_done <= epoch for r in exchanged) for epoch in epochs],
        [sum(_moved(r) for r in exchanged if r.epochs_done <= epoch) for epoch in epochs],
        [record.local_epochs for record in history],
        [float(record.relative_change or 0) for record in history],
        sum(a.nbytes for a in server_trainer(participants).get_weights().values()),
        (participants.examples or len(task.train_set)) * epochs[-1],
        round(time.perf_counter() - started, 1),
        config,
        data,
    )
    forget_trainers()  # a study has more of them than fit on a GPU
    shutil.rmtree(scratch, ignore_errors=True)
    return run


def _moved(record: Any) -> int:
    return (record.bytes_up or 0) + (record.bytes_down or 0)


def curves_of(history: History) -> tuple[list[int], Curves]:
    """Return the epochs of the rounds that were evaluated, and the metrics after them."""
    records = [record for record in history if record.server_metrics]
    names = [name for name in records[0].server_metrics if not name.endswith("num-examples")]
    return (
        [record.epochs_done for record in records],
        {name: [record.server_metrics[name] for record in records] for name in names},
    )


class Measured:
    """Evaluations on the test set and on the training examples.

    Parameters
    ----------
    participants : ParticipantSettings
        The settings.
    every : int
        The local epochs between two evaluations.
    """

    def __init__(self, participants: ParticipantSettings, every: int) -> None:
        self.every = every
        task = load_task(participants)
        self._objective, self._outputs = task.objective, averaged_outputs(participants)
        self._test = evaluate_with(server_trainer(participants))
        seen = replace(task.for_other_data(), test_set=training_examples(participants, task))
        self._train = evaluate_with(server_trainer(participants, seen))

    def shared(self, strategy: CoLearn) -> Callable[[int, ArrayRecord], MetricRecord | None]:
        """Return the evaluation of a strategy's shared models, those of some rounds."""

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            now = strategy.progress
            before = now.epochs_done - (strategy.log.record.local_epochs if server_round else 0)
            passed = now.epochs_done // self.every > before // self.every
            if not server_round or not (passed or strategy.spent):
                return None
            metrics = dict(self._test(server_round, arrays))
            trained = self._train(server_round, arrays)
            return MetricRecord({**metrics, **{TRAIN + name: trained[name] for name in trained}})

        return evaluate

    def alone(self, trainers: Sequence[Trainer]) -> dict[str, float]:
        """Return the metrics of participants that have trained each by itself."""
        own = [trainer.evaluate() for trainer in trainers]
        names = [name for name in own[0] if name != "num-examples"]
        means = {TRAIN + name: statistics.mean(each[name] for each in own) for name in names}
        outputs, targets = self._outputs(trainers)
        loss = self._objective.loss(outputs, targets)
        return {"loss": loss, **self._objective.metrics(outputs, targets), **means}


def training_examples(participants: ParticipantSettings, task: Task) -> Any:
    """Return the examples that a run trains on, of all participants."""
    (everything,) = shards(replace(participants, partition="iid"), 1)
    return take(task.train_set, everything)
