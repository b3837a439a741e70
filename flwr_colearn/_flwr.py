"""Everything that this plugin takes from Flower outside its public modules, in one place."""

import io
import math
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.server.server import fit_clients as fit_clients
from flwr.serverapp import Grid
from flwr.serverapp.strategy.strategy_utils import config_to_str as config_to_str

from .errors import ColearnError, expected
from .roles import NDArray

_MAGIC = 8  # bytes: the magic string and the version of numpy's file format


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
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def node_names(grid: Grid) -> dict[int, str]:
    """Return the names with which connected nodes are registered, where they have one."""
    # Before flwr 1.30 nodes have no names.
    named = {info.node_id: getattr(info, "name", "") for info in grid.get_nodes()}
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


def _view(name: str, array: Array) -> NDArray:
    try:
        if array.stype != "numpy.ndarray":
            raise ValueError(f"serialised as {array.stype!r}")
        # A header is parsed once: that takes longer than all the rest, and models repeat theirs.
        version = np.lib.format.read_magic(io.BytesIO(array.data[:_MAGIC]))
        size = 2 if version == (1, 0) else 4
        offset = _MAGIC + size + int.from_bytes(array.data[_MAGIC : _MAGIC + size], "little")
        shape, fortran_order, dtype = _header(version, array.data[_MAGIC:offset])
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        flat = np.frombuffer(array.data, dtype, count=math.prod(shape), offset=offset)
        return flat.reshape(shape, order="F" if fortran_order else "C")
    except Exception as error:  # anything may be in the bytes
        reason = str(error) or type(error).__name__
    raise expected(f"array '{name}'", "a serialised numpy array", reason)


@lru_cache(maxsize=4096)
def _header(version: tuple[int, int], header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    return read_header(io.BytesIO(header))


__all__ = [
    "ColearnError",
    "assume_identity",
    "config_to_str",
    "data_bytes",
    "empty_run",
    "fit_clients",
    "node_names",
    "to_record",
    "view",
]
