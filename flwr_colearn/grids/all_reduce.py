"""AllReduceGroup: an all-reduce sum of arrays among participants in threads of one process."""

import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import ColearnError
from ..roles import NDArray

GROUP = "all-reduce-group"
"""Config key: the number of the participant's group in this process."""

RANK = "all-reduce-rank"
"""Config key: the participant's rank in the group, from 0."""

_groups: dict[int, "AllReduceGroup"] = {}
_numbers = itertools.count(1)


class AllReduceGroup:
    """K participants, each in a thread of its own, that compute sums of arrays.

    Parameters
    ----------
    size : int
        K.

    Attributes
    ----------
    bytes : int
        The bytes of all arrays given to `sum`, and of all sums returned.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes = 0
        self._barrier = threading.Barrier(size)
        self._brought: list[NDArray] = [np.zeros(0)] * size

    def sum(self, rank: int, array: NDArray) -> NDArray:
        """Return the sum of the arrays of all participants, added in order of rank.

        The call returns when all participants have made it.

        Raises
        ------
        ColearnError
            If another participant left the group.
        """
        self._brought[rank] = array
        self._wait()
        total: NDArray = self._brought[0].copy()
        for other in self._brought[1:]:
            total = total + other
        # A second barrier: a fast participant would replace its array before all have added it.
        self._wait()
        # Once for the group, not once for each participant.
        if rank == 0:
            self.bytes += 2 * self.size * array.nbytes
        return total

    def leave(self) -> None:
        """End the group; calls of `sum` that wait now, and all later ones, raise an error."""
        self._barrier.abort()

    def _wait(self) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise ColearnError(
                "synchronised normalization: expected all participants at the same layer, found "
                "that one has left; the reason is in its own error"
            ) from None


@contextmanager
def new_group(size: int) -> Iterator[tuple[int, AllReduceGroup]]:
    """Create a group, which `group_of` finds by its number until the end of the block."""
    number, group = next(_numbers), AllReduceGroup(size)
    _groups[number] = group
    try:
        yield number, group
    finally:
        del _groups[number]


def group_of(config: Mapping[str, Any]) -> tuple[AllReduceGroup, int]:
    """Return the group that a train config names, and the participant's rank in it.

    Raises
    ------
    ColearnError
        If the group is not in this process.
    """
    group = _groups.get(config.get(GROUP, 0))
    if group is None:
        raise ColearnError(
            "synchronised normalization: expected participants in threads of one process "
            "(flwr_colearn.ThreadedGrid), since every layer exchanges sums at every step, found "
            "one that is alone; in simulations and deployments use another scheme"
        )
    return group, int(config[RANK])
