"""Transport: the features of the exchanges of any Flower strategy, as layers around its grid."""

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields, replace
from logging import INFO
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common import DEFAULT_TTL, log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ._flwr import copied
from ._version import __version__
from .aggregation import ADD_THE_MOD, check_train_reply
from .compression import Compression, CompressionGrid, Uncompressed, as_compression
from .errors import ColearnError, expected
from .grids import BoundingGrid, MeteringGrid, ProgressGrid, SelectingGrid, WrappingGrid
from .normalization import (
    Normalization,
    NormalizationGrid,
    Pooled,
    Recalibrated,
    as_normalization,
)
from .policy import DEFAULT_GUARD, DEFAULT_RECOVERY, Guard, Quorum, Recovery, time_to_live, timed
from .records import SentTypes, config_of, kind_of, records_of
from .recovery import Directory, RecoveringGrid, recovery_on
from .roles import Arrays, Role, Roles, assign_roles, named_roles
from .secure import SecureAggregation, SecureGrid, Surroundings, as_secure, check_trained
from .sharing import shared_by_site
from .traffic import Directions, Event, RoundTraffic, Transfers

Check = Callable[[Message, Message], None]


@dataclass(frozen=True)
class Transport:
    """The features of a strategy's exchange of models, each a layer around Flower's grid.

    ::

        strategy --> Secure > Recovery > Normalization > Compression > Meter --> Flower's grid

    The strategies of this package have a transport of their own. Any other strategy uses one in
    its ServerApp::

        result = strategy.start(Transport(recovery=Recovery()).connect(grid), arrays)

    or, with checkpoints and a history, by `flwr_colearn.run`. Participants need
    `flwr_colearn.participant_mod`.

    Parameters
    ----------
    recovery : Recovery, optional
        The restarts of participants that fail; with ``None`` they are left out, as in Flower. The
        default has three restarts, and none on an `InProcessGrid`, where failures repeat.
    normalization : Normalization, default Pooled()
        The scheme for normalization layers where participants' data differ.
    compression : Compression, default Compression()
        The codecs of models in messages.
    roles : mapping or sequence, optional
        The arrays that are weights, batch-norm means and variances, counters; see
        `flwr_colearn.Role`. The default depends on their names.
    participants : sequence of str, optional
        The registered names of the only SuperNodes that take part, see `SelectingGrid`; by default
        any connected SuperNode may.
    guard : Guard, optional
        The bounds of one participant's update; with ``None`` there are none, and norms are not
        recorded. `flwr_colearn.run` and the strategies of this package apply it. It is off under
        secure aggregation and, except for the record, under differential privacy.
    names : sequence of str, optional
        The names of the arrays in order, ``list(net.state_dict())``, for a model that is sent
        without names; their roles follow from them.
    secure : SecureAggregation, optional
        Secure aggregation, under which the server receives no participant's model. By default there
        is none. Models are then compressed downwards only, and `Recalibrated` and `Synchronised`
        are refused, whose statistics would be exchanged without masks.

    Raises
    ------
    ColearnError
        If an argument is invalid.

    Examples
    --------
    >>> from flwr_colearn import Float16, Int8, LocalStatistics
    >>> transport = Transport(
    ...     normalization=LocalStatistics(), compression=Compression(up=Int8(), down=Float16())
    ... )
    """

    recovery: Recovery | None = DEFAULT_RECOVERY
    normalization: Normalization = field(default_factory=Pooled)
    compression: Compression = field(default_factory=Compression)
    roles: Roles = None
    participants: Sequence[str] | None = None
    guard: Guard | None = DEFAULT_GUARD
    secure: SecureAggregation | None = None
    names: InitVar[Sequence[str] | None] = None

    def __post_init__(self, names: Sequence[str] | None) -> None:
        object.__setattr__(self, "roles", named_roles(names, self.roles))
        if self.recovery is not None and not isinstance(self.recovery, Recovery):
            raise expected("recovery", "a Recovery, or None", self.recovery)
        if self.guard is not None and not isinstance(self.guard, Guard):
            raise expected("guard", "a Guard, or None", self.guard)
        as_normalization(self.normalization)
        as_compression(self.compression)
        if self.participants is not None and (
            isinstance(self.participants, str)
            or not self.participants
            or len(set(self.participants)) < len(self.participants)
        ):
            raise expected("participants", "a sequence of different names", self.participants)
        if as_secure(self.secure) is not None:
            self._check_secure()

    def _check_secure(self) -> None:
        """Raise a ColearnError for a feature that needs a participant's own model."""
        if not isinstance(self.compression.up, Uncompressed):
            raise expected(
                "compression under secure aggregation",
                "up=Uncompressed(), since masked models are random numbers",
                str(self.compression),
            )
        if isinstance(self.normalization, Recalibrated) or self.normalization.all_reduces:
            raise expected(
                "normalization under secure aggregation",
                "a scheme without further exchanges, whose statistics would have no masks",
                self.normalization,
            )
        # Nobody asked for the default one, so that is off.
        if self.guard is not None and self.guard is not DEFAULT_GUARD:
            raise expected(
                "guard under secure aggregation",
                "None, or no argument, since the server receives no participant's update",
                self.guard,
            )

    @property
    def applied_guard(self) -> Guard | None:
        """The guard; None under secure aggregation, where the server receives no single update."""
        return None if self.secure is not None else self.guard

    def required(self, participants: int) -> int:
        """Return the number of models without which a round of so many participants is no round.

        Under secure aggregation all must train under the policies "fail" and "wait" too, but a
        participant that drops out afterwards is left out.
        """
        if self.recovery is None:
            return 0
        needed = self.recovery.required(participants)
        if self.secure is None or isinstance(self.recovery.policy, Quorum):
            return needed
        return self.secure.threshold_of(participants)

    def connect(
        self, grid: Grid, check: Check = check_train_reply, like: ArrayRecord | None = None
    ) -> "ConnectedGrid":
        """Return a grid on which every exchange of models has these features.

        Parameters
        ----------
        grid : Grid
            Flower's grid, or any other. A connected grid keeps its own features too.
        check : callable, optional
            ``(sent, reply) -> None``; raises `ColearnError` for an invalid train reply.
        like : ArrayRecord, optional
            The model in whose types models are sent; by default the first model that is sent.

        Raises
        ------
        ColearnError
            If the grid is connected already with another value of one of these features.
        """
        # The layers are built again around the innermost grid: two layers of one feature, for
        # example of compression, would apply it twice.
        if isinstance(grid, ConnectedGrid):
            return ConnectedGrid(grid.bottom, self.combined(grid.transport), check, like)
        if isinstance(grid, RecoveringGrid):
            own = check if grid.check is check_train_reply else grid.check
            return ConnectedGrid(grid.grid, replace(self, recovery=grid.recovery), own, like)
        return ConnectedGrid(grid, self, check, like)

    def check_privacy(self) -> None:
        """Raise a ColearnError for a feature that must not be used under differential privacy."""
        if not isinstance(self.compression.up, Uncompressed):
            raise expected(
                "compression under differential privacy",
                "up=Uncompressed(), since the wrapper counts on the norm to which updates were "
                "clipped, which rounding changes",
                str(self.compression),
            )
        if self.recovery is not None and isinstance(self.recovery.policy, Quorum):
            raise expected(
                "recovery policy under differential privacy",
                "'fail' or 'wait', since the wrapper's noise is measured for all K participants, "
                "and an average of fewer gives each a larger share than that",
                self.recovery.policy,
            )
        if not self.normalization.travels_whole:
            raise expected(
                "normalization under differential privacy",
                "Pooled() or Average(), since statistics that are exchanged besides the model, and "
                "arrays that stay, have no part in the wrapper's noise",
                self.normalization,
            )
        if self.secure is not None:
            raise expected(
                "secure aggregation under differential privacy",
                "None, since the wrapper clips the updates of single participants",
                self.secure,
            )

    def combined(self, other: "Transport") -> "Transport":
        """Return the transport that has the features of both.

        Raises
        ------
        ColearnError
            If both have another value than the default for one feature, and not the same.
        """
        plain, values = Transport(), {}
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            default = getattr(plain, each.name)
            if mine not in (default, theirs) and theirs != default:
                raise ColearnError(
                    f"{each.name}: expected it once, of the strategy or of the connected grid, "
                    f"found both: {each.name}={mine} of the strategy and "
                    f"Transport({each.name}={theirs})"
                )
            # The default guard that somebody asked for is equal to the one that nobody did.
            values[each.name] = theirs if mine is default or theirs != default else mine
        return Transport(**values)


class ConnectedGrid(WrappingGrid):
    """A grid with the features of a `Transport`, which counts the traffic.

    `Transport.connect` creates it. The config of every message contains the session, which is the
    same for one training across all restarts and resumes. Participants use client state of this
    session only.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    transport : Transport
        The features.
    check, like
        See `Transport.connect`.

    Attributes
    ----------
    transport : Transport
        The features.
    bottom : Grid
        The innermost grid.
    session : str
        The id of the session, random; a resumed run restores the one of the saved run.
    """

    def __init__(
        self,
        grid: Grid,
        transport: Transport,
        check: Check = check_train_reply,
        like: ArrayRecord | None = None,
    ) -> None:
        self.transport, self.bottom = transport, grid
        self.session = secrets.token_hex(8)
        self._asked: list[int] = []
        self._shared: dict[int, dict[str, float]] = {}
        self._types = SentTypes(like)
        names = transport.participants
        self._meter = MeteringGrid(grid if names is None else SelectingGrid(grid, names))
        self._bounds = BoundingGrid(self._meter)
        self._compressing: CompressionGrid | None = None
        self._normalizing: NormalizationGrid | None = None
        self._recovering: RecoveringGrid | None = None
        self._securing: SecureGrid | None = None
        self._directory = Directory()
        super().__init__(self._layers(check))

    def _layers(self, check: Check) -> Grid:
        """Return the layers around the meter."""
        transport = self.transport
        # From inside to outside. The meter counts the compressed bytes. Normalization is outside
        # compression, so that only the arrays that remain are compressed. Recovery is outermost,
        # so that a restart passes through every layer and its check sees complete models. Only
        # secure aggregation is outside it: a round is one training, with restarts, then the sum.
        # Replies are bounded as soon as they are counted, before any other layer reads them.
        top: Grid = self._bounds
        if not transport.compression.is_plain:
            top = self._compressing = CompressionGrid(top, transport.compression)
        if not transport.normalization.travels_whole:
            scheme, roles = transport.normalization, transport.roles
            top = self._normalizing = NormalizationGrid(top, scheme, roles)
        if transport.recovery is not None:
            own = check if transport.secure is None else check_trained
            recovery = recovery_on(self.bottom, transport.recovery)
            top = self._recovering = RecoveringGrid(top, recovery, own)
            self._directory = self._recovering.directory
            if not transport.compression.is_plain:
                self._recovering.needs_mod = (
                    f"reply: expected arrays sent as {transport.compression.up} by "
                    f"flwr_colearn.participant_mod, found none; {ADD_THE_MOD}"
                )
        # Around single trainings: the replies of secure aggregation arrive all together.
        top = self._progress = ProgressGrid(top, self.name_of)
        if transport.secure is not None:
            log(INFO, "Guard: off under secure aggregation, where no single update arrives")
            top = self._securing = SecureGrid(top, transport.secure, self._surroundings())
        return top

    def _surroundings(self) -> Surroundings:
        """Return what secure aggregation needs of the other layers."""
        transport = self.transport
        return Surroundings(
            transport.recovery,
            self._described,
            transport.compression.received,
            self.name_of,
            lambda: self.node_ids,
            lambda: 0.0 if self._recovering is None else self._recovering.seconds,
        )

    def _described(self, model: Arrays, server_round: int) -> tuple[Mapping[str, Role], list[str]]:
        """Return the roles of a model's arrays, and those that participants do not return."""
        scheme = self.transport.normalization
        given = assign_roles(model, self.transport.roles)
        absent = [*scheme.local(model, given), *scheme.not_returned(server_round, model, given)]
        return scheme.roles(model, given), absent

    def serve(self, strategies: Iterable[Strategy], weighted: bool) -> None:
        """Set the strategy, with those that it wraps, for which messages are sent.

        Raises
        ------
        ColearnError
            If it needs single models under secure aggregation.
        """
        if self._securing is not None:
            self._securing.serve(strategies, weighted)

    def feature_state(self) -> dict[str, Any]:
        """Return what a checkpoint stores of the layers, in types of JSON."""
        return {} if self._securing is None else self._securing.ranges.state()

    def restore_feature_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `feature_state` returned."""
        if self._securing is not None:
            self._securing.ranges.restore(state)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the replies; train replies are in the order of `in_order`."""
        return self.in_order(self.stream(messages, timeout=timeout))

    def stream(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Do as `send_and_receive`, but yield replies one at a time, in the order of arrival.

        A reply that has been processed can be freed before the next is in memory.
        """
        batch = self._introduced(messages, timeout)
        if not batch or kind_of(batch[0]) != MessageType.TRAIN:
            return self._exchanged(batch, timeout)
        self._asked = [message.metadata.dst_node_id for message in batch]
        # No loop, which would hold a reply while the next one arrives.
        return map(self._note_shared, self._exchanged(batch, timeout))

    def _note_shared(self, reply: Message) -> Message:
        """Note the metrics of a training that the site lets the server record; return the reply."""
        secure = self.transport.secure
        # Masked metrics come back as the means of all sites, which are no site's own.
        if (secure is None or not secure.masked_metrics) and (own := shared_by_site(reply)):
            self._shared[reply.metadata.src_node_id] = own
        return reply

    def _exchanged(self, batch: list[Message], timeout: float | None) -> Iterable[Message]:
        """Send messages through the layers and return the replies as they arrive."""
        if self._securing is not None:
            self._directory.refresh(self.bottom)
            return self._securing.send_and_receive(batch, timeout=timeout)
        # The recovery's layer refreshes the directory itself.
        if self._recovering is None:
            self._directory.refresh(self.bottom)
        return self._progress.stream(batch, timeout=timeout)

    def expect(self, num_rounds: int | None, total_epochs: int | None) -> None:
        """Set the last round and the budget of local epochs, for the progress that is shown."""
        self._progress.pace.num_rounds = num_rounds
        self._progress.pace.total_epochs = total_epochs

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages, without restarts of participants that fail."""
        return self.grid.push_messages(self._introduced(messages))

    def take(self) -> RoundTraffic:
        """Return the traffic and events since the last call."""
        moved = sum(self._meter.take().values(), Transfers())
        events = [] if self._recovering is None else self._recovering.take_events()
        if self._normalizing is not None:
            events += self._normalizing.take_events()
        if self._securing is not None:
            events += self._securing.take_events()
        names = {node: self.name_of(node) for node in self.node_ids}
        return RoundTraffic(
            bytes=Directions(moved.bytes_down, moved.bytes_up),
            control=Directions(moved.control_down, moved.control_up),
            events=_named(events, names),
            seconds=self._seconds(),
            durations=self._durations(),
            names=names,
            models=Directions(moved.models_down, moved.models_up),
            gone=0 if self._recovering is None else self._recovering.take_gone(),
            secure={} if self._securing is None else self._securing.take_account(),
            shared=self._take_shared(),
        )

    def _take_shared(self) -> dict[str, dict[str, float]]:
        shared, self._shared = self._shared, {}
        return {self.name_of(node): metrics for node, metrics in shared.items()}

    def _durations(self) -> dict[str, float]:
        by_node = {} if self._recovering is None else self._recovering.durations
        return {self.name_of(node): seconds for node, seconds in by_node.items()}

    def _seconds(self) -> float:
        """Return the duration of the longest successful training of the last round."""
        layer = self._securing or self._recovering
        return 0.0 if layer is None else layer.seconds

    def name_of(self, node_id: int) -> str:
        """Return a participant's name where known, else its node id."""
        return self._directory.name_of(node_id)

    def reported_names(self) -> dict[str, str]:
        """Return the names that participants reported, by node id as text, for a checkpoint."""
        return {str(node): name for node, name in self._directory.answered.items()}

    def restore_names(self, names: Mapping[str, str]) -> None:
        """Restore the names that `reported_names` returned, which are not queried again."""
        self._directory.answered.update({int(node): name for node, name in names.items()})

    def in_order(self, replies: Iterable[Message]) -> list[Message]:
        """Return replies sorted by participant name; those without a name in the messages' order.

        A restart does not change this order, so sums of float64 arrays are the same to the bit.
        """
        arrived = list(replies)
        places = {node: place for place, node in enumerate(self.node_ids)}

        def order(reply: Message) -> tuple[str, int]:
            node = reply.metadata.src_node_id
            return self._directory.known_name(node) or "", places.get(node, len(places))

        return sorted(arrived, key=order)

    def refer_to(self, model: Arrays) -> None:
        """Set the reference model of differences where participants keep their own models."""
        if self._compressing is not None:
            self._compressing.reference = model

    def check_by(self, check: Check) -> None:
        """Set the check of train replies, for a strategy that runs in another loop."""
        if self._recovering is not None and self._recovering.check is check_train_reply:
            self._recovering.check = check

    def note_elsewhere(self, participants: int) -> None:
        """Set how many present participants of the round the next messages do not address.

        A quorum counts the participants of the round, and not those of one exchange within it.
        """
        if self._recovering is not None:
            self._recovering.elsewhere = participants

    @property
    def participants(self) -> Sequence[str] | None:
        """The registered names of the only participants; None if any SuperNode may take part."""
        return self.transport.participants

    @property
    def node_ids(self) -> list[int]:
        """The nodes of the last train round's participants, after any replacement."""
        return self._asked if self._recovering is None else self._recovering.node_ids

    def _introduced(
        self, messages: Iterable[Message], timeout: float | None = None
    ) -> list[Message]:
        """Return the messages with the session, the version and the time limit in their configs.

        The time limit is the strategy's own, else the timeout. With it a participant ends a
        ClientApp that hangs in a training or an evaluation, before that delays the next message.
        """
        batch = self._types.cast(messages)
        for message in filter(Message.has_content, batch):
            self._bounds.refer_to(message)
            config = config_of(message.content)
            # `config_of` returns a record outside the message if the message has no config.
            if "server-round" in config:
                config["session"], config["colearn-version"] = self.session, __version__
            if timeout is not None and math.isfinite(timeout):
                _limit(message.content, timeout)
        return [_living(message, time_to_live(timeout)) for message in batch]


def _limit(content: RecordDict, seconds: float) -> None:
    """Set the time limit in the config of a message's content, unless it has one."""
    for key, config in list(records_of(content, ConfigRecord).items()):
        if config is config_of(content) and "time-limit" not in config:
            # A copy, since Flower's strategies pass on the config that the user gave them, which
            # may be used again in a run with another timeout.
            content[key] = ConfigRecord({**config, **timed(float(seconds))})


def _living(message: Message, seconds: float) -> Message:
    """Return a message to train or evaluate with this time to live, unless it has one of its own.

    Messages of other types are their sender's own affair.
    """
    ours = message.has_content() and kind_of(message) in (MessageType.TRAIN, MessageType.EVALUATE)
    if not ours or message.metadata.ttl != DEFAULT_TTL:
        return message
    return copied(message, message.content, ttl=seconds)


def _named(events: Iterable[Event], names: Mapping[int, str]) -> list[Event]:
    """Return the events with node ids replaced by names that became known later."""
    known = {str(node): name for node, name in names.items()}
    return [
        replace(each, participant=known.get(each.participant, each.participant)) for each in events
    ]
