"""The participant's part of compression: decodes the received model and encodes the trained one."""

from collections.abc import Callable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType

from ..errors import expected
from ..records import NUMPY, kind_of, records_of, view
from ..roles import Arrays
from .agreement import AGREEMENT, LOCAL_REFERENCE, REFERENCE, agreed_codecs
from .codecs import Codec
from .residuals import Residual


def compressed(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Decode the model in a message and encode the one in its reply, as the message requests.

    The functions of the ClientApp receive and return ordinary arrays of the model's own types. A
    message without a request is not changed. The function is part of
    `flwr_colearn.participant_mod`. A Flower mod that changes the model, such as those of
    differential privacy, belongs after that one in ``ClientApp(mods=[...])``.

    ``Int8`` sends the difference to the model in the message or, where models stay with the
    participants, to the one under `REFERENCE` in ``context.state``. The rounding error is stored in
    ``context.state`` too, see `flwr_colearn.compression.residuals.Residual`.

    Raises
    ------
    ColearnError
        If the server has another version or a codec unknown at the participant, or the received
        model is damaged. Flower reports the error to the server.
    """
    request = records_of(message.content, ConfigRecord).get(AGREEMENT)
    if request is None:
        return call_next(message, context)
    up, down = agreed_codecs(request)
    received = records_of(message.content, ArrayRecord)
    if len(received) > 1:
        raise expected("message", "at most one ArrayRecord", sorted(received))
    residual = Residual(context.state, request)
    shared: Arrays | None = None
    for key, arrays in received.items():
        shared = down.decode(arrays)
        message.content[key] = _ordinary(arrays, shared)
        residual.note_average()
    # The ClientApp may take the message's only ConfigRecord for its own.
    del message.content[AGREEMENT]
    reply = call_next(message, context)
    if kind_of(message) != MessageType.TRAIN or reply.has_error():
        return reply
    reply.content[AGREEMENT] = request
    models = records_of(reply.content, ArrayRecord)
    # The server refuses a reply with another number of models, and states the reason.
    if len(models) == 1:
        [(key, trained)] = models.items()
        base = _reference_in(context) if request.get(LOCAL_REFERENCE) else shared
        reply.content[key] = _encode(up, trained, base, residual)
    return reply


def _encode(
    up: Codec, trained: ArrayRecord, base: Arrays | None, residual: Residual
) -> ArrayRecord:
    if not up.differential or base is None or not residual.wanted:
        return up.encode(trained, base)[0]
    before = residual.before(base)
    encoded, arriving = up.encode(trained, base, before)
    # Arrays that the codec sends exactly have no rounding error.
    rounded = {n: a for n, a in view(trained).items() if encoded[n].stype == up.stype}
    residual.keep(before, rounded, arriving)
    return encoded


def _reference_in(context: Context) -> Arrays | None:
    record = records_of(context.state, ArrayRecord).get(REFERENCE)
    return None if record is None else view(record)


def _ordinary(arrays: ArrayRecord, decoded: Arrays) -> ArrayRecord:
    """Return a received model with its encoded arrays replaced by decoded ones."""
    return ArrayRecord(
        {
            name: array if array.stype == NUMPY else Array(np.asarray(decoded[name]))
            for name, array in arrays.items()
        }
    )
