"""Directory: the names of nodes, and the search for a participant that reconnects as a new node."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from logging import INFO, WARNING

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from .._flwr import node_names
from ..aggregation import ECHO, echo_of

ASK, NAME = "ask", "name"
"""The entry of the control record `ECHO` that makes a message a query, and the entry's value."""

ANSWER_WITHIN = 120.0
"""The seconds within which a participant must report its name, with the start of its process."""


@dataclass
class Directory:
    """The names of nodes, as far as they are known.

    A node may have a registered name (SuperNode authentication) and a name that its participant
    reports (`flwr_colearn.participant_mod`). Only names of the same kind are compared.
    """

    registered: dict[int, str] = field(default_factory=dict)
    answered: dict[int, str] = field(default_factory=dict)
    nameless: set[int] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)

    def refresh(self, grid: Grid) -> None:
        """Add the connected nodes and their registered names."""
        self.seen.update(grid.get_node_ids())
        self.registered.update(node_names(grid))

    def known_name(self, node_id: int) -> str | None:
        """Return a node's name, or None."""
        return self.answered.get(node_id) or self.registered.get(node_id)

    def name_of(self, node_id: int) -> str:
        """Return a node's name where known, else its id."""
        return self.known_name(node_id) or str(node_id)

    def successor(
        self, grid: Grid, node_id: int, connected: set[int], others: list[int]
    ) -> int | None:
        """Return the new node of a participant whose node disconnected, or None.

        The participant is recognised by the registered name, else by the name that it reports. If
        neither is known, a new node is assumed to be its, and the log contains a warning.

        Parameters
        ----------
        grid : Grid
            The grid by which nodes are queried for their names.
        node_id : int
            The node that disconnected.
        connected : set of int
            All connected nodes.
        others : list of int
            The nodes of the round's other participants.
        """
        self.registered.update(node_names(grid))
        for candidate in sorted(connected - set(others)):
            same = self._same(grid, candidate, node_id)
            # Without names only a node that is new to the run is taken: an older one may be a spare
            # node. It must not be known as the new node of another participant of the round.
            if same is None and candidate not in self.seen:
                same = not any(self._same(grid, candidate, other) for other in others)
            if same:
                self._welcome(candidate, node_id)
                return candidate
        return None

    def _welcome(self, node_id: int, earlier: int) -> None:
        self.seen.add(node_id)
        known = self.known_name(node_id) is not None
        log(
            INFO if known else WARNING,
            "Recovery: participant %s is back as node %s%s",
            self.name_of(earlier),
            node_id,
            "" if known else "; this is an assumption, since its name is not known",
        )

    def _same(self, grid: Grid, node_id: int, earlier: int) -> bool | None:
        """Return whether two nodes belong to the same participant; None if unknown."""
        if node_id in self.registered and earlier in self.registered:
            return self.registered[node_id] == self.registered[earlier]
        self._ask(grid, node_id)
        if node_id in self.answered and earlier in self.answered:
            return self.answered[node_id] == self.answered[earlier]
        return None

    def _ask(self, grid: Grid, node_id: int) -> None:
        """Query a node for its name, once, if participants of this run have reported names.

        Without `participant_mod`, which either all sites of a run have or none, the user's training
        function would receive the query.
        """
        if not self.answered or node_id in self.answered or node_id in self.nameless:
            return
        question = Message(
            content=RecordDict({ECHO: ConfigRecord({ASK: NAME})}),
            message_type=MessageType.TRAIN,
            dst_node_id=node_id,
        )
        names = _names_in(grid.send_and_receive([question], timeout=ANSWER_WITHIN))
        if names:
            self.answered[node_id] = names[0]
        else:
            self.nameless.add(node_id)


def _names_in(replies: Iterable[Message]) -> list[str]:
    names = [echo_of(reply).get("participant") for reply in replies]
    return [str(name) for name in names if name is not None]
