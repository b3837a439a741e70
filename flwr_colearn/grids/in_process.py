"""InProcessGrid: a Flower Grid that calls a ClientApp for every participant, without Ray."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from logging import ERROR
from types import TracebackType
from typing import Any, Self

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from .._flwr import assume_identity, empty_run, set_message_id
from ..aggregation import ECHO
from ..errors import ColearnError, expected, whole_number
from .app_reference import AnyApp, AppReference
from .calling import Raised, call
from .pool import ProcessPool


class InProcessGrid(Grid):
    """Runs a ClientApp for K participants on this machine, without Ray.

    By default participants are called in this process, one after the other, each when its reply is
    pulled, with its own `Context`, whose state lasts as long as the grid. That is for tests, for
    debugging a ClientApp with a debugger, and for small studies. With ``processes=P`` participants
    train side by side in P worker processes, with the same results; see docs/simulation.md.

    Since nobody can join, a strategy that wants more participants than there are ends with an error
    at once. A ClientApp that fails here fails again, so that participants are restarted only where
    a `Recovery` was given to the strategy or the transport. The traceback of an exception is logged
    once, and for further participants with the same exception one line.

    Parameters
    ----------
    client_app : ClientApp, str or callable
        The app, of the Message API or over a NumPyClient; its name, ``"package.module:app"``; or a
        function without parameters that returns it. For worker processes it must be one that they
        can import: a name, an app that is an attribute of a module, or a function that pickles.
    num_supernodes : int
        K. Participant k = 0 .. K-1 has node id k + 1, and ``partition-id`` k and
        ``num-partitions`` K in its node config, as in Flower's simulation.
    run_config : mapping, optional
        The run config of every participant.
    node_configs : sequence of mappings, optional
        Further entries of each participant's node config.
    processes : int, optional
        P, the number of worker processes; 1 for none, which is the default without `devices`. Each
        worker keeps what its participants keep in memory. The cores are divided among them
        (``OMP_NUM_THREADS``, unless it is set).
    devices : sequence of str, optional
        The devices of the worker processes, in turn: "cuda:0", "GPU:1", "cpu". A worker sees its
        GPU only (``CUDA_VISIBLE_DEVICES``), as the first. Several workers may share one. By
        default there is a worker for each.

    Attributes
    ----------
    closed : bool
        Whether nobody can join or leave, and a failure repeats itself. It is True for this class
        and `ThreadedGrid`. A subclass may deliver messages in another way, so that it is not closed
        unless it says so.

    Raises
    ------
    ColearnError
        If `num_supernodes` or `processes` is not positive, `node_configs` has another length, or
        worker processes cannot have the app or the devices.

    Examples
    --------
    ::

        grid = InProcessGrid(client_app, num_supernodes=5, run_config={"seed": 0})
        result = strategy.start(grid, initial_arrays)

    In two processes::

        with InProcessGrid("my_app.client:app", num_supernodes=5, processes=2) as grid:
            result = strategy.start(grid, initial_arrays)

    Notes
    -----
    With worker processes the grid must be closed at the end: use it in a ``with`` statement, or
    call `close`. A grid that is not closed ends its processes and frees its shared memory when it
    is deleted, and at the end of this process. A worker that dies is replaced, and the participant
    that it called is called again with the context from before; when that has failed three times,
    an error reply says so.

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
        client_app: AnyApp,
        num_supernodes: int,
        run_config: Mapping[str, Any] | None = None,
        node_configs: Sequence[Mapping[str, Any]] | None = None,
        processes: int | None = None,
        devices: Sequence[str] | None = None,
    ) -> None:
        k = whole_number("num_supernodes", num_supernodes, least=1)
        if node_configs is not None and len(node_configs) != k:
            raise expected("node_configs", f"one for each of {k} participants", len(node_configs))
        assume_identity()
        _keep_freed_memory()
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
        self.client_app = client_app
        self._pool = self._workers(AppReference(client_app), processes, devices)
        if self._pool is None:
            self.client_app = AppReference(client_app).load()

    def _workers(
        self, app: AppReference, processes: int | None, devices: Sequence[str] | None
    ) -> ProcessPool | None:
        """Return the worker processes, no more than participants; None for this process."""
        if devices is not None and not _are_names(devices):
            raise expected("devices", "a list of devices such as ['cuda:0']", devices)
        if processes is None:
            processes = len(devices or [""])
        processes = whole_number("processes", processes, least=1)
        if devices is not None and len(devices) > processes:
            raise expected("devices", f"at most one for each of {processes} processes", devices)
        # The device of this process cannot be chosen any more.
        if processes == 1 and devices is None:
            return None
        return ProcessPool(app, self.contexts, min(processes, len(self.contexts)), devices)

    def close(self) -> None:
        """End the worker processes and free their memory; without them nothing happens."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> Self:
        """Return the grid, which is closed at the end of the ``with`` statement."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the grid."""
        self.close()

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
        if self._pool is None:
            self._pushed.update(pushed)
        else:
            self._pool.push(list(pushed.values()))
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to messages pushed before, each once.

        In this process the ClientApp runs on all of them. With worker processes those replies are
        returned that are there; if no participant has replied the call waits for the first.
        """
        if self._pool is None:
            return [self._call(self._pushed.pop(id_)) for id_ in message_ids if id_ in self._pushed]
        replies = self._pool.pull(message_ids)
        for node_id, message, raised in self._pool.take_raised():
            self._log(node_id, message, raised)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Run the ClientApp on every message and return the replies, in the messages' order.

        `timeout` is not used. In worker processes the ``time-limit`` in a message's config ends a
        participant that hangs.
        """
        ids = self.push_messages(messages)
        if self._pool is None:
            # Once: a subclass that delays replies has none for some messages.
            return list(self.pull_messages(ids))
        replies: dict[str, Message] = {}
        while missing := [id_ for id_ in ids if id_ not in replies]:
            for reply in self.pull_messages(missing):
                replies[reply.metadata.reply_to_message_id] = reply
        return [replies[id_] for id_ in ids]

    def _check_node(self, node_id: int) -> None:
        if node_id not in self.contexts:
            raise ColearnError(
                f"message: expected a node id from 1 to {len(self.contexts)}, found {node_id}"
            )

    def _call(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        reply, raised = call(self.client_app, message, self.contexts[node_id])  # type: ignore[arg-type]
        if raised is not None:
            self._log(node_id, message, raised)
        return reply

    def _log(self, node_id: int, message: Message, raised: Raised) -> None:
        """Log an exception, with its traceback unless that is in the log already."""
        # A ClientApp without participant_mod fails on the query for the name, which is expected.
        if ECHO in message.content:
            return
        known = raised.reason in self._raised or raised.logged
        self._raised.add(raised.reason)
        text = raised.reason if known else f"{raised.reason}\n{raised.traceback}"
        log(ERROR, "The ClientApp of node %s raised %s", node_id, text)


def _are_names(devices: object) -> bool:
    """Return whether an object is a list of strings that has any."""
    if not isinstance(devices, Sequence) or isinstance(devices, str):
        return False
    return bool(devices) and all(isinstance(each, str) for each in devices)


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
