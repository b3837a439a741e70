"""The traffic between server and participants in a round, and the events of participants."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from .text import printable

LONGEST_REASON = 1000
"""The largest number of characters of an event's reason, which a participant may have chosen."""

EventKind = Literal["restart", "refusal", "absence", "reinitialised", "warning"]


@dataclass(frozen=True)
class Event:
    """An event of one participant in a round.

    Attributes
    ----------
    kind : {"restart", "refusal", "absence", "reinitialised", "warning"}
        A refusal is an invalid reply; after it comes a restart or, when restarts are spent, an
        absence. A participant is reinitialised if it has lost its local arrays and received those
        of the shared model. A warning concerns a participant that is in the average.
    participant : str
        The participant's name where known, else its node id.
    reason : str
        The reason, for the record; it is bounded and printable, see `flwr_colearn.text.printable`.
    """

    kind: EventKind
    participant: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", printable(self.reason, LONGEST_REASON))

    def entry(self) -> dict[str, str]:
        """Return the event as an entry of a record."""
        return {"participant": self.participant, "reason": self.reason}


@dataclass(frozen=True)
class Transfers:
    """The numbers of models and bytes between server and participants.

    Attributes
    ----------
    models_down, models_up : int
        The number of models sent to, and received from, the participants.
    bytes_down, bytes_up : int
        The bytes of their serialised arrays.
    control_down, control_up : int
        The bytes of configs and metrics, see `flwr_colearn.grids.control_bytes`.
    """

    models_down: int = 0
    models_up: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    control_down: int = 0
    control_up: int = 0

    def __add__(self, other: "Transfers") -> "Transfers":
        return Transfers(
            self.models_down + other.models_down,
            self.models_up + other.models_up,
            self.bytes_down + other.bytes_down,
            self.bytes_up + other.bytes_up,
            self.control_down + other.control_down,
            self.control_up + other.control_up,
        )

    @property
    def total(self) -> int:
        """The sum of all bytes in both directions, with those of configs and metrics."""
        return self.bytes_down + self.bytes_up + self.control_down + self.control_up


class Directions(NamedTuple):
    """A number for each direction: to the participants, and from them."""

    down: int = 0
    up: int = 0


@dataclass(frozen=True)
class RoundTraffic:
    """The traffic and events since the last `ConnectedGrid.take`; see `flwr_colearn.Transport`.

    Attributes
    ----------
    bytes : Directions
        The bytes of serialised arrays.
    control : Directions
        The bytes of configs and metrics.
    events : list of Event
        Restarts, refusals, absences and reinitialised participants, in order.
    seconds : float
        The duration of the longest successful attempt in the last train round.
    durations : dict
        The duration of each successful attempt in it, by participant.
    names : dict
        The names of participants by node id; node ids where the name is unknown.
    models : Directions
        The number of models.
    gone : int
        The number of participants that were given up because they left and did not come back.
    secure : dict
        The figures of secure aggregation, see `flwr_colearn.RoundRecord`; empty without it.
    shared : dict
        By participant the metrics of its training that it lets the server record by name.
    """

    bytes: Directions = field(default_factory=Directions)
    control: Directions = field(default_factory=Directions)
    events: list[Event] = field(default_factory=list)
    seconds: float = 0.0
    durations: dict[str, float] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    models: Directions = field(default_factory=Directions)
    gone: int = 0
    secure: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, dict[str, float]] = field(default_factory=dict)
