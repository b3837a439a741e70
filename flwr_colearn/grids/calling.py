"""The call of a ClientApp with one message, and what becomes of its exceptions."""

import traceback
import uuid
from dataclasses import dataclass
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from .._flwr import CLIENT_RAISED, copied, set_message_id
from ..errors import ColearnError, expected


@dataclass(frozen=True)
class Raised:
    """An exception of a ClientApp.

    Attributes
    ----------
    reason : str
        Its type and text.
    traceback : str
        Its traceback as text.
    logged : bool
        Whether the log has its traceback already.
    """

    reason: str
    traceback: str
    logged: bool


def call(app: ClientApp, message: Message, context: Context) -> tuple[Message, Raised | None]:
    """Return the reply of a ClientApp; an error reply, and the exception, if it raised one."""
    # A copy, since all messages of a round share one content, which a ClientApp may change.
    received = copied(message, _copy(message.content))
    set_message_id(received, message.metadata.message_id)
    raised = None
    try:
        reply = app(received, context)
        if not isinstance(reply, Message):
            raise expected("ClientApp", "a Message in reply", reply)
    # SystemExit too: in Flower it ends the participant's process, and here it would end those of
    # other participants. KeyboardInterrupt is the user's, who wants that.
    except (Exception, SystemExit) as error:
        # Flower also makes an error reply of every exception in a ClientApp.
        raised = _raised(error)
        reply = Message(Error(CLIENT_RAISED, raised.reason), reply_to=received)
    set_message_id(reply, str(uuid.uuid4()))
    return reply, raised


def _raised(error: BaseException) -> Raised:
    text = "".join(traceback.format_exception(error)).rstrip("\n")
    logged = isinstance(error, ColearnError) and error.logged
    return Raised(f"{type(error).__name__}: {error}", text, logged)


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
