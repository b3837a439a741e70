"""InProcessGrid: a Flower Grid that calls a ClientApp in this process for every participant."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from logging import ERROR
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import log
from flwr.serverapp import Grid

from .._flwr import (
    CLIENT_RAISED,
    assume_identity,
    copied,
    empty_run,
    set_message_id,
)
from ..aggregation import ECHO
from ..errors import ColearnError, expected, whole_number


class InProcessGrid(Grid):
    """Runs a ClientApp for K participants in this process, deterministically, without Ray.

    Participants are called one after the other, each when its reply is pulled, with its own
    `Context`, whose state lasts as long as the grid. The grid is for tests, for debugging a
    ClientApp with a debugger, and for studies in which the participants share one GPU.

    Since nobody can join, a strategy that wants more participants than there are ends with an error
    at once. A ClientApp that fails here fails again, so that participants are restarted only where
    a `Recovery` was given to the strategy or the transport. The traceback of an exception is logged
    once, and for further participants with the same exception one line.

    Parameters
    ----------
    client_app : ClientApp
        The app, of the Message API or over a NumPyClient.
    num_supernodes : int
        K. Participant k = 0 .. K-1 has node id k + 1, and ``partition-id`` k and
        ``num-partitions`` K in its node config, as in Flower's simulation.
    run_config : mapping, optional
        The run config of every participant.
    node_configs : sequence of mappings, optional
        Further entries of each participant's node config.

    Attributes
    ----------
    closed : bool
        Whether nobody can join or leave, and a failure repeats itself. It is True for this class
        and `ThreadedGrid`. A subclass may deliver messages in another way, so that it is not closed
        unless it says so.

    Raises
    ------
    ColearnError
        If `num_supernodes` is not positive or `node_configs` has another length.

    Examples
    --------
    ::

        grid = InProcessGrid(client_app, num_supernodes=5, run_config={"seed": 0})
        result = strategy.start(grid, initial_arrays)

    Notes
    -----
    With glibc, the process does not return up to 64 MiB of freed memory to the system, since the
    next participant needs as much again.
    """

    closed = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "closed" not in vars(cls):
            cls.closed = False

    def __init__(
        self,
        client_app: ClientApp,
        num_supernodes: int,
        run_config: Mapping[str, Any] | None = None,
        node_configs: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        k = whole_number("num_supernodes", num_supernodes, least=1)
        if node_configs is not None and len(node_configs) != k:
            raise expected("node_configs", f"one for each of {k} participants", len(node_configs))
        assume_identity()
        _keep_freed_memory()
        self.client_app = client_app
        self._run: Any = empty_run(1)
        self._pushed: dict[str, Message] = {}
        self._raised: set[str] = set()
        self.contexts = {
            index + 1: Context(
                run_id=1,
                node_id=index + 1,
                node_config={
                    "partition-id": index,
                    "num-partitions": k,
                    **(node_configs[index] if node_configs else {}),
                },
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for index in range(k)
        }

    def set_run(self, run: Any) -> None:
        """Set Flower's description of the run."""
        self._run = run

    @property
    def run(self) -> Any:
        """Flower's description of the run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message; Flower's own code now uses the constructor ``Message`` instead."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the ids of the participants: 1 .. K."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Store messages; the ClientApp receives each when its reply is pulled."""
        pushed = {}
        # All messages are checked before any is stored, so that an error leaves nothing behind.
        for message in messages:
            self._check_node(message.metadata.dst_node_id)
            set_message_id(message, str(uuid.uuid4()))
            pushed[message.metadata.message_id] = message
        self._pushed.update(pushed)
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the ClientApp on messages pushed before, and return the replies, each once."""
        return [self._call(self._pushed.pop(id_)) for id_ in message_ids if id_ in self._pushed]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Run the ClientApp on every message and return the replies; `timeout` is not used."""
        return self.pull_messages(self.push_messages(messages))

    def _check_node(self, node_id: int) -> None:
        if node_id not in self.contexts:
            raise ColearnError(
                f"message: expected a node id from 1 to {len(self.contexts)}, found {node_id}"
            )

    def _call(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        # A copy, since all messages of a round share one content, which a ClientApp may change.
        received = copied(message, _copy(message.content))
        set_message_id(received, message.metadata.message_id)
        try:
            reply = self.client_app(received, self.contexts[node_id])
            if not isinstance(reply, Message):
                raise expected("ClientApp", "a Message in reply", reply)
        # SystemExit too: in Flower it ends the participant's process, and here it would end the
        # server and all participants. KeyboardInterrupt is the user's, who wants that.
        except (Exception, SystemExit) as error:
            # Flower also makes an error reply of every exception in a ClientApp.
            reason = f"{type(error).__name__}: {error}"
            self._log(node_id, message, error, reason)
            reply = Message(Error(CLIENT_RAISED, reason), reply_to=received)
        set_message_id(reply, str(uuid.uuid4()))
        return reply

    def _log(self, node_id: int, message: Message, error: BaseException, reason: str) -> None:
        """Log an exception, with its traceback unless that is in the log already."""
        # A ClientApp without participant_mod fails on the query for the name, which is expected.
        if ECHO in message.content:
            return
        known = reason in self._raised or (isinstance(error, ColearnError) and error.logged)
        self._raised.add(reason)
        log(ERROR, "The ClientApp of node %s raised %s", node_id, reason, exc_info=not known)


def _keep_freed_memory() -> None:
    """Make glibc keep up to 64 MiB of freed memory, since every participant needs as much again.

    glibc returns free memory at the end of its heap to the system when it exceeds a threshold:
    twice the size of the largest block of at most 32 MiB that was mapped separately and freed.
    Without this call small models would stay below that size, and every round would pay for the
    same pages again. The block allocated here raises the threshold; its pages are never touched.
    With other C libraries the call has no effect.
    """
    np.empty(_LARGEST_THAT_COUNTS, np.uint8)


_LARGEST_THAT_COUNTS = 2**25 - 2**16


def _copy(content: RecordDict) -> RecordDict:
    """Copy the records, but not the immutable bytes of arrays."""
    return RecordDict(
        {
            name: type(record)({key: _own(value) for key, value in record.items()})
            for name, record in content.items()
        }
    )


def _own(value: Any) -> Any:
    return value[:] if isinstance(value, list) else value
