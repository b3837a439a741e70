"""Who takes part: exactly K participants in every round."""

import time
from logging import INFO
from typing import Any

from flwr.common import log
from flwr.serverapp import Grid

from ..errors import ColearnError, expected, whole_number


def wait_for_nodes(grid: Grid, wanted: int, seconds: float) -> list[int]:
    """Return the connected nodes as soon as there are `wanted` of them.

    Raises
    ------
    ColearnError
        If fewer are connected after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while len(nodes := sorted(set(grid.get_node_ids()))) < wanted:
        if time.monotonic() >= deadline:
            raise ColearnError(
                f"participants: expected {wanted}, found {len(nodes)} connected after "
                f"{seconds:g} s. In a deployment start the missing SuperNodes; a simulation has as "
                "many as its federation config says: flwr run . --stream --federation-config "
                f'"num-supernodes={wanted} client-resources-num-cpus=1"'
            )
        log(INFO, "Waiting for participants: %s of %s connected", len(nodes), wanted)
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
    return nodes


def participant_arguments(
    num_participants: int | None, kwargs: dict[str, Any], fraction: str, least: tuple[str, ...]
) -> dict[str, int]:
    """Return FedAvg's arguments that make every round have exactly K participants.

    Parameters
    ----------
    num_participants : int or None
        K; ``None`` takes `least[0]` of `kwargs` (FedAvg's default is 2).
    kwargs : dict
        FedAvg's arguments as the user gave them.
    fraction : str
        Name of the argument for the fraction of nodes that train; must be 1.
    least : tuple of str
        Names of the arguments for the least number of nodes: training first.

    Raises
    ------
    ColearnError
        If the arguments contradict each other.
    """
    if kwargs.get(fraction, 1.0) != 1.0:
        raise expected(fraction, "1.0, since every participant takes part", kwargs[fraction])
    k = kwargs.get(least[0], 2) if num_participants is None else num_participants
    whole_number("num_participants", k, least=1)
    for name in least[:2]:
        if num_participants is not None and kwargs.get(name, k) != k:
            raise expected(name, f"num_participants={k}, or nothing", kwargs[name])
    return {name: kwargs.get(name, k) if name != least[0] else k for name in least}
