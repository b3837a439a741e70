"""RecoveringGrid: restarts participants that fail, so that a round has all K of them.

"If one participant k fails to upload its parameters owing to network errors or other failures, the
global server will restart the local training process of participant k" (Mi et al., 2020, 3.1).
"""

from collections.abc import Iterable, Iterator

from flwr.app import ConfigRecord, Message, MessageType
from flwr.serverapp import Grid

from ..aggregation import ECHO, check_train_reply
from ..grids import WrappingGrid
from ..policy import Recovery
from ..records import SentTypes, kind_of, records_of
from ..traffic import Event
from .attempts import Attempts, Check
from .identity import ASK, Directory


class RecoveringGrid(WrappingGrid):
    """A Grid around any Grid that restarts participants which fail, in the same round.

    ``Transport(recovery=...)`` and every strategy of this package put one around their grid; any
    other Flower strategy can be given one: ``FedAvg().start(RecoveringGrid(grid), ...)``. Arrays
    that a strategy returned in other types than it was first given (FedAvg makes averages of
    counters float64) are sent in the types of the first train message, integers rounded.

    A train message is sent again (a new message with the same content) when its participant
    raised, its process was killed, its SuperNode left and came back, it did not reply within the
    timeout, or its reply is unusable. A reply to an earlier attempt or round is never taken; it is
    pulled, so that it is counted and leaves the SuperLink, and dropped.

    A SuperNode that comes back with another node id is recognised, in this order: by the name it
    is registered with under SuperNode authentication; by the name its participant says (see
    `flwr_colearn.participant_mod`); else the newcomer is taken for the participant that left, and
    the log says that this is an assumption. So no shard trains twice in a round, and none is left
    out.

    In Flower's simulation a participant that raises is restarted too, but a killed Ray actor is
    never replaced by Flower: kills and hangs are survived in deployments.

    Parameters
    ----------
    grid : Grid
        The real one.
    recovery : Recovery, optional
        Restarts, pauses, patience and policy.
    check : callable, optional
        ``(sent, reply) -> None``, raising `ColearnError` for a reply that is no good. By default
        the reply must have the names, shapes and types of the arrays that were sent, be finite,
        and state a positive ``num-examples``.

    Attributes
    ----------
    node_ids : list of int
        Of the last train round's participants, after any replacement, in the order of messages.
    seconds : float
        The longest that a participant of the last train round took for its successful attempt.
    sent : int
        Messages sent in the last train round, restarts included.
    directory : Directory
        The names of nodes.
    """

    def __init__(
        self, grid: Grid, recovery: Recovery | None = None, check: Check = check_train_reply
    ) -> None:
        super().__init__(grid)
        self.recovery = recovery or Recovery()
        self.check = check
        self.node_ids: list[int] = []
        self.seconds = 0.0
        self.sent = 0
        self.directory = Directory()
        self._abandoned: set[str] = set()
        self._events: list[Event] = []
        self._types = SentTypes()

    def name_of(self, node_id: int) -> str:
        """Return a participant's name where known, else its node id."""
        return self.directory.name_of(node_id)

    def in_order(self, replies: Iterable[Message]) -> list[Message]:
        """Return train replies by name of the participant; those without one as they came."""
        return sorted(
            replies, key=lambda reply: self.directory.known_name(reply.metadata.src_node_id) or ""
        )

    def take_events(self) -> list[Event]:
        """Return what happened since the last call."""
        events, self._events = self._events, []
        return events

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the replies; train messages are answered by all participants.

        Parameters
        ----------
        messages : iterable of Message
            One for each participant.
        timeout : float, optional
            Seconds for one attempt of one participant; by default without limit.

        Returns
        -------
        list of Message
            Train replies that passed the check, as they arrived; fewer only under a `Quorum`. Of
            other messages, what the grid inside returns.

        Raises
        ------
        ColearnError
            If a participant is lost under the policy "fail", or the quorum is.
        """
        # A list, since strategies iterate replies more than once: flwr 1.29's privacy wrappers do.
        return list(self.stream(messages, timeout=timeout))

    def stream(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Do as `send_and_receive`, but pull train replies one at a time, while iterated.

        So one that was dealt with can be dropped before the next is in memory. Messages are sent at
        once; errors are raised where the replies are iterated.
        """
        batch = list(messages)
        if not batch or not _is_training(batch[0]):
            return self.grid.send_and_receive(batch, timeout=timeout)
        attempts = Attempts(
            self.grid,
            self._types.cast(batch),
            timeout,
            self.recovery,
            self.directory,
            self.check,
            self._abandoned,
        )
        attempts.begin()
        return self._replies(attempts)

    def _replies(self, attempts: Attempts) -> Iterator[Message]:
        try:
            yield from attempts.replies()
        finally:
            self._events += attempts.events
            self.node_ids, self.seconds = attempts.node_ids, attempts.seconds
            self.sent = attempts.sent


def _is_training(message: Message) -> bool:
    """Return whether a message asks for training, or for another thing that is asked for again.

    A question that the participant's mod answers is not.
    """
    if not message.has_content():
        return False
    control = records_of(message.content, ConfigRecord).get(ECHO, ConfigRecord())
    return kind_of(message) == MessageType.TRAIN and ASK not in control
