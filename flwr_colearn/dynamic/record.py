"""DynamicRecord: what happened in every round of model averaging, and the history of a run."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from logging import INFO
from pathlib import Path
from typing import Any, Literal

from flwr.common import log

from ..history import RecordFile, from_line, to_line
from ..traffic import Event, RoundTraffic, Transfers


@dataclass
class DynamicRecord:
    """One opportunity to exchange models, after b mini-batches of every learner.

    Attributes
    ----------
    round : int
        From 1.
    mini_batches : int
        Trained by every learner up to now.
    examples : float
        Seen by all learners in this round.
    loss : float or None
        Summed over these examples, each measured before the step that learned from it; ``None``
        where the learners report no loss.
    cumulative_loss : float or None
        Summed over all rounds.
    delta : float
        The bound on |f_i - r|^2 in this round: -1 for every model, infinity for none.
    largest_distance : float
        Largest |f_i - r|^2 that a learner found.
    reporters : list of str
        Learners that sent their model by themselves; in dynamic averaging, the violators.
    fetched : list of str
        Learners that were asked for their model besides.
    groups : list of int
        Sizes of the groups in which they were asked.
    synchronised : {"none", "partial", "full"}
        "full" if everybody has a new model, and the reference is new.
    violations : int
        v: violations since the last full synchronisation.
    moved : dict
        `Transfers` of training and synchronisation, restarts and refused replies included.
    collected : dict
        `Transfers` of models that were fetched only to be evaluated or returned.
    cumulative_bytes : int
        Of all rounds, both directions, control included, without what was only collected.
    evaluated : str
        Which model `server_metrics` belongs to: "mean of all learners" or "reference of round R".
    lost : list of dict
        Learners that were given model and reference anew, each with ``participant`` and ``reason``.
    refusals, restarts, absences : list of dict
        As in `RoundRecord`.
    seconds : float
        From the round's messages to its record.
    server_metrics : dict
        Of the server's own evaluation.
    """

    round: int
    mini_batches: int
    examples: float = 0
    loss: float | None = None
    cumulative_loss: float | None = None
    delta: float = 0.0
    largest_distance: float = 0.0
    reporters: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    synchronised: Literal["none", "partial", "full"] = "none"
    violations: int = 0
    moved: dict[str, int] = field(default_factory=lambda: asdict(Transfers()))
    collected: dict[str, int] = field(default_factory=lambda: asdict(Transfers()))
    cumulative_bytes: int = 0
    evaluated: str = ""
    lost: list[dict[str, str]] = field(default_factory=list)
    refusals: list[dict[str, str]] = field(default_factory=list)
    restarts: list[dict[str, str]] = field(default_factory=list)
    absences: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    server_metrics: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the record as one line of JSON; numbers that are not finite become strings."""
        return to_line(self)

    def log(self) -> None:
        """Write the round as branches of Flower's log."""
        moved = Transfers(**self.moved)
        log(INFO, "Averaging: round %s complete in %.1f s", self.round, self.seconds)
        log(INFO, "\t├── Mini-batches: %s each", self.mini_batches)
        log(INFO, "\t├── Loss: %s, cumulative %s", self.loss, self.cumulative_loss)
        log(
            INFO,
            "\t├── Distance: up to %.4g of %.4g; %s reported, %s fetched, synchronisation: %s",
            self.largest_distance,
            self.delta,
            len(self.reporters),
            len(self.fetched),
            self.synchronised,
        )
        log(
            INFO,
            "\t├── Models: %s down, %s up; bytes %s down, %s up; control %s down, %s up",
            moved.models_down,
            moved.models_up,
            f"{moved.bytes_down:,}",
            f"{moved.bytes_up:,}",
            f"{moved.control_down:,}",
            f"{moved.control_up:,}",
        )
        log(
            INFO,
            "\t└── Learners: %s given anew, %s refused, %s restarted, %s absent",
            len(self.lost),
            len(self.refusals),
            len(self.restarts),
            len(self.absences),
        )

    @classmethod
    def from_json(cls, line: str) -> "DynamicRecord":
        """Read a record back from `to_json`.

        Raises
        ------
        ColearnError
            If the line is not a record.
        """
        numbers = ("loss", "cumulative_loss", "delta", "largest_distance", "server_metrics")
        return from_line(cls, line, numbers)


class DynamicHistory(RecordFile[DynamicRecord]):
    """The rounds of model averaging, in memory and, if a path is given, as JSON lines on disk."""

    kind = DynamicRecord

    @property
    def transfers(self) -> Transfers:
        """All that moved for training and synchronisation."""
        return sum((Transfers(**record.moved) for record in self.records), Transfers())

    def bytes_with(self, record: DynamicRecord) -> int:
        """Return all bytes moved up to and with a record that comes next."""
        before = self.records[-1].cumulative_bytes if self.records else 0
        return before + Transfers(**record.moved).total

    @property
    def cumulative_loss(self) -> float | None:
        """Of all rounds."""
        return self.records[-1].cumulative_loss if self.records else 0.0


def transfers_of(traffic: RoundTraffic) -> Transfers:
    """Return what moved, as a record has it."""
    return Transfers(
        models_down=traffic.models.down,
        models_up=traffic.models.up,
        bytes_down=traffic.bytes.down,
        bytes_up=traffic.bytes.up,
        control_down=traffic.control.down,
        control_up=traffic.control.up,
    )


class DynamicLog:
    """The record of the round under way, and the history that it goes to in the end.

    Parameters
    ----------
    history : str, Path or DynamicHistory, optional
        Where the rounds are recorded. By default in memory.

    Attributes
    ----------
    history : DynamicHistory
        The rounds that are complete.
    record : DynamicRecord
        Of the round under way.
    """

    def __init__(self, history: str | Path | DynamicHistory | None = None) -> None:
        self.history = history if isinstance(history, DynamicHistory) else DynamicHistory(history)
        self.record = DynamicRecord(0, 0)
        self._opened = time.monotonic()

    def open(self, record: DynamicRecord) -> None:
        """Begin a round."""
        self.record, self._opened = record, time.monotonic()

    def note(self, **metrics: Mapping[str, Any] | None) -> None:
        """Keep the server's metrics for the record; learners report the loss of their training."""
        if self.record.round and metrics.get("server_metrics"):
            self.record.server_metrics = dict(metrics["server_metrics"] or {})

    def note_events(self, events: Iterable[Event]) -> None:
        """Record what happened to learners."""
        record = self.record
        lists = {
            "restart": record.restarts,
            "refusal": record.refusals,
            "absence": record.absences,
        }
        for event in events:
            lists[event.kind].append(event.entry())

    def note_traffic(self, traffic: RoundTraffic) -> None:
        """Add what moved for training and synchronisation, and what happened."""
        self.record.moved = asdict(Transfers(**self.record.moved) + transfers_of(traffic))
        self.note_events(traffic.events)

    def note_collection(self, traffic: RoundTraffic) -> None:
        """Add what moved only for an evaluation of the mean of all learners."""
        self.record.collected = asdict(Transfers(**self.record.collected) + transfers_of(traffic))
        self.note_events(traffic.events)

    def note_evaluation(self, traffic: RoundTraffic) -> None:
        """Do nothing: learners evaluate nothing."""

    def close(self) -> None:
        """Complete the record of the round under way and write it."""
        record, before = self.record, self.history.cumulative_loss
        record.seconds = time.monotonic() - self._opened
        if record.loss is not None and before is not None:
            record.cumulative_loss = before + record.loss
        record.cumulative_bytes = self.history.bytes_with(record)
        self.history.append(record)
