"""The participant's half of compression: models are decoded before it trains, and encoded after."""

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
    """Decode the model in a message and encode the one in its reply, as the server asks.

    The functions of the ClientApp see ordinary arrays of the model's own types, and nothing happens
    when the server asks for nothing. It is part of `flwr_colearn.participant_mod`; a Flower mod
    that changes the model, such as those of differential privacy, comes after that one in
    ``ClientApp(mods=[...])``.

    What ``Int8`` sends is the difference to the model that the message brought or, where models
    stay with the participants, to the one under `REFERENCE` in ``context.state``. What it rounds
    away is kept there too, see `flwr_colearn.compression.residuals.Residual`.

    Raises
    ------
    ColearnError
        If the server has another version or a codec unknown here, or the model it sent is
        damaged. Flower reports it to the server.
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
    del message.content[AGREEMENT]
    reply = call_next(message, context)
    if kind_of(message) != MessageType.TRAIN or reply.has_error():
        return reply
    reply.content[AGREEMENT] = request
    models = records_of(reply.content, ArrayRecord)
    if len(models) == 1:  # the server refuses other replies, and says why
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
    rounded = {n: a for n, a in view(trained).items() if encoded[n].stype == up.stype}
    residual.keep(before, rounded, arriving)
    return encoded


def _reference_in(context: Context) -> Arrays | None:
    record = records_of(context.state, ArrayRecord).get(REFERENCE)
    return None if record is None else view(record)


def _ordinary(arrays: ArrayRecord, decoded: Arrays) -> ArrayRecord:
    """Return what arrived as ordinary arrays."""
    return ArrayRecord(
        {
            name: array if array.stype == NUMPY else Array(np.asarray(decoded[name]))
            for name, array in arrays.items()
        }
    )
