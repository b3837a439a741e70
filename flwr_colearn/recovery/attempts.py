"""Attempts: the train messages of one round, each sent until its participant has replied."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from logging import WARNING

from flwr.app import Message
from flwr.common import log
from flwr.serverapp import Grid

from .._flwr import REFUSED, copied
from ..aggregation import echo_of
from ..errors import ColearnError, expected
from ..grids import WrappingGrid
from ..policy import Recovery
from ..text import printable
from ..traffic import LONGEST_REASON, Event, EventKind
from .failures import Failure
from .identity import Directory

LONGEST_POLL = 3.0
"""The longest pause between two polls for replies, in seconds."""

Check = Callable[[Message, Message], None]


@dataclass
class Participant:
    """The state of one participant in a round."""

    node_id: int
    message: Message
    message_id: str | None = None
    sent_at: float = 0.0
    not_before: float = 0.0
    waiting_since: float = 0.0
    restarts: int = 0
    warned: bool = False
    waited_for: bool = False
    replied: bool = False
    lost: str | None = None
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether the participant has replied or is given up."""
        return self.replied or self.lost is not None

    @property
    def failure(self) -> str:
        """The reason of the last failure, as text for a log."""
        return printable(self.failures[-1].reason, LONGEST_REASON)


class Attempts:
    """The attempts of one round's participants, until all have replied or are given up.

    Parameters
    ----------
    grid : Grid
        Sends the messages.
    messages : sequence of Message
        One message for each participant.
    timeout : float or None
        The time limit of one attempt of one participant, in seconds.
    recovery : Recovery
        Restarts, pauses, patience and policy.
    directory : Directory
        The names of nodes.
    check : callable
        ``(sent, reply) -> None``; raises `ColearnError` for an invalid reply.
    elsewhere : int
        The number of the round's participants that are present and to which no message of these is
        addressed. A `Quorum` counts them too.
    abandoned : set of str
        The ids of messages of earlier attempts. Replies to them are pulled, so that the SuperLink
        deletes them, and are not used.

    needs_mod : str
        Why participants without `participant_mod` are refused before they receive the model; empty
        if they are not.

    Attributes
    ----------
    events : list of Event
        The events so far.
    sent : int
        The number of messages sent so far, including restarts.
    gone : int
        The number of participants that left and did not come back within the patience.
    """

    def __init__(
        self,
        grid: Grid,
        messages: Sequence[Message],
        timeout: float | None,
        recovery: Recovery,
        directory: Directory,
        check: Check,
        abandoned: set[str],
        elsewhere: int = 0,
        needs_mod: str = "",
    ) -> None:
        self.grid = grid
        self.timeout = timeout
        self.recovery = recovery
        self.directory = directory
        self.check = check
        self.abandoned = abandoned
        self.elsewhere = elsewhere
        self.needs_mod = needs_mod
        self.participants = [Participant(m.metadata.dst_node_id, m) for m in messages]
        self.events: list[Event] = []
        self.sent = 0
        self.gone = 0
        # The participants that were refused because another one has their name.
        self._copies: set[int] = set()

    def begin(self) -> None:
        """Send all messages.

        Before the first training every participant is queried for its name. Of participants that
        have one name only one receives the model.

        Raises
        ------
        ColearnError
            If two participants have one name, or one has no mod and needs it, and the policy
            requires their replies.
        """
        self.directory.refresh(self.grid)
        self.directory.introduce(self.grid, self.node_ids)
        self._refuse_copies()
        self._refuse_without_mod()
        self._push([participant for participant in self.participants if not participant.done])

    def replies(self) -> Iterator[Message]:
        """Yield valid replies, and restart participants that fail, until all are done.

        Raises
        ------
        ColearnError
            If a participant is lost and the policy requires its reply.
        """
        poll = 0.01
        while not all(participant.done for participant in self.participants):
            idle = True
            self._drop_abandoned()
            for participant in self.participants:
                if participant.message_id is None:
                    continue
                # One at a time: the replies to one pull are all in memory together.
                for reply in self.grid.pull_messages([participant.message_id]):
                    if reply.metadata.reply_to_message_id != participant.message_id:
                        continue
                    idle = False
                    if self._accept(participant, reply):
                        yield reply
                    # The loop variable would keep this model in memory during the next pull.
                    del reply
                self._watch_clock(participant)
            # Polls become rarer while nothing happens: each is a request to the SuperLink.
            if self._restart() or not idle:
                poll = 0.01
                continue
            time.sleep(poll)
            poll = min(1.5 * poll, LONGEST_POLL)

    @property
    def node_ids(self) -> list[int]:
        """The nodes of the participants, after any replacement, in the order of the messages."""
        return [participant.node_id for participant in self.participants]

    @property
    def seconds(self) -> float:
        """The duration of the longest successful attempt."""
        return max((p.seconds for p in self.participants if p.replied), default=0.0)

    @property
    def durations(self) -> dict[int, float]:
        """The duration of each successful attempt, by node."""
        return {p.node_id: p.seconds for p in self.participants if p.replied}

    # Replies ------------------------------------------------------------------------------------

    def _drop_abandoned(self) -> None:
        for message_id in sorted(self.abandoned):
            for reply in self.grid.pull_messages([message_id]):
                self.abandoned.discard(reply.metadata.reply_to_message_id)

    def _accept(self, participant: Participant, reply: Message) -> bool:
        """Return whether a reply is valid; schedule a restart if it is not."""
        participant.message_id = None
        # An error of Flower or of the ClientApp is a failure; only a layer's own code is a refusal.
        if reply.has_error() and reply.error.code != REFUSED:
            self._failed(participant, Failure.of(reply))
            return False
        try:
            self._check_identity(participant, reply)
            self.check(participant.message, reply)
        except ColearnError as error:
            self._note("refusal", participant, str(error))
            self._failed(participant, Failure.refused(str(error)))
            return False
        participant.seconds = time.monotonic() - participant.sent_at
        participant.replied = True
        self.directory.accepted.add(participant.node_id)
        return True

    def _refuse_copies(self) -> None:
        """Refuse the participants whose name another one has, before they receive the model."""
        directory = self.directory
        # The one that is registered with the name keeps it, then the one that has trained before.
        order = sorted(
            self.participants,
            key=lambda p: (
                p.node_id not in directory.registered,
                p.node_id not in directory.accepted,
            ),
        )
        owners: dict[str, Participant] = {}
        for participant in order:
            names = directory.names_of(participant.node_id)
            shared = sorted(names & owners.keys())
            if not shared:
                owners.update(dict.fromkeys(names, participant))
                continue
            self._copies.add(participant.node_id)
            error = str(_shared_name(participant, owners[shared[0]], shared[0]))
            self._note("refusal", participant, error)
            self._give_up(participant, error)

    def _refuse_without_mod(self) -> None:
        """Refuse the participants that could not read the model."""
        for participant in self.participants if self.needs_mod else []:
            if participant.node_id in self.directory.without_mod and not participant.done:
                self._note("refusal", participant, self.needs_mod)
                self._give_up(participant, self.needs_mod)

    def _check_identity(self, participant: Participant, reply: Message) -> None:
        """Raise a ColearnError if the name that a reply reports is not the participant's own."""
        reported = echo_of(reply).get("participant")
        if reported is None:
            return
        name = self.directory.check_name(participant.node_id, reported)
        for other in self.participants:
            if other is participant or other.node_id in self._copies:
                continue
            if name in self.directory.names_of(other.node_id):
                raise _shared_name(participant, other, name)
        self.directory.answered[participant.node_id] = name

    def _watch_clock(self, participant: Participant) -> None:
        if self.timeout is None or participant.message_id is None:
            return
        waited = time.monotonic() - participant.sent_at
        if waited >= self.timeout:
            self._abandon(participant)
            self._failed(participant, Failure(f"no reply within {self.timeout:g} s"))
        elif waited >= 0.8 * self.timeout and not participant.warned:
            participant.warned = True
            log(
                WARNING,
                "Recovery: no reply from participant %s after %.0f s; at %.0f s its training "
                "counts as failed. If it is merely slow, raise `timeout` or bound the local epochs "
                "(IncreasingEpochs(maximum=...))",
                self.directory.name_of(participant.node_id),
                waited,
                self.timeout,
            )

    def _abandon(self, participant: Participant) -> None:
        assert participant.message_id is not None
        self.abandoned.add(participant.message_id)
        if isinstance(self.grid, WrappingGrid):
            self.grid.forget([participant.message_id])
        # The reply may still arrive, and is then pulled and dropped by `_drop_abandoned`.
        participant.message_id = None

    # Restarts -----------------------------------------------------------------------------------

    def _push(self, ready: Sequence[Participant]) -> None:
        for participant in ready:
            participant.sent_at, participant.warned = time.monotonic(), False
        accepted = set(self.grid.push_messages([p.message for p in ready]))
        for participant in ready:
            # Flower's grids set the id of the message that they push.
            message_id = participant.message.metadata.message_id
            if message_id in accepted:
                participant.message_id = message_id
                self.sent += 1
            else:
                self._failed(participant, Failure("the message was not accepted"))

    def _failed(self, participant: Participant, failure: Failure) -> None:
        """Schedule a restart, or give the participant up if another one is of no use."""
        now, recovery, reason = time.monotonic(), self.recovery, failure.reason
        # The first repetition is worth a try, since bits of a memory or a disk may flip.
        again = failure.kind == "repeatable" and failure in participant.failures
        participant.failures.append(failure)
        spent = again or participant.restarts >= recovery.max_restarts
        if spent and not recovery.restarts_for_ever:
            after = f"after {participant.restarts} restarts" + (", the same again" if again else "")
            self._give_up(participant, f"{reason} ({after})")
            return
        pause = recovery.pause_before(participant.restarts, scarce=failure.kind == "memory")
        participant.not_before = now + pause
        participant.waiting_since, participant.waited_for = now, False
        participant.restarts += 1

    def _restart(self) -> bool:
        """Send messages again to participants whose pause is over and whose node is connected."""
        now = time.monotonic()
        waiting = [p for p in self.participants if not p.done and p.message_id is None]
        due = [participant for participant in waiting if now >= participant.not_before]
        if not due:
            return False
        connected = set(self.grid.get_node_ids())
        ready = []
        for participant in due:
            node_id = self._find_node(participant, connected)
            if node_id is not None:
                participant.node_id = node_id
                # A new message, since Flower ignores a second push of the same one.
                participant.message = copied(
                    participant.message, participant.message.content, node_id
                )
                # Recorded only now: a participant that does not come back is not restarted.
                self._note("restart", participant, participant.failure)
                ready.append(participant)
            else:
                self._wait_for(participant, now)
        if ready:
            self._push(ready)
        return bool(ready)

    def _wait_for(self, participant: Participant, now: float) -> None:
        """Give up a disconnected participant whose patience is spent; log that it is waited for."""
        patience = math.inf if self.recovery.restarts_for_ever else self.recovery.patience
        if now - participant.waiting_since >= patience:
            self.gone += 1
            reason = f"it left and did not come back within {patience:g} s"
            self._give_up(participant, f"{reason}: {participant.failure}")
        elif not participant.waited_for:
            participant.waited_for = True
            log(
                WARNING,
                "Recovery: waiting for participant %s to reconnect, %s: %s",
                self.directory.name_of(participant.node_id),
                "without limit" if math.isinf(patience) else f"at most {patience:g} s",
                participant.failure,
            )

    def _find_node(self, participant: Participant, connected: set[int]) -> int | None:
        """Return the connected node of a participant, or None."""
        if participant.node_id in connected:
            return participant.node_id
        # The node has another id after a restart of the SuperNode.
        others = [other.node_id for other in self.participants if other is not participant]
        return self.directory.successor(self.grid, participant.node_id, connected, others)

    def _give_up(self, participant: Participant, reason: str) -> None:
        participant.lost = reason
        self._note("absence", participant, reason)
        # At once, and not at the end of the round: the round cannot succeed any more.
        # A quorum is one of the whole round, of which these messages may reach a part only.
        total = len(self.participants) + self.elsewhere
        wanted = self.recovery.required(total)
        left = sum(other.lost is None for other in self.participants) + self.elsewhere
        if left >= wanted:
            return
        raise ColearnError(
            f"participants: expected replies from at least {wanted} of {total}, "
            f"lost participant {self.directory.name_of(participant.node_id)}: {reason}"
        )

    def _note(self, kind: EventKind, participant: Participant, reason: str) -> None:
        name = self.directory.name_of(participant.node_id)
        event = Event(kind, name, reason)
        self.events.append(event)
        log(WARNING, "Recovery: %s of participant %s: %s", kind, name, event.reason)


def _shared_name(one: Participant, other: Participant, name: str) -> ColearnError:
    return expected(
        f"reply of node {one.node_id}",
        "a participant of its own",
        f"{name}, which is node {other.node_id} too; do two sites share a node config?",
    )
