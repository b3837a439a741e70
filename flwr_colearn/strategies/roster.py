"""Roster: the nodes that train in a strategy's rounds, and whose turn it is."""

from logging import WARNING
from random import Random

from flwr.common import log
from flwr.serverapp import Grid

from ..policy import Recovery
from ..recovery import Members, choose_members


class Roster:
    """Chooses the nodes of every round, and remembers them from round to round.

    Parameters
    ----------
    owner : str
        The name of the strategy, for the log.
    random : random.Random
        The random generator for the choice among spare nodes.
    patience : float
        The seconds to wait for enough nodes to connect.
    rotate : bool
        Whether the nodes take turns; otherwise the same ones train in every round.

    Attributes
    ----------
    nodes : list of int
        The nodes of the last round, and those that are missing from it, which come first in the
        next. With `rotate` all nodes that have trained, the one that waits for longest first. A
        checkpoint has them.
    """

    def __init__(self, owner: str, random: Random, patience: float, rotate: bool) -> None:
        self.patience, self.rotate = patience, rotate
        self._owner, self._random = owner, random
        self.clear()

    def clear(self) -> None:
        """Forget the nodes of an earlier run."""
        self.nodes: list[int] = []
        self._missing: list[int] = []
        # With `rotate`, the nodes that have trained and do not in this round.
        self._waiting: list[int] = []
        # The participants that a quorum has waited for in vain, and that are not back.
        self._absent = 0
        self._connected = 0

    def choose(self, grid: Grid, wanted: int, available: int, recovery: Recovery | None) -> Members:
        """Return the nodes of the next round.

        Parameters
        ----------
        grid : Grid
            The grid with the connected nodes.
        wanted : int
            K.
        available : int
            The number of nodes that must be connected, if that is more than K.
        recovery : Recovery or None
            With a `Quorum`, a round may have fewer than K participants.

        Raises
        ------
        ColearnError
            If too few nodes are connected in time.
        """
        members = choose_members(
            grid,
            wanted,
            self.nodes,
            self._random,
            recovery,
            self.patience,
            available,
            self._absent,
            self.rotate,
        )
        self._missing = members.missing
        self._waiting = [n for n in self.nodes if n not in members.nodes and self.rotate]
        self.nodes = self._waiting + members.nodes
        self._absent = wanted - len(members.nodes)
        self._say_who_trains(members.connected, wanted)
        return members

    def renew(self, nodes: list[int], gone: int = 0) -> None:
        """Remember the nodes of the round at its end.

        Parameters
        ----------
        nodes : list of int
            The nodes that trained; a restart may have replaced some of those that were chosen.
        gone : int, default 0
            The number of participants that have left for good, as far as the round knows.
        """
        self._absent += gone
        # Missing nodes too, so that their participants take part again when they reconnect.
        others = [node for node in self._waiting if node not in nodes]
        self.nodes = others + nodes if self.rotate else nodes + self._missing

    def _say_who_trains(self, connected: int, wanted: int) -> None:
        """Log, when the number changes, that more participants are connected than train."""
        if connected > wanted and connected != self._connected:
            log(
                WARNING,
                "%s: %s of %s connected sites train%s",
                self._owner,
                wanted,
                connected,
                ", in turn"
                if self.rotate
                else f", the same in every round; num_participants={connected} trains all, "
                "rotate=True lets them take turns",
            )
        self._connected = connected
