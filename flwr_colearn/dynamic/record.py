"""DynamicRecord, the record of a round of model averaging, and the history of a run."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from logging import INFO
from pathlib import Path
from typing import Any, Literal

from flwr.common import log

from ..history import RecordFile, from_line, to_line
from ..traffic import Event, RoundTraffic, Transfers


@dataclass
class DynamicRecord:
    """The record of one round, which is b mini-batches of every learner and one exchange of models.

    Attributes
    ----------
    round : int
        The number of the round, from 1.
    mini_batches : int
        The mini-batches of every learner up to the end of this round.
    examples : float
        The examples of all learners in this round.
    loss : float or None
        The sum of the loss over these examples, each measured before the step that learns from it;
        ``None`` if the learners report no loss. A learner without a finite loss counts with the
        mean loss of the others.
    cumulative_loss : float or None
        The sum of the loss over all rounds.
    delta : float
        The bound on |f_i - r|^2 in this round: -1 for every model, as in the checks of a
        calibration, infinity for none.
    largest_distance : float
        The largest |f_i - r|^2 of a learner.
    reporters : list of str
        The learners whose models were beyond the bound; in dynamic averaging, the violators.
    fetched : list of str
        The learners whose models were fetched in addition.
    groups : list of int
        The sizes of the groups in which they were fetched.
    synchronised : {"none", "partial", "full"}
        "full" if all learners have a new model, which is the new reference.
    violations : int
        v, the violations since the last full synchronisation.
    moved : dict
        The `Transfers` of training and synchronisation, with restarts and refused replies.
    collected : dict
        The `Transfers` of models that were fetched only for an evaluation or the result.
    cumulative_bytes : int
        The bytes of `moved` over all rounds, both directions, with those of configs and metrics.
    evaluated : str
        The model of `server_metrics`: "mean of all learners" or "reference of round R".
    lost : list of dict
        The reinitialised learners, each with ``participant`` and ``reason``.
    refusals, restarts, absences : list of dict
        The same as in `RoundRecord`.
    seconds : float
        The seconds from the round's messages to its record.
    server_metrics : dict
        The metrics of the server's own evaluation.
    contributions : dict
        The learners whose models are in the round's average; see `flwr_colearn.RoundRecord`, with
        the difference to the reference for an update. Empty in a round without an average.
    stopped : str
        The reason why the run ended with this round, before its last one (see
        `flwr_colearn.Best`); empty if it did not.
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
    contributions: dict[str, dict[str, float | None]] = field(default_factory=dict)
    stopped: str = ""

    def to_json(self) -> str:
        """Return the record as one line of JSON; numbers that are not finite become strings."""
        return to_line(self)

    def log(self) -> None:
        """Write the round to Flower's log, in the form of Flower's own entries."""
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
            "\t└── Learners: %s reinitialised, %s refused, %s restarted, %s absent",
            len(self.lost),
            len(self.refusals),
            len(self.restarts),
            len(self.absences),
        )

    @property
    def train_metrics(self) -> dict[str, Any]:
        """The metrics of the round in the Result: ``num-examples`` and, if known, ``loss``."""
        mean = {} if self.loss is None else {"loss": self.loss / self.examples}
        return {"num-examples": self.examples, **mean}

    @classmethod
    def from_json(cls, line: str) -> "DynamicRecord":
        """Read a record back from `to_json`.

        Raises
        ------
        ColearnError
            If the line is not a record.
        """
        numbers = (
            "loss",
            "cumulative_loss",
            "delta",
            "largest_distance",
            "server_metrics",
            "contributions",
        )
        return from_line(cls, line, numbers)


class DynamicHistory(RecordFile[DynamicRecord]):
    """The rounds of model averaging, in memory and, if a path is given, as JSON lines on disk."""

    kind = DynamicRecord

    @property
    def transfers(self) -> Transfers:
        """The sum of the traffic of training and synchronisation."""
        return sum((Transfers(**record.moved) for record in self.records), Transfers())

    def bytes_with(self, record: DynamicRecord) -> int:
        """Return the cumulative bytes of the run after the given record, which is the next one."""
        before = self.records[-1].cumulative_bytes if self.records else 0
        return before + Transfers(**record.moved).total

    @property
    def cumulative_loss(self) -> float | None:
        """The sum of the loss over all rounds."""
        return self.records[-1].cumulative_loss if self.records else 0.0


def transfers_of(traffic: RoundTraffic) -> Transfers:
    """Return the traffic in the form of a record."""
    return Transfers(
        models_down=traffic.models.down,
        models_up=traffic.models.up,
        bytes_down=traffic.bytes.down,
        bytes_up=traffic.bytes.up,
        control_down=traffic.control.down,
        control_up=traffic.control.up,
    )


class DynamicLog:
    """The record of the round under way, and the history to which it is appended at the end.

    Parameters
    ----------
    history : str, Path or DynamicHistory, optional
        A file for JSON lines, or a history. By default the history is in memory only.

    Attributes
    ----------
    history : DynamicHistory
        The records of the complete rounds.
    record : DynamicRecord
        The record of the round under way.
    """

    def __init__(self, history: str | Path | DynamicHistory | None = None) -> None:
        self.history = history if isinstance(history, DynamicHistory) else DynamicHistory(history)
        self.record = DynamicRecord(0, 0)
        self._opened = time.monotonic()

    def open(self, record: DynamicRecord) -> None:
        """Open the record of a new round.

        Raises
        ------
        ColearnError
            In the first round, if the history's file cannot be written.
        """
        self.history.begin()
        self.record, self._opened = record, time.monotonic()

    @property
    def unfinished(self) -> str | None:
        """The record of the round under way as a line of JSON."""
        seconds = time.monotonic() - self._opened
        return replace(self.record, seconds=seconds).to_json()

    def reopen(self, line: str) -> None:
        """Go on with the record of a round that was saved as `unfinished`."""
        record = DynamicRecord.from_json(line)
        self.open(record)
        self._opened -= record.seconds

    def note(self, **metrics: Mapping[str, Any] | None) -> None:
        """Set the server's metrics of the record; learners report the loss of their training."""
        # Round 0, the evaluation before the first round, has no record.
        if self.record.round and metrics.get("server_metrics"):
            self.record.server_metrics = dict(metrics["server_metrics"] or {})

    def note_stop(self, reason: str) -> None:
        """Set the reason why the run ends with this round, before its last one."""
        self.record.stopped = reason

    def note_events(self, events: Iterable[Event]) -> None:
        """Record events of learners."""
        record = self.record
        lists = {
            "restart": record.restarts,
            "refusal": record.refusals,
            "absence": record.absences,
        }
        for event in events:
            lists[event.kind].append(event.entry())

    def note_traffic(self, traffic: RoundTraffic) -> None:
        """Add the traffic and the events of training and synchronisation."""
        self.record.moved = asdict(Transfers(**self.record.moved) + transfers_of(traffic))
        self.note_events(traffic.events)

    def note_collection(self, traffic: RoundTraffic) -> None:
        """Add the traffic of the models that are fetched for the mean of all learners."""
        self.record.collected = asdict(Transfers(**self.record.collected) + transfers_of(traffic))
        self.note_events(traffic.events)

    def note_evaluation(self, traffic: RoundTraffic) -> None:
        """Do nothing, since learners make no evaluations."""

    def close(self) -> None:
        """Complete the record of the round under way and write it."""
        record, before = self.record, self.history.cumulative_loss
        record.seconds = time.monotonic() - self._opened
        if record.loss is not None and before is not None:
            record.cumulative_loss = before + record.loss
        record.cumulative_bytes = self.history.bytes_with(record)
        self.history.append(record)
