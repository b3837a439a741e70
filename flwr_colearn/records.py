"""Arrays to and from Flower's records, in fewer copies than Flower's own and with its bytes."""

import hashlib
import io
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from .errors import expected
from .roles import NDArray

NUMPY = "numpy.ndarray"
"""How Flower marks an array that is serialised in numpy's format."""

Record = TypeVar("Record", ArrayRecord, MetricRecord, ConfigRecord)


def records_of(content: RecordDict, kind: type[Record]) -> dict[str, Record]:
    """Return the records of one kind.

    Not by ``content.array_records``: Flower keeps that in a reference cycle with the content, and a
    model in a cycle stays in memory until the garbage collector happens to come.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def kind_of(message: Message) -> str:
    """Return a message's type without its action: "train" for "train.recalibrate" too."""
    return message.metadata.message_type.partition(".")[0]


def number_in(config: ConfigRecord, key: str) -> float:
    """Return an entry of a config as a float; 0.0 if it is absent or no number."""
    value = config.get(key)
    return float(value) if isinstance(value, int | float) else 0.0


def config_of(content: RecordDict) -> ConfigRecord:
    """Return the config of a message: the ConfigRecord that has a ``server-round``, else none."""
    for record in records_of(content, ConfigRecord).values():
        if "server-round" in record:
            return record
    return ConfigRecord()


def describe(record: ArrayRecord) -> str:
    """Return eight characters that differ for models of other names, shapes or types."""
    signature = [(name, a.dtype.str, a.shape) for name, a in view(record).items()]
    return hashlib.sha256(repr(signature).encode()).hexdigest()[:8]


def fingerprint(record: ArrayRecord) -> list[bytes]:
    """Return the bytes of a record's arrays: the very objects, by which `is_unchanged` knows them.

    A record may be changed in place by whoever holds it, so that its identity says nothing.
    """
    return [array.data for array in record.values()]


def is_unchanged(record: ArrayRecord, earlier: list[bytes]) -> bool:
    """Return whether a record's arrays are still those of its `fingerprint`; no bytes are read."""
    return len(record) == len(earlier) and all(
        array.data is data for array, data in zip(record.values(), earlier, strict=True)
    )


def view(record: ArrayRecord) -> dict[str, NDArray]:
    """Return the arrays of a record as read-only views of its bytes: nothing is copied.

    Raises
    ------
    ColearnError
        If an entry is not a well-formed serialised numpy array.
    """
    return {name: _view(name, array) for name, array in record.items()}


def data_bytes(record: ArrayRecord) -> int:
    """Return the bytes of a record's serialised arrays."""
    return sum(len(array.data) for array in record.values())


def to_record(arrays: dict[str, NDArray]) -> ArrayRecord:
    """Return named arrays as an ArrayRecord."""
    return ArrayRecord({name: _record_of(array) for name, array in arrays.items()})


def types_of(record: ArrayRecord) -> dict[str, str]:
    """Return the types of a record's ordinary arrays by name, as numpy spells them."""
    return {name: array.dtype for name, array in record.items() if array.stype == NUMPY}


def cast_record(record: ArrayRecord, types: Mapping[str, str]) -> ArrayRecord:
    """Return a record whose arrays have the types given by name; itself, if they have them already.

    Numbers become integers by rounding, halves upwards, as `RunningMean` rounds. Arrays that
    `types` does not name, and those that are no ordinary ones, stay as they are.
    """
    cast = {
        name: _record_of(_as_type(_view(name, record[name]), np.dtype(types[name])))
        for name, dtype in types_of(record).items()
        if types.get(name, dtype) != dtype
    }
    return ArrayRecord({**record, **cast}) if cast else record


class SentTypes:
    """The types of the arrays that were sent first, which later ones are given too.

    Strategies may return averages in other types than they were given: FedAvg makes averages of
    counters float64, and others all of a model. Participants then would get, and train, models of
    other types than their own.

    Parameters
    ----------
    like : ArrayRecord, optional
        Counts as sent first.
    """

    def __init__(self, like: ArrayRecord | None = None) -> None:
        self._types = {} if like is None else types_of(like)

    def cast(self, messages: Iterable[Message]) -> list[Message]:
        """Return messages, their arrays in the types that those of the first one had.

        Integers are rounded. Contents are changed in place, but no record.
        """
        batch = list(messages)
        cast: dict[int, ArrayRecord] = {}  # one for all messages that share a record
        for message in filter(Message.has_content, batch):
            for key, record in list(records_of(message.content, ArrayRecord).items()):
                if id(record) not in cast:
                    cast[id(record)] = self._as_first(record)
                if cast[id(record)] is not record:
                    message.content[key] = cast[id(record)]
        return batch

    def _as_first(self, record: ArrayRecord) -> ArrayRecord:
        if set(record) != set(self._types):
            self._types = types_of(record)
        return cast_record(record, self._types)


def _as_type(array: NDArray, dtype: np.dtype[Any]) -> NDArray:
    whole = dtype.kind in "iub" and array.dtype.kind == "f"
    return np.asarray(np.floor(array + 0.5) if whole else array).astype(dtype)


def into_record(arrays: dict[str, NDArray]) -> ArrayRecord:
    """Return named arrays as an ArrayRecord, and empty `arrays`.

    Each array's memory, if nothing else holds it, is free for the bytes of the next: for a large
    model that takes a quarter of `to_record`'s time, which is spent on memory the system finds
    anew, and one model less of it.
    """
    return Outgoing().record(arrays)


class Outgoing:
    """Memory for a model that is to travel: its arrays are computed in the bytes of their record.

    A record holds serialised arrays, so a model that was computed elsewhere is copied into it: for
    a large one that takes as long as adding two models to a sum, and a model more of memory.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[NDArray, io.BytesIO]] = {}

    def empty(self, name: str, like: NDArray) -> NDArray:
        """Return an array of the shape and type of `like`, to be filled and given to `record`."""
        header = _header_of(like.dtype, like.shape)
        # BytesIO hands out the very bytes that it was made of, and lets them be written until then.
        file = io.BytesIO(bytes(len(header) + like.nbytes))
        file.write(header)
        array = np.ndarray(like.shape, like.dtype, file.getbuffer(), offset=len(header))
        self._made[name] = array, file
        return array

    def record(self, arrays: dict[str, NDArray]) -> ArrayRecord:
        """Return named arrays as an ArrayRecord, and empty `arrays`.

        Those that `empty` made are not copied, and must not be written to any more; with the others
        it is as with `into_record`.
        """
        record = ArrayRecord()
        for name in list(arrays):
            record[name] = self._sealed(name, arrays.pop(name))
        self._made.clear()
        return record

    def _sealed(self, name: str, array: NDArray) -> Array:
        made, file = self._made.pop(name, (None, None))
        if file is None or made is not array:
            return _record_of(array)
        return Array(str(array.dtype), array.shape, NUMPY, file.getvalue())


def view_bytes(name: str, data: bytes) -> NDArray:
    """Return a read-only view of an array serialised in numpy's format.

    Raises
    ------
    ColearnError
        If the bytes are no such array.
    """
    try:
        start = _HEADER_AT + int.from_bytes(data[8:_HEADER_AT], "little")
        shape, fortran_order, dtype = _read_header(data[:start])
        return np.ndarray(shape, dtype, data, start, order="F" if fortran_order else "C")
    except Exception as error:  # anything may be in the bytes
        reason = str(error) or type(error).__name__
    raise expected(f"array '{name}'", "a serialised numpy array", reason)


_HEADER_AT = 10  # after magic, version and length of format 1.0, the one of every numeric array


@lru_cache(maxsize=4096)  # a participant's headers are the next one's, and parsing costs more
def _read_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"version {version} of numpy's format")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if not dtype.itemsize:
        raise ValueError("its elements have no size")
    return shape, fortran_order, dtype


def _view(name: str, array: Array) -> NDArray:
    if array.stype != NUMPY:
        raise expected(f"array '{name}'", "a serialised numpy array", array.stype)
    return view_bytes(name, array.data)


def _record_of(array: NDArray) -> Array:
    """Return an Array with the bytes that Flower's own constructor gives, in fewer copies."""
    array = np.asarray(array)
    if not array.flags.c_contiguous:
        return Array(array)
    header = _header_of(array.dtype, array.shape)
    data = b"".join((header, array.reshape(-1).view(np.uint8).data))
    return Array(str(array.dtype), tuple(array.shape), NUMPY, data)


def _header_of(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return what numpy's format has before the elements of a C-contiguous array."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header,
        {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": shape,
        },
    )
    return header.getvalue()
