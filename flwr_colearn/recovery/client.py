"""The participant's half of recovery: it says its name, and ends itself when it hangs."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common import log

from .._version import MOD_VERSION, __version__
from ..aggregation import ECHO
from ..errors import ColearnError
from ..records import config_of, describe, records_of
from .identity import ASK

Next = Callable[[Message, Context], Message]


def supervised(message: Message, context: Context, call_next: Next) -> Message:
    """Answer the server's question who this is, and train within the time limit.

    If the train config carries ``time-limit`` (seconds), a ClientApp process of a deployment that
    runs longer ends itself: Flower reports it, and the server restarts the training. In a
    simulation, where participants share processes, the limit is ignored.

    Raises
    ------
    ColearnError
        If the server has another version of this plugin: nothing is trained then.
    """
    control = records_of(message.content, ConfigRecord).get(ECHO, ConfigRecord())
    if ASK in control:
        return Message(RecordDict({ECHO: ConfigRecord({**name_of(context)})}), reply_to=message)
    config = config_of(message.content)
    _check_version(config)
    limit = config.get("time-limit")
    with _time_limit(float(limit) if isinstance(limit, int | float) else None):
        return call_next(message, context)


def echoed(message: Message, context: Context, call_next: Next) -> Message:
    """Add to a reply whose it is, and what it answers.

    The ConfigRecord `ECHO` has the participant's name and the round, the versions of the plugin and
    of this exchange, and eight characters that differ for models of other names, shapes or types.
    """
    config = config_of(message.content)
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
        }
    )
    return reply


def name_of(context: Context) -> dict[str, str]:
    """Return the participant's name as the entry ``participant``, or nothing if it has none.

    The name is ``name`` in the SuperNode's node config, else ``partition-<partition-id>``.
    """
    if "name" in context.node_config:
        return {"participant": str(context.node_config["name"])}
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
