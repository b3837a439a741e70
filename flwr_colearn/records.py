"""Conversion of arrays to and from Flower's records: the same bytes as Flower's, fewer copies."""

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
"""Flower's name (`stype`) for an array that is serialised in numpy's format."""

Record = TypeVar("Record", ArrayRecord, MetricRecord, ConfigRecord)


def records_of(content: RecordDict, kind: type[Record]) -> dict[str, Record]:
    """Return the records of one kind.

    ``content.array_records`` is not used: Flower keeps it in a reference cycle with the content,
    and a model in a cycle stays in memory until the garbage collector runs.
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
    """Return eight hexadecimal digits of a digest of a model's array names, types and shapes."""
    signature = [(name, a.dtype.str, a.shape) for name, a in view(record).items()]
    return hashlib.sha256(repr(signature).encode()).hexdigest()[:8]


def fingerprint(record: ArrayRecord) -> list[bytes]:
    """Return the bytes objects of a record's arrays, which `is_unchanged` compares by identity.

    The identity of the record itself does not show a change, since a record may be changed in
    place. The bytes objects are immutable.
    """
    return [array.data for array in record.values()]


def is_unchanged(record: ArrayRecord, earlier: list[bytes]) -> bool:
    """Return whether a record still has the arrays of its `fingerprint`; the bytes are not read."""
    return len(record) == len(earlier) and all(
        array.data is data for array, data in zip(record.values(), earlier, strict=True)
    )


def view(record: ArrayRecord) -> dict[str, NDArray]:
    """Return the arrays of a record as read-only views of its bytes, without a copy.

    Raises
    ------
    ColearnError
        If an entry is not a well-formed serialised numpy array.
    """
    return {name: _view(name, array) for name, array in record.items()}


def data_bytes(record: ArrayRecord) -> int:
    """Return the number of bytes of a record's serialised arrays."""
    return sum(len(array.data) for array in record.values())


def to_record(arrays: dict[str, NDArray]) -> ArrayRecord:
    """Return named arrays as an ArrayRecord."""
    return ArrayRecord({name: _record_of(array) for name, array in arrays.items()})


def types_of(record: ArrayRecord) -> dict[str, str]:
    """Return the numpy type names of a record's arrays in numpy's format, by array name."""
    return {name: array.dtype for name, array in record.items() if array.stype == NUMPY}


def cast_record(record: ArrayRecord, types: Mapping[str, str]) -> ArrayRecord:
    """Return a record whose arrays have the types given by name; itself, if nothing changes.

    Floats become integers by rounding, halves upwards, as in `RunningMean`. Arrays that `types`
    does not name, and arrays in another than numpy's format, are not changed.
    """
    cast = {
        name: _record_of(_as_type(_view(name, record[name]), np.dtype(types[name])))
        for name, dtype in types_of(record).items()
        if types.get(name, dtype) != dtype
    }
    return ArrayRecord({**record, **cast}) if cast else record


class SentTypes:
    """Casts the arrays of all messages to the types of the first message.

    Strategies may return averages in other types than they were given: FedAvg makes averages of
    counters float64, and other strategies do so with all arrays. Without the cast, participants
    would receive and train models of other types than their own.

    Parameters
    ----------
    like : ArrayRecord, optional
        The model whose types are used; by default that of the first message.
    """

    def __init__(self, like: ArrayRecord | None = None) -> None:
        self._types = {} if like is None else types_of(like)

    def cast(self, messages: Iterable[Message]) -> list[Message]:
        """Return the messages, with their arrays cast to the types of the first message.

        Integers are rounded. The contents of the messages are changed in place, records are not.
        """
        batch = list(messages)
        # By identity: messages that shared a record share the cast one, which is one model in all.
        cast: dict[int, ArrayRecord] = {}
        for message in filter(Message.has_content, batch):
            for key, record in list(records_of(message.content, ArrayRecord).items()):
                if id(record) not in cast:
                    cast[id(record)] = self._as_first(record)
                if cast[id(record)] is not record:
                    message.content[key] = cast[id(record)]
        return batch

    def _as_first(self, record: ArrayRecord) -> ArrayRecord:
        # Another set of names is another model, for example of a second run of the strategy.
        if set(record) != set(self._types):
            self._types = types_of(record)
        return cast_record(record, self._types)


def _as_type(array: NDArray, dtype: np.dtype[Any]) -> NDArray:
    # astype alone would round towards zero.
    whole = dtype.kind in "iub" and array.dtype.kind == "f"
    return np.asarray(np.floor(array + 0.5) if whole else array).astype(dtype)


def into_record(arrays: dict[str, NDArray]) -> ArrayRecord:
    """Return named arrays as an ArrayRecord, and empty `arrays`.

    The memory of each array without another reference is reused for the bytes of the next. For a
    large model this takes a quarter of `to_record`'s time, which is mostly the allocation of new
    memory, and the peak of memory is one model less.
    """
    return Outgoing().record(arrays)


class Outgoing:
    """Memory for a model that will be sent: its arrays are computed in the bytes of their record.

    A record holds serialised arrays, so a model computed in other memory is copied into it. For a
    large model the copy takes as long as the addition of two models to a sum, and the memory of
    another model.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[NDArray, io.BytesIO]] = {}

    def empty(self, name: str, like: NDArray) -> NDArray:
        """Return an array of the shape and type of `like`, to be filled and given to `record`."""
        header = _header_of(like.dtype, like.shape)
        # BytesIO lets numpy write into memory that later becomes a bytes object without a copy:
        # getbuffer() is writable, and getvalue() returns the bytes object behind it.
        file = io.BytesIO(bytes(len(header) + like.nbytes))
        file.write(header)
        array = np.ndarray(like.shape, like.dtype, file.getbuffer(), offset=len(header))
        self._made[name] = array, file
        return array

    def record(self, arrays: dict[str, NDArray]) -> ArrayRecord:
        """Return named arrays as an ArrayRecord, and empty `arrays`.

        Arrays that `empty` made are not copied, and must not be written to afterwards. The others
        are copied as by `into_record`.
        """
        record = ArrayRecord()
        # Popped, so that an array's memory is free before the bytes of the next are allocated.
        for name in list(arrays):
            record[name] = self._sealed(name, arrays.pop(name))
        self._made.clear()
        return record

    def _sealed(self, name: str, array: NDArray) -> Array:
        made, file = self._made.pop(name, (None, None))
        # The caller may have put another array under this name, which has to be serialised.
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
    # np.load would copy the array; a view of the bytes costs nothing for a large model.
    try:
        start = _HEADER_AT + int.from_bytes(data[8:_HEADER_AT], "little")
        shape, fortran_order, dtype = _read_header(data[:start])
        return np.ndarray(shape, dtype, data, start, order="F" if fortran_order else "C")
    except Exception as error:  # numpy's readers raise many types for malformed bytes
        reason = str(error) or type(error).__name__
    raise expected(f"array '{name}'", "a serialised numpy array", reason)


_HEADER_AT = 10  # after magic, version and length of format 1.0, which every numeric array has


@lru_cache(maxsize=4096)  # all participants send the same headers, and parsing them is slow
def _read_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"version {version} of numpy's format")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    # Objects would be unpickled, which lets a participant run code on the server.
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
    """Return an Array with the same bytes as Flower's own constructor, with fewer copies."""
    array = np.asarray(array)
    # In another order of elements numpy's format has other headers, which Flower's way handles.
    if not array.flags.c_contiguous:
        return Array(array)
    header = _header_of(array.dtype, array.shape)
    data = b"".join((header, array.reshape(-1).view(np.uint8).data))
    return Array(str(array.dtype), tuple(array.shape), NUMPY, data)


def _header_of(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the header of numpy's format for a C-contiguous array."""
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
