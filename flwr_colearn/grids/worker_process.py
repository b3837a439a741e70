"""WorkerProcess: a worker process of an InProcessGrid, seen from the server."""

import logging
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.shared_memory import SharedMemory

from .devices import variables_set
from .jobs import Job
from .parcels import Frozen, created, removed
from .worker import overflow_of, serve

IN_FLIGHT = 2
"""The tasks that a worker has at a time: it begins the second without waiting for the server."""


@dataclass
class WorkerProcess:
    """One worker process; after its death the next one takes its place.

    Attributes
    ----------
    number : int
        Of the worker, from 0.
    app : bytes
        A pickled `AppReference`.
    environment : dict
        Environment variables.
    waiting, running : deque of Job
        The jobs of its participants: those it has not got yet, and those it has; of the latter the
        first is the one that it works at.
    known : dict
        The contexts that the process has, by node.
    outboxes : deque of SharedMemory
        The segments for its replies, of which the first was used least recently.
    largest : int
        The bytes of the largest reply that did not fit into an outbox.
    deaths : int
        The deaths at start-up, one after the other.
    started : bool
        Whether the process has the ClientApp.
    """

    number: int
    app: bytes
    environment: dict[str, str]
    waiting: deque[Job] = field(default_factory=deque)
    running: deque[Job] = field(default_factory=deque)
    known: dict[int, Frozen] = field(default_factory=dict)
    outboxes: deque[SharedMemory] = field(default_factory=deque)
    largest: int = 0
    deaths: int = 0
    started: bool = False

    def start(self) -> None:
        """Start a process."""
        spawn = multiprocessing.get_context("spawn")
        self.channel, theirs = spawn.Pipe()
        level = logging.getLogger("flwr").getEffectiveLevel()
        # Not a daemon: it may have processes of its own, such as those that load data.
        self.process = spawn.Process(
            target=serve, args=(theirs, self.app, level), name=f"colearn-{self.number}"
        )
        self.known.clear()
        self.started = False
        with variables_set(self.environment), _without_interrupts():
            self.process.start()
        theirs.close()

    @property
    def load(self) -> int:
        """The number of jobs."""
        return len(self.waiting) + len(self.running)

    def outbox(self, size: int) -> SharedMemory:
        """Return a segment of at least this size for a reply, which nobody uses."""
        size = max(size, self.largest)
        # As many tasks are in flight as there are outboxes, so that the first one is free.
        free = [self.outboxes.popleft()] if len(self.outboxes) >= IN_FLIGHT else []
        if not free or free[0].size < size:
            removed(free)
            free = [created(size)]
        self.outboxes.extend(free)
        return free[0]

    def overflow(self) -> Iterator[SharedMemory]:
        """Yield the segments that the process made for large replies."""
        for outbox in self.outboxes:
            with suppress(FileNotFoundError):
                yield SharedMemory(overflow_of(outbox.name))

    def end(self, seconds: float = 0.0) -> None:
        """End the process; an idle one ends by itself when the connection is closed."""
        self.channel.close()
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        removed(self.overflow())


def how_ended(exitcode: int | None) -> str:
    """Return how a process ended, for a log."""
    if exitcode is None or exitcode >= 0:
        return f"ended with exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    hint = ", as when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach: the server ends them, without their tracebacks.

    Ctrl-C goes to all processes of a terminal, and a blocked signal stays blocked in new ones.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
