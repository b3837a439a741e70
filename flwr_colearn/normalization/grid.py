"""NormalizationGrid: strategies see whole models, and messages carry what a scheme lets travel."""

from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from ..errors import ColearnError, NotAnsweredError
from ..grids import RewritingGrid
from ..records import config_of, fingerprint, is_unchanged, kind_of, records_of, view
from ..roles import Role, Roles, assign_roles
from ..traffic import Event
from .messages import LOCAL, RECALIBRATE, LocalAnswer, LocalRequest
from .schemes import Normalization


@dataclass
class _Model:
    """The model's names by what becomes of them; the same in every round."""

    roles: dict[str, Role]
    local: dict[str, int]


class NormalizationGrid(RewritingGrid):
    """A Grid around any Grid that leaves out of messages what stays with the participants.

    Outgoing models lose the arrays that the scheme keeps with the participants; replies get them
    back, as they were sent, so that any strategy on top of it, and `RecoveringGrid` too, sees
    whole models. A participant that is not known to hold its own arrays is sent all of them. One
    that says that it lost them has not answered, and is asked again where there is recovery; a
    reply that brings what must stay is refused.

    It stands inside a `RecoveringGrid`; ``Transport(normalization=...)`` and the strategies of
    this package do that by themselves.

    Parameters
    ----------
    grid : Grid
        The one inside.
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
        self._holders: set[int] = set()
        self._reduced: tuple[list[bytes], ArrayRecord] = ([], ArrayRecord())
        self._events: list[Event] = []

    def take_events(self) -> list[Event]:
        """Return which nodes were reinitialised since the last call, by node id."""
        events, self._events = self._events, []
        return events

    def outgoing(self, message: Message) -> RecordDict:
        """Return the content without arrays that stay, and with what the participant is told."""
        kind = kind_of(message)
        records = list(records_of(message.content, ArrayRecord).items())
        if kind not in (MessageType.TRAIN, MessageType.EVALUATE) or len(records) != 1:
            return message.content
        [(key, arrays)] = records
        model = self._model_of(arrays)
        content = RecordDict({**message.content})
        config = self._tell(content)
        request = self._request(message, arrays, config)
        if message.metadata.dst_node_id in self._holders:
            content[key] = self._reduce(arrays, model)
        if model.local or (kind == MessageType.TRAIN and len(request.returned) < len(arrays)):
            content[LOCAL] = request.to_record()
        return content

    def incoming(self, sent: Message, reply: Message) -> None:
        """Give a train reply the arrays that did not travel, as they were sent."""
        node_id = reply.metadata.src_node_id
        answer = LocalAnswer.from_record(records_of(reply.content, ConfigRecord).get(LOCAL))
        if answer.lost:
            self._holders.discard(node_id)
            raise NotAnsweredError(
                "it lost its local normalization arrays, and starts again from the shared model's"
            )
        if kind_of(sent) != MessageType.TRAIN or self._model is None:
            return
        (whole,) = records_of(sent.content, ArrayRecord).values()
        returned = set(self._request(sent, whole, config_of(sent.content)).returned)
        for key, arrays in list(records_of(reply.content, ArrayRecord).items()):
            self._refuse_local(arrays)
            reply.content[key] = _completed(whole, arrays, returned)
        if self._model.local and records_of(reply.content, ArrayRecord):
            self._holders.add(node_id)
        if answer.reinitialised:
            reason = "it began from the shared model's local arrays"
            self._events.append(Event("reinitialised", str(node_id), reason))

    def _refuse_local(self, arrays: ArrayRecord) -> None:
        assert self._model is not None
        leaked = [name for name in arrays if name in self._model.local]
        if leaked:
            raise ColearnError(
                f"reply: expected only what travels under {self.scheme.name}, found '{leaked[0]}'; "
                "add participant_mod to the mods of the ClientApp"
            )

    def _tell(self, content: RecordDict) -> ConfigRecord:
        """Add the scheme to the config in a content, and return it."""
        for key, record in list(records_of(content, ConfigRecord).items()):
            server_round = record.get("server-round")
            if isinstance(server_round, int):
                told = ConfigRecord({**record, **self.scheme.config(server_round)})
                content[key] = told
                return told
        raise ColearnError(
            f"normalization {self.scheme.name}: expected 'server-round' in a message's config, "
            f"found only {[sorted(r) for r in records_of(content, ConfigRecord).values()]}"
        )

    def _request(self, message: Message, arrays: ArrayRecord, config: ConfigRecord) -> LocalRequest:
        """Return what the participant is told of the arrays that stay."""
        assert self._model is not None
        roles, local = self._model.roles, self._model.local
        server_round = config["server-round"]
        assert isinstance(server_round, int)
        sgd = [float(value) for value in config.get("sgd", [])]  # type: ignore[union-attr]
        if message.metadata.message_type == RECALIBRATE:
            returned = [n for n in arrays if roles[n] in (Role.MEAN, Role.VARIANCE)]
        else:
            unreturned = self.scheme.not_returned(server_round, view(arrays), roles)
            returned = [name for name in arrays if name not in {*local, *unreturned}]
        return LocalRequest(
            session=str(config.get("session", "")),
            round=server_round,
            local=local,
            returned=returned,
            stepped=[n for n in local if roles[n] is Role.TRAINABLE] if sgd else [],
            sgd=sgd,
        )

    def _reduce(self, arrays: ArrayRecord, model: _Model) -> ArrayRecord:
        """Return the arrays that travel: one record for all messages that share a model."""
        known, reduced = self._reduced
        if not is_unchanged(arrays, known):
            reduced = ArrayRecord({n: a for n, a in arrays.items() if n not in model.local})
            self._reduced = fingerprint(arrays), reduced
        return reduced

    def _model_of(self, arrays: ArrayRecord) -> _Model:
        names = list(arrays)
        if self._model is None or set(self._model.roles) != set(names):
            model = view(arrays)
            roles = assign_roles(model, self._given_roles)
            self.scheme.check(model, roles)
            local = self.scheme.local(model, roles)
            self._model = _Model(roles, {name: names.index(name) for name in local})
        return self._model


def _completed(whole: ArrayRecord, arrays: ArrayRecord, returned: set[str]) -> ArrayRecord:
    """Return a reply's model with the arrays that did not travel, as they were sent.

    What must not change comes from the model that was sent, whatever was replied. Arrays that the
    reply lacks or has too many are left so: the strategy refuses it, and says why.
    """
    merged = {
        name: arrays[name] if name in returned else whole[name]
        for name in whole
        if name not in returned or name in arrays
    }
    unknown = {name: array for name, array in arrays.items() if name not in whole}
    return ArrayRecord({**merged, **unknown})
