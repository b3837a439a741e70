"""Transport: what happens to models on their way, for any Flower strategy, and its account."""

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace

from flwr.app import ArrayRecord, Message, MessageType
from flwr.serverapp import Grid

from ._version import __version__
from .aggregation import check_train_reply
from .compression import Compression, CompressionGrid, Uncompressed, as_compression
from .errors import ColearnError, expected
from .grids import MeteringGrid, WrappingGrid
from .normalization import Normalization, NormalizationGrid, Pooled, as_normalization
from .policy import Recovery
from .records import SentTypes, config_of, kind_of
from .recovery import Directory, RecoveringGrid
from .roles import Arrays, Roles
from .traffic import Directions, Event, RoundTraffic, Transfers

Check = Callable[[Message, Message], None]


@dataclass(frozen=True)
class Transport:
    """The features that a strategy's exchange of models has, each a layer around Flower's grid.

    ::

        strategy ──> Recovery > Normalization > Compression > Meter ──> Flower's grid

    The strategies of this package have one of their own. Any other gets one in its ServerApp::

        result = strategy.start(Transport(recovery=Recovery()).connect(grid), arrays)

    or, with checkpoints and a history, by `flwr_colearn.run`. Participants need
    `flwr_colearn.participant_mod`.

    Parameters
    ----------
    recovery : Recovery, optional
        How participants that fail are restarted; ``None`` leaves them out, as Flower does.
    normalization : Normalization, default Pooled()
        What becomes of normalization layers where participants' data are unlike.
    compression : Compression, default Compression()
        How models are written on their way.
    roles : mapping or sequence, optional
        Which arrays are weights, batch-norm means and variances, counters; see
        `flwr_colearn.Role`. By default their names decide.

    Raises
    ------
    ColearnError
        If an argument is not what it should be.

    Examples
    --------
    >>> from flwr_colearn import Float16, Int8, LocalStatistics
    >>> transport = Transport(
    ...     normalization=LocalStatistics(), compression=Compression(up=Int8(), down=Float16())
    ... )
    """

    recovery: Recovery | None = field(default_factory=Recovery)
    normalization: Normalization = field(default_factory=Pooled)
    compression: Compression = field(default_factory=Compression)
    roles: Roles = None

    def __post_init__(self) -> None:
        if self.recovery is not None and not isinstance(self.recovery, Recovery):
            raise expected("recovery", "a Recovery, or None", self.recovery)
        as_normalization(self.normalization)
        as_compression(self.compression)

    def connect(
        self, grid: Grid, check: Check = check_train_reply, like: ArrayRecord | None = None
    ) -> "ConnectedGrid":
        """Return a grid on which every exchange of models has these features.

        Parameters
        ----------
        grid : Grid
            Flower's, or any other. One that is connected already keeps its features too.
        check : callable, optional
            ``(sent, reply) -> None``, raising `ColearnError` for a train reply that is no good.
        like : ArrayRecord, optional
            Models are sent in the types of this one; by default in those of the first that is sent.

        Raises
        ------
        ColearnError
            If the grid is connected already with another value of one of these features.
        """
        if isinstance(grid, ConnectedGrid):
            return ConnectedGrid(grid.bottom, self.combined(grid.transport), check, like)
        if isinstance(grid, RecoveringGrid):
            own = check if grid.check is check_train_reply else grid.check
            return ConnectedGrid(grid.grid, replace(self, recovery=grid.recovery), own, like)
        return ConnectedGrid(grid, self, check, like)

    def check_privacy(self) -> None:
        """Raise a ColearnError for what must not be done to models under differential privacy."""
        if not isinstance(self.compression.up, Uncompressed):
            raise expected(
                "compression under differential privacy",
                "up=Uncompressed(), since the wrapper counts on the norm to which updates were "
                "clipped, which rounding changes",
                str(self.compression),
            )
        if not self.normalization.travels_whole:
            raise expected(
                "normalization under differential privacy",
                "Pooled() or Average(), since statistics that are exchanged besides the model, and "
                "arrays that stay, have no part in the wrapper's noise",
                self.normalization,
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
            values[each.name] = theirs if mine == default else mine
        return Transport(**values)


class ConnectedGrid(WrappingGrid):
    """A grid with the features of a `Transport`, which accounts for all that moves.

    Made by `Transport.connect`. Every message says of which session (one training, whatever
    restarts) it is, so that participants know which of what they keep belongs to it.

    Parameters
    ----------
    grid : Grid
        Flower's.
    transport : Transport
        The features.
    check, like
        See `Transport.connect`.

    Attributes
    ----------
    transport : Transport
        The features.
    bottom : Grid
        The grid inside.
    session : str
        Random; a run that is resumed sets it to what it was.
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
        self._types = SentTypes(like)
        self._meter = MeteringGrid(grid)
        self._compressing: CompressionGrid | None = None
        self._normalizing: NormalizationGrid | None = None
        self._recovering: RecoveringGrid | None = None
        self._directory = Directory()
        super().__init__(self._layers(check))

    def _layers(self, check: Check) -> Grid:
        """Return the layers around the meter."""
        transport = self.transport
        top: Grid = self._meter
        if not transport.compression.is_plain:
            top = self._compressing = CompressionGrid(top, transport.compression)
        if not transport.normalization.travels_whole:
            scheme, roles = transport.normalization, transport.roles
            top = self._normalizing = NormalizationGrid(top, scheme, roles)
        if transport.recovery is not None:
            top = self._recovering = RecoveringGrid(top, transport.recovery, check)
            self._directory = self._recovering.directory
        return top

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the replies, those of training in the order of `in_order`."""
        return self.in_order(self.stream(messages, timeout=timeout))

    def stream(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Do as `send_and_receive`, but give replies as they arrive, one at a time.

        So one that was dealt with can be dropped before the next is in memory.
        """
        batch = self._introduced(messages)
        if batch and kind_of(batch[0]) == MessageType.TRAIN:
            self._asked = [message.metadata.dst_node_id for message in batch]
        if self._recovering is None:
            self._directory.refresh(self.bottom)
            return self.grid.send_and_receive(batch, timeout=timeout)
        return self._recovering.stream(batch, timeout=timeout)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages; who pulls their replies restarts nobody."""
        return self.grid.push_messages(self._introduced(messages))

    def take(self) -> RoundTraffic:
        """Return what moved and happened since the last call."""
        moved = sum(self._meter.take().values(), Transfers())
        events = [] if self._recovering is None else self._recovering.take_events()
        if self._normalizing is not None:
            events += self._normalizing.take_events()
        names = {node: self.name_of(node) for node in self.node_ids}
        return RoundTraffic(
            bytes=Directions(moved.bytes_down, moved.bytes_up),
            control=Directions(moved.control_down, moved.control_up),
            events=_named(events, names),
            seconds=0.0 if self._recovering is None else self._recovering.seconds,
            names=names,
            models=Directions(moved.models_down, moved.models_up),
        )

    def name_of(self, node_id: int) -> str:
        """Return a participant's name where known, else its node id."""
        return self._directory.name_of(node_id)

    def in_order(self, replies: Iterable[Message]) -> list[Message]:
        """Return replies by name of the participant; those without one in the messages' order.

        A restart changes neither, so that sums of float64 arrays do not change a bit.
        """
        arrived = list(replies)
        places = {node: place for place, node in enumerate(self.node_ids)}

        def order(reply: Message) -> tuple[str, int]:
            node = reply.metadata.src_node_id
            return self._directory.known_name(node) or "", places.get(node, len(places))

        return sorted(arrived, key=order)

    def refer_to(self, model: Arrays) -> None:
        """Set the model that differences are to where participants keep theirs."""
        if self._compressing is not None:
            self._compressing.reference = model

    @property
    def node_ids(self) -> list[int]:
        """The nodes of the last train round's participants, after any replacement."""
        return self._asked if self._recovering is None else self._recovering.node_ids

    def _introduced(self, messages: Iterable[Message]) -> list[Message]:
        """Return messages that say in their config of which session and version they are."""
        batch = self._types.cast(messages)
        for message in filter(Message.has_content, batch):
            config = config_of(message.content)
            if "server-round" in config:
                config["session"], config["colearn-version"] = self.session, __version__
        return batch


def _named(events: Iterable[Event], names: Mapping[int, str]) -> list[Event]:
    """Return the events under the names that became known after they had happened."""
    known = {str(node): name for node, name in names.items()}
    return [
        replace(each, participant=known.get(each.participant, each.participant)) for each in events
    ]
