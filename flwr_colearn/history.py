"""What happened in every round: RoundRecord, and the history it is written to."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from logging import INFO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import numpy as np
from flwr.common import log

from .errors import ColearnError
from .traffic import Event, RoundTraffic

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass
class RoundRecord:
    """One communication round.

    Attributes
    ----------
    round : int
        From 1.
    local_epochs : int
        T_i.
    learning_rate : float
        eta^i; of a schedule that has none, the rate of the first epoch.
    epochs_done : int
        Local epochs of every participant up to the end of this round.
    relative_change : float or None
        |w^{i+1} - w^i| / |w^i| over the trainable arrays: what eq. 4 compares with epsilon to
        decide the next round's T. ``None`` until the round is closed.
    bytes_down, bytes_up : int or None
        Bytes of the serialised arrays sent to, and received from, all participants for training,
        as they travelled (compressed where `flwr_colearn.Compression` says so), restarts and
        refused replies included. ``None`` where nothing counted them: in a loop of others, without
        ``Transport(...).connect(grid)``.
    control_down, control_up : int or None
        Bytes of configs and metrics that went with them.
    evaluation : dict
        What the participants' evaluation of the shared model moved: ``bytes_down``, ``bytes_up``,
        ``control_down`` and ``control_up``. Empty if they evaluated nothing.
    participants : list of str
        Those whose model is in the average.
    refusals : list of dict
        Replies left out, each with ``participant`` and ``reason``.
    restarts : list of dict
        Participants whose training was started again, each with ``participant`` and ``reason``.
    absences : list of dict
        Participants that the round did without, each with ``participant`` and ``reason``.
    normalization : dict
        Where a scheme changes what travels: its name as ``scheme``; under ``reinitialised`` the
        participants that had lost their local arrays; and, where part of the model exists at the
        participants only, what that means as ``shared-model``.
    seconds : float
        From the round's plan to its record.
    train_metrics, evaluate_metrics, server_metrics : dict
        Aggregated metrics of the participants' training and evaluation, and of the server's own
        evaluation of the shared model.
    """

    round: int
    local_epochs: int
    learning_rate: float
    epochs_done: int
    relative_change: float | None = None
    bytes_down: int | None = None
    bytes_up: int | None = None
    control_down: int | None = None
    control_up: int | None = None
    evaluation: dict[str, int] = field(default_factory=dict)
    participants: list[str] = field(default_factory=list)
    refusals: list[dict[str, str]] = field(default_factory=list)
    restarts: list[dict[str, str]] = field(default_factory=list)
    absences: list[dict[str, str]] = field(default_factory=list)
    normalization: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    train_metrics: dict[str, Any] = field(default_factory=dict)
    evaluate_metrics: dict[str, Any] = field(default_factory=dict)
    server_metrics: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the record as one line of JSON; numbers that are not finite become strings."""
        return to_line(self)

    def log(self) -> None:
        """Write the round as branches of Flower's log."""
        change = self.relative_change
        log(INFO, "CoLearn: round %s complete in %.1f s", self.round, self.seconds)
        log(INFO, "\t├── Local epochs: %s (%s in all)", self.local_epochs, self.epochs_done)
        log(INFO, "\t├── Learning rate: from %g", self.learning_rate)
        log(INFO, "\t├── Relative change: %s", "unknown" if change is None else f"{change:.4g}")
        log(INFO, "\t├── Bytes: %s down, %s up", _spelled(self.bytes_down), _spelled(self.bytes_up))
        log(
            INFO,
            "\t└── Participants: %s averaged, %s refused, %s restarted, %s absent",
            len(self.participants),
            len(self.refusals),
            len(self.restarts),
            len(self.absences),
        )

    @classmethod
    def from_json(cls, line: str) -> "RoundRecord":
        """Read a record back from `to_json`.

        Raises
        ------
        ColearnError
            If the line is not a record.
        """
        numbers = ("relative_change", "train_metrics", "evaluate_metrics", "server_metrics")
        record = from_line(cls, line, numbers)
        for old, new in _OLD_KEYS.items():
            if old in record.normalization:
                record.normalization[new] = record.normalization.pop(old)
        return record


_OLD_KEYS = {"fresh": "reinitialised"}
"""Keys of a record's normalization until 0.4, and what they are called now."""


def _spelled(size: int | None) -> str:
    return "not counted" if size is None else f"{size:,}"


class Record(Protocol):
    """What a `RecordFile` holds: one round."""

    def to_json(self) -> str:
        """Return the record as one line."""

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read a record back."""

    def log(self) -> None:
        """Write what happened to Flower's log."""


R = TypeVar("R", bound=Record)


class RecordFile(Generic[R]):
    """The records of a run, in memory and, if a path is given, as JSON lines on disk.

    Parameters
    ----------
    path : str or Path, optional
        Written line by line, flushed with every round; the first record of a run replaces what an
        earlier run left there.
    """

    kind: type[R]

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.records: list[R] = []

    def __iter__(self) -> Iterator[R]:
        """Yield the records in order."""
        return iter(self.records)

    def __len__(self) -> int:
        """Return the number of rounds recorded."""
        return len(self.records)

    def append(self, record: R) -> None:
        """Add a complete round: keep it, write it, log it."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a" if self.records else "w") as file:
                file.write(record.to_json() + "\n")
        self.records.append(record)
        record.log()

    def clear(self) -> None:
        """Forget the records of an earlier run; its file stays until a new record is written."""
        self.records = []

    def restore(self, records: Iterable[R]) -> None:
        """Go on from these records: what the file holds beyond them is dropped."""
        self.records = list(records)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(record.to_json() + "\n" for record in self.records))

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a history written earlier.

        Raises
        ------
        ColearnError
            If a line is not a record.
        """
        history = cls()
        lines = Path(path).read_text().splitlines()
        history.records = [cls.kind.from_json(line) for line in lines if line]
        return history


class History(RecordFile[RoundRecord]):
    """The rounds of co-learning, in memory and, if a path is given, as JSON lines on disk.

    Examples
    --------
    >>> history = History()
    >>> history.append(RoundRecord(1, 5, 0.01, epochs_done=5))
    >>> [record.local_epochs for record in history]
    [5]
    """

    kind = RoundRecord

    @property
    def bytes_total(self) -> int:
        """Bytes of arrays moved for training, in both directions, as far as they were counted."""
        return sum((record.bytes_down or 0) + (record.bytes_up or 0) for record in self.records)

    @property
    def epochs_path(self) -> list[int]:
        """T_i of every round."""
        return [record.local_epochs for record in self.records]


class RoundLog:
    """The record of the round under way, and the history that it goes to in the end.

    Parameters
    ----------
    history : str, Path or History, optional
        Where the rounds are recorded: a file for JSON lines, or a `History`. By default in memory.

    Attributes
    ----------
    history : History
        The rounds that are complete.
    """

    def __init__(self, history: str | Path | History | None = None) -> None:
        self.history = history if isinstance(history, History) else History(history)
        self._record: RoundRecord | None = None
        self._opened_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether a round is under way."""
        return self._record is not None

    @property
    def record(self) -> RoundRecord:
        """The record of the round under way.

        Raises
        ------
        ColearnError
            If none is.
        """
        if self._record is None:
            raise ColearnError(
                "round: expected configure_train (configure_fit) before the aggregation, found none"
            )
        return self._record

    def clear(self) -> None:
        """Forget an earlier run."""
        self._record = None
        self.history.clear()

    def open(self, record: RoundRecord) -> None:
        """Begin a round."""
        self._record, self._opened_at = record, time.perf_counter()

    def note(self, **metrics: Mapping[str, Any] | None) -> None:
        """Keep metrics (train_metrics=, evaluate_metrics=, server_metrics=) for the record."""
        if self._record is not None:
            for name, values in metrics.items():
                setattr(self._record, name, dict(values or {}))

    def note_events(self, events: Iterable[Event]) -> None:
        """Record what happened to participants."""
        record = self.record
        lists = {
            "restart": record.restarts,
            "refusal": record.refusals,
            "absence": record.absences,
        }
        for event in events:
            if event.kind == "reinitialised":
                record.normalization.setdefault(event.kind, []).append(event.participant)
            else:
                lists[event.kind].append(event.entry())

    def note_traffic(self, traffic: RoundTraffic) -> None:
        """Add what moved for training, and what happened."""
        record = self.record
        record.bytes_down = (record.bytes_down or 0) + traffic.bytes.down
        record.bytes_up = (record.bytes_up or 0) + traffic.bytes.up
        record.control_down = (record.control_down or 0) + traffic.control.down
        record.control_up = (record.control_up or 0) + traffic.control.up
        self.note_events(traffic.events)

    def note_evaluation(self, traffic: RoundTraffic) -> None:
        """Add what moved for the participants' evaluation."""
        if self._record is None or not any(traffic.bytes + traffic.control):
            return
        for name, count in (("bytes", traffic.bytes), ("control", traffic.control)):
            for direction, size in zip(("down", "up"), count, strict=True):
                key = f"{name}_{direction}"
                self._record.evaluation[key] = self._record.evaluation.get(key, 0) + size

    def close(self, relative_change: float | None) -> None:
        """Complete the record of the round under way and write it."""
        record = self.record
        record.relative_change = relative_change
        record.participants.sort()  # they arrived in any order
        record.seconds = round(time.perf_counter() - self._opened_at, 3)
        self._record = None
        self.history.append(record)


D = TypeVar("D", bound="DataclassInstance")


def to_line(record: "DataclassInstance") -> str:
    """Return a record as one line of JSON; numbers that are not finite become strings."""
    return json.dumps(_spell(asdict(record)), allow_nan=False)


def from_line(kind: type[D], line: str, numbers: Iterable[str]) -> D:
    """Read a record back from `to_line`.

    Parameters
    ----------
    kind : type
        A dataclass; keys that it does not have are passed over.
    line : str
        What `to_line` returned.
    numbers : iterable of str
        Fields that hold numbers only, at any depth: in them strings are numbers that are not
        finite.

    Raises
    ------
    ColearnError
        If the line is not a record.
    """
    try:
        values = json.loads(line)
        known = {item.name for item in fields(kind)}
        record = kind(**{key: values[key] for key in values if key in known})
        for name in numbers:
            setattr(record, name, _unspell(getattr(record, name)))
    except (ValueError, TypeError) as error:
        raise ColearnError(
            f"history: expected one {kind.__name__} a line, found {line[:80]!r} ({error})"
        ) from None
    return record


def _unspell(value: Any) -> Any:
    """Undo `_spell` in metrics, which have no text of their own."""
    if isinstance(value, str):
        return float(value)
    if isinstance(value, Mapping):
        return {key: _unspell(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unspell(item) for item in value]
    return value


def _spell(value: Any) -> Any:
    """Replace non-finite floats by 'inf', '-inf', 'nan', which JSON has no numbers for."""
    if type(value) is float and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _spell(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        return _spell(value.item())
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        return [_spell(item) for item in value]
    return value
