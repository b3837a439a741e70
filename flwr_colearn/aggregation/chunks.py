"""Passes over a model's arrays, a cache-sized chunk at a time, on the cores there are."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..roles import Arrays, NDArray

T = TypeVar("T")

CHUNK = 1 << 17
"""Elements of a chunk: a float32 chunk and its float64 copy fit into a core's second-level cache,
and numpy works long enough on one that threads do not wait for the interpreter."""

_THREADED = 1 << 24
"""Elements of a model from which on threads pay: on smaller ones they wait for the interpreter."""

_MOST_THREADS = 8  # a few cores saturate a machine's memory

Part = tuple[str, slice]
"""A chunk: the array's name, and the elements of the flattened array."""


class Chunks:
    """The chunks of a model, dealt to threads.

    Parameters
    ----------
    arrays : mapping of str to numpy.ndarray
        The model, or any of the same sizes.

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
        for part in parts:  # runs of neighbours, of nearly equal numbers of elements
            self._shares[done * threads // total].append(part)
            done += part[1].stop - part[1].start

    def map(self, work: Callable[[list[Part]], T]) -> list[T]:
        """Call `work` with each thread's share of the chunks, at once; return the results."""
        if len(self._shares) == 1:
            return [work(self._shares[0])]
        with ThreadPoolExecutor(len(self._shares)) as pool:
            return list(pool.map(work, self._shares))


def flat(arrays: Arrays) -> dict[str, NDArray]:
    """Return the arrays as vectors: views, where their memory allows."""
    return {name: array.reshape(-1) for name, array in arrays.items()}
