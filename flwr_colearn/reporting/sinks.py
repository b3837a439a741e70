"""Sinks of a history: the numbers of a record by name, and TensorBoard."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ColearnError

SEPARATOR = "/"


class TensorBoard:
    """A `flwr_colearn.Sink` that writes event files for TensorBoard (extra ``[tensorboard]``).

    The step is the number of the round. A round that is written again, by a run that was killed
    between its record and its checkpoint or by a new run in the same folder, takes the place of the
    former one and of those after it.

    Parameters
    ----------
    folder : str or Path
        The folder of the event files: ``tensorboard --logdir FOLDER``.

    Raises
    ------
    ColearnError
        If tensorboardX, which writes the files and needs no framework, is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ColearnError(
                "TensorBoard: expected tensorboardX, found none; pip install "
                "'flwr-colearn[tensorboard]'"
            ) from error
        self.folder = Path(folder)
        self._writer = SummaryWriter

    def write(self, record: Any) -> None:
        """Write the numbers of a record to an event file of its own."""
        # Only a writer that is closed has written everything. TensorBoard reads the files in the
        # order of their names, which begin with the time in seconds.
        writer = self._writer(
            str(self.folder), purge_step=record.round, filename_suffix=f".{time.time_ns()}"
        )
        with writer:
            for name, value in scalars(record).items():
                writer.add_scalar(name, value, record.round)


def scalars(record: Any) -> dict[str, float]:
    """Return the numbers of a record by name, as trackers of experiments want them.

    The names are the record's fields and the keys within them, with a slash between: the accuracy
    at a site is ``site_metrics/utrecht/accuracy``. A list of rates becomes its ``first`` and
    ``last``, another list its length.

    Parameters
    ----------
    record : RoundRecord or DynamicRecord
        The record of a round.

    Examples
    --------
    >>> from flwr_colearn import RoundRecord
    >>> record = RoundRecord(1, 2, 0.1, 2, server_metrics={"accuracy": 0.5}, participants=["a"])
    >>> found = scalars(record)
    >>> found["local_epochs"], found["server_metrics/accuracy"], found["participants"]
    (2.0, 0.5, 1.0)
    """
    return dict(_scalars("", asdict(record)))


def _scalars(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _scalars(f"{prefix}{SEPARATOR}{key}" if prefix else str(key), item)
    elif isinstance(value, list):
        if value and all(isinstance(item, float) for item in value):
            yield f"{prefix}{SEPARATOR}first", value[0]
            yield f"{prefix}{SEPARATOR}last", value[-1]
        else:
            yield prefix, float(len(value))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield prefix, float(value)
