"""The participant's half of recovery: it says who it is, and ends itself when it hangs."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.common import log

from ..aggregation.replies import ECHO
from ..records import records_of


def participant_mod(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Flower mod that lets the server tell participants apart and restart hanging ones.

    A train reply echoes the participant's name and the round in a ConfigRecord ``colearn``. If
    the train config carries ``time-limit`` (seconds), a ClientApp process of a deployment that
    runs longer ends itself: Flower reports it, and the server restarts the training. In a
    simulation, where participants share processes, the limit is ignored.

    Examples
    --------
    ::

        app = ClientApp(mods=[participant_mod])
        app.query("colearn")(introduce)
    """
    if message.metadata.message_type == f"{MessageType.QUERY}.{ECHO}":
        return introduce(message, context)
    config = _config(message)
    limit = config.get("time-limit")
    with _time_limit(float(limit) if isinstance(limit, int | float) else None):
        reply = call_next(message, context)
    if reply.has_content() and "server-round" in config:
        echo = {"server-round": config["server-round"], **name_of(context)}
        reply.content[ECHO] = ConfigRecord(echo)
    return reply


def introduce(message: Message, context: Context) -> Message:
    """Answer the server's question who this participant is.

    The name is ``name`` in the SuperNode's node config, else ``partition-<partition-id>``. Register
    it with ``app.query("colearn")(introduce)``; a ClientApp with a `client_fn` answers through
    `participant_mod`.
    """
    content = RecordDict({ECHO: ConfigRecord({**name_of(context)})})
    return Message(content=content, reply_to=message)


def name_of(context: Context) -> dict[str, str]:
    """Return the participant's name as the entry ``participant``, or nothing if it has none."""
    if "name" in context.node_config:
        return {"participant": str(context.node_config["name"])}
    if "partition-id" in context.node_config:
        return {"participant": f"partition-{context.node_config['partition-id']}"}
    return {}


def _config(message: Message) -> ConfigRecord:
    """Return the train config, wherever Message API or legacy messages keep it."""
    for record in records_of(message.content, ConfigRecord).values():
        if "server-round" in record:
            return record
    return ConfigRecord()


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    # Only a process that serves this one message may be ended.
    if seconds is None or Path(sys.argv[0]).name != "flwr-clientapp":
        yield
        return
    # Not SIGTERM: Flower takes that for the end of a task and reports nothing to the server.
    timer = threading.Timer(seconds, _end_process, [seconds])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_process(seconds: float) -> None:
    log(ERROR, "Local training exceeded its time limit of %s s; this process ends itself", seconds)
    os._exit(os.EX_TEMPFAIL)
