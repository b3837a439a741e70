"""The server's part of Algorithm 1 of Mi et al. (2020), as pure functions of the progress."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from logging import INFO, WARNING
from typing import Any

from flwr.common import log

from ..epoch_rules import EpochRule, Observations, as_epoch_rule
from ..errors import expected, whole_number
from ..history import RoundRecord
from ..plan import LocalPlan
from ..policy import attempt_limit
from ..schedules import LearningRate, RateFunction, as_learning_rate, describe_rate
from .advice import advice

SLOWDOWN = 2.0
"""The bound of changes of the measured seconds per local epoch, which decide time limits."""


@dataclass(frozen=True)
class Progress:
    """The state of the algorithm between rounds, besides the shared model.

    Attributes
    ----------
    round : int
        The last round that was started; 0 before the first.
    seen : Observations
        What the epoch rule sees: T of that round, and the relative changes and training losses of
        the rounds before it at that T.
    epochs_done : int
        The local epochs of every participant up to the end of that round.
    train_loss : float or None
        The mean training loss of that round, once its replies have arrived.
    seconds_per_epoch : float
        The seconds that a local epoch takes the slowest participant; 0 if unknown.
    first_seconds_per_epoch : float
        The same of the first round that was measured; 0 if unknown.
    """

    round: int = 0
    seen: Observations = field(default_factory=Observations)
    epochs_done: int = 0
    train_loss: float | None = None
    seconds_per_epoch: float = 0.0
    first_seconds_per_epoch: float = 0.0

    @property
    def local_epochs(self) -> int:
        """T of the last round that was started, without the limit of the budget."""
        return self.seen.local_epochs

    def started(self, server_round: int, seen: Observations, local_epochs: int) -> "Progress":
        """Return the progress at the beginning of a round of `local_epochs`."""
        done = self.epochs_done + local_epochs
        return replace(self, round=server_round, seen=seen, epochs_done=done, train_loss=None)

    def told(self, train_loss: float | None) -> "Progress":
        """Return the progress with the mean training loss of the round under way."""
        return replace(self, train_loss=train_loss)

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
                "of timeout=%.0f. Raise `timeout`, or bound the local epochs (`maximum` of the "
                "epoch rule)",
                local_epochs,
                likely,
                limit,
                timeout,
            )
        return limit

    def to_json(self) -> dict[str, Any]:
        """Return the progress in types of JSON."""
        return {**vars(self), "seen": self.seen.to_json()}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "Progress":
        """Restore what `to_json` returned, here or in version 0.6.

        A checkpoint of 0.6 has T only, and its epoch rules need no more than that.
        """
        values = {**state}
        if "local_epochs" in values:
            values["seen"] = Observations(values.pop("local_epochs"))
        else:
            values["seen"] = Observations.from_json(values["seen"])
        return cls(**values)


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
    local_steps : int or None
        The steps (mini-batches) that every participant trains in place of one local epoch.
    advises : bool
        Whether the log says what the relative changes show; not where a round is one step.
    """

    local_epochs: EpochRule
    learning_rate: LearningRate
    total_epochs: int | None = None
    local_steps: int | None = None
    advises: bool = True

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
        seen = self._next(progress, relative_change)
        local_epochs = seen.local_epochs
        if self.total_epochs is not None:
            local_epochs = min(local_epochs, self.total_epochs - progress.epochs_done)
        steps = None if self.local_steps is None else self.local_steps * local_epochs
        plan = LocalPlan.of(
            self.learning_rate, server_round, local_epochs, progress.epochs_done, steps
        )
        return plan, progress.started(server_round, seen, local_epochs)

    def _next(self, progress: Progress, relative_change: float | None) -> Observations:
        """Return the observations at the beginning of the next round, with its T."""
        seen, rule = progress.seen, self.local_epochs
        if not seen.local_epochs:
            return seen.then(int(rule.initial))
        # Without an average there is nothing to compare.
        if relative_change is None:
            return seen.then(seen.local_epochs)
        seen = seen.after(relative_change, progress.train_loss)
        then = seen.then(int(rule.next(seen)))
        if then.local_epochs != seen.local_epochs:
            log(
                INFO,
                "CoLearn: relative change %.4g, local epochs %s -> %s",
                relative_change,
                seen.local_epochs,
                then.local_epochs,
            )
        for level, text in advice(rule, seen, then) if self.advises else ():
            log(level, "CoLearn: %s", text)
        return then

    def configuration(self) -> dict[str, str]:
        """Return the settings that a resumed run must have in common with the saved one."""
        return {
            "local epochs": str(self.local_epochs),
            "learning rate": describe_rate(self.learning_rate),
            "total epochs": str(self.total_epochs),
            # Left out where it is not used, so that checkpoints without it stay those of the run.
            **({} if self.local_steps is None else {"local steps": str(self.local_steps)}),
        }

    def log_summary(self, write: Callable[[str], None]) -> None:
        """Write the settings in the form of Flower's summary of a strategy."""
        write("\t├──> Co-learning settings:")
        write(f"\t│\t├── Local epochs: {self.local_epochs}")
        write(f"\t│\t├── Learning rate: {self.learning_rate}")
        if self.local_steps is not None:
            write(f"\t│\t├── A local epoch is {self.local_steps} steps at every participant")
        write(f"\t│\t└── Budget in local epochs: {self.total_epochs or 'none'}")


def plan_record(plan: LocalPlan, progress: Progress) -> RoundRecord:
    """Return the record of a round that begins with a plan."""
    return RoundRecord(
        plan.round,
        plan.local_epochs,
        plan.learning_rate,
        progress.epochs_done,
        learning_rates=list(plan.learning_rates or ()),
    )


def algorithm_of(
    local_epochs: int | EpochRule,
    learning_rate: float | LearningRate | RateFunction,
    total_epochs: int | None = None,
    local_steps: int | None = None,
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
    if local_steps is not None:
        whole_number("local_steps", local_steps, least=1)
    rate = as_learning_rate(learning_rate, total_epochs)
    # A schedule that is planned for another number of epochs would end too early or too late.
    planned = getattr(rate, "total_epochs", None)
    if None not in (planned, total_epochs) and planned != total_epochs:
        raise expected(
            f"total_epochs of {type(rate).__name__}",
            f"the run's own total_epochs={total_epochs}",
            planned,
        )
    return Algorithm(as_epoch_rule(local_epochs), rate, total_epochs, local_steps)
