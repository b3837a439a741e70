"""What server and participants say to each other of a scheme: one record in a message, one back."""

from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, MessageType

LOCAL = "normalization"
"""Key of the ConfigRecord that the server adds for the participant's mod, and of the answer."""

RECALIBRATE = f"{MessageType.TRAIN}.recalibrate"
"""Type of the message that asks for the statistics of a participant's data."""


@dataclass(frozen=True)
class LocalRequest:
    """What a participant is told of the arrays that stay with it.

    Attributes
    ----------
    session : str
        Of the run; local arrays of another session are not used.
    round : int
        From 1.
    local : dict
        The position in the model of every array that stays, by name.
    returned : list of str
        Names of the arrays that the reply must bring.
    stepped : list of str
        Names of local arrays for which the training returns gradients.
    sgd : list of float
        Rate, momentum and weight decay of the step that the participant takes with them.
    """

    session: str
    round: int
    local: dict[str, int]
    returned: list[str]
    stepped: list[str] = field(default_factory=list)
    sgd: list[float] = field(default_factory=list)

    def to_record(self) -> ConfigRecord:
        """Return the request as a message carries it."""
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
        """Read what `to_record` wrote."""
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
    """What a participant answers.

    Attributes
    ----------
    lost : bool
        It has lost its local arrays, trained nothing, and must be sent the shared model's.
    reinitialised : bool
        It had lost them, and began from the shared model's.
    """

    lost: bool = False
    reinitialised: bool = False

    def to_record(self) -> ConfigRecord:
        """Return the answer as a reply carries it."""
        return ConfigRecord({"lost": self.lost, "reinitialised": self.reinitialised})

    @classmethod
    def from_record(cls, record: ConfigRecord | None) -> "LocalAnswer":
        """Read what `to_record` wrote; a reply without it is that of a stateless participant."""
        values = {} if record is None else dict(record)
        return cls(bool(values.get("lost")), bool(values.get("reinitialised")))
