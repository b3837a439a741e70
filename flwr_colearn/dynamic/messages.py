"""What coordinator and learners of model averaging say to each other: the only contract.

Every message is one of Flower's train messages, so that recovery restarts all alike. Its config
says which action it asks for:

=========  ==============================================================
``train``  train some mini-batches; send your model if it is beyond the bound
``fetch``  send your model
``set``    go on from this model, which may be the new reference
=========  ==============================================================

Each is answered by a `Report`. Each may be sent again: the answer is then the same, and nothing is
trained or set twice.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from flwr.app import ConfigRecord, Message

from ..aggregation import failure_of
from ..errors import ColearnError, expected
from ..records import records_of
from ..roles import Arrays

ARRAYS, CONFIG, METRICS, REPORT = "arrays", "config", "metrics", "learner"
"""Keys of the records in messages."""

Action = Literal["train", "fetch", "set"]

_NO_REFERENCE = -1


@dataclass(frozen=True)
class Ask:
    """What the coordinator asks of one learner.

    Attributes
    ----------
    session : str
        Of the training; a learner that remembers another one begins anew.
    server_round : int
        From 1.
    reference_round : int or None
        The round whose full synchronisation gave the reference that the learner must have, 0 for
        the initial model. With the action ``set`` it says that the arrays are that reference;
        ``None`` leaves the reference as it is.
    action : {"train", "fetch", "set"}
        What is asked for.
    mini_batches : int
        How many to train now (b).
    batches_done : int
        Trained by every learner before this round: where in its stream a learner is.
    bound : float
        The learner sends its model if |f - r|^2 is larger.
    left_out : list of str
        Names of the arrays that do not count in the distance; sent with a reference only.
    reference_check : int or None
        `checksum` of the reference, where models travel as differences to it.
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
        """Return the question as the train config carries it."""
        reference = _NO_REFERENCE if self.reference_round is None else self.reference_round
        config = ConfigRecord(
            {
                "session": self.session,
                "server-round": self.server_round,
                "reference-round": reference,
                "action": self.action,
            }
        )
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
        """Read what `to_config` wrote; entries of others are left alone.

        Raises
        ------
        ColearnError
            If the message does not come from `flwr_colearn.DynamicAveraging` or its kin.
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
    """A learner's answer.

    Attributes
    ----------
    examples : float
        Seen since the last full synchronisation: its weight in an average, so that learners of
        equal streams count the same. 0 if its state is lost.
    distance : float
        |f - r|^2 over the trainable arrays.
    lost : str
        Why the learner has no usable state and needs model and reference anew; empty if it has.
    """

    examples: float = 0
    distance: float = 0.0
    lost: str = ""

    def to_config(self) -> ConfigRecord:
        """Return the report as the reply carries it."""
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
        return Report(lost=str(record["lost"]))
    examples, distance = record.get("examples"), record.get("distance")
    for name, value, least in (("examples", examples, 1e-9), ("distance", distance, 0.0)):
        if not isinstance(value, int | float) or not least <= value < math.inf:
            raise expected(f"'{name}' in the reply", "a number that is not negative", value)
    assert isinstance(examples, int | float)
    assert isinstance(distance, int | float)
    return Report(examples, distance)


def checksum(arrays: Arrays) -> int:
    """Return the CRC-32 of all bytes of a model, in its order."""
    value = 0
    for array in arrays.values():
        value = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, value)
    return value
