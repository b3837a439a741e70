"""CompressionGrid: the layer that encodes the models in messages and decodes those in replies."""

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from ..errors import expected
from ..grids import RewritingGrid
from ..records import config_of, fingerprint, into_record, is_unchanged, kind_of, records_of
from ..roles import Arrays
from .agreement import AGREEMENT, LOCAL_REFERENCE, Compression, check_agreed

_REMEMBERED = 2
"""The number of encoded models in the cache: a round sends one model, or two where only some
participants have their local arrays."""


class CompressionGrid(RewritingGrid):
    """A Grid around any Grid that compresses the models in messages.

    Strategies send and receive ordinary arrays: the models of train and evaluate messages are
    encoded, each once for all participants, and those of train replies are decoded. Participants
    need `flwr_colearn.participant_mod`.

    Parameters
    ----------
    grid : Grid
        The inner grid.
    compression : Compression
        The codecs.

    Attributes
    ----------
    reference : mapping of str to numpy.ndarray or None
        The reference model of differences where participants keep their models (see
        `LOCAL_REFERENCE`); the strategy sets it. Otherwise the reference is the model in the
        message.
    """

    def __init__(self, grid: Grid, compression: Compression) -> None:
        super().__init__(grid)
        self.compression = compression
        self.reference: Arrays | None = None
        self._encoded: list[tuple[list[bytes], ArrayRecord, Arrays]] = []

    def outgoing(self, message: Message) -> RecordDict:
        """Return the content with its model encoded, and with the agreement."""
        records = records_of(message.content, ArrayRecord)
        asked = bool(records) or AGREEMENT in message.content
        if kind_of(message) not in (MessageType.TRAIN, MessageType.EVALUATE) or not asked:
            return message.content
        if len(records) > 1:
            raise expected("message to compress", "at most one ArrayRecord", sorted(records))
        content = RecordDict({**message.content, AGREEMENT: self._request(message)})
        for key, record in records.items():
            content[key] = self._encode(record)[0]
        return content

    def incoming(self, sent: Message, reply: Message) -> None:
        """Decode the model of a train reply."""
        if kind_of(sent) != MessageType.TRAIN:
            return
        said = records_of(reply.content, ConfigRecord).get(AGREEMENT)
        request = self._request(sent)
        check_agreed(said, request)
        del reply.content[AGREEMENT]
        models = records_of(reply.content, ArrayRecord)
        # A reply with several models is refused by the strategy's check.
        if len(models) != 1:
            return
        [(key, arrays)] = models.items()
        decoded = self.compression.up.decode(arrays, self._base(sent, request))
        reply.content[key] = into_record(dict(decoded))

    def _base(self, sent: Message, request: ConfigRecord) -> Arrays | None:
        """Return the reference model of a reply, whose names, shapes and types it must have."""
        if request.get(LOCAL_REFERENCE):
            return self.reference
        records = list(records_of(sent.content, ArrayRecord).values())
        # The model as the participant decoded it, and not the exact one, which it does not have.
        return self._encode(records[0])[1] if records else None

    def _request(self, message: Message) -> ConfigRecord:
        """Return the agreement in a message, which its reply must confirm.

        A strategy that leaves models with the participants has put further entries into the
        message. Otherwise a train message has the round and the session, by which the participant
        stores the rounding error for the next round.
        """
        more = dict(records_of(message.content, ConfigRecord).get(AGREEMENT, {}))
        if not more and message.metadata.message_type == MessageType.TRAIN:
            config = config_of(message.content)
            more = {"round": config.get("server-round", 0), "session": config.get("session", "")}
        return ConfigRecord({**self.compression.request(), **more})

    def _encode(self, record: ArrayRecord) -> tuple[ArrayRecord, Arrays]:
        """Return an encoded model, and the model that participants will decode from it."""
        # The cache is searched by the identity of the arrays' bytes, without reading them.
        for known, encoded, arriving in self._encoded:
            if is_unchanged(record, known):
                return encoded, arriving
        encoded, arriving = self.compression.down.encode(record)
        self._encoded = [(fingerprint(record), encoded, arriving), *self._encoded][:_REMEMBERED]
        return encoded, arriving
