"""RoundRecord, the record of one round, and History, the records of a run in memory and on disk."""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from logging import INFO, WARNING
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import numpy as np
from flwr.common import log

from .errors import ColearnError
from .files import append_to, is_regular, replace_file, set_aside
from .journal import joined
from .traffic import Event, RoundTraffic

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass
class RoundRecord:
    """The record of one communication round.

    Attributes
    ----------
    round : int
        The number of the round, from 1.
    local_epochs : int
        T_i.
    learning_rate : float
        eta^i; where the schedule has none, the rate of the first epoch.
    epochs_done : int
        The local epochs of every participant up to the end of this round.
    relative_change : float or None
        |w^{i+1} - w^i| / |w^i| over the trainable arrays: what eq. 4 compares with epsilon to
        decide the next round's T. ``None`` until the round is closed.
    bytes_down, bytes_up : int or None
        The bytes of the serialised arrays sent to, and received from, all participants for
        training, after any compression (see `flwr_colearn.Compression`), with those of restarts
        and refused replies. ``None`` where they are not counted: in another loop than
        `flwr_colearn.run`, without ``Transport(...).connect(grid)``.
    control_down, control_up : int or None
        The bytes of the configs and metrics in the same messages.
    evaluation : dict
        The traffic of the participants' evaluation of the shared model: ``bytes_down``,
        ``bytes_up``, ``control_down`` and ``control_up``. Empty without such an evaluation.
    participants : list of str
        The participants whose models are in the average.
    refusals : list of dict
        The refused replies, each with ``participant`` and ``reason``.
    restarts : list of dict
        The participants whose training was restarted, each with ``participant`` and ``reason``.
    absences : list of dict
        The participants without a model in the average, each with ``participant`` and ``reason``.
    contributions : dict
        By participant whose model is in the average: ``weight``, its share of the average; ``norm``
        of its update over the trainable arrays, to about four digits; and ``cosine`` between its
        update and the mean one. Norm and cosine are None under secure aggregation, under
        differential privacy unless asked for (see `flwr_colearn.Guard`), and without a guard. The
        cosine is exact up to 4,096 coordinates; of a larger model it is an estimate from 4,096
        random ones, the same for all participants, with a standard error of at most 0.016.
    warnings : list of dict
        What participants in the average did that should be looked at, such as a number of examples
        that changed, each with ``participant`` and ``reason``.
    normalization : dict
        Empty unless a scheme changes which arrays are exchanged. Then ``scheme`` is its name,
        ``reinitialised`` lists the participants that had lost their local arrays, and
        ``shared-model`` is a note that the shared model is partial, if it is.
    secure : dict
        Empty without secure aggregation. Else ``participants`` in the sum, ``weight``, the sum of
        their weights, the number of ``attempts``, the ``clipping-range`` of updates, and how many
        elements of all updates were ``clipped`` to it.
    seconds : float
        The seconds from the round's plan to its record.
    train_metrics, evaluate_metrics, server_metrics : dict
        The aggregated metrics of the participants' training and evaluation, and those of the
        server's own evaluation of the shared model.
    site_metrics : dict
        The metrics of each participant's evaluation of the shared model on its own data, by the
        participant's name. `evaluate_metrics` weighs them by the numbers of examples.
    site_train_metrics : dict
        The metrics of each participant's training that the site lets the server record, see
        `flwr_colearn.share_metrics`, by the participant's name. Empty where no site has a list.
    site_means : dict
        The plain means of these metrics, in which every participant that has the metric as a
        finite number counts the same.
    learning_rates : list of float
        The rates of the T_i local epochs, of which ``CyclicalRate`` never uses eta^i itself. Empty
        where the train config defines the local training, and in histories up to version 0.6.
    stopped : str
        The reason why the run ended with this round, before its last one (see
        `flwr_colearn.Best`); empty if it did not.
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
    contributions: dict[str, dict[str, float | None]] = field(default_factory=dict)
    warnings: list[dict[str, str]] = field(default_factory=list)
    normalization: dict[str, Any] = field(default_factory=dict)
    secure: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    train_metrics: dict[str, Any] = field(default_factory=dict)
    evaluate_metrics: dict[str, Any] = field(default_factory=dict)
    server_metrics: dict[str, Any] = field(default_factory=dict)
    site_metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    site_means: dict[str, float] = field(default_factory=dict)
    learning_rates: list[float] = field(default_factory=list)
    stopped: str = ""
    site_train_metrics: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the record as one line of JSON; numbers that are not finite become strings."""
        return to_line(self)

    @property
    def rates(self) -> str:
        """The rates of the round in words, those that were used where they are known."""
        rates = self.learning_rates or [self.learning_rate]
        first, last = rates[0], rates[-1]
        return f"{first:.4g}" if first == last else f"from {first:.4g} to {last:.4g}"

    def log(self) -> None:
        """Write the round to Flower's log, in the form of Flower's own entries."""
        change = self.relative_change
        log(INFO, "CoLearn: round %s complete in %.1f s", self.round, self.seconds)
        log(INFO, "\t├── Local epochs: %s (%s in all)", self.local_epochs, self.epochs_done)
        log(INFO, "\t├── Learning rate: %s", self.rates)
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
        numbers = (
            "learning_rate",
            "learning_rates",
            "relative_change",
            "seconds",
            "contributions",
            "train_metrics",
            "evaluate_metrics",
            "server_metrics",
            "site_metrics",
            "site_train_metrics",
            "site_means",
        )
        record = from_line(cls, line, numbers)
        for old, new in _OLD_KEYS.items():
            if old in record.normalization:
                record.normalization[new] = record.normalization.pop(old)
        return record


_OLD_KEYS = {"fresh": "reinitialised"}
"""The keys of a record's normalization up to version 0.4, and their present names."""


def _spelled(size: int | None) -> str:
    return "not counted" if size is None else f"{size:,}"


class Record(Protocol):
    """The record of one round, an element of a `RecordFile`."""

    def to_json(self) -> str:
        """Return the record as one line."""

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read a record back."""

    def log(self) -> None:
        """Write the record to Flower's log."""


R = TypeVar("R", bound=Record)


class Sink(Protocol):
    """What a history hands every new record to, such as a tracker of experiments."""

    def write(self, record: Any) -> None:
        """Take the record of a complete round: a `RoundRecord`, or a ``DynamicRecord``."""


class RecordFile(Generic[R]):
    """The records of a run, in memory and, if a path is given, as JSON lines on disk.

    Parameters
    ----------
    path : str or Path, optional
        The file, to which every round appends a line. A file of an earlier run is renamed to
        ``path.1``, ``path.2``, ... when a new run begins. If a line cannot be written during a
        run, the log has a warning, and it is written together with the next one.
    sinks : sequence of Sink
        What gets every new record. Those that a resumed run restores were written before. If a sink
        raises, the run goes on, and the log has a warning, once for each sink.

    Attributes
    ----------
    records : list
        The records of the complete rounds.
    lines : list of str
        The same as lines of JSON.
    """

    kind: type[R]

    def __init__(self, path: str | Path | None = None, sinks: Sequence[Sink] = ()) -> None:
        self.path = None if path is None else Path(path)
        self.sinks = tuple(sinks)
        self._failed: set[int] = set()
        self.records: list[R] = []
        self.lines: list[str] = []
        self._written = 0
        self._begun = False

    def __iter__(self) -> Iterator[R]:
        """Yield the records in order."""
        return iter(self.records)

    def __len__(self) -> int:
        """Return the number of rounds recorded."""
        return len(self.records)

    def begin(self) -> None:
        """Prepare the file for a new run; further calls during this run have no effect.

        Raises
        ------
        ColearnError
            If the file cannot be written. Found out here, and not after the first round, which may
            take a day.
        """
        if self.path is None or self._begun:
            return
        with self._as_error():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if (aside := set_aside(self.path)) is not None:
                log(WARNING, "History: the file of an earlier run is now %s", aside)
            # A full disk shows only when something is written; readers skip an empty line.
            append_to(self.path, b"\n")
            if is_regular(self.path):
                os.truncate(self.path, 0)
        self._begun = True

    def append(self, record: R) -> None:
        """Add the record of a complete round to the list, the file and the log."""
        self.begin()
        self.records.append(record)
        self.lines.append(record.to_json())
        self._write()
        record.log()
        for index, sink in enumerate(self.sinks):
            self._hand(record, index, sink)

    def clear(self) -> None:
        """Remove the records of an earlier run; its file stays until a new run begins."""
        self.records, self.lines = [], []
        self._written, self._begun = 0, False

    def restore(self, lines: Iterable[str]) -> None:
        """Replace the records in memory and in the file by those of a checkpoint.

        Raises
        ------
        ColearnError
            If a line is not a record, or the file cannot be written.
        """
        self.lines = list(lines)
        self.records = [self.kind.from_json(line) for line in self.lines]
        if self.path is not None:
            with self._as_error():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._restore_file(self.path)
        self._written, self._begun = len(self.lines), True

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a history written earlier.

        A last line without an end, which a crash or a full disk left, is not used, and the log has
        a warning.

        Raises
        ------
        ColearnError
            If the file cannot be read, or another line is not a record.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ColearnError(f"history: expected a readable file, found {error}") from None
        history = cls()
        *lines, last = data.decode(errors="replace").split("\n")
        history.lines = [line for line in lines if line]
        history.records = [cls.kind.from_json(line) for line in history.lines]
        if last:
            history._read_torn(last, path)
        return history

    def _read_torn(self, line: str, path: str | Path) -> None:
        """Add the record of a last line that has no end, if it is complete."""
        try:
            self.records.append(self.kind.from_json(line))
            self.lines.append(line)
        except ColearnError:
            log(WARNING, "History: the last line of %s is incomplete and is not used", path)

    def _write(self) -> None:
        """Append the lines that are not in the file yet."""
        if self.path is None:
            return
        try:
            append_to(self.path, joined(self.lines[self._written :]))
            self._written = len(self.lines)
        except OSError as error:
            # The rounds so far took days, so the run goes on without this line.
            log(
                WARNING,
                "History: %s lines not written to %s, which is tried again after the next round: "
                "%s",
                len(self.lines) - self._written,
                self.path,
                error,
            )

    def _hand(self, record: R, index: int, sink: Sink) -> None:
        try:
            sink.write(record)
        except Exception as error:  # of another library, which must not end a run of days
            if index not in self._failed:
                self._failed.add(index)
                log(
                    WARNING,
                    "History: expected %s to take the record of round %s, found %r; the run goes "
                    "on, and further errors of it are not logged",
                    type(sink).__name__,
                    getattr(record, "round", "?"),
                    error,
                )

    def _restore_file(self, path: Path) -> None:
        wanted = joined(self.lines)
        if path.exists() and not is_regular(path):
            return
        found = path.read_bytes() if path.exists() else b""
        if wanted and found.startswith(wanted):
            # A killed run may have written rounds after its last checkpoint, which are run again.
            os.truncate(path, len(wanted))
            return
        if not wanted.startswith(found) and (aside := set_aside(path)) is not None:
            log(
                WARNING,
                "History: expected the file of the resumed run, found another one; it is now %s",
                aside,
            )
        replace_file(path, wanted)

    @contextmanager
    def _as_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ColearnError(
                f"history {self.path}: expected a file that can be written, found {error}; choose "
                "another path, or make room on its disk"
            ) from error


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
        """The bytes of arrays moved for training, both directions, as far as they were counted."""
        return sum((record.bytes_down or 0) + (record.bytes_up or 0) for record in self.records)

    @property
    def epochs_path(self) -> list[int]:
        """The local epochs T_i of every round."""
        return [record.local_epochs for record in self.records]


class RoundLog:
    """The record of the round under way, and the history to which it is appended at the end.

    Parameters
    ----------
    history : str, Path or History, optional
        A file for JSON lines, or a `History`. By default the history is in memory only.

    Attributes
    ----------
    history : History
        The records of the complete rounds.
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
            If no round is under way.
        """
        if self._record is None:
            raise ColearnError(
                "round: expected configure_train (configure_fit) before the aggregation, found none"
            )
        return self._record

    def clear(self) -> None:
        """Remove the records of an earlier run."""
        self._record = None
        self.history.clear()

    def open(self, record: RoundRecord) -> None:
        """Open the record of a new round.

        Raises
        ------
        ColearnError
            In the first round, if the history's file cannot be written.
        """
        self.history.begin()
        self._record, self._opened_at = record, time.perf_counter()

    @property
    def unfinished(self) -> str | None:
        """The record of the round under way as a line of JSON; None if no round is under way."""
        if self._record is None:
            return None
        return replace(self._record, seconds=self._seconds).to_json()

    def reopen(self, line: str) -> None:
        """Go on with the record of a round that was saved as `unfinished`."""
        record = RoundRecord.from_json(line)
        self.open(record)
        self._opened_at -= record.seconds

    @property
    def _seconds(self) -> float:
        return round(time.perf_counter() - self._opened_at, 3)

    def note(self, **metrics: Mapping[str, Any] | None) -> None:
        """Set metrics of the record (train_metrics=, evaluate_metrics=, site_metrics=, ...)."""
        if self._record is not None:
            for name, values in metrics.items():
                setattr(self._record, name, dict(values or {}))

    def note_stop(self, reason: str) -> None:
        """Set the reason why the run ends with this round, before its last one."""
        self.record.stopped = reason

    def note_events(self, events: Iterable[Event]) -> None:
        """Record events of participants."""
        record = self.record
        lists = {
            "restart": record.restarts,
            "refusal": record.refusals,
            "absence": record.absences,
            "warning": record.warnings,
        }
        for event in events:
            # A reinitialised participant is in the average all the same, and it has no reason.
            if event.kind == "reinitialised":
                record.normalization.setdefault(event.kind, []).append(event.participant)
            else:
                lists[event.kind].append(event.entry())

    def note_traffic(self, traffic: RoundTraffic) -> None:
        """Add the traffic and the events of training."""
        record = self.record
        record.bytes_down = (record.bytes_down or 0) + traffic.bytes.down
        record.bytes_up = (record.bytes_up or 0) + traffic.bytes.up
        record.control_down = (record.control_down or 0) + traffic.control.down
        record.control_up = (record.control_up or 0) + traffic.control.up
        record.secure = traffic.secure or record.secure
        record.site_train_metrics |= traffic.shared
        self.note_events(traffic.events)

    def note_evaluation(self, traffic: RoundTraffic) -> None:
        """Add the traffic of the participants' evaluation."""
        # Without an evaluation the record's entry stays empty.
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
        if relative_change == 0.0:
            log(
                WARNING,
                "Round %s: the relative change is exactly 0: no weight of the shared model differs "
                "from the round before. Expected training to change it; check the learning rate, "
                "frozen layers and, in float16, the participants' skipped steps.",
                record.round,
            )
        record.participants.sort()  # replies arrive in any order
        record.seconds = self._seconds
        self._record = None
        self.history.append(record)


def plain_means(sites: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the means over sites of their numeric metrics.

    The mean of a metric is that over the sites that have it as a finite number. The number of
    examples is left out, since its mean is no metric of the model.

    Examples
    --------
    >>> plain_means([{"accuracy": 0.5, "num-examples": 10}, {"accuracy": 1.0, "num-examples": 90}])
    {'accuracy': 0.75}
    """
    values: dict[str, list[float]] = {}
    for site in sites:
        for name, value in site.items():
            if isinstance(value, int | float) and math.isfinite(value) and name != "num-examples":
                values.setdefault(name, []).append(value)
    return {name: float(np.mean(each)) for name, each in values.items()}


D = TypeVar("D", bound="DataclassInstance")


def to_line(record: "DataclassInstance") -> str:
    """Return a record as one line of JSON; numbers that are not finite become strings."""
    return json.dumps(_spell(asdict(record)), allow_nan=False)


def from_line(kind: type[D], line: str, numbers: Iterable[str]) -> D:
    """Read a record back from `to_line`.

    Parameters
    ----------
    kind : type
        A dataclass; keys that it does not have are ignored.
    line : str
        The line that `to_line` returned.
    numbers : iterable of str
        The fields that hold numbers only, at any depth: a string in them is a number that is not
        finite.

    Raises
    ------
    ColearnError
        If the line is not a record.
    """
    try:
        values = json.loads(line)
        # A history that a later version wrote may have more keys.
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
    """Undo `_spell` in metrics, in which every string is a spelled number."""
    if isinstance(value, str):
        return float(value)
    if isinstance(value, Mapping):
        return {key: _unspell(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unspell(item) for item in value]
    return value


def _spell(value: Any) -> Any:
    """Replace non-finite floats, which JSON does not have, by 'inf', '-inf' or 'nan'."""
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
