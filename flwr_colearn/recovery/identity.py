"""Who a participant is: the names of nodes, and on which node a participant is to be found now."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from logging import INFO, WARNING

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from .._flwr import node_names
from ..aggregation import ECHO, echo_of

ASK, NAME = "ask", "name"
"""Entry of the control record `ECHO` in a message that asks, and what it asks for."""

ANSWER_WITHIN = 120.0
"""Seconds within which a participant must say its name; starting its process takes some."""


@dataclass
class Directory:
    """The names of nodes, as far as they are known.

    A node may be registered under a name (SuperNode authentication), and its participant may say
    one (`flwr_colearn.participant_mod`); only names of one kind are compared.
    """

    registered: dict[int, str] = field(default_factory=dict)
    answered: dict[int, str] = field(default_factory=dict)
    nameless: set[int] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)

    def refresh(self, grid: Grid) -> None:
        """Learn which nodes are connected, and the names they are registered under."""
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
        """Return the node on which the participant of a node that left has come back, or None.

        It is recognised by its registered name, else by the name that its participant says; else a
        node that was not there before is taken for it, and the log says that this is an assumption.

        Parameters
        ----------
        grid : Grid
            To ask nodes for their names.
        node_id : int
            The node that left.
        connected : set of int
            All nodes that are connected.
        others : list of int
            The nodes of the round's other participants.
        """
        self.registered.update(node_names(grid))
        for candidate in sorted(connected - set(others)):
            same = self._same(grid, candidate, node_id)
            # One that was there from the start may be the successor of one that was killed and
            # not yet given up; without its name it is a spare.
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
        """Return whether a node is the participant that an earlier one was; None if unknown."""
        if node_id in self.registered and earlier in self.registered:
            return self.registered[node_id] == self.registered[earlier]
        self._ask(grid, node_id)
        if node_id in self.answered and earlier in self.answered:
            return self.answered[node_id] == self.answered[earlier]
        return None

    def _ask(self, grid: Grid, node_id: int) -> None:
        """Ask a node for its name, once, where the participants are known to answer.

        Without `participant_mod`, which all sites of a run have or have not, the question would be
        given to the user's training function.
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
