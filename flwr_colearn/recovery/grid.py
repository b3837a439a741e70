"""RecoveringGrid: restarts participants that fail, so that a round has replies of all K.

"If one participant k fails to upload its parameters owing to network errors or other failures, the
global server will restart the local training process of participant k" (Mi et al., 2020, 3.1).
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from flwr.app import ConfigRecord, Message, MessageType
from flwr.serverapp import Grid

from ..aggregation import ASK, ECHO, check_train_reply
from ..grids import WrappingGrid, is_closed
from ..policy import DEFAULT_RECOVERY, Recovery
from ..records import SentTypes, kind_of, records_of
from ..traffic import Event
from .attempts import Attempts, Check
from .identity import Directory


class RecoveringGrid(WrappingGrid):
    """A Grid around any Grid that restarts participants which fail, in the same round.

    ``Transport(recovery=...)`` and every strategy of this package use one around their grid. Any
    other Flower strategy can use one too: ``FedAvg().start(RecoveringGrid(grid), ...)``. Arrays
    are sent in the types of the first train message, integers rounded, since a strategy may return
    other types (FedAvg makes averages of counters float64).

    A train message is sent again (a new message with the same content) when the ClientApp raised,
    its process was killed, the SuperNode disconnected and reconnected, no reply arrived within the
    timeout, or the reply is invalid. A reply to an earlier attempt or round is never used; it is
    pulled, so that it is counted and deleted on the SuperLink.

    A SuperNode that reconnects with another node id is recognised by its registered name (SuperNode
    authentication), else by the name that its participant reports (see
    `flwr_colearn.participant_mod`). If neither is known, a new node is assumed to be the one that
    disconnected, and the log contains a warning. So no shard is trained twice in a round, and none
    is left out.

    Before its first training a participant is queried for its name. Of two participants with one
    name, such as two sites with a copied node config, the second is refused before it receives the
    model, with both nodes in the reason. A participant that reports another name than its
    registered one, or than it reported before, is refused.

    In Flower's simulation a participant that raises is restarted too. Recovery from kills and hangs
    works in deployments only, since Flower does not replace a killed Ray actor.

    Parameters
    ----------
    grid : Grid
        The inner grid.
    recovery : Recovery, optional
        Restarts, pauses, patience and policy.
    check : callable, optional
        ``(sent, reply) -> None``; raises `ColearnError` for an invalid reply. By default the reply
        must have the names, shapes and types of the arrays that were sent, only finite numbers, and
        a positive ``num-examples``.

    Attributes
    ----------
    node_ids : list of int
        The nodes of the last train round's participants, after any replacement, in the order of
        the messages.
    seconds : float
        The duration of the longest successful attempt in the last train round.
    durations : dict
        The duration of each successful attempt in the last train round, by node.
    sent : int
        The number of messages sent in the last train round, including restarts.
    directory : Directory
        The names of nodes.
    elsewhere : int
        The number of the round's participants that are present and to which the next messages are
        not addressed. A `Quorum` counts them too; 0 by default.
    needs_mod : str
        Why participants without `participant_mod` are refused before they receive the model; empty,
        by default, if they are not.
    """

    def __init__(
        self, grid: Grid, recovery: Recovery | None = None, check: Check = check_train_reply
    ) -> None:
        super().__init__(grid)
        self.recovery = recovery or Recovery()
        self.check = check
        self.node_ids: list[int] = []
        self.seconds = 0.0
        self.durations: dict[int, float] = {}
        self.sent = 0
        self.directory = Directory()
        self.elsewhere = 0
        self.needs_mod = ""
        # Kept across rounds: the reply to an abandoned attempt may arrive in a later round.
        self._abandoned: set[str] = set()
        self._events: list[Event] = []
        self._gone = 0
        self._types = SentTypes()

    def name_of(self, node_id: int) -> str:
        """Return a participant's name where known, else its node id."""
        return self.directory.name_of(node_id)

    def in_order(self, replies: Iterable[Message]) -> list[Message]:
        """Return train replies sorted by participant name; those without one in arrival order."""
        return sorted(
            replies, key=lambda reply: self.directory.known_name(reply.metadata.src_node_id) or ""
        )

    def take_events(self) -> list[Event]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def take_gone(self) -> int:
        """Return how many participants left and did not come back since the last call."""
        gone, self._gone = self._gone, 0
        return gone

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the replies; for train messages, those of all participants.

        Parameters
        ----------
        messages : iterable of Message
            One message for each participant.
        timeout : float, optional
            The time limit of one attempt of one participant, in seconds; by default none.

        Returns
        -------
        list of Message
            For train messages, the replies that passed the check, in the order of arrival; fewer
            than messages only under a `Quorum`. For other messages, the replies of the inner grid.

        Raises
        ------
        ColearnError
            If a participant is lost under the policy "fail", or fewer than a `Quorum` replied.
        """
        # A list, since some strategies iterate replies twice, such as flwr 1.29's privacy wrappers.
        return list(self.stream(messages, timeout=timeout))

    def stream(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Do as `send_and_receive`, but pull train replies one at a time, during the iteration.

        A reply that has been processed can be freed before the next is in memory. Messages are sent
        at the call; errors are raised during the iteration.
        """
        batch = list(messages)
        if not batch or not _is_training(batch[0]):
            return self.grid.send_and_receive(batch, timeout=timeout)
        attempts = Attempts(
            self.grid,
            self._types.cast(batch),
            # On a closed grid participants wait for one another, which is no failure.
            None if is_closed(self.grid) else timeout,
            self.recovery,
            self.directory,
            self.check,
            self._abandoned,
            self.elsewhere,
            self.needs_mod,
        )
        try:
            attempts.begin()
        except BaseException:
            self._note(attempts)
            raise
        return self._replies(attempts)

    def _replies(self, attempts: Attempts) -> Iterator[Message]:
        try:
            yield from attempts.replies()
        # After an error too: the history has to show the events that led to it.
        finally:
            self._note(attempts)

    def _note(self, attempts: Attempts) -> None:
        """Store the events and numbers of a round's attempts."""
        self._events += attempts.events
        self._gone += attempts.gone
        self.node_ids, self.seconds = attempts.node_ids, attempts.seconds
        self.sent, self.durations = attempts.sent, attempts.durations


def recovery_on(grid: Grid | None, recovery: Recovery) -> Recovery:
    """Return the recovery on a grid: the default one is without restarts where failures repeat."""
    if recovery is DEFAULT_RECOVERY and grid is not None and is_closed(grid):
        return replace(recovery, max_restarts=0)
    return recovery


def _is_training(message: Message) -> bool:
    """Return whether a message is of the type train, for which recovery restarts participants.

    A query, such as that for a participant's name, is not, although it has this type.
    """
    if not message.has_content():
        return False
    control = records_of(message.content, ConfigRecord).get(ECHO, ConfigRecord())
    return kind_of(message) == MessageType.TRAIN and ASK not in control
