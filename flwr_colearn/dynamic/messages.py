"""The messages between the coordinator and the learners of model averaging.

Every message has Flower's type train, so that recovery restarts participants for all of them. Its
config states the action:

=========  ==============================================================================
``train``  The learner trains mini-batches and sends its model if it is beyond the bound.
``fetch``  The learner sends its model.
``set``    The learner replaces its model, and maybe the reference, by this one.
=========  ==============================================================================

The reply to each has a `Report`. A message may be sent again: the reply is then the same, and the
learner does not train a second time.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord

from ..aggregation import failure_of
from ..errors import ColearnError, expected
from ..records import records_of
from ..roles import Arrays

ARRAYS, CONFIG, METRICS, REPORT = "arrays", "config", "metrics", "learner"
"""The keys of the records in messages."""

Action = Literal["train", "fetch", "set"]

_NO_REFERENCE = -1

_LONGEST_REASON = 500
"""The characters of a learner's own text that are recorded."""

_MOST_EXAMPLES = 2**62
"""The bound of a number of examples: integers of messages have 64 bits."""


@dataclass(frozen=True)
class Ask:
    """A request of the coordinator to one learner.

    Attributes
    ----------
    session : str
        The session of the training; a learner with state of another one is reinitialised.
    server_round : int
        The number of the round, from 1.
    reference_round : int or None
        The round whose full synchronisation gave the reference that the learner must have, 0 for
        the initial model. With the action ``set``, a number means that the arrays are the new
        reference, and ``None`` that the reference stays.
    action : {"train", "fetch", "set"}
        The action.
    mini_batches : int
        b, the number of mini-batches to train.
    batches_done : int
        The number of mini-batches of every learner before this round, which is the position in its
        stream.
    bound : float
        The bound on |f - r|^2 beyond which the learner sends its model.
    left_out : list of str
        The names of the arrays that are not part of the distance; sent only with a reference.
    reference_check : int or None
        The `checksum` of the reference, if models are sent as differences to it.
    """

    session: str
    server_round: int
    reference_round: int | None
    action: Action = "train"
    mini_batches: int = 0
    batches_done: int = 0
    bound: float = math.inf
    left_out: tuple[str, ...] = ()
    reference_check: int | None = None

    def to_config(self) -> ConfigRecord:
        """Return the request as entries of the train config."""
        reference = _NO_REFERENCE if self.reference_round is None else self.reference_round
        config = ConfigRecord(
            {
                "session": self.session,
                "server-round": self.server_round,
                "reference-round": reference,
                "action": self.action,
            }
        )
        # Only the entries of the action, since the bytes of configs are part of the traffic.
        if self.mini_batches:
            config["mini-batches"] = self.mini_batches
            config["batches-done"] = self.batches_done
            config["bound"] = float(self.bound)
        if self.left_out:
            config["left-out"] = list(self.left_out)
        if self.reference_check is not None:
            config["reference-check"] = self.reference_check
        return config

    @classmethod
    def from_config(cls, config: ConfigRecord) -> "Ask":
        """Read the request from the train config; other entries are ignored.

        Raises
        ------
        ColearnError
            If the message is not from `flwr_colearn.DynamicAveraging` or `ModelAveraging`.
        """
        values: dict[str, Any] = dict(config)
        missing = {"session", "server-round", "reference-round"} - set(values)
        if missing:
            raise expected(
                "train config",
                f"'{min(missing)}' among its entries; is the strategy on the server "
                "DynamicAveraging or ModelAveraging?",
                sorted(values),
            )
        reference = values["reference-round"]
        return cls(
            session=values["session"],
            server_round=values["server-round"],
            reference_round=None if reference == _NO_REFERENCE else reference,
            action=values.get("action", "train"),
            mini_batches=values.get("mini-batches", 0),
            batches_done=values.get("batches-done", 0),
            bound=values.get("bound", math.inf),
            left_out=tuple(values.get("left-out", ())),
            reference_check=values.get("reference-check"),
        )


@dataclass(frozen=True)
class Report:
    """A learner's report in its reply.

    Attributes
    ----------
    examples : float
        The number of examples since the last full synchronisation, which is the learner's weight
        in an average. 0 if its state is lost.
    distance : float
        |f - r|^2 over the trainable arrays.
    lost : str
        The reason why the learner has no usable state and must be reinitialised; empty if it has.
    """

    examples: float = 0
    distance: float = 0.0
    lost: str = ""

    def to_config(self) -> ConfigRecord:
        """Return the report as a record of the reply."""
        if self.lost:
            return ConfigRecord({"lost": self.lost})
        return ConfigRecord({"examples": self.examples, "distance": self.distance})


def report_of(reply: Message) -> Report:
    """Return the report in a reply.

    Raises
    ------
    ColearnError
        If the learner failed, or its reply has no well-formed report.
    """
    failure = failure_of(reply)
    if failure is not None:
        raise ColearnError(failure)
    record = records_of(reply.content, ConfigRecord).get(REPORT)
    if record is None:
        raise expected(
            f"ConfigRecord '{REPORT}' in the reply",
            "a learner's report; decorate the training function with @learner(app)",
            sorted(reply.content),
        )
    if "lost" in record:
        return Report(lost=_printable(record["lost"]))
    examples, distance = record.get("examples"), record.get("distance")
    for name, value, least, wanted in (
        ("examples", examples, 1e-9, "a positive number"),
        ("distance", distance, 0.0, "a number that is not negative"),
    ):
        if not isinstance(value, int | float) or not least <= value < math.inf:
            raise expected(f"'{name}' in the reply", wanted, value)
    if examples > _MOST_EXAMPLES:  # type: ignore[operator]  # a number, see above
        raise expected("'examples' in the reply", f"a number up to {_MOST_EXAMPLES}", examples)
    assert isinstance(examples, int | float)
    assert isinstance(distance, int | float)
    return Report(examples, distance)


def metrics_of(reply: Message) -> dict[str, int | float]:
    """Return the numbers among a reply's metrics; none if it has no metrics.

    Raises
    ------
    ColearnError
        If there are metrics, and ``num-examples`` is not a positive number among them. The loss of
        the round is a mean over these examples.
    """
    metrics = records_of(reply.content, MetricRecord).get(METRICS)
    if metrics is None:
        return {}
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    examples = metrics.get("num-examples")
    if "num-examples" not in numbers or not 0 < numbers["num-examples"] <= _MOST_EXAMPLES:
        raise expected(
            "'num-examples' in the reply's metrics",
            "a positive number, that of the examples trained",
            examples,
        )
    return numbers


def _printable(text: object) -> str:
    """Return a learner's text, bounded and without characters that a log cannot show."""
    shown = str(text)[:_LONGEST_REASON]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def checksum(arrays: Arrays) -> int:
    """Return the CRC-32 of all bytes of a model, in its order."""
    value = 0
    for array in arrays.values():
        value = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, value)
    return value
