"""The server's part of Algorithm 1 of Mi et al. (2020), as pure functions of the progress."""

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

SLOWDOWN = 2.0
"""The bound of changes of the measured seconds per local epoch, which decide time limits."""


@dataclass(frozen=True)
class Progress:
    """The state of the algorithm between rounds, besides the shared model.

    Attributes
    ----------
    round : int
        The last round that was started; 0 before the first.
    local_epochs : int
        T of that round, without the limit of the budget.
    epochs_done : int
        The local epochs of every participant up to the end of that round.
    seconds_per_epoch : float
        The seconds that a local epoch takes the slowest participant; 0 if unknown.
    first_seconds_per_epoch : float
        The same of the first round that was measured; 0 if unknown.
    """

    round: int = 0
    local_epochs: int = 0
    epochs_done: int = 0
    seconds_per_epoch: float = 0.0
    first_seconds_per_epoch: float = 0.0

    def timed(self, seconds: float, local_epochs: int) -> "Progress":
        """Return the progress with the speed of a round of `local_epochs` in `seconds`.

        The speed counts as at most `SLOWDOWN` times slower than that of the first round measured,
        whose attempts could take no longer than `timeout`. Otherwise a participant that always
        replies just before its limit would multiply the limit in every round. It counts as at most
        `SLOWDOWN` times faster than before, since participants that go on with an interrupted
        round train a part of its epochs only.
        """
        if seconds <= 0.0:
            return self
        measured = seconds / local_epochs
        first = self.first_seconds_per_epoch or measured
        bounded = min(max(measured, self.seconds_per_epoch / SLOWDOWN), SLOWDOWN * first)
        return replace(self, seconds_per_epoch=bounded, first_seconds_per_epoch=first)

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
        """Return the progress in types of JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Algorithm:
    """The rules for T and the learning rate of the next round; `algorithm_of` creates it.

    Attributes
    ----------
    local_epochs : EpochRule
        The rule for T: ``IncreasingEpochs`` (ILE), ``FixedEpochs`` (FLE).
    learning_rate : LearningRate
        ``CyclicalRate`` (CLR), ``ExponentialRate`` (ELR), ``ConstantRate`` or another schedule.
    total_epochs : int or None
        The budget: the local epochs of every participant after which the run ends.
    """

    local_epochs: EpochRule
    learning_rate: LearningRate
    total_epochs: int | None = None

    def spent(self, progress: Progress) -> bool:
        """Return whether the budget of local epochs is spent."""
        return self.total_epochs is not None and progress.epochs_done >= self.total_epochs

    def next_plan(
        self, server_round: int, progress: Progress, relative_change: float | None
    ) -> tuple[LocalPlan, Progress]:
        """Return the plan of the next round, and the progress after it.

        Parameters
        ----------
        server_round : int
            The number of the round, from 1.
        progress : Progress
            The progress after the last round; the budget must not be spent.
        relative_change : float or None
            The relative change of the shared model in the last round (eq. 4); ``None`` if that
            round had no average.
        """
        # The progress has T without the budget's limit: the next T is a multiple of it (eq. 4).
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
        # Without an average eq. 4 has nothing to compare.
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
        """Return the settings that a resumed run must have in common with the saved one."""
        return {
            "local epochs": str(self.local_epochs),
            "learning rate": describe_rate(self.learning_rate),
            "total epochs": str(self.total_epochs),
        }

    def log_summary(self, write: Callable[[str], None]) -> None:
        """Write the settings in the form of Flower's summary of a strategy."""
        write("\t├──> Co-learning settings:")
        write(f"\t│\t├── Local epochs: {self.local_epochs}")
        write(f"\t│\t├── Learning rate: {self.learning_rate}")
        write(f"\t│\t└── Budget in local epochs: {self.total_epochs or 'none'}")


def algorithm_of(
    local_epochs: int | EpochRule,
    learning_rate: float | LearningRate | RateFunction,
    total_epochs: int | None = None,
) -> Algorithm:
    """Return the algorithm with these settings.

    A number is a fixed T or a constant rate. A function of the progress is a schedule over the
    total epochs.

    Raises
    ------
    ColearnError
        If an argument is invalid.
    """
    if total_epochs is not None:
        whole_number("total_epochs", total_epochs, least=1)
    rate = as_learning_rate(learning_rate, total_epochs)
    # A schedule that is planned for another number of epochs would end too early or too late.
    planned = getattr(rate, "total_epochs", None)
    if None not in (planned, total_epochs) and planned != total_epochs:
        raise expected(
            f"total_epochs of {type(rate).__name__}",
            f"the run's own total_epochs={total_epochs}",
            planned,
        )
    return Algorithm(as_epoch_rule(local_epochs), rate, total_epochs)
