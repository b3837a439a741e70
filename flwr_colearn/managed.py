"""Managed: what `flwr_colearn.run` asks of a strategy besides Flower's own hooks."""

from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message

from .aggregation import Weighting, check_train_reply
from .checkpoint import CheckpointFolder
from .history import RecordFile
from .roles import Role
from .traffic import RoundTraffic
from .transport import ConnectedGrid, Transport


class Log(Protocol):
    """The record of the round under way, and the history that it goes to in the end."""

    @property
    def history(self) -> RecordFile[Any]:
        """The rounds that are complete."""

    def note(self, **metrics: Mapping[str, Any] | None) -> None:
        """Keep metrics (train_metrics=, evaluate_metrics=, server_metrics=) for the record."""

    def note_traffic(self, traffic: RoundTraffic) -> None:
        """Add what moved for training, and what happened."""

    def note_evaluation(self, traffic: RoundTraffic) -> None:
        """Add what moved for the participants' evaluation."""


L = TypeVar("L", bound=Log)


class Managed(Generic[L]):
    """A strategy, or what stands beside one, that knows where its run is and records it.

    The strategies of this package are of this kind; `flwr_colearn.stock.Stock` stands beside any
    other. The methods here do nothing, and say that there is nothing.

    Attributes
    ----------
    log : RoundLog
        The record of the round under way, and the history. What moves for training is recorded by
        the strategy itself, if it has a `log`.
    transport : Transport
        The features of the strategy's exchanges.
    checkpoints : CheckpointFolder or None
        Where the run is saved.
    time_limit : float or None
        Seconds that an attempt of the round under way may take.
    streams : bool
        Whether replies may be handed over as they arrive, each once.
    roles : mapping
        What the average does with every array; empty before the first round.
    weighting : {"uniform", "weighted"}
        How participants count in an average.
    """

    log: L
    transport: Transport
    checkpoints: CheckpointFolder | None = None
    time_limit: float | None = None
    streams: bool = False
    weighting: Weighting = "uniform"

    @property
    def roles(self) -> Mapping[str, Role]:
        """What the average does with every array; empty before the first round."""
        return {}

    @property
    def spent(self) -> bool:
        """Whether nothing is left to do, whatever the number of rounds."""
        return False

    def begin(
        self,
        grid: ConnectedGrid,
        timeout: float,
        num_rounds: int | None,
        save: Callable[[int], None],
    ) -> None:
        """Begin a run, and forget an earlier one.

        Parameters
        ----------
        grid : ConnectedGrid
            Connects to the participants; its transport has the features of this run.
        timeout : float
            Seconds that one attempt of one participant may take at least.
        num_rounds : int or None
            The last round; ``None`` for as many as there is a budget for.
        save : callable
            ``(round) -> None``: saves the run in the middle of a round. A run that is resumed from
            there calls ``strategy.round`` with the same round again.
        """

    def open(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord) -> None:
        """Begin a round, before the strategy configures it."""

    def check_reply(self, sent: Message, reply: Message) -> None:
        """Raise a ColearnError unless `reply` is a usable answer to the train message `sent`."""
        check_train_reply(sent, reply)

    def close(self, arrays: ArrayRecord) -> None:
        """Complete the record of the round under way, which ended with these arrays."""

    def end(self) -> None:
        """End a run, however it ended."""

    def own_state(self) -> dict[str, Any]:
        """Return what is needed to go on besides ``strategy_state()``, as JSON can hold it."""
        return {}

    def restore_own_state(self, state: Mapping[str, Any]) -> None:
        """Go on with what `own_state` returned."""

    def configuration(self) -> dict[str, str]:
        """Return what must be the same for a run to be resumed."""
        return {}
