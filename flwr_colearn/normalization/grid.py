"""NormalizationGrid: the layer that leaves a scheme's local arrays out of messages."""

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
    """The roles of the model's arrays, and the positions of the local ones; equal in all rounds."""

    roles: dict[str, Role]
    local: dict[str, int]


class NormalizationGrid(RewritingGrid):
    """A Grid around any Grid that leaves the participants' local arrays out of messages.

    The layer removes the scheme's local arrays from models that are sent, and adds them to replies
    with the values of the strategy's model. The strategy and `RecoveringGrid` therefore work with
    complete models. A participant that is not known to have local arrays receives those of the
    model. If a participant reports that it has lost them, its reply does not count, and the message
    is sent again where there is recovery. A reply that contains local arrays is refused.

    The layer belongs inside a `RecoveringGrid`, where ``Transport(normalization=...)`` and the
    strategies of this package put it.

    Parameters
    ----------
    grid : Grid
        The inner grid.
    scheme : Normalization
        The scheme, with its local arrays and its entries for the participants' config.
    roles : mapping or sequence, optional
        See `flwr_colearn.Role`.

    Raises
    ------
    ColearnError
        With the first train message, if the scheme cannot work with the model.
    """

    def __init__(self, grid: Grid, scheme: Normalization, roles: Roles = None) -> None:
        super().__init__(grid)
        self.scheme = scheme
        self._given_roles = roles
        self._model: _Model | None = None
        # The nodes that have trained in this run, and so have local arrays of its session.
        self._holders: set[int] = set()
        self._reduced: tuple[list[bytes], ArrayRecord] = ([], ArrayRecord())
        self._events: list[Event] = []

    def take_events(self) -> list[Event]:
        """Return an event for every node that was reinitialised since the last call."""
        events, self._events = self._events, []
        return events

    def outgoing(self, message: Message) -> RecordDict:
        """Return the content without local arrays, and with the request for the participant."""
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
        # Without a request the participant's mod does nothing, which is right where all arrays are
        # exchanged: `Frozen` in its first phase, for example.
        if model.local or (kind == MessageType.TRAIN and len(request.returned) < len(arrays)):
            content[LOCAL] = request.to_record()
        return content

    def incoming(self, sent: Message, reply: Message) -> None:
        """Add the arrays that were not exchanged to a train reply, as in the model sent."""
        node_id = reply.metadata.src_node_id
        answer = LocalAnswer.from_record(records_of(reply.content, ConfigRecord).get(LOCAL))
        if answer.lost:
            # The next message to this node contains the local arrays again.
            self._holders.discard(node_id)
            raise NotAnsweredError(
                "it lost its local normalization arrays, and restarts from the shared model's"
            )
        if kind_of(sent) != MessageType.TRAIN or self._model is None:
            return
        (whole,) = records_of(sent.content, ArrayRecord).values()
        returned = set(self._request(sent, whole, config_of(sent.content)).returned)
        for key, arrays in list(records_of(reply.content, ArrayRecord).items()):
            self._refuse_local(arrays)
            reply.content[key] = _completed(whole, arrays, returned)
        # Its answer says that it has trained; under secure aggregation no array arrives.
        if self._model.local and LOCAL in reply.content:
            self._holders.add(node_id)
        if answer.reinitialised:
            reason = "it started from the shared model's local arrays"
            self._events.append(Event("reinitialised", str(node_id), reason))

    def _refuse_local(self, arrays: ArrayRecord) -> None:
        assert self._model is not None
        leaked = [name for name in arrays if name in self._model.local]
        if leaked:
            raise ColearnError(
                f"reply: expected only shared arrays of {self.scheme.name}, found '{leaked[0]}'; "
                "add participant_mod to the mods of the ClientApp"
            )

    def _tell(self, content: RecordDict) -> ConfigRecord:
        """Add the scheme to the config in a content, and return the config."""
        # A new record, since the messages of a round share one.
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
        """Return the request with the names of local and of returned arrays."""
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
        """Return the exchanged arrays, in one record for all messages that share a model."""
        # One record, so that the compression layer inside encodes it once.
        known, reduced = self._reduced
        if not is_unchanged(arrays, known):
            reduced = ArrayRecord({n: a for n, a in arrays.items() if n not in model.local})
            self._reduced = fingerprint(arrays), reduced
        return reduced

    def _model_of(self, arrays: ArrayRecord) -> _Model:
        names = list(arrays)
        # Other names are another model, for example of a second run.
        if self._model is None or set(self._model.roles) != set(names):
            model = view(arrays)
            roles = assign_roles(model, self._given_roles, quiet=True)
            self.scheme.check(model, roles)
            local = self.scheme.local(model, roles)
            self._model = _Model(roles, {name: names.index(name) for name in local})
        return self._model


def _completed(whole: ArrayRecord, arrays: ArrayRecord, returned: set[str]) -> ArrayRecord:
    """Return a reply's model with the arrays that were not exchanged, as in the model sent.

    An array that must not change is that of the model sent, even if the reply contains it. Missing
    and unknown arrays of the reply stay so: the strategy refuses the reply, and states the reason.
    """
    merged = {
        name: arrays[name] if name in returned else whole[name]
        for name in whole
        if name not in returned or name in arrays
    }
    unknown = {name: array for name, array in arrays.items() if name not in whole}
    return ArrayRecord({**merged, **unknown})
