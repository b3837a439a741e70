"""MeteredGrid: counts all that moves between server and participants, attempt by attempt."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from ..dynamic.messages import control_bytes
from ..records import data_bytes, records_of
from .wrapping import WrappingGrid


@dataclass(frozen=True)
class Transfers:
    """What moved.

    Attributes
    ----------
    models_down, models_up : int
        Models sent to, and received from, the participants.
    bytes_down, bytes_up : int
        Of their serialised arrays.
    control_down, control_up : int
        Bytes of configs and metrics, see `flwr_colearn.exchange.control_bytes`.
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


class MeteredGrid(WrappingGrid):
    """A Grid around any Grid that counts what goes through it.

    Put inside a `RecoveringGrid`, it sees every restart and every refused reply.

    Parameters
    ----------
    grid : Grid
        The real one.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self._moved = Transfers()

    def take(self) -> Transfers:
        """Return what moved since the last call."""
        moved, self._moved = self._moved, Transfers()
        return moved

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push and count messages."""
        batch = list(messages)
        for message in batch:
            self._count(message, down=True)
        return self.grid.push_messages(batch)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull and count replies."""
        replies = list(self.grid.pull_messages(message_ids))
        for reply in replies:
            self._count(reply, down=False)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send and receive, counting both."""
        batch = list(messages)
        for message in batch:
            self._count(message, down=True)
        replies = list(self.grid.send_and_receive(batch, timeout=timeout))
        for reply in replies:
            self._count(reply, down=False)
        return replies

    def _count(self, message: Message, down: bool) -> None:
        if not message.has_content():
            return
        records = [record for record in records_of(message.content, ArrayRecord).values() if record]
        models, size = len(records), sum(map(data_bytes, records))
        control = control_bytes(message.content)
        self._moved += (
            Transfers(models_down=models, bytes_down=size, control_down=control)
            if down
            else Transfers(models_up=models, bytes_up=size, control_up=control)
        )
