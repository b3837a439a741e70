"""One cell of the study of normalization schemes: a training, a partition and a scheme."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from torch.utils.data import TensorDataset

from clients.client_app import make_client_app
from clients.settings import ParticipantSettings
from clients.tasks.registry import load_task, participant_trainer, server_trainer, shards
from clients.torch.trainer import TorchTrainer
from clients.trainer import NDArray
from flwr_colearn import (
    Averaging,
    CoLearn,
    ColearnError,
    ExponentialRate,
    History,
    InProcessGrid,
    Normalization,
    SynchronousSGD,
    ThreadedGrid,
)
from flwr_colearn.errors import NOT_FINITE
from flwr_colearn.normalization import scheme_named
from flwr_colearn.records import data_bytes
from flwr_colearn.torch import convert
from flwr_colearn.torch import roles as roles_of
from simulations.arms import ARMS, schedules
from simulations.server_app import to_record
from simulations.settings import RunSettings
from simulations.study.units import unit_config

TRAININGS = {
    "synchronous": "synchronous SGD",
    "colearn": "co-learning (CLR+ILE)",
    "fedavg": "federated averaging",
}
PARTITIONS = {"iid": "IID", "dirichlet": "Dirichlet 0.5", "classes": "two classes each"}


@dataclass(frozen=True)
class Unit:
    """The result of one cell with one seed.

    Attributes
    ----------
    training, partition, scheme : str
        Keys of `TRAININGS`, `PARTITIONS`, `SCHEMES`.
    seed : int
        Of partition, initial model and training.
    shared_accuracy : float or None
        Of the shared model on the common test set; None where part of it is local.
    sites_accuracy : float
        Of the participants' own models on the common test set, their mean; where nothing is local
        they all are the shared model.
    local_accuracy : float
        Of the participants' own models on test data with the labels of their own data, their mean:
        accuracy by class on the common test set, weighted by the participant's shares of classes.
    rounds : int
        Exchanges of models, or of gradients.
    bytes : int
        Of arrays, up and down, over all participants, the scheme's own exchanges included.
    scheme_bytes : int
        What the scheme cost over exchanging the whole model; below 0: saved.
    seconds : float
        Wall time.
    config : dict
        The settings that gave it.
    diverged : bool
        Whether a participant's numbers ceased to be finite; then there is no accuracy.
    """

    training: str
    partition: str
    scheme: str
    seed: int
    shared_accuracy: float | None
    sites_accuracy: float | None
    local_accuracy: float | None
    rounds: int
    bytes: int
    scheme_bytes: int
    seconds: float
    config: dict[str, object]
    diverged: bool = False


@dataclass(frozen=True)
class Cell:
    """One cell of the study with one seed, and the settings of both sides.

    Attributes
    ----------
    training, scheme : str
        Keys of `TRAININGS` and `SCHEMES`.
    participants, settings
        Of both sides; the partition and the seed are the participants'.
    test_examples : int
        Evaluate on so many examples of the test set, the first ones; 0 for all.
    """

    training: str
    scheme: str
    participants: ParticipantSettings
    settings: RunSettings
    test_examples: int = 0

    @property
    def possible(self) -> bool:
        """Whether there is such a thing: layers are synchronised at every step or not at all."""
        return self.scheme != "synchronised" or self.training == "synchronous"

    @property
    def rounds(self) -> int:
        """Steps, or rounds of one local epoch; co-learning has fewer."""
        if self.training != "synchronous":
            return self.settings.total_epochs
        k = self.settings.num_participants
        sizes = [len(shard) for shard in shards(self.participants, k)]
        # As many steps as a participant of average size takes in its local epochs.
        steps = -(-sum(sizes) // (k * self.participants.batch_size))
        return steps * self.settings.total_epochs

    def normalization(self) -> Normalization:
        """Return the scheme, its parameters as the study has them."""
        half = 4 if self.training == "colearn" else self.rounds // 2
        every = self.rounds if self.training == "synchronous" else 1
        parameters = {
            "recalibrated": {"every": every},
            "frozen": {"after": half},
            "batch-renorm": {"warmup": 50},
        }
        return scheme_named(self.scheme, **parameters.get(self.scheme, {}))


def run_cell(cell: Cell, processes: int = 1) -> Unit:
    """Train and evaluate one cell, whose participants train in so many processes.

    Layers that are synchronised need participants that are threads of one process.
    """
    started = time.perf_counter()
    scheme, settings, participants = cell.normalization(), cell.settings, cell.participants
    plain = server_trainer(participants)
    assert isinstance(plain, TorchTrainer)
    evaluator = converted(plain, scheme, participants)
    if cell.test_examples:
        assert isinstance(evaluator.test_set, TensorDataset)
        evaluator.test_set = TensorDataset(
            *(t[: cell.test_examples] for t in evaluator.test_set.tensors)
        )
    k = settings.num_participants
    app = partial(client_app, participants, scheme, k, torch.get_num_threads())
    strategy = strategy_of(cell, scheme, evaluator)
    initial = to_record(evaluator)
    with (
        ThreadedGrid(app, k)
        if scheme.all_reduces
        else InProcessGrid(app, k, processes=processes) as grid
    ):
        shared = train(cell, strategy, grid, initial)
    history: History = strategy.history
    overall = local = whole = None
    if shared is not None:
        sites, locals_ = evaluate(evaluator, shared, grid, participants, scheme.is_local)
        overall, local = statistics.mean(sites), statistics.mean(locals_)
        whole = None if scheme.is_local else sites[0]
    return Unit(
        cell.training,
        participants.partition,
        cell.scheme,
        participants.seed,
        whole,
        overall,
        local,
        len(history),
        history.bytes_total,
        history.bytes_total - len(history) * 2 * k * data_bytes(initial),
        round(time.perf_counter() - started, 1),
        config_of(cell),
        diverged=shared is None,
    )


def train(
    cell: Cell, strategy: Averaging, grid: InProcessGrid, initial: ArrayRecord
) -> dict[str, NDArray] | None:
    """Return the model that a cell's training ends with, or None if it diverges.

    One participant that diverges is enough: whatever is averaged without it is another experiment.
    """
    config = ConfigRecord()
    if cell.training == "fedavg":
        rate = cell.settings.learning_rate
        config = ConfigRecord({"local-epochs": 1, "learning-rate": rate})
    limit: dict[str, Any] = {} if cell.training == "colearn" else {"num_rounds": cell.rounds}
    try:
        result = strategy.start(grid, initial, train_config=config, **limit)
    except ColearnError as error:
        if NOT_FINITE in str(error):
            return None
        raise
    history: History = strategy.history
    refusals = [entry["reason"] for record in history for entry in record.refusals]
    shared = {name: array.numpy() for name, array in result.arrays.items()}
    finite = all(np.isfinite(array).all() for array in shared.values())
    return shared if finite and not any(NOT_FINITE in reason for reason in refusals) else None


def strategy_of(cell: Cell, scheme: Normalization, evaluator: TorchTrainer) -> Averaging:
    """Return the strategy of a cell, which evaluates nothing itself."""
    k, settings, roles = cell.settings.num_participants, cell.settings, roles_of(evaluator.model)
    if cell.training == "colearn":
        return CoLearn(
            k,
            **schedules(ARMS["clr-ile"], settings),
            roles=roles,
            normalization=scheme,
            fraction_evaluate=0.0,
        )
    if cell.training == "synchronous":
        return SynchronousSGD(
            k,
            learning_rate=ExponentialRate(settings.learning_rate, settings.decay, cell.rounds),
            momentum=cell.participants.momentum,
            roles=roles,
            normalization=scheme,
        )
    return Averaging(k, roles=roles, normalization=scheme, fraction_evaluate=0.0, recovery=None)


def client_app(
    participants: ParticipantSettings, scheme: Normalization, k: int, threads: int
) -> ClientApp:
    """Return a ClientApp of participants whose models are converted as the scheme asks.

    In a worker process too PyTorch has so many threads.
    """
    torch.set_num_threads(threads)

    @lru_cache
    def trainer(index: int) -> TorchTrainer:
        plain = participant_trainer(participants, index, k)
        assert isinstance(plain, TorchTrainer)
        return converted(plain, scheme, participants)

    for index in range(k):  # before there are threads: models are drawn from one generator
        trainer(index)
    return make_client_app(
        lambda context: trainer(int(context.node_config["partition-id"])),
        seed=lambda context: participants.seed,
        mods=[count_epochs],
    )


def count_epochs(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Say which epoch it is where the server does not, so that every one has its own order."""
    config = message.content.config_records.get("config")
    if config is not None and "epochs-done" not in config:
        config["epochs-done"] = int(config["server-round"]) - 1  # type: ignore[arg-type]
    return call_next(message, context)


def converted(
    trainer: TorchTrainer, scheme: Normalization, participants: ParticipantSettings
) -> TorchTrainer:
    """Return a trainer of the same data whose model is converted as the scheme asks."""
    return TorchTrainer(
        convert(trainer.model, scheme),
        trainer.train_set,
        trainer.test_set,
        batch_size=participants.batch_size,
        momentum=participants.momentum,
        weight_decay=participants.weight_decay,
        transform=trainer.transform,
        objective=trainer.objective,
        precision=participants.precision,
        clip_norm=participants.clip_norm or None,
        channels_last=participants.channels_last,
    )


def evaluate(
    evaluator: TorchTrainer,
    shared: dict[str, NDArray],
    grid: InProcessGrid,
    participants: ParticipantSettings,
    is_local: bool,
) -> tuple[list[float], list[float]]:
    """Return every participant's accuracy, on the common test set and on labels like its own."""
    overall, local = [], []
    by_class: NDArray | None = None
    labels = _labels(participants)
    for index, shard in enumerate(shards(participants, len(grid.contexts))):
        if by_class is None or is_local:
            own = dict(shared)
            if is_local:
                kept = cast(ArrayRecord, grid.contexts[index + 1].state["normalization.after"])
                own.update({n: a.numpy() for n, a in kept.items() if n in own})
            evaluator.set_weights(own)
            outputs, targets = evaluator.predict()
            right = outputs.argmax(1) == targets
            by_class = np.array([right[targets == c].mean() for c in range(targets.max() + 1)])
        overall.append(float(right.mean()))
        shares = np.bincount(labels[shard], minlength=len(by_class)) / len(shard)
        local.append(float(shares @ by_class))
    return overall, local


def _labels(participants: ParticipantSettings) -> NDArray:
    return load_task(participants).train_set.labels


def config_of(cell: Cell) -> dict[str, object]:
    """Return the settings that a cell's result depends on."""
    config = unit_config(cell.participants, cell.settings)
    scheme = str(cell.normalization())
    return {**config, "normalization": scheme, "test-examples": cell.test_examples}
