"""What moved between server and participants in a round, and what happened to participants."""

from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple

EventKind = Literal["restart", "refusal", "absence", "reinitialised"]


@dataclass(frozen=True)
class Event:
    """What a participant's part in a round was besides its model in the mean.

    Attributes
    ----------
    kind : {"restart", "refusal", "absence", "reinitialised"}
        A refusal is a reply that arrived but was no good; it is followed by a restart or, when
        they are spent, by an absence. A participant is reinitialised when it had lost what it keeps
        between rounds and was given the shared model's.
    participant : str
        Its name where known, else its node id.
    reason : str
        For the record.
    """

    kind: EventKind
    participant: str
    reason: str

    def entry(self) -> dict[str, str]:
        """Return the event as a record has it."""
        return {"participant": self.participant, "reason": self.reason}


@dataclass(frozen=True)
class Transfers:
    """What moved between server and participants.

    Attributes
    ----------
    models_down, models_up : int
        Models sent to, and received from, the participants.
    bytes_down, bytes_up : int
        Bytes of their serialised arrays.
    control_down, control_up : int
        Bytes of configs and metrics, see `flwr_colearn.grids.control_bytes`.
    """

    models_down: int = 0
    models_up: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    control_down: int = 0
    control_up: int = 0

    def __add__(self, other: "Transfers") -> "Transfers":
        mine, theirs = asdict(self), asdict(other)
        return Transfers(**{name: mine[name] + theirs[name] for name in mine})

    @property
    def total(self) -> int:
        """All bytes, both directions, control included."""
        return self.bytes_down + self.bytes_up + self.control_down + self.control_up


class Directions(NamedTuple):
    """A count for each direction: to the participants, and from them."""

    down: int = 0
    up: int = 0


@dataclass(frozen=True)
class RoundTraffic:
    """What moved and happened since it was last asked for; see `flwr_colearn.Transport`.

    Attributes
    ----------
    bytes : Directions
        Bytes of serialised arrays.
    control : Directions
        Bytes of configs and metrics.
    events : list of Event
        Restarts, refusals, absences and reinitialised participants, in order.
    seconds : float
        The longest that a participant of the last train round took for its successful attempt.
    names : dict
        Names of participants by node id, as far as they are known.
    models : Directions
        Number of models.
    """

    bytes: Directions = field(default_factory=Directions)
    control: Directions = field(default_factory=Directions)
    events: list[Event] = field(default_factory=list)
    seconds: float = 0.0
    names: dict[int, str] = field(default_factory=dict)
    models: Directions = field(default_factory=Directions)
