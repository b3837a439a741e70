"""The choice of a round's nodes: exactly K participants, or a quorum of them."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from logging import INFO, WARNING
from random import Random

from flwr.common import log
from flwr.serverapp import Grid

from .._flwr import node_names
from ..errors import ColearnError
from ..grids import is_closed
from ..policy import Quorum, Recovery

LOG_EVERY = 60.0
"""The seconds between two lines in the log while the server waits for participants; after ten times
as long, a tenth of the time that it has waited."""


@dataclass(frozen=True)
class Members:
    """The nodes of a round's participants.

    Attributes
    ----------
    nodes : list of int
        The chosen nodes; those of the last round come first, in their order.
    missing : list of int
        The nodes of the last round that are not connected and have no replacement.
    connected : int
        The number of all connected nodes.
    """

    nodes: list[int]
    missing: list[int]
    connected: int


def choose_members(
    grid: Grid,
    wanted: int,
    before: Sequence[int],
    random: Random,
    recovery: Recovery | None = None,
    patience: float = float("inf"),
    available: int = 0,
    absent: int = 0,
    rotate: bool = False,
) -> Members:
    """Return the nodes of the next round's participants.

    Parameters
    ----------
    grid : Grid
        The grid with the connected nodes.
    wanted : int
        K.
    before : sequence of int
        The last round's nodes. They are chosen again if they are connected. With `rotate` all nodes
        that have trained, the one that waits for longest first.
    random : random.Random
        The random generator for the choice among spare nodes.
    recovery : Recovery, optional
        With a `Quorum`, a round may have fewer than K participants when the patience is spent.
    patience : float
        The seconds to wait for K nodes to connect.
    available : int
        The number of nodes that must be connected, if that is more than K.
    absent : int, default 0
        The number of participants that have been waited for until the patience was spent, and are
        not back. With a `Quorum` the round does not wait for so many again.
    rotate : bool, default False
        Whether the nodes take turns: those that have not trained for longest come first.

    Raises
    ------
    ColearnError
        If too few nodes are connected in time.
    """
    policy, target = recovery.policy if recovery is not None else None, max(wanted, available)
    if recovery is not None and isinstance(policy, Quorum):
        patience = min(patience, recovery.patience)
        target = max(target - absent, policy.least)
    try:
        nodes = wait_for_nodes(grid, target, patience)
    except ColearnError:
        nodes = sorted(set(grid.get_node_ids()))
        if not isinstance(policy, Quorum) or len(nodes) < policy.least:
            raise
        log(WARNING, "Quorum: %s of %s participants are connected", len(nodes), wanted)
    stayed = [node for node in before if node in nodes]
    spare = sorted(set(nodes) - set(stayed))
    # Otherwise the last round's nodes come first: they have client state of this run.
    free = wanted if rotate else wanted - len(stayed)
    drawn = spare if len(spare) <= free else random.sample(spare, free)
    chosen = ([*drawn, *stayed] if rotate else [*stayed, *drawn])[:wanted]
    left = [node for node in before if node not in nodes]
    # A spare node takes the place of one that left, which then is not missing.
    return Members(chosen, left[: wanted - len(chosen)], len(nodes))


def wait_for_nodes(grid: Grid, wanted: int, seconds: float) -> list[int]:
    """Return the connected nodes as soon as at least `wanted` are connected.

    Raises
    ------
    ColearnError
        If fewer nodes are connected after `seconds`, or at once on a grid that no node can join.
    """
    began = time.monotonic()
    logged_at, logged = -math.inf, -1
    while len(nodes := sorted(set(grid.get_node_ids()))) < wanted:
        now = time.monotonic()
        found = _named(grid, nodes)
        if is_closed(grid):
            raise too_few_in_process(wanted, len(nodes))
        if now - began >= seconds:
            raise ColearnError(
                f"participants: expected {wanted}, found {len(nodes)} connected after "
                f"{seconds:g} s{found}. {_how_to_connect(wanted)}"
            )
        # The wait for a site may take days, so a line a second would fill the disk.
        if len(nodes) != logged or now - logged_at >= max(LOG_EVERY, 0.1 * (now - began)):
            log(INFO, "Waiting for participants: %s of %s connected%s", len(nodes), wanted, found)
            if logged < 0:
                log(WARNING, "Too few participants are connected. %s", _how_to_connect(wanted))
            logged_at, logged = now, len(nodes)
        time.sleep(min(1.0, max(0.0, began + seconds - now)))
    return nodes


def too_few_in_process(wanted: int, found: int) -> ColearnError:
    """Return the error for too few participants on a grid that no node can join."""
    return ColearnError(
        f"participants: expected {wanted}, found {found} in this process, where no others can "
        f"connect: InProcessGrid(client_app, num_supernodes={wanted}), or a lower number in the "
        f"strategy. {_how_to_connect(wanted)}"
    )


def _how_to_connect(wanted: int) -> str:
    return (
        "In a deployment start the missing SuperNodes; a simulation has as many as its federation "
        f'config says: flwr run . --stream --federation-config "num-supernodes={wanted} '
        'client-resources-num-cpus=1"'
    )


def _named(grid: Grid, nodes: Sequence[int]) -> str:
    """Return the names of the connected nodes and of the missing participants, as far as known."""
    names = node_names(grid)
    connected = ", ".join(names.get(node, str(node)) for node in nodes)
    wanted = getattr(grid, "participants", None) or ()
    missing = ", ".join(name for name in wanted if name not in names.values())
    return (f" ({connected})" if nodes else "") + (f"; missing: {missing}" if missing else "")
