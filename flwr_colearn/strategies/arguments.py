"""Checks of the strategies' arguments."""

import math
from collections.abc import Sequence
from typing import Any

from ..errors import expected, real_number, whole_number


def participant_arguments(
    num_participants: int | None, kwargs: dict[str, Any], fraction: str, least: tuple[str, ...]
) -> dict[str, int]:
    """Return FedAvg's arguments with which every round has exactly K participants.

    Parameters
    ----------
    num_participants : int or None
        K; ``None`` takes `least[0]` of `kwargs` (FedAvg's default is 2).
    kwargs : dict
        The user's arguments of FedAvg.
    fraction : str
        The name of the argument for the fraction of nodes that train, which must be 1.
    least : tuple of str
        The names of the arguments for the least number of nodes; that of training is first.

    Raises
    ------
    ColearnError
        If the arguments contradict each other.
    """
    if kwargs.get(fraction, 1.0) != 1.0:
        raise expected(fraction, "1.0, since every participant is in every round", kwargs[fraction])
    k = kwargs.get(least[0], 2) if num_participants is None else num_participants
    whole_number("num_participants", k, least=1)
    # An evaluation may have fewer participants, so the third name is not checked.
    for name in least[:2]:
        if num_participants is not None and kwargs.get(name, k) != k:
            raise expected(name, f"num_participants={k}, or nothing", kwargs[name])
    # A fraction of the nodes to evaluate is the user's; FedAvg's own least number is 2.
    if kwargs.get("fraction_evaluate", 1.0) < 1.0:
        kwargs.setdefault(least[2], min(k, 2))
    return {name: kwargs.get(name, k) if name != least[0] else k for name in least}


def number_of(
    participants: Sequence[str] | None, number: int | None, name: str = "num_participants"
) -> int | None:
    """Return K: the number of the named participants, else `number`.

    Parameters
    ----------
    participants : sequence of str, optional
        The registered names, see `flwr_colearn.Transport`.
    number : int or None
        The user's argument for K.
    name : str
        The name of that argument.

    Raises
    ------
    ColearnError
        If both are given and differ.
    """
    if participants is None:
        return number
    if number is not None and number != len(participants):
        raise expected(name, f"{len(participants)}, the number of `participants`", number)
    return len(participants)


def patience(wait_for_participants: float | None) -> float:
    """Return the seconds to wait for participants to connect; infinity for None."""
    if wait_for_participants is None:
        return math.inf
    return real_number("wait_for_participants", wait_for_participants, least=0.0)
