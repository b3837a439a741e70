"""Bars and a live line in a terminal (extra ``[progress]``); nothing where there is none."""

import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

TICK = 1.0
"""The seconds after which a live line is written anew."""


def track(items: Iterable[T], description: str = "", total: int | None = None) -> Iterable[T]:
    """Return an iterable with a bar in the terminal, for the local epochs or the batches of one.

    Without a terminal (stderr is a file or a pipe, as in ``flwr run``), and without tqdm, which is
    the extra ``[progress]``, the items are returned as they are.

    Parameters
    ----------
    items : iterable
        For example a `LocalPlan`, or the mini-batches of an epoch.
    description : str
        The text before the bar.
    total : int, optional
        The number of items; by default their length, if they have one.

    Examples
    --------
    ::

        for epoch in track(plan, f"round {plan.round}", plan.local_epochs):
            for batch in track(batches, f"epoch {epoch.index}"):
                train(model, batch, epoch.learning_rate)

    >>> list(track([1, 2], "epochs"))
    [1, 2]
    """
    tqdm = _tqdm()
    if tqdm is None or not in_terminal():
        return items
    return tqdm(items, description, total, leave=False)  # type: ignore[no-any-return]


def in_terminal() -> bool:
    """Return whether stderr is a terminal."""
    return bool(sys.stderr is not None and sys.stderr.isatty())


def live_line(text: Callable[[], str]) -> "LiveLine | None":
    """Return a line in the terminal, which is alive until it is closed; None if there is none."""
    tqdm = _tqdm()
    return LiveLine(text, tqdm) if tqdm is not None and in_terminal() else None


class LiveLine:
    """The last line of a terminal, written anew every second. Log lines are written above it.

    Parameters
    ----------
    text : callable
        Returns the text of the line.
    tqdm : type
        The library's class, which draws the line.
    """

    def __init__(self, text: Callable[[], str], tqdm: Any) -> None:
        self._text = text
        # The bar takes the last ten columns; with one, tqdm cuts the text at the terminal's width.
        shape = {"bar_format": "{desc} {bar:10}", "dynamic_ncols": True, "leave": False}
        self._restore = _logs_above(tqdm)
        self._bar = tqdm(desc=text(), total=1, **shape)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._thread.start()

    def show(self, done: int, of: int) -> None:
        """Write the line anew, with this much of its bar full."""
        self._bar.n, self._bar.total = done, of
        self._bar.set_description_str(self._text())

    def close(self) -> None:
        """Remove the line; further calls have no effect."""
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join()
            self._bar.close()
            self._restore()

    def _tick(self) -> None:
        while not self._ended.wait(TICK):
            self._bar.set_description_str(self._text())


def _logs_above(tqdm: Any) -> Callable[[], None]:
    """Have Flower's log written above the line; return what undoes it.

    The handlers keep their format and colours: only the stream to which they write is wrapped.
    """
    from tqdm.contrib import DummyTqdmFile

    before = [(handler, handler.stream) for handler in _terminal_handlers()]
    for handler, stream in before:
        handler.setStream(DummyTqdmFile(stream))

    def restore() -> None:
        for handler, stream in before:
            handler.setStream(stream)

    return restore


def _terminal_handlers() -> Iterator["logging.StreamHandler[Any]"]:
    for handler in logging.getLogger("flwr").handlers:
        if isinstance(handler, logging.StreamHandler) and _is_terminal(handler.stream):
            yield handler


def _is_terminal(stream: Any) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
