"""BoundingGrid: the layer that bounds what a participant's reply may hold."""

from collections.abc import Iterable
from logging import WARNING

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from .._flwr import REFUSED, error_reply, set_message_id
from ..errors import expected
from ..records import data_bytes, records_of
from ..text import printable
from .wrapping import WrappingGrid

LARGEST_RATIO, ALLOWANCE = 4, 2**24
"""A reply's arrays may have so many times the bytes of the model, and so many bytes more."""

MOST_METRICS, LONGEST_KEY, MOST_NUMBERS = 256, 128, 10_000
"""The bounds of a reply's metrics: their number, the length of a name, the numbers in all lists."""


class BoundingGrid(WrappingGrid):
    """A Grid around any Grid that bounds the arrays and metrics in replies.

    A reply with far more bytes of arrays than the model is refused before any layer reads them: an
    error reply with the code `REFUSED` takes its place. Metrics beyond the bounds are left out,
    with a log warning, since a training is not worth less for them.

    Parameters
    ----------
    grid : Grid
        The inner grid.

    Attributes
    ----------
    model_bytes : int
        The bytes of the largest model that was sent, uncompressed; 0 while there was none, which
        allows any reply.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.model_bytes = 0

    def refer_to(self, message: Message) -> None:
        """Take the model in a message, which is not compressed yet, into account."""
        self.model_bytes = max(self.model_bytes, _bytes_of(message))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies, within the bounds."""
        return [self._bounded(reply) for reply in self.grid.pull_messages(message_ids)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the replies, within the bounds."""
        replies = self.grid.send_and_receive(messages, timeout=timeout)
        return [self._bounded(reply) for reply in replies]

    def _bounded(self, reply: Message) -> Message:
        if not reply.has_content():
            return reply
        largest, size = LARGEST_RATIO * self.model_bytes + ALLOWANCE, _bytes_of(reply)
        if self.model_bytes and size > largest:
            error = expected("bytes of arrays in the reply", f"at most {largest}", size)
            return _refused(reply, str(error))
        for key, metrics in list(records_of(reply.content, MetricRecord).items()):
            kept = bounded_metrics(metrics)
            if len(kept) < len(metrics):
                node, left_out = reply.metadata.src_node_id, len(metrics) - len(kept)
                log(WARNING, "Reply of node %s: %s metrics are left out", node, left_out)
            reply.content[key] = kept
        return reply


def bounded_metrics(metrics: MetricRecord) -> MetricRecord:
    """Return the metrics within the bounds, in their order, with printable names.

    Metrics beyond `MOST_METRICS` are left out, and lists with which there are more than
    `MOST_NUMBERS` numbers in lists.
    """
    kept, room = MetricRecord(), MOST_NUMBERS
    for key, value in metrics.items():
        size = len(value) if isinstance(value, list) else 0
        if size <= room and len(kept) < MOST_METRICS:
            kept[printable(key, LONGEST_KEY)] = value
            room -= size
    return kept


def _bytes_of(message: Message) -> int:
    return sum(map(data_bytes, records_of(message.content, ArrayRecord).values()))


def _refused(reply: Message, reason: str) -> Message:
    """Return the error reply that takes the place of a reply."""
    metadata = reply.metadata
    # The message that was replied to is not known here; the error needs its id and its node only.
    sent = Message(RecordDict(), metadata.src_node_id, metadata.message_type)
    set_message_id(sent, metadata.reply_to_message_id)
    return error_reply(sent, reply, REFUSED, reason)
