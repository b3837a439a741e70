"""What leaves a site of an exception: its type, and the messages of this plugin."""

import re
from collections.abc import Callable
from logging import ERROR

from flwr.app import Context, Message
from flwr.common import log

from ..errors import ColearnError, ParticipantError, expected

Next = Callable[[Message, Context], Message]

SWITCH = "exception-text"
"""The key in a SuperNode's node config with which a site lets the text of exceptions leave."""

# Flower's own text where a ClientApp lacks a function. It holds nothing of the site.
_NO_FUNCTION = re.compile(r"No \w+ function registered with name '[\w.-]{1,80}'")

_OUT_OF_MEMORY = re.compile(r"out of memory|RESOURCE_EXHAUSTED", re.IGNORECASE)

_LONGEST_TYPE = 80


def discreet(message: Message, context: Context, call_next: Next) -> Message:
    """Answer a message, and let only the type of a foreign exception leave the site.

    Flower sends the text of an exception to the server, which logs it. A text may hold a file name
    or a value of the site's data. The text and the traceback are written to the site's own log in
    its place. The messages of `ColearnError` leave the site as they are.

    Raises
    ------
    ParticipantError
        If the ClientApp raised an exception that is not of this plugin, with its type only. With
        ``exception-text=true`` in the SuperNode's node config, the exception itself is raised.
    """
    if _text_may_leave(context):
        return call_next(message, context)
    try:
        return call_next(message, context)
    except ColearnError as error:
        log(ERROR, "Participant: the ClientApp raised", exc_info=True)
        reported = _alone(error)
    # SystemExit too: a process that ends by it is reported by a time limit only.
    except (Exception, SystemExit) as error:
        log(ERROR, "Participant: the ClientApp raised", exc_info=True)
        reported = ParticipantError(_described(error))
    reported.logged = True
    # Outside of the except block, so that the traceback that Flower makes does not show the first.
    raise reported


def _text_may_leave(context: Context) -> bool:
    value = context.node_config.get(SWITCH, False)
    if not isinstance(value, bool):
        raise expected(f"node config '{SWITCH}'", "true or false", value)
    return value


def _alone(error: ColearnError) -> ColearnError:
    """Return an error of this plugin without the foreign exception that it was raised from."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _described(error: BaseException) -> str:
    flowers = _NO_FUNCTION.search(str(error)) if type(error) is ValueError else None
    # The name of a class is chosen by code, which may make it of anything.
    kind = re.sub(r"\W", "_", type(error).__name__)[:_LONGEST_TYPE]
    text = flowers[0] if flowers else "the text stays in the participant's log"
    # Not every framework has a type for it, and the server waits longer before another attempt.
    memory = "out of memory; " if _OUT_OF_MEMORY.search(str(error)) else ""
    return f"{kind}: {memory}{text}"
