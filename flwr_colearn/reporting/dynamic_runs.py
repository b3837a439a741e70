"""DynamicRun, a run of dynamic averaging in a report: its series, tables and charts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import Field
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

from ..dynamic import DynamicHistory, DynamicRecord
from .page import Cell
from .runs import Run, checked, number

MOST_ROWS = 400
"""The number of rounds in the table: a run may have many thousands of a few mini-batches each."""

_TEXTS = ("evaluated", "synchronised", "stopped")
_WHOLE = ("round", "mini_batches", "violations", "cumulative_bytes")
_OPTIONAL = ("loss", "cumulative_loss")
_DISTANCES = ("delta", "largest_distance", "examples", "seconds")
_TABLES = ("moved", "collected", "server_metrics", "contributions")


class DynamicRun(Run):
    """A run of `flwr_colearn.DynamicAveraging`, whose rounds are mini-batches of every learner."""

    @property
    def _records(self) -> Sequence[DynamicRecord]:
        return cast(Sequence[DynamicRecord], self.records)

    def epochs(self) -> list[float]:
        """Return NaN for every round: learners have no local epochs."""
        return [math.nan for _ in self.records]

    def mini_batches(self) -> list[float]:
        """Return the mini-batches of every learner after every round."""
        return [number(record.mini_batches) for record in self._records]

    def bytes_moved(self) -> list[float]:
        """Return the cumulative bytes of arrays, both ways, without those of evaluations."""
        return list(
            accumulate(
                number(r.moved.get("bytes_down")) + number(r.moved.get("bytes_up"))
                for r in self._records
            )
        )

    def total(self, name: str) -> float:
        """Return the sum of a number of bytes over the rounds."""
        return sum(number(record.moved.get(name)) for record in self._records)

    def bytes_of_evaluation(self) -> float:
        """Return the bytes of models that were fetched for an evaluation or the result only."""
        return sum(
            number(size)
            for record in self._records
            for name, size in record.collected.items()
            if not name.startswith("models")
        )

    def length(self) -> tuple[str, str]:
        """Return the mini-batches of every learner in words, and no T."""
        return f"{self._records[-1].mini_batches:,} mini-batches", ""

    def series(self, name: str) -> list[float]:
        """Return a number of the records, one each round."""
        return [number(getattr(record, name)) for record in self._records]

    def models(self) -> list[float]:
        """Return the cumulative number of models that were sent, both ways."""
        return list(
            accumulate(
                number(r.moved.get("models_down")) + number(r.moved.get("models_up"))
                for r in self._records
            )
        )


HEADER = ["Round", "Mini-batches", "Loss", "Distance", "Bound", "Synchronised", "Reported"]
HEADER += ["Fetched", "Metrics", "Events", "Bytes down", "Bytes up", "Seconds"]


def rows_of(run: DynamicRun) -> tuple[list[DynamicRecord], str]:
    """Return the rounds for the table, and a note about those that are left out.

    They are the rounds in which models were exchanged, or something happened, and the last one.
    """
    records = list(run._records)
    chosen = [r for r in records if _is_eventful(r)]
    if not chosen or chosen[-1] is not records[-1]:
        chosen.append(records[-1])
    shown = chosen[-MOST_ROWS:]
    left = len(records) - len(shown)
    note = f"{left:,} rounds without an exchange or an event, or before these, are left out."
    return shown, note if left else ""


def _is_eventful(record: DynamicRecord) -> bool:
    events = (record.lost, record.refusals, record.restarts, record.absences)
    return record.synchronised != "none" or any(events) or bool(record.stopped)


def row(record: DynamicRecord, metrics: Cell, events: Cell) -> list[Cell]:
    """Return a row of the table, in the order of `HEADER`."""
    return [
        str(record.round),
        f"{record.mini_batches:,}",
        "unknown" if record.loss is None else f"{number(record.loss):.4g}",
        f"{number(record.largest_distance):.4g}",
        _bound(number(record.delta)),
        record.synchronised,
        ", ".join(map(str, record.reporters)),
        ", ".join(map(str, record.fetched)),
        metrics,
        events,
        f"{record.moved.get('bytes_down', 0):,}",
        f"{record.moved.get('bytes_up', 0):,}",
        f"{number(record.seconds):,.1f}",
    ]


def _bound(delta: float) -> str:
    # Of records: -1 asks for every model, infinity for none.
    return {-1.0: "every model", math.inf: "none"}.get(delta, f"{delta:.4g}")


def read_dynamic(path: str | Path) -> list[DynamicRecord]:
    """Read the history of a run of dynamic averaging.

    Raises
    ------
    ColearnError
        If it has no rounds, or a field of another type than a `DynamicRecord`.
    """
    return checked(DynamicHistory.read(path).records, path, _fits)


def _fits(entry: Field[Any], value: Any) -> bool:
    name = entry.name
    if name in _WHOLE:
        return type(value) is int
    if name in (*_DISTANCES, *_OPTIONAL):
        return type(value) in (int, float) or (value is None and name in _OPTIONAL)
    if name in _TEXTS:
        return isinstance(value, str)
    if name in _TABLES:
        return isinstance(value, Mapping) and (
            name != "contributions" or all(isinstance(each, Mapping) for each in value.values())
        )
    if not isinstance(value, list):
        return False
    kind = dict if name in ("lost", "refusals", "restarts", "absences") else object
    return all(isinstance(each, kind) for each in value)
