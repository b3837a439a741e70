"""Participants side by side in one process, which may exchange sums while they compute."""

import itertools
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from ..errors import ColearnError
from ..records import records_of
from ..roles import NDArray
from .in_process import InProcessGrid

MEETING = "meeting"
"""Config key: the number of the meeting that a participant takes part in, in this process."""

RANK = "meeting-rank"
"""Config key: its place there, from 0."""

_meetings: dict[int, "Meeting"] = {}
_numbers = itertools.count(1)


class Meeting:
    """Where K participants, each in a thread of its own, add up arrays.

    Parameters
    ----------
    parties : int
        K.

    Attributes
    ----------
    bytes : int
        Of all arrays handed in, and of all sums handed out.
    """

    def __init__(self, parties: int) -> None:
        self.parties = parties
        self.bytes = 0
        self._barrier = threading.Barrier(parties)
        self._brought: list[NDArray] = [np.zeros(0)] * parties

    def sum(self, rank: int, array: NDArray) -> NDArray:
        """Return the sum of what all participants bring to this call, added in order of rank.

        Raises
        ------
        ColearnError
            If another participant left the meeting.
        """
        self._brought[rank] = array
        self._wait()
        total: NDArray = self._brought[0].copy()
        for other in self._brought[1:]:
            total = total + other
        self._wait()  # nobody brings the next array before everyone has added these
        if rank == 0:
            self.bytes += 2 * self.parties * array.nbytes
        return total

    def leave(self) -> None:
        """End the meeting: those who wait are told, and so is everyone who comes later."""
        self._barrier.abort()

    def _wait(self) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise ColearnError(
                "synchronised normalization: expected all participants at the same layer, found "
                "that one has left; the reason is in its own error"
            ) from None


def meeting_of(config: Mapping[str, Any]) -> tuple[Meeting, int]:
    """Return the meeting that a train config names, and the participant's rank in it.

    Raises
    ------
    ColearnError
        If there is none in this process.
    """
    meeting = _meetings.get(config.get(MEETING, 0))
    if meeting is None:
        raise ColearnError(
            "synchronised normalization: expected participants side by side in one process "
            "(flwr_colearn.SideBySideGrid), since every layer exchanges sums at every step, found "
            "one that is alone; in simulations and deployments use another scheme"
        )
    return meeting, int(config[RANK])


class SideBySideGrid(InProcessGrid):
    """An InProcessGrid whose participants train at the same time, each in a thread.

    What they share they share through a `Meeting`. If one fails all fail, since the others would
    wait for it. Randomness that a framework draws from one generator for all threads (dropout,
    augmentation in torch) depends on their timing.

    Attributes
    ----------
    exchanged : int
        Bytes that participants exchanged in meetings.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exchanged = 0
        self._replies: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Run the ClientApp on all messages at once."""
        batch = list(messages)
        ids = super().push_messages(batch)
        if not batch or batch[0].metadata.message_type.partition(".")[0] != MessageType.TRAIN:
            return ids
        number, meeting = next(_numbers), Meeting(len(self.contexts))
        if len(batch) < len(self.contexts):
            meeting.leave()  # some would wait for those who are not asked
        _meetings[number] = meeting

        def run(rank: int) -> None:
            reply = self._call(_invited(self._pushed.pop(ids[rank]), number, rank))
            self._replies[ids[rank]] = reply
            if reply.has_error():
                meeting.leave()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(batch))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        del _meetings[number]
        self.exchanged += meeting.bytes
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to messages pushed before, each once."""
        ids = list(message_ids)
        ready = [self._replies.pop(id_) for id_ in ids if id_ in self._replies]
        return ready + super().pull_messages(ids)


def _invited(message: Message, number: int, rank: int) -> Message:
    """Return the message with the meeting in its config."""
    content = RecordDict({**message.content})
    for key, record in list(records_of(content, ConfigRecord).items()):
        content[key] = ConfigRecord({**record, MEETING: number, RANK: rank})
    invited = Message(
        content=content,
        dst_node_id=message.metadata.dst_node_id,
        message_type=message.metadata.message_type,
        ttl=message.metadata.ttl,
        group_id=message.metadata.group_id,
    )
    invited.metadata.__dict__["_message_id"] = message.metadata.message_id
    return invited
