"""MeteringGrid: counts the traffic between server and participants, message by message."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from ..records import data_bytes, records_of
from ..traffic import Transfers
from .threaded import ThreadedGrid
from .wrapping import WrappingGrid


class MeteringGrid(WrappingGrid):
    """A Grid around Flower's Grid that counts the messages' bytes.

    It is the innermost layer, so that it counts messages as they are sent: each message's
    serialised arrays and control records, per destination, including restarts and refused replies.
    It does not count TLS and framing, and it counts equal arrays every time, although Flower sends
    them only once.

    Parameters
    ----------
    grid : Grid
        Flower's grid. The exchanges among the participants of a `ThreadedGrid` are counted too,
        half of them as downwards.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self._moved: defaultdict[int, Transfers] = defaultdict(Transfers)
        self._exchanged = grid.exchanged if isinstance(grid, ThreadedGrid) else 0

    def take(self) -> dict[int, Transfers]:
        """Return the traffic since the last call by node id; exchanges in groups have the id 0."""
        self._count_exchanges()
        moved, self._moved = dict(self._moved), defaultdict(Transfers)
        return moved

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push and count messages."""
        batch = list(messages)
        ids = list(self.grid.push_messages(batch))
        # Flower's grid leaves out the ids of messages that it could not push.
        accepted = set(ids)
        self._count_sent(m for m in batch if m.metadata.message_id in accepted)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull and count replies."""
        return self._counted(self.grid.pull_messages(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send and receive, counting both."""
        batch = list(messages)
        replies = self.grid.send_and_receive(batch, timeout=timeout)
        self._count_sent(batch)
        return self._counted(replies)

    def _count_sent(self, messages: Iterable[Message]) -> None:
        for message in messages:
            models, size = _arrays_of(message)
            self._moved[message.metadata.dst_node_id] += Transfers(
                models_down=models, bytes_down=size, control_down=_control_of(message)
            )

    def _counted(self, replies: Iterable[Message]) -> list[Message]:
        arrived = list(replies)
        for reply in arrived:
            models, size = _arrays_of(reply)
            self._moved[reply.metadata.src_node_id] += Transfers(
                models_up=models, bytes_up=size, control_up=_control_of(reply)
            )
        return arrived

    def _count_exchanges(self) -> None:
        if not isinstance(self.grid, ThreadedGrid):
            return
        moved = self.grid.exchanged - self._exchanged
        self._exchanged = self.grid.exchanged
        if moved:
            self._moved[0] += Transfers(bytes_down=moved // 2, bytes_up=moved - moved // 2)


def _arrays_of(message: Message) -> tuple[int, int]:
    """Return the number of models in a message, and the bytes of their serialised arrays."""
    if not message.has_content():
        return 0, 0
    # An empty record is not a model.
    records = [record for record in records_of(message.content, ArrayRecord).values() if record]
    return len(records), sum(map(data_bytes, records))


def _control_of(message: Message) -> int:
    return control_bytes(message.content) if message.has_content() else 0


def control_bytes(content: RecordDict) -> int:
    """Return the bytes of the keys and values of configs and metrics, without arrays.

    A number has 8 bytes, a truth value 1, and text its length in UTF-8. Flower's own envelope is
    not counted.
    """
    records: list[Mapping[str, object]] = [
        *map(dict, records_of(content, ConfigRecord).values()),
        *map(dict, records_of(content, MetricRecord).values()),
    ]
    return sum(_size(key) + _size(value) for record in records for key, value in record.items())


def _size(value: object) -> int:
    if isinstance(value, bool):
        return 1
    if isinstance(value, str):
        # A lone surrogate is no valid UTF-8, and must not end a run because its bytes are counted.
        return len(value.encode(errors="surrogatepass"))
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    return 8
