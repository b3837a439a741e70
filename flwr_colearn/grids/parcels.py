"""Parcels: messages and contexts whose arrays lie in shared memory, for a process on this machine.

An object is pickled without the bytes of its arrays (pickle protocol 5, PEP 574). Those are written
to a `multiprocessing.shared_memory` segment, from which the other process copies them once.
"""

import io
import os
import pickle
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Array

from ..errors import ColearnError

SHARED = Path("/dev/shm")
"""The folder in which Linux shows shared memory."""


@dataclass(frozen=True)
class Frozen:
    """A pickled object, and the bytes of its arrays, which are not in the pickle.

    Attributes
    ----------
    pickled : bytes
        The object without its arrays.
    arrays : list of bytes
        The serialised arrays in the order of the pickle; the same objects as in the arrays.
    """

    pickled: bytes
    arrays: list[bytes]

    @classmethod
    def of(cls, value: Any) -> "Frozen":
        """Return an object as pickle and arrays."""
        file, arrays = io.BytesIO(), list[bytes]()
        _Pickler(file, arrays).dump(value)
        return cls(file.getvalue(), arrays)

    def thawed(self) -> Any:
        """Return a new object, which has the same bytes objects in its arrays."""
        return pickle.loads(self.pickled, buffers=self.arrays)

    def is_same(self, other: "Frozen | None") -> bool:
        """Return whether another has the same content; bytes of arrays are compared by identity."""
        return (
            other is not None
            and self.pickled == other.pickled
            and len(self.arrays) == len(other.arrays)
            and all(a is b for a, b in zip(self.arrays, other.arrays, strict=True))
        )


class _Pickler(pickle.Pickler):
    """A pickler that appends the bytes of Flower's arrays to a list."""

    def __init__(self, file: io.BytesIO, arrays: list[bytes]) -> None:
        super().__init__(file, protocol=5, buffer_callback=lambda buffer: False)
        self._arrays = arrays

    def reducer_override(self, value: Any) -> Any:
        """Reduce an array to its description and a buffer outside the pickle."""
        if type(value) is not Array:
            return NotImplemented
        self._arrays.append(value.data)
        described = (value.dtype, tuple(value.shape), value.stype)
        return Array, (*described, pickle.PickleBuffer(value.data))


class Parcel(NamedTuple):
    """Where an object lies: a segment, and the start and size of its pickle there."""

    segment: str
    start: int
    size: int


def size_of(frozen: Sequence[Frozen]) -> int:
    """Return the bytes that objects need in a segment, with room for the places of the arrays."""
    arrays = {id(data): len(data) for each in frozen for data in each.arrays}
    heads = sum(len(each.pickled) + 32 * len(each.arrays) + 256 for each in frozen)
    return sum(arrays.values()) + heads


def written(frozen: Sequence[Frozen], segment: SharedMemory) -> list[Parcel]:
    """Write objects to a segment, and bytes that several of them have only once."""
    end, places, parcels = 0, dict[int, tuple[int, int]](), []
    for each in frozen:
        for data in each.arrays:
            if id(data) not in places:
                places[id(data)] = end, len(data)
                end = _put(segment, end, data)
        table = [places[id(data)] for data in each.arrays]
        head = pickle.dumps((each.pickled, table), protocol=5)
        parcels.append(Parcel(segment.name, end, len(head)))
        end = _put(segment, end, head)
    return parcels


def _put(segment: SharedMemory, start: int, data: bytes) -> int:
    assert segment.buf is not None  # it is open
    segment.buf[start : start + len(data)] = data
    return start + len(data)


class Reader:
    """Reads parcels; arrays that several parcels of one segment share are copied once.

    Parameters
    ----------
    keep : int
        The number of segments that stay attached. Attaching one anew costs as much as a copy.
    """

    def __init__(self, keep: int = 8) -> None:
        self._keep = keep
        self._attached: OrderedDict[str, SharedMemory] = OrderedDict()
        self._copied: dict[tuple[int, int], bytes] = {}
        self._batch: Any = None

    def segment(self, name: str) -> SharedMemory:
        """Return a segment that another process created."""
        if name not in self._attached:
            self._attached[name] = SharedMemory(name)
        self._attached.move_to_end(name)
        while len(self._attached) > self._keep:
            self._attached.popitem(last=False)[1].close()
        return self._attached[name]

    def read(self, parcel: Parcel, batch: Any = None) -> Frozen:
        """Return the object; parcels of one `batch` share the bytes of their common arrays."""
        if batch is None or batch != self._batch:
            self._copied.clear()
        self._batch = batch
        return read(self.segment(parcel.segment), parcel, self._copied)


def read(
    segment: SharedMemory, parcel: Parcel, copied: dict[tuple[int, int], bytes] | None = None
) -> Frozen:
    """Return the object of a parcel; `copied` has the arrays that were copied before, by place."""
    copied = {} if copied is None else copied
    pickled, table = pickle.loads(_get(segment, parcel.start, parcel.size))
    for place in table:
        if place not in copied:
            copied[place] = _get(segment, *place)
    return Frozen(pickled, [copied[place] for place in table])


def _get(segment: SharedMemory, start: int, size: int) -> bytes:
    assert segment.buf is not None  # it is open
    return bytes(segment.buf[start : start + size])


def created(size: int, name: str | None = None) -> SharedMemory:
    """Return a new segment, whose memory is there.

    Raises
    ------
    ColearnError
        If there is not so much shared memory. Without this check the process would be killed by
        SIGBUS when it writes to the segment.
    """
    # The server's process id tells whose a segment is, for whoever looks into /dev/shm.
    name = name or f"colearn-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    segment = SharedMemory(name, create=True, size=size)
    path = SHARED / segment.name.lstrip("/")
    try:
        if path.exists():
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        removed([segment])
        raise ColearnError(
            f"shared memory: expected {size} bytes for the messages of a round, found no room "
            f"({error.strerror}); enlarge {SHARED} (docker run --shm-size), or use fewer processes"
        ) from None
    return segment


def removed(segments: Iterable[SharedMemory]) -> None:
    """Remove segments."""
    for segment in segments:
        segment.close()
        with suppress(FileNotFoundError):
            segment.unlink()
