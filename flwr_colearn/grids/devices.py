"""The environment of a worker process: its device, and its number of threads."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile

from ..errors import expected

_DEVICE = re.compile(r"(cpu|cuda|gpu)(?::(\d+))?", re.IGNORECASE)
_GPU_NAME = re.compile(r"\d+$|GPU-|MIG-")
_THREADS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
"""Variables of the number of threads in torch and numpy (OpenMP, MKL, OpenBLAS), and TensorFlow."""


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def environment_of(device: str | None, processes: int) -> dict[str, str]:
    """Return the environment variables of one of so many worker processes.

    A worker sees its GPU alone, so that every framework uses it without being told. The cores are
    divided among the workers, unless the user has set the number of threads.

    Parameters
    ----------
    device : str or None
        "cpu", "cuda:1", "GPU:1"; None for all devices of this process.
    processes : int
        The number of workers.

    Raises
    ------
    ColearnError
        If there is no such device.
    """
    threads = str(max(1, cores() // processes))
    variables = {name: os.environ.get(name, threads) for name in _THREADS}
    if device is not None:
        variables["CUDA_VISIBLE_DEVICES"] = _visible(device)
    return variables


def _visible(device: str) -> str:
    """Return the value of CUDA_VISIBLE_DEVICES with which a process sees one device only."""
    wanted, seen = _DEVICE.fullmatch(device), _gpus_seen()
    if wanted is not None and wanted[1].lower() == "cpu":
        return ""
    number = int(wanted[2] or 0) if wanted else None
    # Numbers count the GPUs that this process sees, as in torch.
    if number is None or (seen is not None and number >= len(seen)):
        raise expected("devices", "'cpu' or a visible GPU such as 'cuda:0'", device)
    return str(number) if seen is None else seen[number]


def _gpus_seen() -> list[str] | None:
    """Return the GPUs to which this process is restricted; None without a restriction."""
    outer = os.environ.get("CUDA_VISIBLE_DEVICES")
    if outer is None:
        return None
    names = [name.strip() for name in outer.split(",") if name.strip()]
    # CUDA ignores all that follows an invalid name; -1 is the usual one to hide all GPUs.
    return list(takewhile(_GPU_NAME.match, names))


@contextmanager
def variables_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes that are started within."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
