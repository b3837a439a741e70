"""The records of a scheme in messages: LocalRequest to a participant, LocalAnswer in its reply."""

from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, MessageType

LOCAL = "normalization"
"""The key of the ConfigRecord with the request to the participant's mod, and with its answer."""

RECALIBRATE = f"{MessageType.TRAIN}.recalibrate"
"""The type of the message that requests the statistics of a participant's data."""


@dataclass(frozen=True)
class LocalRequest:
    """The request of a message to the participant's mod.

    Attributes
    ----------
    session : str
        The session of the run; local arrays of another session are not used.
    round : int
        The number of the round, from 1.
    local : dict
        The position in the model of every local array, by name.
    returned : list of str
        The names of the arrays that the reply must contain.
    stepped : list of str
        The names of local arrays for which the training returns gradients.
    sgd : list of float
        The learning rate, momentum and weight decay of the participant's step with them.
    """

    session: str
    round: int
    local: dict[str, int]
    returned: list[str]
    stepped: list[str] = field(default_factory=list)
    sgd: list[float] = field(default_factory=list)

    def to_record(self) -> ConfigRecord:
        """Return the request as a record of a message."""
        record = ConfigRecord(
            {
                "session": self.session,
                "round": self.round,
                "local": list(self.local),
                "positions": list(self.local.values()),
                "returned": self.returned,
            }
        )
        if self.sgd:
            record["stepped"], record["sgd"] = self.stepped, self.sgd
        return record

    @classmethod
    def from_record(cls, record: ConfigRecord) -> "LocalRequest":
        """Read the request from the record that `to_record` returned."""
        values: dict[str, Any] = dict(record)
        return cls(
            session=str(values["session"]),
            round=int(values["round"]),
            local=dict(zip(values["local"], values["positions"], strict=True)),
            returned=list(values["returned"]),
            stepped=list(values.get("stepped", ())),
            sgd=list(values.get("sgd", ())),
        )


@dataclass(frozen=True)
class LocalAnswer:
    """The participant's answer in a reply.

    Attributes
    ----------
    lost : bool
        Whether the participant has lost its local arrays. It has not trained then, and needs those
        of the shared model.
    reinitialised : bool
        Whether it had lost its local arrays, and started from those of the shared model.
    """

    lost: bool = False
    reinitialised: bool = False

    def to_record(self) -> ConfigRecord:
        """Return the answer as a record of a reply."""
        return ConfigRecord({"lost": self.lost, "reinitialised": self.reinitialised})

    @classmethod
    def from_record(cls, record: ConfigRecord | None) -> "LocalAnswer":
        """Read the answer from its record; a participant without state sends none."""
        values = {} if record is None else dict(record)
        return cls(bool(values.get("lost")), bool(values.get("reinitialised")))
