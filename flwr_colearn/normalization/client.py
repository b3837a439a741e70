"""The participant's part of normalization schemes: it stores local arrays and never sends them."""

from collections.abc import Callable, Mapping
from logging import INFO, WARNING

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.common import log

from ..aggregation import SGD
from ..errors import ColearnError
from ..records import kind_of, records_of, to_record, view
from ..roles import NDArray
from .local_arrays import LocalArrays, load, save
from .messages import LOCAL, LocalAnswer, LocalRequest

_VELOCITY = "|velocity"


def with_local_arrays(
    message: Message,
    context: Context,
    call_next: Callable[[Message, Context], Message],
) -> Message:
    """Store the arrays that a scheme of `flwr_colearn.Normalization` leaves with participants.

    A message contains the arrays that are exchanged. The user's function receives the complete
    model, with the participant's local arrays in their places, and may return the complete model;
    only the exchanged arrays are sent. Local arrays are stored in ``context.state``. A participant
    that has lost them logs a warning, reports it to the server and is reinitialised from the shared
    model's arrays. The function is part of `flwr_colearn.participant_mod`.

    Parameters
    ----------
    message, context, call_next
        The arguments that Flower gives to a mod.
    """
    record = records_of(message.content, ConfigRecord).get(LOCAL)
    if record is None:
        return call_next(message, context)
    del message.content[LOCAL]
    request = LocalRequest.from_record(record)
    training = kind_of(message) == MessageType.TRAIN
    [(key, sent)] = records_of(message.content, ArrayRecord).items()
    own = load(context, request.local).at(request.session, request.round, training)
    # The server sends local arrays only to participants that it does not know to have their own.
    if not own and not all(array in sent for array in request.local):
        log(
            WARNING,
            "Normalization: round %s: the local arrays are lost; requesting the shared model's",
            request.round,
        )
        return Message(RecordDict({LOCAL: LocalAnswer(lost=True).to_record()}), reply_to=message)
    reinitialised = bool(request.local) and not own
    if reinitialised:
        _log_beginning(request, context)
        own = view(ArrayRecord({array: sent[array] for array in request.local}))
    message.content[key] = _merged(sent, own, request.local)
    reply = call_next(message, context)
    # An evaluation and a failed training leave the local arrays as they are.
    if not training or not reply.has_content():
        return reply
    for returned_key, returned in list(records_of(reply.content, ArrayRecord).items()):
        if request.local:
            after = _after(view(returned), own, request)
            save(context, LocalArrays(request.session, request.round, own, after))
        travels = {n: a for n, a in returned.items() if n in set(request.returned)}
        reply.content[returned_key] = ArrayRecord(travels)
    # In round 1 every participant starts from the shared model's arrays, and none has lost its own.
    answer = LocalAnswer(reinitialised=reinitialised and request.round > 1)
    reply.content[LOCAL] = answer.to_record()
    return reply


def _after(
    trained: Mapping[str, NDArray], own: Mapping[str, NDArray], request: LocalRequest
) -> dict[str, NDArray]:
    """Return the local arrays after training: the reply's, or for gradients those after SGD."""
    missing = [name for name in request.local if name not in trained]
    if missing:
        raise ColearnError(
            f"reply: expected the local arrays too, which participant_mod stores, found "
            f"{len(missing)} missing {missing[:3]}"
        )
    after = {name: trained[name].copy() for name in request.local}
    if request.stepped:
        rate, momentum, decay = request.sgd
        velocity = {n: own[n + _VELOCITY] for n in request.stepped if n + _VELOCITY in own}
        weights = {name: own[name] for name in request.stepped}
        new, velocity = SGD(momentum, decay).step(weights, trained, velocity, rate)
        after.update(new)
        after.update({name + _VELOCITY: array for name, array in velocity.items()})
    return after


def _merged(sent: ArrayRecord, own: Mapping[str, NDArray], local: Mapping[str, int]) -> ArrayRecord:
    """Return the complete model in its own order, with the participant's local arrays."""
    names = [name for name in sent if name not in local]
    # In ascending order of positions, so each insertion is at its final place.
    for name, position in local.items():
        names.insert(position, name)
    mine = to_record({name: array for name, array in own.items() if name in local})
    return ArrayRecord({name: mine[name] if name in local else sent[name] for name in names})


def _log_beginning(request: LocalRequest, context: Context) -> None:
    count = len(request.local)
    if request.round > 1:
        log(
            WARNING,
            "Normalization: round %s: no local arrays; starting from the shared model's %s",
            request.round,
            count,
        )
        return
    log(INFO, "Normalization: %s arrays stay at this participant", count)
    if not context.node_config.get("state-dir"):
        log(
            WARNING,
            "Normalization: without 'state-dir' in the node config the local arrays are lost with "
            "this SuperNode or run; a resumed run then starts from the shared model's",
        )
