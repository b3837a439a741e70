"""The participant's part of secure aggregation: its model leaves under masks only."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from ..aggregation import arrays_of, examples_of
from ..errors import ColearnError, expected
from ..records import into_record, records_of, to_record, view
from ..roles import Arrays
from .layout import Layout
from .member import Member
from .messages import MASK, SECURE, SHARE, TOTALS, TRAIN, UNMASK, WORDS, attempt_of, request_of
from .settings import FEWEST

Next = Callable[[Message, Context], Message]

KEPT, METRICS, MEMBER, UNMASKED = (
    f"{SECURE}.{name}" for name in ("kept", "metrics", "member", "unmasked")
)
"""Keys in ``context.state``; the words of the trained model are under `WORDS`."""


def masked(message: Message, context: Context, call_next: Next, name: str | None) -> Message:
    """Keep the trained model at the participant, and send it under masks as the message requests.

    The reply to a training has public keys and metrics, and no arrays. The model is quantized and
    stored in ``context.state`` until its sum is unmasked. The function is part of
    `flwr_colearn.participant_mod`, and messages without a request pass through.

    Parameters
    ----------
    message, context, call_next
        The arguments that Flower gives to a mod.
    name : str or None
        The participant's name, on which the rounding of its numbers depends; None for one without,
        of which it depends on the node's id.

    Raises
    ------
    ColearnError
        If the model has NaN or infinity or cannot be summed, or the request does not follow the
        protocol, for example if it asks for a second sum of the same round.
    """
    request = records_of(message.content, ConfigRecord).get(SECURE)
    if request is None:
        return call_next(message, context)
    del message.content[SECURE]
    stage = request["stage"]
    if stage == TRAIN:
        return _trained(message, context, call_next, request, name or str(context.node_id))
    answers = {SHARE: _shares, MASK: _vector, UNMASK: _opened}
    if stage not in answers:
        raise expected("stage of secure aggregation", f"one of {list(answers)}", stage)
    member = _member(context, request)
    content = RecordDict({SECURE: request_of(stage, member.attempt, {})})
    answers[stage](context.state, request, member, content)
    context.state[MEMBER] = ConfigRecord(member.to_config())
    return Message(content, reply_to=message)


# The training -----------------------------------------------------------------------------------


def _trained(
    message: Message, context: Context, call_next: Next, request: ConfigRecord, name: str
) -> Message:
    if request["participants"] < FEWEST:  # type: ignore[operator]
        wanted = f"at least {FEWEST}"
        raise expected("participants under secure aggregation", wanted, request["participants"])
    # A repeated attempt needs new keys and no new training.
    if _is_kept(context.state, request):
        key = str(context.state[KEPT]["metrics-key"])
        reply = Message(RecordDict({key: _plain(context.state, request)}), reply_to=message)
    else:
        shared = view(arrays_of(message))
        reply = call_next(message, context)
        # A failure, and a reply without a model, such as one that asks for local arrays.
        if reply.has_error() or not records_of(reply.content, ArrayRecord):
            return reply
        _keep(context.state, reply, shared, request, name)
    member = Member(attempt_of(request))
    context.state[MEMBER] = ConfigRecord(member.to_config())
    metrics = _named(context.state) if request["masked-metrics"] else []
    answer = {"keys": list(member.public_keys), "metrics": metrics}
    reply.content[SECURE] = request_of(TRAIN, member.attempt, answer)
    return reply


def _is_kept(state: RecordDict, request: ConfigRecord) -> bool:
    kept = records_of(state, ConfigRecord).get(KEPT)
    return (
        kept is not None
        and WORDS in state
        and all(kept[key] == request[key] for key in ("session", "round", "training"))
    )


def _keep(
    state: RecordDict, reply: Message, shared: Arrays, request: ConfigRecord, name: str
) -> None:
    """Store the words of the reply's model and its metrics; remove the model from the reply."""
    trained = view(arrays_of(reply))
    weight = _weight_of(reply, request)
    layout = Layout.from_config(request)
    generator = np.random.default_rng(_seed(request, name))
    words, clipped = layout.encode(shared, trained, weight, generator)
    [(key, metrics)] = records_of(reply.content, MetricRecord).items()
    for model in records_of(reply.content, ArrayRecord):
        del reply.content[model]
    examples = str(request["examples-key"])
    state[METRICS] = MetricRecord({n: v for n, v in metrics.items() if n != examples})
    state[KEPT] = ConfigRecord(
        {
            **{entry: request[entry] for entry in ("session", "round", "training")},
            **request,
            "metrics-key": key,
            "weight": weight,
            "clipped": clipped,
        }
    )
    state[WORDS] = into_record(words)
    reply.content[key] = _plain(state, request)


def _weight_of(reply: Message, request: ConfigRecord) -> int:
    examples = examples_of(reply, str(request["examples-key"]))
    if not request["weighted"]:
        return 1
    if examples != int(examples):
        raise expected("number of examples under secure aggregation", "a whole number", examples)
    return int(examples)


def _seed(request: ConfigRecord, name: str) -> int:
    """Return the seed of the rounding, which differs for every participant and round."""
    text = f"{request['seed']!r}|{request['round']!r}|{name}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "little")


def _plain(state: RecordDict, request: ConfigRecord) -> MetricRecord:
    """Return the metrics that travel without a mask."""
    if request["masked-metrics"]:
        return MetricRecord()
    return MetricRecord({**records_of(state, MetricRecord)[METRICS]})


def _named(state: RecordDict) -> list[str]:
    """Return the names of the metrics that are masked: those that are numbers."""
    metrics = records_of(state, MetricRecord)[METRICS]
    return [name for name, value in metrics.items() if not isinstance(value, list)]


# The stages after it ----------------------------------------------------------------------------


def _member(context: Context, request: ConfigRecord) -> Member:
    record = records_of(context.state, ConfigRecord).get(MEMBER)
    if record is not None:
        member = Member.from_config(record)
        if member.attempt == attempt_of(request):
            return member
    raise ColearnError(
        "secure aggregation: expected keys of this attempt, found none at this participant; its "
        "client state is lost, or it has begun another attempt"
    )


def _shares(state: RecordDict, request: ConfigRecord, member: Member, content: RecordDict) -> None:
    values: dict[str, Any] = dict(request)
    member.names = list(values["names"])
    shares, commitment = member.share(
        values["index"], values["keys"], values["ciphers"], values["threshold"]
    )
    content[SECURE] = ConfigRecord(
        {**records_of(content, ConfigRecord)[SECURE], "shares": shares, "commitment": commitment}
    )


def _vector(state: RecordDict, request: ConfigRecord, member: Member, content: RecordDict) -> None:
    values: dict[str, Any] = dict(request)
    kept: dict[str, Any] = dict(records_of(state, ConfigRecord).get(KEPT, ConfigRecord()))
    if WORDS not in state or (kept["session"], kept["round"]) != (
        member.attempt.session,
        member.attempt.round,
    ):
        raise ColearnError("secure aggregation: expected the trained model of this round, lost")
    masks = member.mask(dict(zip(values["senders"], values["shares"], strict=True)))
    words = {n: a.copy() for n, a in view(records_of(state, ArrayRecord)[WORDS]).items()}
    totals = [kept["weight"], kept["clipped"]]
    metrics = records_of(state, MetricRecord)[METRICS]
    totals += Layout.from_config(kept).encode_metrics(metrics, values["metrics"], kept["weight"])
    # Signed numbers modulo 2^64.
    last = np.array(totals, np.int64).view(np.uint64)
    for array in (*words.values(), last):
        masks.add_to(array)
    content[WORDS], content[TOTALS] = into_record(words), to_record({"totals": last})


def _opened(state: RecordDict, request: ConfigRecord, member: Member, content: RecordDict) -> None:
    survivors: list[int] = list(request["survivors"])  # type: ignore[arg-type]
    before = records_of(state, ConfigRecord).get(UNMASKED)
    seeds, private = member.unmask(survivors)
    names = sorted(member.names[index] for index in survivors)
    of: dict[str, Any] = {"session": member.attempt.session, "round": member.attempt.round}
    # Two sums of one round over different participants differ by the models of a few.
    if (
        before is not None
        and all(before[key] == value for key, value in of.items())
        and before["names"] != names
    ):
        raise expected(
            f"participants of the sum of round {member.attempt.round}",
            f"{before['names']!r}, whose sum was unmasked",
            names,
        )
    state[UNMASKED] = ConfigRecord({**of, "names": names})
    state.pop(WORDS, None)
    content[SECURE] = ConfigRecord(
        {**records_of(content, ConfigRecord)[SECURE], "seeds": seeds, "private": private}
    )
