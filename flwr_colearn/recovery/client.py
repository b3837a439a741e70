"""The participant's part of recovery: its name, the echo in replies, and the time limit."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.common import log

from .._version import MOD_VERSION, __version__
from ..aggregation import ASK, ECHO
from ..errors import ColearnError
from ..plan import watched_plan
from ..records import config_of, describe, records_of
from .identity import NAME, checked_name

Next = Callable[[Message, Context], Message]


def supervised(message: Message, context: Context, call_next: Next) -> Message:
    """Answer the server's query for the name, and any other message within its time limit.

    If the message's config contains ``time-limit`` (seconds), a ClientApp process of a deployment
    that runs longer ends itself. Flower reports the end, and the server restarts a training. In a
    simulation, where participants share processes, the limit is ignored.

    Raises
    ------
    ColearnError
        If the server has another version of this plugin; the participant does not train then.
    """
    control = records_of(message.content, ConfigRecord).get(ECHO, ConfigRecord())
    # The query for the name is of the type train: the user's training function must not get it.
    if control.get(ASK) == NAME:
        return Message(RecordDict({ECHO: ConfigRecord({**name_of(context)})}), reply_to=message)
    config = config_of(message.content)
    _check_version(config)
    limit = config.get("time-limit")
    with _time_limit(float(limit) if isinstance(limit, int | float) else None):
        return call_next(message, context)


def echoed(message: Message, context: Context, call_next: Next) -> Message:
    """Add the participant's name and the round to a reply.

    The ConfigRecord `ECHO` has the participant's name, the round, the versions of the plugin and of
    the protocol, and a short digest of the array names, types and shapes of the model. In the reply
    to a training it also states for how many epochs, and at which rates, the plan was iterated.
    """
    config = config_of(message.content)
    with watched_plan() as use:
        reply = call_next(message, context)
    if not reply.has_content() or "server-round" not in config:
        return reply
    models = list(records_of(reply.content, ArrayRecord).values())
    reply.content[ECHO] = ConfigRecord(
        {
            "server-round": config["server-round"],
            **name_of(context),
            "version": __version__,
            "mod": MOD_VERSION,
            **({"model": describe(models[0])} if len(models) == 1 else {}),
            **(use.statement() if _has_plan(message, config) else {}),
        }
    )
    return reply


def _has_plan(message: Message, config: ConfigRecord) -> bool:
    """Return whether a message asks for a training by a plan."""
    return message.metadata.message_type == MessageType.TRAIN and "learning-rates" in config


def name_of(context: Context) -> dict[str, str]:
    """Return the participant's name as the entry ``participant``; empty if it has no name.

    The name is ``name`` in the SuperNode's node config, else ``client-name``, which NVFlare sets to
    the name of its site, else ``partition-<partition-id>``.

    Raises
    ------
    ColearnError
        If the name is empty, too long, or contains control characters.
    """
    for key in ("name", "client-name"):
        if key in context.node_config:
            return {"participant": checked_name(str(context.node_config[key]))}
    if "partition-id" in context.node_config:
        number = str(context.node_config["partition-id"])
        return {"participant": f"partition-{number}"}
    return {}


def _check_version(config: ConfigRecord) -> None:
    wanted = str(config.get("colearn-version", __version__))
    if wanted != __version__:
        raise ColearnError(
            f"flwr-colearn: expected the server's version {wanted}, found {__version__} at this "
            "participant; install the same version on the server and at every site"
        )


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    # Only a ClientApp process of a deployment may be ended, since it serves this message alone.
    if seconds is None or Path(sys.argv[0]).name != "flwr-clientapp":
        yield
        return
    # Not SIGTERM, after which Flower reports nothing to the server. A timer thread also runs while
    # the main thread waits in C code, where Python runs no signal handlers.
    timer = threading.Timer(seconds, _end_process, [seconds])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_process(seconds: float) -> None:
    log(ERROR, "The ClientApp exceeded its time limit of %s s; this process ends itself", seconds)
    os._exit(os.EX_TEMPFAIL)
