"""NormalizationGrid: strategies see whole models, and messages carry what a scheme lets travel."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from logging import WARNING

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from ..aggregation.replies import failure_of
from ..errors import ColearnError
from ..grids.wrapping import WrappingGrid
from ..records import data_bytes, records_of, view
from ..roles import Role, Roles, assign_roles
from .client import RECORD
from .schemes import Normalization

RECALIBRATE = f"{MessageType.TRAIN}.recalibrate"
"""Type of the message that asks for the statistics of a participant's data."""

REFUSED = 2
"""Flower's code for a ClientApp that failed, under which replies that are no good are passed on."""


@dataclass
class Traffic:
    """Bytes of arrays that a scheme saved, and those it cost, since they were last taken.

    Attributes
    ----------
    saved_down, saved_up : int
        Of arrays that the strategy sent or received as far as it knows, and that did not travel.
    fresh : list of int
        Nodes that had lost what they kept and started from the shared model's arrays.
    """

    saved_down: int = 0
    saved_up: int = 0
    fresh: list[int] = field(default_factory=list)


@dataclass
class _Model:
    """The model's names by what becomes of them; the same in every round."""

    roles: dict[str, Role]
    kept: list[str]
    positions: list[int]


class NormalizationGrid(WrappingGrid):
    """A Grid around any Grid that leaves out of messages what stays with the participants.

    Outgoing models lose the arrays that the scheme keeps with the participants; replies get them
    back, as they were sent, so that any strategy on top of it, and `RecoveringGrid` too, sees
    whole models. A participant that is not known to hold its own arrays is sent all of them. One
    that says that it lost them, or that sends what must stay, has failed: it is restarted
    where there is recovery.

    It stands inside a `RecoveringGrid`: ``RecoveringGrid(NormalizationGrid(grid, scheme))``.
    ``CoLearn(normalization=...)`` does that by itself.

    Parameters
    ----------
    grid : Grid
        The real one.
    scheme : Normalization
        What stays, and what participants are told.
    roles : mapping or sequence, optional
        See `flwr_colearn.Role`.

    Raises
    ------
    ColearnError
        With the first train message, if the model is not one that the scheme works with.
    """

    def __init__(self, grid: Grid, scheme: Normalization, roles: Roles = None) -> None:
        super().__init__(grid)
        self.scheme = scheme
        self._given_roles = roles
        self._model: _Model | None = None
        self._sent: dict[str, Message] = {}
        self._holders: set[int] = set()
        self._traffic = Traffic()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push the messages, less what stays with the participants."""
        whole = list(messages)
        reduced = [self._reduce(message) for message in whole]
        ids = list(self.grid.push_messages(reduced))
        for message, pushed in zip(whole, reduced, strict=True):
            # Whoever waits for the reply knows the message that it gave us.
            message.metadata.__dict__["_message_id"] = pushed.metadata.message_id
            self._sent[pushed.metadata.message_id] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies and complete them."""
        return [self._complete(reply) for reply in self.grid.pull_messages(message_ids)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send the messages, less what stays, and return the completed replies."""
        whole = list(messages)
        reduced = [self._reduce(message) for message in whole]
        replies = list(self.grid.send_and_receive(reduced, timeout=timeout))
        for message, pushed in zip(whole, reduced, strict=True):
            self._sent[pushed.metadata.message_id] = message
        completed = [self._complete(reply) for reply in replies]
        self._sent.clear()
        return completed

    def take_traffic(self) -> Traffic:
        """Return what was saved and who started afresh since the last call."""
        traffic, self._traffic = self._traffic, Traffic()
        return traffic

    def _reduce(self, message: Message) -> Message:
        """Return the message to send in place of a train or evaluate message."""
        kind = message.metadata.message_type.partition(".")[0]
        records = list(records_of(message.content, ArrayRecord).items())
        if kind not in (MessageType.TRAIN, MessageType.EVALUATE) or len(records) != 1:
            return message
        (key, arrays), model = records[0], self._model_of(records[0][1])
        content = RecordDict({**message.content})
        server_round, gradients = self._tell(content)
        if message.metadata.dst_node_id in self._holders:
            travelling = ArrayRecord({n: a for n, a in arrays.items() if n not in model.kept})
            if kind == MessageType.TRAIN:  # strategies count no evaluation
                self._traffic.saved_down += data_bytes(arrays) - data_bytes(travelling)
            content[key] = travelling
        returned = self._returned(message, server_round, arrays)
        if (kind == MessageType.TRAIN and len(returned) < len(arrays)) or model.kept:
            trainable = [n for n in model.kept if model.roles[n] is Role.TRAINABLE]
            content[RECORD] = ConfigRecord(
                {
                    "round": server_round,
                    "kept": model.kept,
                    "positions": model.positions,
                    "returned": returned,
                    **({"stepped": trainable, "sgd": gradients} if gradients else {}),
                }
            )
        return Message(
            content=content,
            dst_node_id=message.metadata.dst_node_id,
            message_type=message.metadata.message_type,
            ttl=message.metadata.ttl,
            group_id=message.metadata.group_id,
        )

    def _tell(self, content: RecordDict) -> tuple[int, list[float]]:
        """Add the scheme to the config; return the round and, with gradients, SGD's settings."""
        for key, record in list(records_of(content, ConfigRecord).items()):
            server_round = record.get("server-round")
            if isinstance(server_round, int):
                content[key] = ConfigRecord({**record, **self.scheme.config(server_round)})
                sgd = record.get("sgd", [])
                return server_round, [float(value) for value in sgd]  # type: ignore[union-attr]
        raise ColearnError(
            f"normalization {self.scheme.name}: expected 'server-round' in a message's config, "
            f"found only {[sorted(r) for r in records_of(content, ConfigRecord).values()]}"
        )

    def _returned(self, message: Message, server_round: int, arrays: ArrayRecord) -> list[str]:
        """Return the names that a reply must bring."""
        assert self._model is not None
        if message.metadata.message_type == RECALIBRATE:
            return [n for n in arrays if self._model.roles[n] in (Role.MEAN, Role.VARIANCE)]
        silent = self.scheme.silent(server_round, view(arrays), self._model.roles)
        left_out = {*self._model.kept, *silent}
        return [name for name in arrays if name not in left_out]

    def _complete(self, reply: Message) -> Message:
        """Return the reply with the whole model, or an error reply if it is no good."""
        node_id = reply.metadata.src_node_id
        sent = self._sent.pop(reply.metadata.reply_to_message_id, None)
        if sent is None or failure_of(reply) is not None:
            return reply
        answer = records_of(reply.content, ConfigRecord).get(RECORD, ConfigRecord())
        if answer.get("lost"):
            self._holders.discard(node_id)
            return self._error(
                reply,
                "it lost its local normalization arrays, and starts again from the shared model's",
            )
        is_train = sent.metadata.message_type.partition(".")[0] == MessageType.TRAIN
        if not is_train or not records_of(reply.content, ArrayRecord) or self._model is None:
            return reply
        return self._completed(sent, reply, bool(answer.get("fresh")))

    def _completed(self, sent: Message, reply: Message, fresh: bool) -> Message:
        assert self._model is not None
        node_id = reply.metadata.src_node_id
        (_, whole), *_ = records_of(sent.content, ArrayRecord).items()
        config = next(
            r for r in records_of(sent.content, ConfigRecord).values() if "server-round" in r
        )
        server_round = config["server-round"]
        assert isinstance(server_round, int)
        absent = set(whole) - set(self._returned(sent, server_round, whole))
        for key, arrays in list(records_of(reply.content, ArrayRecord).items()):
            leaked = [name for name in arrays if name in self._model.kept]
            if leaked:
                return self._error(
                    reply,
                    f"expected only what travels under {self.scheme.name}, found '{leaked[0]}'; "
                    "add normalization_mod to the mods of the ClientApp",
                )
            filled = [n for n in whole if n in absent and n not in arrays]
            self._traffic.saved_up += data_bytes(ArrayRecord({n: whole[n] for n in filled}))
            # What must not change comes from the model that was sent, whatever was replied.
            merged = {
                n: whole[n] if n in absent else arrays[n]
                for n in whole
                if n in absent or n in arrays
            }
            unknown = {n: array for n, array in arrays.items() if n not in whole}
            reply.content[key] = ArrayRecord({**merged, **unknown})
        if self._model.kept:
            self._holders.add(node_id)
        if fresh:
            self._traffic.fresh.append(node_id)
            log(
                WARNING,
                "Normalization: node %s began from the shared model's local arrays",
                node_id,
            )
        return reply

    def _error(self, reply: Message, reason: str) -> Message:
        failed = Message(Error(REFUSED, reason), reply_to=self._sent_as(reply))
        failed.metadata.__dict__["_message_id"] = reply.metadata.message_id
        return failed

    def _sent_as(self, reply: Message) -> Message:
        """Return a message to which an error can be a reply, in place of `reply`."""
        asked = Message(RecordDict(), reply.metadata.src_node_id, reply.metadata.message_type)
        asked.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
        return asked

    def _model_of(self, arrays: ArrayRecord) -> _Model:
        names = list(arrays)
        if self._model is None or set(self._model.roles) != set(names):
            model = view(arrays)
            roles = assign_roles(model, self._given_roles)
            self.scheme.check(model, roles)
            kept = self.scheme.kept(model, roles)
            self._model = _Model(roles, kept, [names.index(name) for name in kept])
        return self._model
