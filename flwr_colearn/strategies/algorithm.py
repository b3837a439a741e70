"""Algorithm 1 of Mi et al. (2020), server side, as pure functions: progress, eq. 4, plan."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from logging import INFO, WARNING
from typing import Any

from flwr.common import log

from ..errors import expected, whole_number
from ..plan import LocalPlan
from ..policy import attempt_limit
from ..schedules import (
    EpochRule,
    LearningRate,
    RateFunction,
    as_epoch_rule,
    as_learning_rate,
    describe_rate,
)


@dataclass(frozen=True)
class Progress:
    """All that the algorithm remembers from round to round, besides the shared model.

    Attributes
    ----------
    round : int
        The last round that was begun; 0 before the first.
    local_epochs : int
        T of that round, before the budget cut it.
    epochs_done : int
        Local epochs of every participant up to the end of that round.
    seconds_per_epoch : float
        What a local epoch takes the slowest participant; 0 while unknown.
    """

    round: int = 0
    local_epochs: int = 0
    epochs_done: int = 0
    seconds_per_epoch: float = 0.0

    def timed(self, seconds: float, local_epochs: int) -> "Progress":
        """Return the progress after a round that took so many seconds."""
        return replace(self, seconds_per_epoch=seconds / local_epochs) if seconds > 0.0 else self

    def time_limit(self, timeout: float | None, local_epochs: int) -> float | None:
        """Return the seconds that an attempt of so many local epochs may take; None for no limit.

        The limit grows with T, from what a local epoch took before; the log contains a warning
        when it is above `timeout`.
        """
        if timeout is None:
            return None
        likely = local_epochs * self.seconds_per_epoch
        limit = attempt_limit(timeout, likely)
        if limit is not None and limit > timeout:
            log(
                WARNING,
                "CoLearn: %s local epochs take about %.0f s, so an attempt may take %.0f s instead "
                "of timeout=%.0f. Raise `timeout`, or bound the local epochs "
                "(IncreasingEpochs(maximum=...))",
                local_epochs,
                likely,
                limit,
                timeout,
            )
        return limit

    def to_json(self) -> dict[str, Any]:
        """Return the progress as JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class Algorithm:
    """How T and the learning rate follow from what was reached.

    Made by `algorithm_of`.

    Attributes
    ----------
    local_epochs : EpochRule
        T: ``IncreasingEpochs`` (ILE), ``FixedEpochs`` (FLE).
    learning_rate : LearningRate
        ``CyclicalRate`` (CLR), ``ExponentialRate`` (ELR), ``ConstantRate`` or another schedule.
    total_epochs : int or None
        Budget: local epochs of every participant after which the run ends.
    """

    local_epochs: EpochRule
    learning_rate: LearningRate
    total_epochs: int | None = None

    def spent(self, progress: Progress) -> bool:
        """Return whether the budget of local epochs is used up."""
        return self.total_epochs is not None and progress.epochs_done >= self.total_epochs

    def next_plan(
        self, server_round: int, progress: Progress, relative_change: float | None
    ) -> tuple[LocalPlan, Progress]:
        """Return what the next round asks of the participants, and the progress it makes.

        Parameters
        ----------
        server_round : int
            From 1.
        progress : Progress
            After the last round, whose budget is not spent.
        relative_change : float or None
            Of the shared model in the last round (eq. 4); ``None`` if that brought no average, so
            that there is nothing to compare.
        """
        chosen = self._epochs(progress.local_epochs, relative_change)
        done, local_epochs = progress.epochs_done, chosen
        if self.total_epochs is not None:
            local_epochs = min(local_epochs, self.total_epochs - done)
        plan = LocalPlan.of(self.learning_rate, server_round, local_epochs, done)
        return plan, replace(
            progress, round=server_round, local_epochs=chosen, epochs_done=done + local_epochs
        )

    def _epochs(self, last: int, relative_change: float | None) -> int:
        if not last:
            return int(self.local_epochs.initial)
        if relative_change is None:
            return last
        chosen = int(self.local_epochs.next(last, relative_change))
        if chosen != last:
            log(
                INFO,
                "CoLearn: relative change %.4g, local epochs %s -> %s",
                relative_change,
                last,
                chosen,
            )
        return chosen

    def configuration(self) -> dict[str, str]:
        """Return what must be the same for a run to be resumed."""
        return {
            "local epochs": str(self.local_epochs),
            "learning rate": describe_rate(self.learning_rate),
            "total epochs": str(self.total_epochs),
        }

    def log_summary(self, write: Callable[[str], None]) -> None:
        """Write the settings as branches of Flower's strategy tree."""
        write("\t├──> Co-learning settings:")
        write(f"\t│\t├── Local epochs: {self.local_epochs}")
        write(f"\t│\t├── Learning rate: {self.learning_rate}")
        write(f"\t│\t└── Budget in local epochs: {self.total_epochs or 'none'}")


def algorithm_of(
    local_epochs: int | EpochRule,
    learning_rate: float | LearningRate | RateFunction,
    total_epochs: int | None = None,
) -> Algorithm:
    """Return the algorithm with these settings; numbers are a fixed T, and a constant rate.

    A function of the progress is a schedule over the total epochs.

    Raises
    ------
    ColearnError
        If one is not what it should be.
    """
    if total_epochs is not None:
        whole_number("total_epochs", total_epochs, least=1)
    rate = as_learning_rate(learning_rate, total_epochs)
    planned = getattr(rate, "total_epochs", None)
    if None not in (planned, total_epochs) and planned != total_epochs:
        raise expected(
            f"total_epochs of {type(rate).__name__}",
            f"the run's own total_epochs={total_epochs}",
            planned,
        )
    return Algorithm(as_epoch_rule(local_epochs), rate, total_epochs)
