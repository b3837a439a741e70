"""What a train reply must be: the checks that keep one bad participant from poisoning a round."""

import math

from flwr.app import ArrayRecord, Message, MessageType

from .averaging import check_model
from .errors import ColearnError, expected
from .roles import Arrays
from .wire import WIRE, Broadcast

ECHO = "colearn"
"""Key of the ConfigRecord in which a participant echoes its name and the round."""


def failure_of(reply: Message) -> str | None:
    """Return why Flower or the participant's own code failed, or None for a reply with content."""
    if not reply.has_error():
        return None
    lines = (reply.error.reason or "").strip().splitlines()
    return (
        f"the participant failed (code {reply.error.code}): {lines[-1] if lines else 'no reason'}"
    )


def examples_of(reply: Message, weighted_by_key: str) -> float:
    """Return the number of examples that a reply states.

    Raises
    ------
    ColearnError
        If the participant failed, or its only MetricRecord has no positive number of examples.
    """
    failure = failure_of(reply)
    if failure is not None:
        raise ColearnError(failure)
    records = list(reply.content.metric_records.values())
    if len(records) != 1:
        raise expected("reply", "exactly one MetricRecord", len(records))
    examples = records[0].get(weighted_by_key)
    if not isinstance(examples, int | float) or not 0 < examples < math.inf:
        raise expected(f"'{weighted_by_key}' in the reply", "a positive number", examples)
    return examples


def arrays_of(reply: Message) -> ArrayRecord:
    """Return the only ArrayRecord of a train reply.

    Raises
    ------
    ColearnError
        If there is none, or more than one.
    """
    records = list(reply.content.array_records.values())
    if len(records) != 1:
        raise expected("reply", "exactly one ArrayRecord", len(records))
    return records[0]


def model_of(reply: Message, broadcast: Broadcast) -> Arrays:
    """Return the model in a train reply to a broadcast, decoded.

    Raises
    ------
    ColearnError
        If there is not exactly one ArrayRecord, or it is not encoded as asked for, or damaged.
    """
    return broadcast.decode(arrays_of(reply), reply.content.config_records.get(WIRE))


def check_train_reply(
    sent: Message,
    reply: Message,
    weighted_by_key: str = "num-examples",
    broadcast: Broadcast | None = None,
) -> None:
    """Raise a ColearnError unless `reply` is a usable answer to `sent`.

    It must carry one ArrayRecord with the names, shapes and types of the model that was sent, all
    numbers finite, and one MetricRecord with a positive number of examples. Where the participant
    echoes its round, it must be the one that was asked for. `broadcast`, which decodes the model,
    is by default read from `sent`.
    """
    if sent.metadata.message_type.partition(".")[0] != MessageType.TRAIN:
        return
    examples_of(reply, weighted_by_key)
    if broadcast is None:
        broadcast = Broadcast.received(arrays_of(sent), sent.content.config_records.get(WIRE))
    check_model(model_of(reply, broadcast), like=broadcast.reference)
    echoed = echo_of(reply).get("server-round")
    for config in sent.content.config_records.values():
        asked = config.get("server-round", echoed)
        if echoed is not None and echoed != asked:
            raise expected("round echoed in the reply", str(asked), echoed)


def echo_of(reply: Message) -> dict[str, object]:
    """Return what a participant says of itself in a reply: ``participant``, ``server-round``."""
    record = reply.content.config_records.get(ECHO) if reply.has_content() else None
    return dict(record or {})
