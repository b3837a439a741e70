"""Managed: the interface between `flwr_colearn.run` and a strategy, besides Flower's own hooks."""

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
    """The record of the round under way, and the history to which it is appended at the end."""

    @property
    def history(self) -> RecordFile[Any]:
        """The records of the complete rounds."""

    @property
    def unfinished(self) -> str | None:
        """The record of the round under way as a line of JSON; None if no round is under way."""

    def reopen(self, line: str) -> None:
        """Go on with the record of a round that was saved as `unfinished`."""

    def note(self, **metrics: Mapping[str, Any] | None) -> None:
        """Set metrics of the record (train_metrics=, evaluate_metrics=, site_metrics=, ...)."""

    def note_stop(self, reason: str) -> None:
        """Set the reason why the run ends with this round, before its last one."""

    def note_traffic(self, traffic: RoundTraffic) -> None:
        """Add the traffic and the events of training."""

    def note_evaluation(self, traffic: RoundTraffic) -> None:
        """Add the traffic of the participants' evaluation."""


L = TypeVar("L", bound=Log)


class Managed(Generic[L]):
    """The interface by which `flwr_colearn.run` manages and records a strategy's run.

    The strategies of this package implement it themselves; `flwr_colearn.stock.Stock` implements it
    for any other. The methods of this base class do nothing and return empty values.

    Attributes
    ----------
    log : RoundLog
        The record of the round under way, and the history. A strategy with a `log` records the
        traffic of training itself.
    transport : Transport
        The features of the strategy's exchanges.
    checkpoints : CheckpointFolder or None
        The folder in which the run is saved.
    time_limit : float or None
        The seconds that an attempt of the round under way may take.
    streams : bool
        Whether the strategy takes replies as an iterator, in the order of their arrival.
    roles : mapping
        The role of every array in the average; empty before the first round.
    weighting : {"uniform", "weighted"}
        The weights of participants in an average.
    """

    log: L
    transport: Transport
    checkpoints: CheckpointFolder | None = None
    time_limit: float | None = None
    streams: bool = False
    weighting: Weighting = "uniform"

    @property
    def roles(self) -> Mapping[str, Role]:
        """The role of every array in the average; empty before the first round."""
        return {}

    @property
    def total_epochs(self) -> int | None:
        """The budget of local epochs per participant; None if there is none."""
        return None

    @property
    def spent(self) -> bool:
        """Whether the strategy's budget is spent, which ends the run before `num_rounds`."""
        return False

    def begin(
        self,
        grid: ConnectedGrid,
        timeout: float,
        num_rounds: int | None,
        save: Callable[[int], None],
    ) -> None:
        """Begin a run, and reset the state of an earlier one.

        Parameters
        ----------
        grid : ConnectedGrid
            Connects to the participants; its transport has the features of this run.
        timeout : float
            The least time limit of one attempt of one participant, in seconds.
        num_rounds : int or None
            The last round; ``None`` for the end of the budget.
        save : callable
            ``(round) -> None``: saves the run in the middle of a round. A run that is resumed from
            this checkpoint calls ``strategy.round`` with the same round again.
        """

    def open(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord) -> None:
        """Begin a round, before the strategy configures it."""

    def check_reply(self, sent: Message, reply: Message) -> None:
        """Raise a ColearnError unless `reply` is a usable answer to the train message `sent`."""
        check_train_reply(sent, reply)

    def measure(self, arrays: ArrayRecord) -> None:
        """Measure what depends on the model before the round; `arrays` is the new shared model.

        It is called before the evaluation, from which a resumed run may go on without that model.
        """

    def close(self, arrays: ArrayRecord) -> None:
        """Complete the record of the round under way; `arrays` is the new shared model."""

    def end(self) -> None:
        """End a run, after its last round or an error."""

    def own_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint besides ``strategy_state()``, in types of JSON."""
        return {}

    def restore_own_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `own_state` returned."""

    def configuration(self) -> dict[str, str]:
        """Return the settings that a resumed run must have in common with the saved one."""
        return {}
