"""Directory: the names of nodes, and the search for a participant that reconnects as a new node."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from logging import INFO, WARNING

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from .._flwr import RAISING_CODES, node_names
from ..aggregation import ASK, ECHO, echo_of
from ..errors import ColearnError

NAME = "name"
"""The value of the entry `ASK` that makes a message a query for the participant's name."""

ANSWER_WITHIN = 120.0
"""The seconds within which a participant must report its name, with the start of its process."""

LONGEST_NAME = 512
"""The largest number of characters of a participant's name."""

# The name of a participant whose node config has none. It is no name that somebody chose, so a
# node with a registered name may report it.
_NUMBERED = re.compile(r"partition--?\d+")


def checked_name(name: object) -> str:
    """Return a participant's name.

    Raises
    ------
    ColearnError
        If it is no text, empty, too long, or contains characters that would forge lines of a log:
        control and format characters, line separators, and lone surrogates.
    """
    is_text = isinstance(name, str) and 0 < len(name) <= LONGEST_NAME
    # The categories of Unicode that begin with C are control, format, surrogate, private and
    # unassigned; Zl and Zp are the separators of lines and paragraphs.
    if not is_text or any(
        (kind := unicodedata.category(each))[0] == "C" or kind in ("Zl", "Zp") for each in str(name)
    ):
        shown = ascii(name[:40] if isinstance(name, str | bytes) else type(name).__name__)
        raise ColearnError(
            f"name of a participant: expected text of 1 to {LONGEST_NAME} characters without "
            f"control characters, found {shown}; change `name` in the site's node config"
        )
    return str(name)


@dataclass
class Directory:
    """The names of nodes, as far as they are known.

    A node may have a registered name (SuperNode authentication) and a name that its participant
    reports (`flwr_colearn.participant_mod`). The registered name goes before the reported one. A
    node whose participant reports another name than the registered one, or than it reported before,
    is refused.

    Attributes
    ----------
    registered, answered : dict
        The registered and the reported names, by node id.
    nameless : set of int
        The nodes that were queried for a name and reported none.
    without_mod : set of int
        The nodes of which the answer to the query shows that they have no `participant_mod`.
    seen : set of int
        The nodes that were ever connected.
    accepted : set of int
        The nodes of which a reply was accepted.
    """

    registered: dict[int, str] = field(default_factory=dict)
    answered: dict[int, str] = field(default_factory=dict)
    nameless: set[int] = field(default_factory=set)
    without_mod: set[int] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)
    accepted: set[int] = field(default_factory=set)
    _compared: set[tuple[int, int]] = field(default_factory=set)

    def refresh(self, grid: Grid) -> None:
        """Add the connected nodes and their registered names."""
        self.seen.update(grid.get_node_ids())
        self.registered.update(node_names(grid))

    def known_name(self, node_id: int) -> str | None:
        """Return a node's name, or None."""
        return self.registered.get(node_id) or self.answered.get(node_id)

    def name_of(self, node_id: int) -> str:
        """Return a node's name where known, else its id."""
        return self.known_name(node_id) or str(node_id)

    def names_of(self, node_id: int) -> set[str]:
        """Return the registered and the reported name of a node; both are names of its own."""
        names = (self.registered.get(node_id), self.answered.get(node_id))
        return {name for name in names if name is not None}

    def check_name(self, node_id: int, reported: object) -> str:
        """Return the name that a node's participant reported.

        Raises
        ------
        ColearnError
            If it is no name, or another than the node's registered or earlier name.
        """
        name = checked_name(reported)
        registered, before = self.registered.get(node_id), self.answered.get(node_id)
        if registered not in (None, name) and not _NUMBERED.fullmatch(name):
            raise ColearnError(
                f"name of node {node_id}: expected the registered name {registered!r}, found "
                f"{name!r}; change `name` in the site's node config, or register the site anew"
            )
        if before not in (None, name):
            raise ColearnError(
                f"name of node {node_id}: expected {before!r}, which it reported before, found "
                f"{name!r}"
            )
        return name

    def introduce(self, grid: Grid, nodes: Iterable[int]) -> None:
        """Query the nodes whose participants have not reported a name yet, each once, together.

        A ClientApp without `participant_mod` gives the query to its training function, which finds
        no model in it and fails; its node then counts as nameless.
        """
        unknown = [n for n in nodes if n not in self.answered and n not in self.nameless]
        if not unknown:
            return
        replies = grid.send_and_receive([_question(n) for n in unknown], timeout=ANSWER_WITHIN)
        for reply in replies:
            node_id, reported = reply.metadata.src_node_id, echo_of(reply).get("participant")
            if _lacks_mod(reply):
                self.without_mod.add(node_id)
            if reported is None or node_id not in unknown:
                continue
            try:
                self.answered[node_id] = self.check_name(node_id, reported)
            # The reply to the training is refused for the same reason, which is recorded then.
            except ColearnError as error:
                log(WARNING, "Recovery: %s", error)
        self.nameless.update(node for node in unknown if node not in self.answered)

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
            self._note_stranger(candidate, node_id)
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

    def _note_stranger(self, node_id: int, earlier: int) -> None:
        """Log, once, that a new node is not taken for a participant that left, and the reason."""
        # Nodes that were there before are spare nodes, about which nothing is new.
        if node_id in self.seen or (node_id, earlier) in self._compared:
            return
        self._compared.add((node_id, earlier))
        log(
            WARNING,
            "Recovery: node %s (%s) has connected and does not take the place of participant %s "
            "(%s), which left, since the names differ",
            node_id,
            self._described(node_id),
            self.name_of(earlier),
            self._described(earlier),
        )

    def _described(self, node_id: int) -> str:
        """Return both names of a node, for the log."""
        kinds = (("registered", self.registered), ("reported", self.answered))
        known = [f"{kind} name {names[node_id]!r}" for kind, names in kinds if node_id in names]
        return ", ".join(known) or "no name"

    def _same(self, grid: Grid, node_id: int, earlier: int) -> bool | None:
        """Return whether two nodes belong to the same participant; None if unknown."""
        # A name that only one of the two has registered cannot be taken over by reporting it.
        if node_id in self.registered or earlier in self.registered:
            return self.registered.get(node_id) == self.registered.get(earlier)
        self._ask(grid, node_id)
        if node_id in self.answered and earlier in self.answered:
            return self.answered[node_id] == self.answered[earlier]
        return None

    def _ask(self, grid: Grid, node_id: int) -> None:
        """Query a node for its name, once, if participants of this run have reported names.

        Either all sites of a run have `participant_mod` or none, so where none has reported a name
        another query would be in vain.
        """
        if self.answered:
            self.introduce(grid, [node_id])


def _lacks_mod(reply: Message) -> bool:
    """Return whether the answer to the query is one that no ClientApp with the mod gives."""
    if reply.has_content():
        return ECHO not in reply.content
    # The mod's own exceptions, such as that of an invalid name, leave the site with their types.
    ours = re.search(r"\b(ColearnError|ParticipantError)\b", reply.error.reason or "")
    return reply.error.code in RAISING_CODES and not ours


def _question(node_id: int) -> Message:
    return Message(
        content=RecordDict({ECHO: ConfigRecord({ASK: NAME})}),
        message_type=MessageType.TRAIN,
        dst_node_id=node_id,
    )
