"""ProgressGrid: who has replied to the trainings of a round, and when the round may end."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from logging import INFO

from flwr.app import Message, MessageType
from flwr.common import log
from flwr.serverapp import Grid

from ..progress import LiveLine, live_line
from ..records import config_of, kind_of
from .wrapping import WrappingGrid

LOG_EVERY = 60.0
"""The least number of seconds between two lines of the log, where there is no terminal."""


@dataclass
class Pace:
    """The measured speed of the rounds so far, and what the run has before it.

    Attributes
    ----------
    seconds : float or None
        The seconds of a local epoch in the last complete round, of a round without a plan those of
        the round; None before the first.
    num_rounds, total_epochs : int or None
        The last round, and the budget of local epochs; None where there is none.
    """

    seconds: float | None = None
    num_rounds: int | None = None
    total_epochs: int | None = None


@dataclass
class RoundProgress:
    """The trainings of one round, and how far they are.

    Attributes
    ----------
    round : int
        The number of the round.
    epochs : int or None
        T, the local epochs of the round; None of a strategy without them.
    epochs_done : int
        The local epochs before the round.
    asked : sequence of int
        The nodes that train.
    replied : list of int
        The nodes whose replies were accepted.
    pace : Pace
        The speed of the rounds before.
    began : float
        The time at which the round began, in seconds of a monotonic clock.
    """

    round: int
    epochs: int | None
    epochs_done: int
    asked: Sequence[int]
    pace: Pace
    began: float
    replied: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, messages: Sequence[Message], pace: Pace, now: float) -> "RoundProgress":
        """Return the progress of a round at its beginning, as its train messages have it."""
        config = config_of(messages[0].content)
        nodes = [message.metadata.dst_node_id for message in messages]
        epochs, done, number = (
            config.get(key) for key in ("local-epochs", "epochs-done", "server-round")
        )
        return cls(
            number if isinstance(number, int) else 0,
            epochs if isinstance(epochs, int) else None,
            done if isinstance(done, int) else 0,
            nodes,
            pace,
            now,
        )

    def round_left(self, now: float) -> float | None:
        """Return the seconds that the round probably still takes; None in the first round."""
        if self.pace.seconds is None:
            return None
        return max(self.pace.seconds * (self.epochs or 1) - (now - self.began), 0.0)

    def run_left(self, now: float) -> float | None:
        """Return the seconds that the run probably still takes; None if its end is not known.

        A run ends with its budget of local epochs or its last round, whichever is first. T may
        grow: rounds to come are counted with the present T.
        """
        left = []
        if self.pace.total_epochs is not None and self.epochs is not None:
            left.append(self.pace.total_epochs - self.epochs_done)
        if self.pace.num_rounds is not None:
            left.append((self.pace.num_rounds - self.round + 1) * (self.epochs or 1))
        if self.pace.seconds is None or not left:
            return None
        return max(self.pace.seconds * min(left) - (now - self.began), 0.0)

    def measured(self, now: float) -> float:
        """Return the seconds of a local epoch in this round, which is complete."""
        return (now - self.began) / (self.epochs or 1)

    def text(self, now: float, name_of: Callable[[int], str]) -> str:
        """Return the progress in words."""
        of = "" if self.pace.num_rounds is None else f" of {self.pace.num_rounds}"
        epochs = "" if self.epochs is None else f" (T = {self.epochs})"
        names = {name_of(node) for node in self.replied}
        waiting = [name for name in map(name_of, self.asked) if name not in names]
        parts = [
            f"round {self.round}{of}{epochs}: {len(self.replied)} of {len(self.asked)} have replied"
        ]
        if waiting and self.replied:
            parts.append(f"not yet {', '.join(waiting)}")
        if (left := self.round_left(now)) is not None:
            parts.append(f"about {duration(left)} left")
        if (left := self.run_left(now)) is not None:
            parts.append(f"the run about {duration(left)}")
        return ", ".join(parts)


class ProgressGrid(WrappingGrid):
    """A layer that shows the progress of a round's trainings.

    In a terminal it is one line, which is alive. A ServerApp of a deployment or of ``flwr run`` has
    no terminal: there a line is logged when a reply arrives that is not the last one, at most once
    in 60 seconds, so that quick rounds have none.

    Parameters
    ----------
    grid : Grid
        The inner grid.
    name_of : callable
        Returns the name of a node.

    Attributes
    ----------
    pace : Pace
        The speed of the rounds so far; the loop sets what the run has before it.
    """

    def __init__(self, grid: Grid, name_of: Callable[[int], str]) -> None:
        super().__init__(grid)
        self.pace = Pace()
        self._name_of = name_of
        self._line: LiveLine | None = None
        self._logged = 0.0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the replies, a list."""
        return list(self.stream(messages, timeout=timeout))

    def stream(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages at the call, and yield their replies as they arrive."""
        batch = list(messages)
        # The layer of recovery yields replies one at a time; Flower's grids return all at once.
        send = getattr(self.grid, "stream", self.grid.send_and_receive)
        if not batch or not _is_training(batch[0]):
            return send(batch, timeout=timeout)
        self._end()
        progress = RoundProgress.of(batch, self.pace, time.monotonic())
        self._logged = progress.began
        self._line = live_line(lambda: progress.text(time.monotonic(), self._name_of))
        try:
            replies = send(batch, timeout=timeout)
        except BaseException:
            self._end()
            raise
        return self._watched(replies, progress)

    def _watched(self, replies: Iterable[Message], progress: RoundProgress) -> Iterator[Message]:
        def noted(reply: Message) -> Message:
            if not reply.has_error():
                progress.replied.append(reply.metadata.src_node_id)
            self._show(progress)
            return reply

        try:
            # A loop would hold a reply while the next one arrives; models may be large.
            yield from map(noted, replies)
            if progress.replied:
                self.pace.seconds = progress.measured(time.monotonic())
        finally:
            self._end()

    def _show(self, progress: RoundProgress) -> None:
        now, asked = time.monotonic(), len(progress.asked)
        if self._line is not None:
            self._line.show(len(progress.replied), asked)
        elif len(progress.replied) < asked and now - self._logged >= LOG_EVERY:
            self._logged = now
            text = progress.text(now, self._name_of)
            log(INFO, "%s", text[0].upper() + text[1:])

    def _end(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None


def duration(seconds: float) -> str:
    """Return a duration in words, as exact as an estimate is.

    Examples
    --------
    >>> [duration(seconds) for seconds in (0, 59, 61, 3700, 200_000)]
    ['1 s', '59 s', '1 min', '1 h 2 min', '2 d 7 h']
    """
    if seconds < 60:
        return f"{max(math.ceil(seconds), 1)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def _is_training(message: Message) -> bool:
    """Return whether a message asks for the training of a round, and is no query or later stage."""
    if not message.has_content() or kind_of(message) != MessageType.TRAIN:
        return False
    return "server-round" in config_of(message.content)
