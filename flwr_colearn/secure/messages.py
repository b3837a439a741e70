"""The records of secure aggregation in messages: requests to participants, and their answers."""

from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from ..aggregation import ASK, ECHO, check_echo
from ..errors import ColearnError, expected
from ..records import records_of
from .masks import Attempt

SECURE = "colearn.secure"
"""The key of the ConfigRecord with a request, and with its answer."""

WORDS = f"{SECURE}.words"
"""The key of the ArrayRecord with a participant's masked model."""

TOTALS = f"{SECURE}.totals"
"""The key of the ArrayRecord with the masked weight, number of clipped elements, and metrics."""

TRAIN, SHARE, MASK, UNMASK = "train", "share", "mask", "unmask"
"""The stages: every one is a message to the participants."""


def request_of(stage: str, attempt: Attempt, entries: Mapping[str, Any]) -> ConfigRecord:
    """Return the request of a stage."""
    return ConfigRecord(
        {
            "stage": stage,
            "session": attempt.session,
            "round": attempt.round,
            "attempt": attempt.number,
            **entries,
        }
    )


def query_of(stage: str, attempt: Attempt, entries: Mapping[str, Any]) -> RecordDict:
    """Return the content of a message for one of the stages after the training."""
    return RecordDict(
        {
            ECHO: ConfigRecord({ASK: SECURE}),
            SECURE: request_of(stage, attempt, entries),
        }
    )


def attempt_of(request: ConfigRecord) -> Attempt:
    """Return the attempt to which a request belongs."""
    values: dict[str, Any] = dict(request)
    return Attempt(str(values["session"]), int(values["round"]), int(values["attempt"]))


def answer_in(content: RecordDict, stage: str, attempt: Attempt) -> ConfigRecord:
    """Return the answer in a reply.

    Raises
    ------
    ColearnError
        If there is none, or it answers another stage or attempt.
    """
    answer = records_of(content, ConfigRecord).get(SECURE)
    if answer is None:
        raise ColearnError(
            "reply: expected a model under masks by flwr_colearn.participant_mod, found none; add "
            "participant_mod to the ClientApp's mods: ClientApp(mods=[participant_mod])"
        )
    wanted = (stage, attempt.session, attempt.round, attempt.number)
    found = tuple(answer.get(key) for key in ("stage", "session", "round", "attempt"))
    if found != wanted:
        raise expected("answer of secure aggregation", str(wanted), found)
    return answer


def list_in(answer: ConfigRecord, key: str, kind: type) -> list[Any]:
    """Return a list in an answer.

    Raises
    ------
    ColearnError
        If there is none, or it has elements of another type.
    """
    values = answer.get(key)
    if not isinstance(values, list) or not all(isinstance(each, kind) for each in values):
        raise expected(f"'{key}' in the answer", f"a list of {kind.__name__}", type(values))
    return values


def check_trained(sent: Message, reply: Message) -> None:
    """Raise a ColearnError unless a reply to a training has keys, and no model.

    It is the check of replies that a restart depends on; see `RecoveringGrid`.
    """
    check_echo(sent, reply)
    request = records_of(sent.content, ConfigRecord)[SECURE]
    answer = answer_in(reply.content, TRAIN, attempt_of(request))
    if len(list_in(answer, "keys", bytes)) != 2:
        raise expected("keys in the answer", "two", len(list_in(answer, "keys", bytes)))
    list_in(answer, "metrics", str)
    if records_of(reply.content, ArrayRecord):
        raise expected("reply under secure aggregation", "no arrays", "some")
