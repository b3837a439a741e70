"""The participant's half of compressed exchange: the mod, and what rounding left over."""

import math
from collections.abc import Callable
from logging import WARNING

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.common import log

from ..dynamic.client_state import reference_in
from ..dynamic.messages import CONFIG, SET, TRAIN
from ..errors import ColearnError, expected
from ..records import NUMPY, records_of, to_record, view
from ..roles import Arrays, NDArray
from .codecs import WIRE, BFloat16, Codec, agreed_codecs, difference

RESIDUAL = "colearn.residual"
"""Keys in ``context.state`` begin so: what rounding kept back from the server."""


def wire_mod(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Flower mod that decodes the models in messages and encodes those in replies, as asked for.

    The functions of the ClientApp see ordinary arrays of the model's own types, and neither does
    anything when the server asks for nothing.

    Mods are called from first to last, and see replies from last to first: what changes the model,
    such as Flower's differential privacy mods, comes after this one, what measures messages before
    it. With `participant_mod` either order will do.

    What ``Int8`` sends is the difference to the model that the message brought; a learner
    (`flwr_colearn.learner`), whose model stays, sends the difference to its reference. What
    ``Int8`` rounds away is kept in ``context.state`` (as bfloat16), which Flower keeps for the
    run and loses with the SuperNode: then that round's rounding, half a step of each number at
    most, is not made up for. A round that is repeated, by a restart or by a server that resumes
    the same run, uses what it used the first time, so it gives the same bits.

    Raises
    ------
    ColearnError
        If the server speaks another version or a codec unknown here, or the model it sent is
        damaged. Flower reports it to the server.

    Examples
    --------
    ::

        app = ClientApp(mods=[participant_mod, wire_mod])
    """
    request = records_of(message.content, ConfigRecord).get(WIRE)
    if request is None:
        return call_next(message, context)
    up, down = agreed_codecs(request)
    _note_new_model(message, request, context.state)
    shared: Arrays | None = None
    received = records_of(message.content, ArrayRecord)
    if len(received) > 1:
        raise expected("message", "at most one ArrayRecord", len(received))
    for key, arrays in received.items():
        shared = down.decode(arrays)
        message.content[key] = _plain(arrays, shared)
    del message.content[WIRE]
    reply = call_next(message, context)
    is_train = message.metadata.message_type.partition(".")[0] == MessageType.TRAIN
    if not is_train or reply.has_error():
        return reply
    reply.content[WIRE] = request
    if message.metadata.message_type == SET:
        _settle(context.state, request)
    models = records_of(reply.content, ArrayRecord)
    if len(models) == 1:  # the server refuses other replies, and says why
        [(key, trained)] = models.items()
        if "session" in request:  # of a learner, by which its server asks
            shared = reference_in(context)
        reply.content[key] = _encode_reply(up, trained, shared, request, context.state)
    return reply


def _encode_reply(
    up: Codec,
    trained: ArrayRecord,
    shared: Arrays | None,
    request: ConfigRecord,
    state: RecordDict,
) -> ArrayRecord:
    # Without a round nothing is made up for: the server looks at a model that stays as it is.
    if not up.differential or shared is None or "round" not in request:
        return up.encode(trained, shared)[0]
    residual = _residual_before(request, state, shared)
    encoded, arriving = up.encode(trained, shared, residual)
    left = {
        name: difference(array, arriving[name], residual.get(name))
        for name, array in view(trained).items()
        if encoded[name].stype == up.stype  # of the others nothing is left over
    }
    for when, arrays in (("before", residual), ("after", left)):
        state[f"{RESIDUAL}.{when}"] = BFloat16().encode(to_record(arrays))[0]
    session = request.get("session", "")
    state[RESIDUAL] = ConfigRecord(
        {
            "round": request["round"],
            "session": session,
            # A learner's model is still its own, unrounded, until the average has replaced it.
            "settled": not session,
        }
    )
    return encoded


def _settle(state: RecordDict, request: ConfigRecord) -> None:
    """Note that a learner's model was replaced: what its rounding left over is now missing."""
    kept = records_of(state, ConfigRecord).get(RESIDUAL, ConfigRecord())
    if all(kept.get(key) == request.get(key) for key in ("session", "round")):
        kept["settled"] = True


def _note_new_model(message: Message, request: ConfigRecord, state: RecordDict) -> None:
    """Note that a learner begins anew in a later round: the average it is in may never have come.

    If the reference that it gets is that average, what its rounding left over is missing from it;
    otherwise its own model, with all that is left over, is gone.
    """
    is_train = message.metadata.message_type == TRAIN and "session" in request
    kept = records_of(state, ConfigRecord).get(RESIDUAL)
    if not is_train or not records_of(message.content, ArrayRecord) or kept is None:
        return
    if kept["round"] == request.get("round"):
        return  # a round that is repeated
    asked = records_of(message.content, ConfigRecord).get(CONFIG, ConfigRecord())
    if asked.get("reference-round") == kept["round"]:
        kept["settled"] = True
    else:
        log(WARNING, "Wire: what earlier rounds rounded away is lost with the learner's model")
        del state[RESIDUAL]


def _residual_before(
    request: ConfigRecord, state: RecordDict, shared: Arrays
) -> dict[str, NDArray]:
    """Return what the rounds before this one left over; nothing where that is lost."""
    server_round = request["round"]
    try:
        kept = records_of(state, ConfigRecord)[RESIDUAL] if RESIDUAL in state else ConfigRecord()
        last = kept["round"] if kept else math.inf
        if server_round < last or kept["session"] != request.get("session", ""):  # type: ignore[operator]
            if server_round != 1:
                log(WARNING, "Wire: nothing is kept here of what earlier rounds rounded away")
            return {}  # nothing is kept, or it is of an earlier run
        when = "after" if kept["settled"] and server_round != last else "before"
        arrays = BFloat16().decode(records_of(state, ArrayRecord)[f"{RESIDUAL}.{when}"])
    except (ColearnError, KeyError, TypeError) as error:
        log(WARNING, "Wire: what earlier rounds rounded away is lost: %r", error)
        return {}
    strangers = [
        name
        for name, array in arrays.items()
        if name not in shared or shared[name].shape != array.shape
    ]
    if strangers:
        log(WARNING, "Wire: rounding kept for arrays of another shape is dropped: %s", strangers)
    return {name: array for name, array in arrays.items() if name not in strangers}


def _plain(arrays: ArrayRecord, decoded: Arrays) -> ArrayRecord:
    """Return what arrived as ordinary arrays."""
    return ArrayRecord(
        {
            name: array if array.stype == NUMPY else Array(np.asarray(decoded[name]))
            for name, array in arrays.items()
        }
    )
