"""ProcessPool: the worker processes of an InProcessGrid, seen from the server."""

import atexit
import logging
import time
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from logging import DEBUG, INFO, WARNING
from multiprocessing import connection, resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import Any

from flwr.app import Context, Message
from flwr.common import log

from ..errors import ColearnError
from .app_reference import AppReference
from .batches import Batches
from .calling import Raised
from .devices import environment_of
from .jobs import Job
from .parcels import Frozen, read, removed, size_of, written
from .worker import Done, Started, Task
from .worker_process import IN_FLIGHT, WorkerProcess, how_ended

MOST_DEATHS = 3
"""The deaths of workers after which a message counts as failed, or the start-up does."""

CHECK = 1.0
"""The seconds after which the server looks whether workers live, besides their connections."""

CLOSING = 2.0
"""The seconds in which idle workers must have ended; they are killed then."""


class ProcessPool:
    """Worker processes that call a ClientApp for their participants.

    A participant belongs to the worker that has the fewest messages when the first one arrives for
    it. A worker that dies is replaced, and its messages are sent again with the contexts from
    before, which the server has; so a repeated training has the same result. A message during
    which `MOST_DEATHS` workers died gets an error reply with Flower's code for a crashed ClientApp.

    Parameters
    ----------
    app : AppReference
        The ClientApp.
    contexts : dict of int to Context
        The participants' contexts by node id; updated with every reply.
    processes : int
        The number of workers.
    devices : sequence of str, optional
        The workers' devices, in turn.
    """

    def __init__(
        self,
        app: AppReference,
        contexts: dict[int, Context],
        processes: int,
        devices: Sequence[str] | None = None,
    ) -> None:
        self.contexts = contexts
        portable = app.portable()
        names = [None if not devices else devices[i % len(devices)] for i in range(processes)]
        self.workers = [
            WorkerProcess(number, portable, environment_of(name, processes))
            for number, name in enumerate(names)
        ]
        self._homes: dict[int, WorkerProcess] = {}
        self._jobs: dict[str, Job] = {}
        self._replies: dict[str, Message] = {}
        self._asked: set[str] = set()  # messages asked for since a reply came or was taken
        self._batches = Batches()
        self._raised: list[tuple[int, Message, Raised]] = []
        # At the end of this process too, before multiprocessing waits for its children.
        self._finalizer = weakref.finalize(self, _close, self.workers, self._batches)
        atexit.register(self._finalizer)
        resource_tracker.ensure_running()
        for worker in self.workers:
            worker.start()
        log(INFO, "In process: %s worker processes, started", processes)

    def close(self) -> None:
        """End the processes and free the shared memory."""
        atexit.unregister(self._finalizer)
        self._finalizer()

    def push(self, messages: Sequence[Message]) -> None:
        """Send messages to the workers of their participants."""
        self._check_open()
        for job in self._batches.jobs_of(messages):
            self._jobs[job.message_id] = job
            self._home_of(job.node_id).waiting.append(job)
        self._dispatch()

    def pull(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there; if there is none at all, wait for the first.

        Raises
        ------
        ColearnError
            If the workers cannot start, or the pool is closed.
        """
        ids = list(message_ids)
        if not self._jobs.keys().isdisjoint(ids):
            self._check_open()
            self._receive(0)
            while not self._has_news(ids):
                self._receive(CHECK)
        self._asked.update(ids)
        replies = [self._replies.pop(id_) for id_ in ids if id_ in self._replies]
        if replies:
            self._asked.clear()
        return replies

    def _has_news(self, ids: Sequence[str]) -> bool:
        """Return whether a reply is there for these messages, or for others that may be asked for.

        Whoever asks for the same messages again has not taken the replies that are there, which
        belong to nobody, such as those of a run that was interrupted.
        """
        if not self._replies.keys().isdisjoint(ids):
            return True
        return bool(self._replies) and not self._asked.issuperset(ids)

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise ColearnError("InProcessGrid: expected an open grid, found it closed")

    def take_raised(self) -> list[tuple[int, Message, Raised]]:
        """Return the exceptions since the last call, with node and message."""
        raised, self._raised = self._raised, []
        return raised

    def _home_of(self, node_id: int) -> WorkerProcess:
        if node_id not in self._homes:
            self._homes[node_id] = min(self.workers, key=lambda worker: worker.load)
        return self._homes[node_id]

    # Workers ------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        for worker in self.workers:
            while worker.waiting and worker.started and len(worker.running) < IN_FLIGHT:
                self._send(worker)

    def _send(self, worker: WorkerProcess) -> None:
        """Send a worker its next job."""
        job = worker.waiting[0]
        node = job.node_id
        context = Frozen.of(self.contexts[node])
        told = [] if context.is_same(worker.known.get(node)) else [context]
        # A reply is about as large as the message.
        outbox = worker.outbox(max(job.batch.segment.size, size_of(told)))
        parcel = written(told, outbox)[0] if told else None
        worker.known[node] = context
        # Only now: without room for the outbox the job goes on waiting.
        worker.waiting.popleft()
        if not worker.running:
            self._begin(job)
        worker.running.append(job)
        task = Task(job.message_id, node, job.parcel, parcel, outbox.name, job.batch.number)
        with suppress(OSError):  # a dead worker is found when it is read from
            worker.channel.send(task)

    def _begin(self, job: Job) -> None:
        job.began = time.monotonic()
        log(DEBUG, "Participant %s begins: %s", job.node_id, job.message.metadata.message_type)

    def _receive(self, seconds: float) -> None:
        """Process what the workers sent; wait for it at most so many seconds."""
        channels = {worker.channel: worker for worker in self.workers}
        for channel in connection.wait(list(channels), seconds):
            self._read(channels[channel])  # type: ignore[index]
        for worker in self.workers:
            self._check(worker)
        self._dispatch()

    def _read(self, worker: WorkerProcess) -> None:
        """Process all that a worker has sent."""
        try:
            while worker.channel.poll():
                self._process(worker, worker.channel.recv())
        except (EOFError, OSError):
            self._died(worker)

    def _check(self, worker: WorkerProcess) -> None:
        """Replace a worker that has died, or that works too long at one message."""
        job, process = worker.running[0] if worker.running else None, worker.process
        if process.exitcode is not None:
            self._read(worker)
            # Its connection has no end while a process that it has forked holds it too.
            if worker.process is process:
                self._died(worker)
        elif job is not None and 0 < job.limit < time.monotonic() - job.began:
            worker.running.popleft()
            self._answer(job, job.failed(f"no reply within {job.limit:g} s"))
            self._replace(worker)

    def _process(self, worker: WorkerProcess, received: Any) -> None:
        if isinstance(received, logging.LogRecord):
            logging.getLogger(received.name).handle(received)
        elif isinstance(received, Started):
            self._started(worker, received)
        elif isinstance(received, Done):
            self._done(worker, received)

    def _started(self, worker: WorkerProcess, received: Started) -> None:
        if received.failure:
            self.close()
            raise ColearnError(
                "client_app: expected an app that a new process can import, found in worker "
                f"{worker.number}:\n{received.failure}"
            )
        worker.started, worker.deaths = True, 0

    def _done(self, worker: WorkerProcess, done: Done) -> None:
        job = worker.running.popleft()
        reply_at = done.reply.segment
        segments = {segment.name: segment for segment in worker.outboxes}
        segment = segments.get(reply_at) or SharedMemory(reply_at)
        reply = read(segment, done.reply).thawed()
        if done.context is not None:
            context = read(segment, done.context).thawed()
            self.contexts[job.node_id] = context
            worker.known[job.node_id] = Frozen.of(context)
        if reply_at not in segments:
            worker.largest = max(worker.largest, segment.size)
            removed([segment])
        if done.raised is not None:
            self._raised.append((job.node_id, job.message, done.raised))
        seconds = time.monotonic() - job.began
        log(DEBUG, "Participant %s has replied after %.1f s", job.node_id, seconds)
        self._answer(job, reply)
        if worker.running:
            self._begin(worker.running[0])

    def _answer(self, job: Job, reply: Message) -> None:
        self._replies[job.message_id] = reply
        self._asked.clear()
        del self._jobs[job.message_id]
        self._batches.answered(job)

    def _died(self, worker: WorkerProcess) -> None:
        """Replace a worker that has died."""
        worker.process.join()
        how = how_ended(worker.process.exitcode)
        if not worker.started:
            self._died_at_start(worker, how)
        elif worker.running:
            job = worker.running[0]
            job.deaths += 1
            log(WARNING, "In process: a worker %s with participant %s", how, job.node_id)
            if job.deaths >= MOST_DEATHS:
                worker.running.popleft()
                self._answer(job, job.failed(f"the worker process {how}, {job.deaths} times"))
        self._replace(worker)

    def _died_at_start(self, worker: WorkerProcess, how: str) -> None:
        worker.deaths += 1
        log(WARNING, "In process: a worker %s at its start", how)
        if worker.deaths >= MOST_DEATHS:
            self.close()
            raise ColearnError(
                f"InProcessGrid: expected worker processes to start, found that one {how}, "
                f"{worker.deaths} times; what it wrote is above. A program needs 'if __name__ == "
                '"__main__":\' around what it does, since every worker imports it'
            )

    def _replace(self, worker: WorkerProcess) -> None:
        """Start a worker again, with the jobs that it had."""
        worker.end()
        worker.waiting.extendleft(reversed(worker.running))
        worker.running.clear()
        worker.start()


def _close(workers: Sequence[WorkerProcess], batches: Batches) -> None:
    """End processes and free memory; those that train are ended at once."""
    for worker in workers:
        worker.channel.close()
    until = time.monotonic() + CLOSING
    for worker in workers:
        idle = worker.started and not worker.running
        worker.end(max(0.0, until - time.monotonic()) if idle else 0.0)
        removed(worker.outboxes)
    batches.remove()


__all__ = ["ProcessPool"]
