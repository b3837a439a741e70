"""Run, the records of a run as a report has them, and their series of numbers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..dynamic import DynamicRecord
from ..errors import ColearnError
from ..history import History, RoundRecord

R = TypeVar("R", RoundRecord, DynamicRecord)

ALONE = "alone-"
"""The beginning of the names of metrics of a participant's own model."""
_FIRST = ("accuracy", "loss")
_NO_METRICS = ("num-examples", "num_examples")
_OF_SITES = ("contributions", "site_metrics", "site_train_metrics")
_OF_DICTS = ("refusals", "restarts", "absences", "warnings", *_OF_SITES)
_COUNTS = ("round", "local_epochs", "epochs_done")
_RATES = ("learning_rate", "learning_rates")
_BYTES = ("bytes_down", "bytes_up", "control_down", "control_up")


class Source(NamedTuple):
    """Who measured a metric: the field of the records, in words, and the dash of its lines."""

    field: str
    words: str
    dash: str


SOURCES = (
    Source("server_metrics", "the server's evaluation", ""),
    Source("evaluate_metrics", "the participants' evaluation", "5 2"),
    Source("train_metrics", "training", "1 2"),
)


@dataclass(frozen=True)
class Run:
    """A run in a report.

    Attributes
    ----------
    label : str
        The name of the run in legends and headings.
    records : sequence of RoundRecord
        The records of its rounds, in order; a `History` too.
    epsilon : float or None
        The threshold of eq. 4, if the run had one: records do not say it.
    configuration : mapping
        The settings of the run, for a table.
    """

    label: str
    records: Sequence[RoundRecord]
    epsilon: float | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict)

    def rounds(self) -> list[float]:
        """Return the number of every round."""
        return [number(record.round) for record in self.records]

    def epochs(self) -> list[float]:
        """Return the local epochs done after every round."""
        return [number(record.epochs_done) for record in self.records]

    def bytes_moved(self) -> list[float]:
        """Return the cumulative bytes of arrays, both ways; NaN from a round without a count on."""
        return list(accumulate(number(r.bytes_down) + number(r.bytes_up) for r in self.records))

    def mini_batches(self) -> list[float]:
        """Return NaN for every round: only dynamic averaging counts mini-batches."""
        return [math.nan for _ in self.records]

    def total(self, name: str) -> float:
        """Return the sum of a number of bytes over the rounds; NaN if one was not counted."""
        return sum(number(getattr(record, name)) for record in self.records)

    def bytes_of_evaluation(self) -> float:
        """Return the bytes of the participants' evaluations."""
        return sum(sum(map(number, record.evaluation.values())) for record in self.records)

    def length(self) -> tuple[str, str]:
        """Return the local epochs of the run and its T in words."""
        path = [record.local_epochs for record in self.records]
        t = f"{path[0]}" if len(set(path)) == 1 else f"{min(path)} to {max(path)}"
        return f"{self.records[-1].epochs_done:,}", t

    def rates(self) -> tuple[list[float], list[float]]:
        """Return the local epochs and the rate of each; one of a round without a list of rates."""
        x, y = [], []
        for record in self.records:
            rates = record.learning_rates or [record.learning_rate]
            x += [number(record.epochs_done) - after for after in reversed(range(len(rates)))]
            y += list(map(number, rates))
        return x, y

    def metric(self, source: str, name: str) -> list[float]:
        """Return a metric in every round; NaN where the record does not have it."""
        return [number(metrics_in(record, source).get(name)) for record in self.records]

    def metrics(self) -> list[str]:
        """Return the names of the shared model's metrics, accuracy and loss first."""
        tables = (metrics_in(each, source.field) for each in self.records for source in SOURCES)
        return [name for name in names_in(tables) if not name.startswith(ALONE)]

    def participants(self, source: str) -> list[str]:
        """Return who is in ``site_metrics``, ``site_train_metrics`` or ``contributions``."""
        return sorted({who for record in self.records for who in getattr(record, source)})

    def of_participant(self, source: str, who: str, name: str) -> list[float]:
        """Return a value of a participant in every round; NaN where it has none."""
        tables = [getattr(record, source).get(who, {}) for record in self.records]
        return [number(table.get(name)) for table in tables]


def metrics_in(record: Any, source: str) -> Mapping[str, Any]:
    """Return the metrics of a source in a record; empty where its kind has no such source."""
    found: Mapping[str, Any] = getattr(record, source, {})
    return found


def names_in(tables: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the metrics that have a finite number, accuracy and loss first."""
    found = dict.fromkeys(
        name
        for table in tables
        for name, value in table.items()
        if name not in _NO_METRICS and math.isfinite(number(value))
    )
    return sorted(found, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))


def number(value: Any) -> float:
    """Return a value of a record as a float; NaN for None, and for what is no number.

    Examples
    --------
    >>> [number(value) for value in (3, None, "inf", "fast", [1.0])]
    [3.0, nan, inf, nan, nan]
    """
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def labels(paths: Sequence[str | Path]) -> list[str]:
    """Return names of files that differ wherever the paths do.

    Examples
    --------
    >>> labels(["a/history.jsonl"]), labels(["a/history.jsonl", "b/history.jsonl"])
    (['history'], ['a', 'b'])
    """
    files = [Path(path) for path in paths]
    kinds = (
        [file.stem for file in files],
        [file.absolute().parent.name for file in files],
    )
    wanted = len({file.absolute() for file in files})
    return next((kind for kind in kinds if len(set(kind)) == wanted), [str(file) for file in files])


def read_records(path: str | Path) -> list[RoundRecord]:
    """Read the history of a run with rounds of local epochs.

    Raises
    ------
    ColearnError
        If it has no rounds, or a field of another type than a `RoundRecord`.
    """
    return checked(History.read(path).records, path, _fits)


def checked(records: list[R], path: str | Path, fits: Callable[[Field[Any], Any], bool]) -> list[R]:
    """Return the records that were read from a history.

    Parameters
    ----------
    records : list of a dataclass
        The records of its rounds.
    path : str or Path
        The file, for the error.
    fits : callable
        ``(field, value)``: whether a field may have that value.

    Raises
    ------
    ColearnError
        If there are none, or a field has another type than ours.
    """
    if not records:
        raise ColearnError(f"history {path}: expected at least one complete round, found none")
    for record in records:
        for each in fields(record):
            value = getattr(record, each.name)
            if not fits(each, value):
                raise ColearnError(
                    f"history {path}, round {record.round}: expected '{each.name}' as "
                    f"{type(record).__name__} has it, found {str(value)[:80]!r}"
                )
    return records


def is_dynamic(path: str | Path) -> bool:
    """Return whether a file is a history of dynamic averaging, whose rounds are mini-batches."""
    try:
        with Path(path).open(encoding="utf-8", errors="replace") as file:
            first = next((line for line in file if line.strip()), "")
    except OSError:
        return False  # History.read says what is wrong with it
    return '"mini_batches"' in first and '"local_epochs"' not in first


def _fits(entry: Field[Any], value: Any) -> bool:
    name, factory = entry.name, entry.default_factory
    if name in _COUNTS:
        return type(value) is int
    if name in _BYTES:
        return value is None or type(value) is int
    if name in _RATES:
        rates = value if isinstance(value, list) else [value]
        return all(map(_is_number, rates))
    if name == "relative_change":
        return value is None or _is_number(value)
    if factory in (dict, list) and not isinstance(value, factory):
        return False
    if name in _OF_DICTS:
        inner = value.values() if isinstance(value, dict) else value
        return all(isinstance(each, dict) for each in inner)
    if name == "normalization":
        return isinstance(value.get("reinitialised", []), list)
    return name != "stopped" or isinstance(value, str)


def _is_number(value: Any) -> bool:
    # An integer may be too large for a float; NaN, which a record may have, is one already.
    return type(value) is float or (type(value) is int and math.isfinite(number(value)))
