"""Batches: the shared memory of the messages that worker processes have not answered yet."""

from collections.abc import Sequence
from multiprocessing.shared_memory import SharedMemory

from flwr.app import Message

from .jobs import Batch, Job
from .parcels import Frozen, created, removed, size_of, written


class Batches:
    """Segments with the messages of open batches, and those of answered ones, to be used again."""

    def __init__(self) -> None:
        self._open: dict[int, Batch] = {}
        self._spare: list[SharedMemory] = []
        self._numbered = 0

    def jobs_of(self, messages: Sequence[Message]) -> list[Job]:
        """Write messages to a segment, arrays that they share only once, and return their jobs.

        Raises
        ------
        ColearnError
            If there is not so much shared memory.
        """
        if not messages:
            return []
        frozen = [Frozen.of(message) for message in messages]
        segment = self._segment(size_of(frozen))
        self._numbered += 1
        batch = self._open[self._numbered] = Batch(self._numbered, segment, len(messages))
        parcels = written(frozen, segment)
        pairs = zip(messages, parcels, strict=True)
        return [Job(message, parcel, batch) for message, parcel in pairs]

    def answered(self, job: Job) -> None:
        """Note that a job has its reply; the segment of a batch without others is spare."""
        job.batch.left -= 1
        if not job.batch.left:
            del self._open[job.batch.number]
            self._spare.append(job.batch.segment)

    def remove(self) -> None:
        """Remove all segments."""
        removed(batch.segment for batch in self._open.values())
        removed(self._spare)

    def _segment(self, size: int) -> SharedMemory:
        """Return a segment of at least this size, which nobody uses."""
        # Memory that was in use before needs no new pages.
        fitting = [each for each in self._spare if each.size >= size]
        if fitting:
            segment = min(fitting, key=lambda each: each.size)
            self._spare.remove(segment)
            return segment
        removed(self._spare)
        self._spare.clear()
        return created(size)
