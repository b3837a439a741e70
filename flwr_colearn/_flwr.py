"""Everything that this plugin takes from Flower outside its public modules, in one place."""

import io
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.server.client_proxy import ClientProxy as ClientProxy
from flwr.server.server import fit_clients as fit_clients
from flwr.serverapp import Grid
from flwr.serverapp.strategy.strategy_utils import config_to_str as config_to_str

from .errors import ColearnError, expected
from .roles import NDArray

Record = TypeVar("Record", ArrayRecord, MetricRecord, ConfigRecord)


def records_of(content: RecordDict, kind: type[Record]) -> dict[str, Record]:
    """Return the records of one kind.

    Not by ``content.array_records``: Flower keeps that in a reference cycle with the content, and a
    model in a cycle stays in memory until the garbage collector happens to come.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


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


def into_record(arrays: dict[str, NDArray]) -> ArrayRecord:
    """Return named arrays as an ArrayRecord, and empty `arrays`.

    Each array's memory, if nothing else holds it, is free for the bytes of the next: for a large
    model that takes a quarter of `to_record`'s time, which is spent on memory the system finds
    anew, and one model less of it.
    """
    return ArrayRecord({name: _record_of(arrays.pop(name)) for name in list(arrays)})


def nodes_of(grid: Grid) -> Iterable[Any]:
    """Return what Flower knows of the connected nodes: in 1.29 nothing but their ids."""
    get_nodes = getattr(grid, "get_nodes", None)
    return get_nodes() if get_nodes is not None else ()


def node_names(grid: Grid) -> dict[int, str]:
    """Return the names with which connected nodes are registered, where they have one."""
    named = {info.node_id: getattr(info, "name", "") for info in nodes_of(grid)}
    return {node_id: name for node_id, name in named.items() if name}


def assume_identity() -> None:
    """Let ``Message(...)`` be called outside a Flower run, as flwr demands since 1.38."""
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:  # flwr < 1.38 asks for none
        return
    for name in ("task_id", "run_id", "node_id"):
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:
            setattr(TaskIdentity, name, 1)


def empty_run(run_id: int) -> Any:
    """Return Flower's description of a run about which only the id is known."""
    try:
        from flwr.supercore.run import Run
    except ImportError:  # flwr < 1.38
        from flwr.common.typing import Run  # type: ignore[attr-defined,no-redef]
    return Run.create_empty(run_id)


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
        flat = np.frombuffer(data, dtype, count=math.prod(shape), offset=start)
        return flat.reshape(shape, order="F" if fortran_order else "C")
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
    return shape, fortran_order, dtype


def _view(name: str, array: Array) -> NDArray:
    if array.stype != "numpy.ndarray":
        raise expected(f"array '{name}'", "a serialised numpy array", array.stype)
    return view_bytes(name, array.data)


def _record_of(array: NDArray) -> Array:
    """Return an Array with the bytes that Flower's own constructor gives, in fewer copies."""
    array = np.asarray(array)
    if not array.flags.c_contiguous:
        return Array(array)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    data = b"".join((header.getvalue(), array.reshape(-1).view(np.uint8).data))
    return Array(str(array.dtype), tuple(array.shape), "numpy.ndarray", data)


__all__ = [
    "ClientProxy",
    "ColearnError",
    "assume_identity",
    "config_to_str",
    "data_bytes",
    "empty_run",
    "fit_clients",
    "into_record",
    "node_names",
    "nodes_of",
    "records_of",
    "to_record",
    "view",
    "view_bytes",
]
