"""The check of train replies, so that an invalid reply does not change the average."""

import math
import re

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict

from .._flwr import REFUSED
from .._version import MOD_VERSION, __version__
from ..errors import ColearnError, expected
from ..records import kind_of, records_of, view
from ..roles import Arrays
from .validation import check_model

_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Interrupt|Exit)\b")

_LONGEST_REASON = 300

# Flower's error where a ClientApp has no function for the messages of `Recalibrated`.
_NO_RECALIBRATION = "No train function registered with name 'recalibrate'"
_ADD_RECALIBRATION = (
    "; under Recalibrated() the ClientApp needs a function that is decorated with "
    "flwr_colearn.torch.recalibrate(app) or flwr_colearn.keras.recalibrate(app)"
)

ADD_THE_MOD = "add participant_mod to the ClientApp's mods: ClientApp(mods=[participant_mod])"

# Flower's error where a ClientApp without the mod reads an array that a codec has encoded.
_NOT_DECODED = re.compile(r"Unsupported serialization type[^']*'colearn\.")

# Flower's errors where a ClientApp, or a NumPyClient, has no function for evaluation.
_NO_EVALUATION = re.compile(
    r"No evaluate function registered with name 'default'|Client does not implement `evaluate`"
)

ECHO = "colearn"
"""The key of the ConfigRecord in which a participant echoes its name, the round and versions."""

ASK = "ask"
"""The entry of the record `ECHO` that makes a message of the type train a query of its own kind.

It must be of that type: Flower calls the mods of a ClientApp only where it has a function, and a
query with this entry never reaches the function.
"""


def failure_of(reply: Message) -> str | None:
    """Return the reason of an error reply, of Flower or of a layer; None for other replies."""
    if not reply.has_error():
        return None
    reason = (reply.error.reason or "").strip() or "no reason"
    if reply.error.code == REFUSED:
        return reason
    if _NOT_DECODED.search(reason):
        return (
            "the participant failed: expected the compressed model decoded by "
            f"flwr_colearn.participant_mod, found none; {ADD_THE_MOD}"
        )
    lines = reason.splitlines()
    # Only the exception and its message, which may have several lines, from the end of a traceback.
    last = max((i for i, line in enumerate(lines) if _EXCEPTION.match(line)), default=-1)
    shown = " ".join(line.strip() for line in lines[last:] if line.strip())
    remedy = _ADD_RECALIBRATION if _NO_RECALIBRATION in shown else ""
    return f"the participant failed (code {reply.error.code}): {shown[:_LONGEST_REASON]}{remedy}"


def cannot_evaluate(reply: Message) -> bool:
    """Return whether an error reply says that the ClientApp has no function for evaluation."""
    return reply.has_error() and bool(_NO_EVALUATION.search(reply.error.reason or ""))


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
    # NaN and infinity, which a MetricRecord can hold, would make the whole average NaN.
    if not isinstance(examples, int | float) or not 0 < examples < math.inf:
        raise expected(f"'{weighted_by_key}' in the reply", "a positive number", examples)
    return examples


def arrays_of(reply: Message) -> ArrayRecord:
    """Return the only ArrayRecord of a train reply.

    Raises
    ------
    ColearnError
        If the reply has none, or more than one.
    """
    records = list(records_of(reply.content, ArrayRecord).values())
    if len(records) != 1:
        raise expected("reply", "exactly one ArrayRecord", len(records))
    return records[0]


def read_reply(reply: Message, weighted_by_key: str) -> tuple[Arrays, float]:
    """Return the model in a train reply, as views of its bytes, and the number of examples.

    Raises
    ------
    ColearnError
        If the participant failed, or the reply is not well-formed.
    """
    examples = examples_of(reply, weighted_by_key)
    return view(arrays_of(reply)), examples


def metrics_of(reply: Message) -> RecordDict:
    """Return the metrics in a reply, in the form of Flower's aggregation of metrics."""
    return RecordDict({**records_of(reply.content, MetricRecord)})


def check_train_reply(sent: Message, reply: Message, weighted_by_key: str = "num-examples") -> None:
    """Raise a ColearnError unless `reply` is a usable answer to `sent`.

    The reply must have one ArrayRecord with the names, shapes and types of the model that was sent
    and only finite numbers, and one MetricRecord with a positive number of examples. See also
    `check_echo`.
    """
    if kind_of(sent) == MessageType.TRAIN:
        check_echo(sent, reply)
        model, _ = read_reply(reply, weighted_by_key)
        check_model(model, view(arrays_of(sent)))


def check_echo(sent: Message, reply: Message) -> None:
    """Raise a ColearnError if a participant echoes another version or round than the server's."""
    failure = failure_of(reply)
    if failure is not None:
        raise ColearnError(failure)
    echo = echo_of(reply)
    # A participant without the mod echoes nothing, which is allowed: it only has no name.
    ours = {"version": __version__, "mod": MOD_VERSION}
    theirs = {key: echo[key] for key in ours if key in echo}
    if theirs and theirs != ours:
        raise expected("flwr-colearn at the participant", f"the server's {ours}", theirs)
    # A reply of another round belongs to a message that was sent before a restart of the server.
    echoed = echo.get("server-round")
    for config in records_of(sent.content, ConfigRecord).values():
        asked = config.get("server-round", echoed)
        if echoed is not None and echoed != asked:
            raise expected("round echoed in the reply", str(asked), echoed)


def echo_of(reply: Message) -> dict[str, object]:
    """Return the echo in a reply: ``participant``, ``server-round`` and others; may be empty."""
    configs = records_of(reply.content, ConfigRecord) if reply.has_content() else {}
    return dict(configs.get(ECHO, {}))
