"""ThreadedGrid: an InProcessGrid with a thread for each participant, and all-reduce sums."""

import threading
from collections.abc import Iterable
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from .._flwr import copied, set_message_id
from ..errors import ColearnError
from ..records import kind_of, records_of
from .all_reduce import GROUP, RANK, AllReduceGroup, new_group
from .in_process import InProcessGrid


class ThreadedGrid(InProcessGrid):
    """An InProcessGrid whose participants train at the same time, each in a thread.

    The participants exchange arrays in an `AllReduceGroup`. If one fails, all fail, since the
    others would wait for it. Where a framework has one random generator for all threads (dropout,
    augmentation in torch), its numbers depend on the timing of the threads.

    Attributes
    ----------
    exchanged : int
        The bytes that participants exchanged in groups.
    """

    closed = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._pool is not None:
            self.close()
            raise ColearnError(
                "ThreadedGrid: expected one process, whose threads exchange sums, found more; "
                "leave out 'processes' and 'devices'"
            )
        self.exchanged = 0
        self._replies: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Run the ClientApp on all messages at once."""
        batch = list(messages)
        ids = super().push_messages(batch)
        # Only training exchanges sums; other messages are processed when their replies are pulled.
        if not batch or kind_of(batch[0]) != MessageType.TRAIN:
            return ids
        with new_group(len(self.contexts)) as (number, group):
            if len(batch) < len(self.contexts):
                # A barrier of K participants would never open: an error instead of a deadlock.
                group.leave()
            self._run_all(ids, number, group)
        self.exchanged += group.bytes
        return ids

    def _run_all(self, ids: list[str], number: int, group: AllReduceGroup) -> None:
        def run(rank: int) -> None:
            reply = self._call(_member(self._pushed.pop(ids[rank]), number, rank))
            self._replies[ids[rank]] = reply
            # The other participants wait at a barrier that this one will not reach.
            if reply.has_error():
                group.leave()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ids))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to messages pushed before, each once."""
        ids = list(message_ids)
        ready = [self._replies.pop(id_) for id_ in ids if id_ in self._replies]
        return ready + super().pull_messages(ids)


def _member(message: Message, number: int, rank: int) -> Message:
    """Return the message with the group in its config."""
    content = RecordDict({**message.content})
    for key, record in list(records_of(content, ConfigRecord).items()):
        content[key] = ConfigRecord({**record, GROUP: number, RANK: rank})
    member = copied(message, content)
    set_message_id(member, message.metadata.message_id)
    return member
