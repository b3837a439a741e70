"""Passes over a model's arrays in cache-sized chunks, on several cores for large models."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..roles import Arrays, NDArray

T = TypeVar("T")

CHUNK = 1 << 17
"""The number of elements of a chunk. A float32 chunk and its float64 copy fit into a core's
second-level cache, and numpy's work on one is long compared with the wait for Python's lock."""

_THREADED = 1 << 24
"""The number of elements from which threads are faster: on smaller models they wait for the lock of
Python's interpreter."""

_MOST_THREADS = 8  # a few cores use all of a machine's memory bandwidth

Part = tuple[str, slice]
"""A chunk: the array's name, and the elements of the flattened array."""


class Chunks:
    """The chunks of a model, divided among threads.

    Parameters
    ----------
    arrays : mapping of str to numpy.ndarray
        The model, or another with arrays of the same sizes.

    Examples
    --------
    >>> import numpy as np
    >>> model = flat({"w": np.ones((2, 3)), "b": np.ones(2)})
    >>> Chunks(model).map(lambda parts: sum(model[name][chunk].sum() for name, chunk in parts))
    [np.float64(8.0)]
    """

    def __init__(self, arrays: Arrays) -> None:
        parts = [
            (name, slice(start, min(start + CHUNK, array.size)))
            for name, array in arrays.items()
            for start in range(0, array.size, CHUNK)
        ]
        total = sum(array.size for array in arrays.values())
        threads = 1 if total < _THREADED else min(os.cpu_count() or 1, _MOST_THREADS)
        self._shares: list[list[Part]] = [[] for _ in range(threads)]
        done = 0
        # Each thread gets consecutive chunks with a nearly equal number of elements. Consecutive
        # ones keep the results in the order of the model, which a sum over them relies on.
        for part in parts:
            self._shares[done * threads // total].append(part)
            done += part[1].stop - part[1].start

    def map(self, work: Callable[[list[Part]], T]) -> list[T]:
        """Call `work` with each thread's share of the chunks, in parallel; return the results."""
        if len(self._shares) == 1:
            return [work(self._shares[0])]
        with ThreadPoolExecutor(len(self._shares)) as pool:
            return list(pool.map(work, self._shares))


def flat(arrays: Arrays) -> dict[str, NDArray]:
    """Return the arrays as vectors, as views where their memory is contiguous."""
    return {name: array.reshape(-1) for name, array in arrays.items()}
