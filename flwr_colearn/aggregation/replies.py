"""What a train reply must be: the checks that keep one bad participant from poisoning a round."""

import math
import re
from collections.abc import Callable

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict

from ..compression.codecs import WIRE, Broadcast
from ..errors import ColearnError, expected
from ..records import records_of
from ..roles import Arrays
from .mean import check_model

_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Interrupt|Exit)\b")

_LONGEST_REASON = 300

ECHO = "colearn"
"""Key of the ConfigRecord in which a participant echoes its name and the round."""


def failure_of(reply: Message) -> str | None:
    """Return why Flower or the participant's own code failed, or None for a reply with content."""
    if not reply.has_error():
        return None
    lines = ((reply.error.reason or "").strip() or "no reason").splitlines()
    # A traceback ends with the exception, whose message may be of several lines.
    last = max((i for i, line in enumerate(lines) if _EXCEPTION.match(line)), default=-1)
    reason = " ".join(line.strip() for line in lines[last:] if line.strip())
    return f"the participant failed (code {reply.error.code}): {reason[:_LONGEST_REASON]}"


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
    records = list(records_of(reply.content, MetricRecord).values())
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
    records = list(records_of(reply.content, ArrayRecord).values())
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
    said = records_of(reply.content, ConfigRecord).get(WIRE)
    return broadcast.decode(arrays_of(reply), said)


def metrics_of(reply: Message) -> RecordDict:
    """Return the metrics in a reply, as Flower's aggregation of metrics takes them."""
    return RecordDict({**records_of(reply.content, MetricRecord)})


def check_train_reply(sent: Message, reply: Message, weighted_by_key: str = "num-examples") -> None:
    """Raise a ColearnError unless `reply` is a usable answer to `sent`; see `checked_model`."""
    if sent.metadata.message_type.partition(".")[0] == MessageType.TRAIN:
        request = records_of(sent.content, ConfigRecord).get(WIRE)
        broadcast = Broadcast.received(arrays_of(sent), request)
        checked_model(
            sent,
            reply,
            weighted_by_key,
            broadcast,
            lambda model, examples: check_model(model, broadcast.reference),
        )


def checked_model(
    sent: Message,
    reply: Message,
    weighted_by_key: str,
    broadcast: Broadcast,
    check: Callable[[Arrays, float], None],
) -> Arrays:
    """Return the model in a train reply, decoded.

    It must carry one ArrayRecord and one MetricRecord with a positive number of examples, and
    ``check(model, examples)`` must accept the model: by the names, shapes and types of the model
    that was broadcast, all numbers finite. Where the participant echoes its round, it must be the
    one that was asked for.

    Raises
    ------
    ColearnError
        If it does not.
    """
    examples = examples_of(reply, weighted_by_key)
    model = model_of(reply, broadcast)
    check(model, examples)
    echoed = echo_of(reply).get("server-round")
    for config in records_of(sent.content, ConfigRecord).values():
        asked = config.get("server-round", echoed)
        if echoed is not None and echoed != asked:
            raise expected("round echoed in the reply", str(asked), echoed)
    return model


def echo_of(reply: Message) -> dict[str, object]:
    """Return what a participant says of itself in a reply: ``participant``, ``server-round``."""
    configs = records_of(reply.content, ConfigRecord) if reply.has_content() else {}
    return dict(configs.get(ECHO, {}))
