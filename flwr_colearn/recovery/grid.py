"""RecoveringGrid: restarts participants that fail, so that a round has all K of them.

"If one participant k fails to upload its parameters owing to network errors or other failures, the
global server will restart the local training process of participant k" (Mi et al., 2020, 3.1).
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from logging import INFO, WARNING
from typing import Literal

from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from .._flwr import node_names
from ..aggregation.replies import ECHO, check_train_reply, echo_of, failure_of
from ..errors import ColearnError, expected, real_number, whole_number
from ..grids.wrapping import WrappingGrid
from ..records import cast_record, data_bytes, records_of, types_of

LONGEST_PAUSE = 60.0
LONGEST_POLL = 3.0
ANSWER_WITHIN = 120.0
"""Seconds within which a participant must say its name; starting its process takes some."""


@dataclass(frozen=True)
class Quorum:
    """Go on without the participants that are lost, as long as at least `least` replied.

    Raises
    ------
    ColearnError
        If `least` is not a whole number of at least 1.
    """

    least: int

    def __post_init__(self) -> None:
        whole_number("quorum", self.least, least=1)


Policy = Literal["fail", "wait"] | Quorum
"""What happens when a participant's restarts are spent: end the run with the model of the last
completed round, wait and go on restarting for ever, or go on without it."""


@dataclass(frozen=True)
class Recovery:
    """How hard to try before a participant counts as lost.

    Parameters
    ----------
    max_restarts : int, default 3
        Restarts of one participant in one round.
    pause : float, default 1.0
        Seconds before the first restart; doubled before each further one, up to a minute.
    patience : float, default 600.0
        Seconds that a participant which left may take to come back.
    policy : "fail", "wait" or Quorum, default "fail"
        When restarts or patience are spent.

    Raises
    ------
    ColearnError
        If an argument lies outside its range.
    """

    max_restarts: int = 3
    pause: float = 1.0
    patience: float = 600.0
    policy: Policy = "fail"

    def __post_init__(self) -> None:
        whole_number("max_restarts", self.max_restarts, least=0)
        real_number("pause", self.pause, least=0.0)
        real_number("patience", self.patience, least=0.0)
        if not isinstance(self.policy, Quorum) and self.policy not in ("fail", "wait"):
            raise expected("policy", "'fail', 'wait' or Quorum(n)", self.policy)


@dataclass(frozen=True)
class Event:
    """A participant's restart, refused reply, or absence from a round.

    Attributes
    ----------
    kind : {"restart", "refusal", "absence"}
        A refusal is a reply that arrived but was no good; it is followed by a restart or, when
        they are spent, by an absence.
    participant : str
        Its name where known, else its node id.
    reason : str
        For the record.
    size : int
        Bytes of arrays that a refused reply brought.
    """

    kind: Literal["restart", "refusal", "absence"]
    participant: str
    reason: str
    size: int = 0


@dataclass
class _Participant:
    """One participant's part in a round."""

    node_id: int
    message: Message
    message_id: str | None = None
    sent_at: float = 0.0
    not_before: float = 0.0
    waiting_since: float = 0.0
    restarts: int = 0
    warned: bool = False
    replied: bool = False
    lost: str | None = None
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        return self.replied or self.lost is not None


@dataclass
class _Directory:
    """Who is who: the names of the nodes, as far as they are known.

    Nodes may have a name under SuperNode authentication and one that their ClientApp answers;
    only names of one kind are compared.
    """

    registered: dict[int, str] = field(default_factory=dict)
    answered: dict[int, str] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)

    def name_of(self, node_id: int) -> str | None:
        return self.answered.get(node_id) or self.registered.get(node_id)

    def call(self, node_id: int) -> str:
        return self.name_of(node_id) or str(node_id)


class RecoveringGrid(WrappingGrid):
    """A Grid around any Grid that restarts participants which fail, in the same round.

    ``CoLearn.start`` puts one around its grid by itself; any other Flower strategy can be given
    one: ``FedAvg().start(RecoveringGrid(grid), ...)``. Arrays that a strategy returned in other
    types than it was first given (FedAvg makes averages of counters float64) are sent in the types
    of the first train message, integers rounded.

    A train message is sent again (a new message with the same content) when its participant
    raised, its process was killed, its SuperNode left and came back, it did not reply within the
    timeout, or its reply is unusable. A reply to an earlier attempt or round is never taken.

    A SuperNode that comes back with another node id is recognised, in this order: by the name it
    is registered with under SuperNode authentication; by the name its ClientApp answers (see
    `flwr_colearn.introduce`); else the newcomer is taken for the participant that left, and the
    log says that this is an assumption. So no shard trains twice in a round, and none is left out.

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
    """

    def __init__(
        self,
        grid: Grid,
        recovery: Recovery | None = None,
        check: Callable[[Message, Message], None] = check_train_reply,
    ) -> None:
        super().__init__(grid)
        self.recovery = recovery or Recovery()
        self.check = check
        self.node_ids: list[int] = []
        self.seconds = 0.0
        self.sent = 0
        self._directory = _Directory()
        self._events: list[Event] = []
        self._types: dict[str, str] = {}

    def name_of(self, node_id: int) -> str:
        """Return a participant's name where known, else its node id."""
        return self._directory.call(node_id)

    def in_order(self, replies: Iterable[Message]) -> list[Message]:
        """Return train replies by name of the participant; those without one as they came."""
        return sorted(
            replies, key=lambda reply: self._directory.name_of(reply.metadata.src_node_id) or ""
        )

    def required(self, participants: int) -> int:
        """Return how many of the participants a round must have."""
        policy = self.recovery.policy
        return policy.least if isinstance(policy, Quorum) else participants

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
        if not batch or not _is_train(batch[0]):
            return self.grid.send_and_receive(batch, timeout=timeout)
        self._keep_types(batch)
        participants = [_Participant(message.metadata.dst_node_id, message) for message in batch]
        self._directory.seen.update(self.grid.get_node_ids())
        self._directory.registered.update(node_names(self.grid))
        self.sent = 0
        self._push(participants, participants)
        return self._replies(participants, timeout)

    def _keep_types(self, messages: list[Message]) -> None:
        """Give the arrays of messages the types that the first train message had."""
        cast: dict[int, ArrayRecord] = {}  # one for all messages that share a record
        for message in messages:
            for key, record in list(records_of(message.content, ArrayRecord).items()):
                if id(record) not in cast:
                    cast[id(record)] = self._as_first(record)
                message.content[key] = cast[id(record)]

    def _as_first(self, record: ArrayRecord) -> ArrayRecord:
        if set(record) != set(self._types):
            self._types = types_of(record)
        return cast_record(record, self._types)

    def _replies(
        self, participants: list[_Participant], timeout: float | None
    ) -> Iterator[Message]:
        """Yield what arrives, notice what does not, restart what is due, until all are done."""
        poll = 0.01
        while not all(participant.done for participant in participants):
            idle = True
            for participant in participants:
                if participant.message_id is None:
                    continue
                # One at a time, since all that is asked for at once is held at once.
                for reply in self.grid.pull_messages([participant.message_id]):
                    if reply.metadata.reply_to_message_id != participant.message_id:
                        continue
                    idle = False
                    if self._accept(participant, reply, participants):
                        yield reply
                    del reply
                self._watch_clock(participant, timeout, participants)
            waiting = [p for p in participants if not p.done and p.message_id is None]
            if self._restart(waiting, participants) or not idle:
                poll = 0.01
                continue
            time.sleep(poll)
            poll = min(1.5 * poll, LONGEST_POLL)
        self.node_ids = [participant.node_id for participant in participants]
        self.seconds = max((p.seconds for p in participants if p.replied), default=0.0)

    def _push(self, ready: list[_Participant], participants: list[_Participant]) -> None:
        for participant in ready:
            participant.sent_at, participant.warned = time.monotonic(), False
        accepted = set(self.grid.push_messages([p.message for p in ready]))
        for participant in ready:
            # Both of Flower's grids put the id into the message that they push.
            message_id = participant.message.metadata.message_id
            if message_id in accepted:
                participant.message_id = message_id
                self.sent += 1
            else:
                self._failed(participant, "the message was not accepted", participants)

    def _accept(
        self, participant: _Participant, reply: Message, participants: list[_Participant]
    ) -> bool:
        participant.message_id = None
        failure = failure_of(reply)
        if failure is not None:
            self._failed(participant, failure, participants)
            return False
        try:
            self._check_identity(participant, reply, participants)
            self.check(participant.message, reply)
        except ColearnError as error:
            size = sum(map(data_bytes, records_of(reply.content, ArrayRecord).values()))
            self._note("refusal", participant, str(error), size)
            self._failed(participant, f"its reply was refused: {error}", participants)
            return False
        participant.seconds = time.monotonic() - participant.sent_at
        participant.replied = True
        return True

    def _check_identity(
        self, participant: _Participant, reply: Message, participants: list[_Participant]
    ) -> None:
        directory = self._directory
        answered = echo_of(reply).get("participant")
        registered = directory.registered.get(participant.node_id)
        for other in participants:
            if other is participant:
                continue
            if answered is not None and directory.answered.get(other.node_id) == answered:
                raise _shared_name(participant, other, str(answered))
            # Whoever replies first is taken at its word.
            if registered and other.replied and directory.call(other.node_id) == registered:
                raise _shared_name(participant, other, registered)
        if answered is not None:
            directory.answered[participant.node_id] = str(answered)

    def _watch_clock(
        self, participant: _Participant, timeout: float | None, participants: list[_Participant]
    ) -> None:
        if timeout is None or participant.message_id is None:
            return
        waited = time.monotonic() - participant.sent_at
        if waited >= timeout:
            participant.message_id = None
            self._failed(participant, f"no reply within {timeout:g} s", participants)
        elif waited >= 0.8 * timeout and not participant.warned:
            participant.warned = True
            log(
                WARNING,
                "Recovery: no reply from participant %s after %.0f s; at %.0f s its training "
                "counts as failed. If it is merely slow, raise `timeout` or bound the local epochs "
                "(IncreasingEpochs(maximum=...))",
                self.name_of(participant.node_id),
                waited,
                timeout,
            )

    def _failed(
        self, participant: _Participant, reason: str, participants: list[_Participant]
    ) -> None:
        """Schedule a restart, or give the participant up."""
        now = time.monotonic()
        if participant.restarts >= self.recovery.max_restarts and self.recovery.policy != "wait":
            restarts = f"{participant.restarts} restarts"
            self._give_up(participant, f"{reason} (after {restarts})", participants)
            return
        # The power is bounded: "wait" restarts more often than a float can be doubled.
        pause = min(self.recovery.pause * 2.0 ** min(participant.restarts, 64), LONGEST_PAUSE)
        participant.restarts += 1
        participant.not_before, participant.waiting_since = now + pause, now
        self._note("restart", participant, reason)

    def _restart(self, waiting: list[_Participant], participants: list[_Participant]) -> bool:
        """Send again to those whose pause is over and whose node is there."""
        now = time.monotonic()
        due = [participant for participant in waiting if now >= participant.not_before]
        if not due:
            return False
        nodes = set(self.grid.get_node_ids())
        ready = []
        for participant in due:
            node_id = self._find_node(participant, nodes, participants)
            if node_id is not None:
                participant.node_id = node_id
                participant.message = _again(participant.message, node_id)
                ready.append(participant)
            elif (
                now - participant.waiting_since >= self.recovery.patience
                and self.recovery.policy != "wait"
            ):
                reason = f"it left and did not come back within {self.recovery.patience:g} s"
                self._give_up(participant, reason, participants)
        if ready:
            self._push(ready, participants)
        return bool(ready)

    def _find_node(
        self, participant: _Participant, nodes: set[int], participants: list[_Participant]
    ) -> int | None:
        """Return the node on which a participant is to be found now, or None."""
        if participant.node_id in nodes:
            return participant.node_id
        directory = self._directory
        directory.registered.update(node_names(self.grid))
        others = [other.node_id for other in participants if other is not participant]
        for node_id in sorted(nodes - set(others)):
            same = self._same(node_id, participant.node_id)
            # One that was there from the start may be the successor of one that was killed and
            # not yet given up; without its name it is a spare.
            if same is None and node_id not in directory.seen:
                same = not any(self._same(node_id, other) for other in others)
            if not same:
                continue
            directory.seen.add(node_id)
            name = directory.name_of(node_id)
            log(
                INFO if name is not None else WARNING,
                "Recovery: participant %s is back as node %s%s",
                directory.call(participant.node_id),
                node_id,
                "" if name is not None else "; an assumption, since it does not say who it is",
            )
            return node_id
        return None

    def _same(self, node_id: int, earlier: int) -> bool | None:
        """Return whether a node is the participant that an earlier one was; None if unknown."""
        directory = self._directory
        if node_id in directory.registered and earlier in directory.registered:
            return directory.registered[node_id] == directory.registered[earlier]
        if node_id not in directory.answered and node_id not in directory.silent:
            name = self._query_name(node_id)
            if name is None:
                directory.silent.add(node_id)
            else:
                directory.answered[node_id] = name
        if node_id in directory.answered and earlier in directory.answered:
            return directory.answered[node_id] == directory.answered[earlier]
        return None

    def _query_name(self, node_id: int) -> str | None:
        question = Message(
            content=RecordDict(), message_type=f"{MessageType.QUERY}.{ECHO}", dst_node_id=node_id
        )
        for reply in self.grid.send_and_receive([question], timeout=ANSWER_WITHIN):
            name = echo_of(reply).get("participant")
            return None if name is None else str(name)
        return None

    def _give_up(
        self, participant: _Participant, reason: str, participants: list[_Participant]
    ) -> None:
        participant.lost = reason
        self._note("absence", participant, reason)
        wanted = self.required(len(participants))
        if sum(other.lost is None for other in participants) >= wanted:
            return
        raise ColearnError(
            f"participants: expected replies from at least {wanted} of {len(participants)}, lost "
            f"participant {self.name_of(participant.node_id)}: {reason}"
        )

    def _note(
        self,
        kind: Literal["restart", "refusal", "absence"],
        participant: _Participant,
        reason: str,
        size: int = 0,
    ) -> None:
        name = self.name_of(participant.node_id)
        self._events.append(Event(kind, name, reason, size))
        log(WARNING, "Recovery: %s of participant %s: %s", kind, name, reason)


def _shared_name(one: _Participant, other: _Participant, name: str) -> ColearnError:
    return expected(
        f"reply of node {one.node_id}",
        "a participant of its own",
        f"{name}, which is node {other.node_id} too; do two sites share a node config?",
    )


def _is_train(message: Message) -> bool:
    return message.metadata.message_type.partition(".")[0] == MessageType.TRAIN


def _again(message: Message, node_id: int) -> Message:
    """Return a new message with the same content; Flower ignores a message that it has seen."""
    return Message(
        content=message.content,
        dst_node_id=node_id,
        message_type=message.metadata.message_type,
        ttl=message.metadata.ttl,
        group_id=message.metadata.group_id,
    )
