"""A worker process of an InProcessGrid: it calls the ClientApp for the participants it is given."""

import logging
import os
import pickle
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from logging.handlers import QueueHandler
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any, NamedTuple

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from .._flwr import CLIENT_RAISED, assume_identity, set_message_id
from ..errors import ColearnError
from .app_reference import AppReference
from .calling import Raised, call
from .parcels import Frozen, Parcel, Reader, created, read, size_of, written

FLOWER = logging.getLogger("flwr")


class Task(NamedTuple):
    """A message for a participant.

    Attributes
    ----------
    message_id : str
        The id of the message.
    node_id : int
        The participant.
    message : Parcel
        The message.
    context : Parcel or None
        The participant's context in the outbox, unless the worker has it.
    outbox : str
        The segment for the reply.
    batch : int
        The number of the batch; messages of one batch share arrays.
    """

    message_id: str
    node_id: int
    message: Parcel
    context: Parcel | None
    outbox: str
    batch: int


class Started(NamedTuple):
    """The worker has the ClientApp, or the traceback of the exception with which it failed."""

    failure: str = ""


class Done(NamedTuple):
    """A participant has replied.

    Attributes
    ----------
    message_id : str
        The id of the task's message.
    reply : Parcel
        The reply.
    context : Parcel or None
        The participant's context if the ClientApp changed it.
    raised : Raised or None
        The exception that the ClientApp raised.
    """

    message_id: str
    reply: Parcel
    context: Parcel | None
    raised: Raised | None


def serve(channel: Connection, app: bytes, level: int) -> None:
    """Run the worker until the server closes the connection or ends.

    Parameters
    ----------
    channel : Connection
        Connects to the server.
    app : bytes
        A pickled `AppReference`.
    level : int
        The level of Flower's log in the server's process.
    """
    threading.Thread(target=_end_with_server, daemon=True).start()
    assume_identity()
    line = _Line(channel)
    FLOWER.handlers, FLOWER.propagate = [_ToServer(line)], False  # type: ignore[arg-type]
    FLOWER.setLevel(level)
    try:
        reference: AppReference = pickle.loads(app)
        desk = _Desk(reference.load())
    except Exception:
        line.put(Started(traceback.format_exc()))
        return
    line.put(Started())
    # Closed by the server, the connection ends, or is reset if the server has not read all of it.
    with suppress(EOFError, ConnectionError):
        while True:
            line.put(desk.done(channel.recv()))


def _end_with_server() -> None:
    """End the process when the server's has ended, also while a participant trains."""
    server = parent_process()
    assert server is not None
    connection.wait([server.sentinel])
    os._exit(1)


@dataclass
class _Line:
    """The connection to the server, which threads of the ClientApp use too, for their log."""

    channel: Connection

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def put(self, value: Any) -> None:
        with self._lock:
            self.channel.send(value)


class _ToServer(QueueHandler):
    """Sends the records of Flower's log to the server, whose log is one."""

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.put(record)  # type: ignore[attr-defined]


class _Desk:
    """Calls the ClientApp, and keeps the contexts of the participants."""

    def __init__(self, app: ClientApp) -> None:
        self.app = app
        self._reader = Reader()
        self._contexts: dict[int, tuple[Context, Frozen]] = {}

    def done(self, task: Task) -> Done:
        message: Message = self._reader.read(task.message, task.batch).thawed()
        if task.context is not None:
            received = read(self._reader.segment(task.outbox), task.context).thawed()
            self._contexts[task.node_id] = received, Frozen.of(received)
        context, before = self._contexts[task.node_id]
        reply, raised = call(self.app, message, context)
        after = Frozen.of(context)
        self._contexts[task.node_id] = context, after
        outbox = self._reader.segment(task.outbox)
        parcels = [Frozen.of(reply)] + ([] if after.is_same(before) else [after])
        try:
            reply_at, *context_at = _sent(parcels, outbox)
        except ColearnError as error:
            reply_at, context_at = _sent([_failed(message, str(error))], outbox)[0], []
        return Done(task.message_id, reply_at, context_at[0] if context_at else None, raised)


def overflow_of(outbox: str) -> str:
    """Return the name of the segment for a reply that does not fit into the outbox."""
    return f"{outbox}-more"


def _sent(parcels: list[Frozen], outbox: SharedMemory) -> list[Parcel]:
    size = size_of(parcels)
    if size <= outbox.size:
        return written(parcels, outbox)
    more = created(size, overflow_of(outbox.name))
    try:
        return written(parcels, more)
    finally:
        more.close()


def _failed(message: Message, reason: str) -> Frozen:
    reply = Message(Error(CLIENT_RAISED, reason), reply_to=message)
    set_message_id(reply, f"{message.metadata.message_id}-failed")
    return Frozen.of(reply)
