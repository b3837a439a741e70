"""Learning-rate schedules: immutable values with pure methods.

The four arms of the co-learning paper (Mi et al., SCIS 63(8):182102, 2020) are four pairs of a
schedule and a rule for the local epochs (`flwr_colearn.epoch_rules`): CLR+ILE is ``CyclicalRate``
with ``IncreasingEpochs``, ELR+FLE (federated averaging) is ``ExponentialRate`` with
``FixedEpochs``, and so on. Any other object with the attributes of `LearningRate` is a
learning-rate schedule as well, and so is a plain function of the progress. The server evaluates the
schedule, and the participants receive its rates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Protocol, runtime_checkable

from .errors import ColearnError, decay_factor, expected, real_number, whole_number

InitialRate = float | Callable[[int], float]
"""eta^i: one number for every round, or a function of the round i = 0, 1, ..."""


RateFunction = Callable[[float], float]
"""A learning rate as a function of the progress: epochs done / epochs planned, from 0 to 1."""


@runtime_checkable
class LearningRate(Protocol):
    """A learning-rate schedule: the learning rate of every local epoch of a round."""

    @property
    def kind(self) -> str:
        """The name of the schedule in error messages."""

    def start(self, round_index: int) -> float | None:
        """Return eta^i, the rate from which round i = 0, 1, ... starts.

        A schedule without such a rate returns None. The plan of a round then states the rate of
        the round's first epoch instead.
        """

    def at(
        self, epoch: int, local_epochs: int, round_index: int = 0, epochs_done: int = 0
    ) -> float:
        """Return the rate of one local epoch.

        Parameters
        ----------
        epoch : int
            j, the local epoch within the round, from 1 to `local_epochs`.
        local_epochs : int
            T, the local epochs of the round.
        round_index : int, default 0
            i, counted from 0.
        epochs_done : int, default 0
            The local epochs that every participant has done before this round.
        """


@dataclass(frozen=True)
class ConstantRate:
    """The same learning rate in every epoch of a round.

    Parameters
    ----------
    initial : float or callable
        eta^i, at least 0, or a function of the round i = 0, 1, ..., which may lower it.

    Raises
    ------
    ColearnError
        If `initial` is negative, infinite or not a number.
    """

    initial: InitialRate
    kind: ClassVar[str] = "constant"

    def __post_init__(self) -> None:
        if not callable(self.initial):
            real_number("initial learning rate", self.initial, least=0.0)

    def start(self, round_index: int) -> float:
        """Return eta^i for round i = 0, 1, ..."""
        value = self.initial(round_index) if callable(self.initial) else self.initial
        return real_number(f"initial learning rate of round i={round_index}", value, least=0.0)

    def at(
        self, epoch: int, local_epochs: int, round_index: int = 0, epochs_done: int = 0
    ) -> float:
        """Return eta^i, the same for every epoch."""
        _check_epoch(epoch, local_epochs)
        return self.start(round_index)


@dataclass(frozen=True)
class CyclicalRate(ConstantRate):
    """CLR: exponential annealing within a round, restarted by the next round.

    eta_j^i = eta^i * decay ** (j / T_i), j = 1 .. T_i      (eq. 3 of Mi et al., 2020)

    The full eta^i is never used, and every round ends at exactly eta^i * decay.

    Parameters
    ----------
    initial : float or callable, default 0.01
        eta^i, a number of at least 0 or a function of the round i = 0, 1, ...
    decay : float, default 0.25
        r, in (0, 1]; 1 is a constant rate.

    Raises
    ------
    ColearnError
        If `initial` or `decay` lies outside its range.

    Examples
    --------
    >>> rate = CyclicalRate(0.01)
    >>> [round(rate.at(j, local_epochs=5), 6) for j in range(1, 6)]
    [0.007579, 0.005743, 0.004353, 0.003299, 0.0025]
    """

    initial: InitialRate = 0.01
    decay: float = 0.25
    kind: ClassVar[str] = "cyclical"

    def __post_init__(self) -> None:
        super().__post_init__()
        decay_factor("decay of the learning rate", self.decay)

    def at(
        self, epoch: int, local_epochs: int, round_index: int = 0, epochs_done: int = 0
    ) -> float:
        """Return eta^i * decay ** (epoch / local_epochs)."""
        _check_epoch(epoch, local_epochs)
        return self.start(round_index) * math.pow(self.decay, epoch / local_epochs)


@dataclass(frozen=True)
class ExponentialRate(ConstantRate):
    """ELR: one exponential decay over the whole run, without restarts.

    eta_e = eta^i * decay ** (e / E), with e = epochs done before this round + j and E the planned
    total. The paper names ELR and gives no formula; this form ends at eta^i * decay, as eq. 3 does.

    Parameters
    ----------
    initial : float or callable
        eta^i, a number of at least 0 or a function of the round i = 0, 1, ...
    decay : float
        The factor of `initial` after `total_epochs`, in (0, 1].
    total_epochs : int
        E, the local epochs planned for the whole run. The decay continues in epochs beyond it.

    Raises
    ------
    ColearnError
        If an argument lies outside its range.

    Examples
    --------
    >>> rate = ExponentialRate(0.01, decay=0.25, total_epochs=10)
    >>> rate.at(5, local_epochs=5, epochs_done=5)
    0.0025
    """

    decay: float
    total_epochs: int
    kind: ClassVar[str] = "exponential"

    def __post_init__(self) -> None:
        super().__post_init__()
        decay_factor("decay of the learning rate", self.decay)
        whole_number("total_epochs of ExponentialRate", self.total_epochs, least=1)

    def at(
        self, epoch: int, local_epochs: int, round_index: int = 0, epochs_done: int = 0
    ) -> float:
        """Return eta^i * decay ** ((epochs_done + epoch) / total_epochs)."""
        _check_epoch(epoch, local_epochs)
        share = (epochs_done + epoch) / self.total_epochs
        return self.start(round_index) * math.pow(self.decay, share)


@dataclass(frozen=True)
class CosineRate(ConstantRate):
    """Half a cosine over the whole run, without restarts.

    eta_e = final + (eta^i - final) * (1 + cos(pi * e / E)) / 2, with e the epochs done before this
    one, from 0 to E - 1, and E the planned total (Loshchilov and Hutter, 2017, eq. 5 without
    restarts). The first epoch trains with the full eta^i, and `final` would be the rate after the
    last one.

    Parameters
    ----------
    initial : float or callable
        eta^i, a number of at least 0 or a function of the round i = 0, 1, ...
    total_epochs : int
        E, the local epochs planned for the whole run. Epochs beyond it stay at `final`.
    final : float, default 0.0
        The rate after epoch E, at least 0. At most `initial` where that is a number.

    Raises
    ------
    ColearnError
        If an argument lies outside its range.

    Examples
    --------
    >>> rate = CosineRate(0.1, total_epochs=4, final=0.02)
    >>> [round(rate.at(j, local_epochs=4), 6) for j in range(1, 5)]
    [0.1, 0.088284, 0.06, 0.031716]
    """

    total_epochs: int
    final: float = 0.0
    kind: ClassVar[str] = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("total_epochs of CosineRate", self.total_epochs, least=1)
        most = math.inf if callable(self.initial) else float(self.initial)
        # A final rate above the initial one would raise the rate over the run.
        real_number("final rate of CosineRate", self.final, least=0.0, most=most)

    def at(
        self, epoch: int, local_epochs: int, round_index: int = 0, epochs_done: int = 0
    ) -> float:
        """Return the value of the cosine before epoch epochs_done + epoch of total_epochs."""
        _check_epoch(epoch, local_epochs)
        # Epochs beyond the plan stay at `final`; the cosine itself would rise again.
        share = min((epochs_done + epoch - 1) / self.total_epochs, 1.0)
        height = (1.0 + math.cos(math.pi * share)) / 2.0
        return float(self.final + (self.start(round_index) - self.final) * height)


@dataclass(frozen=True)
class ProgressRate:
    """A learning rate given by a function of the run's progress.

    eta_e = function(e / E), with e the epochs done before this one, from 0 to E - 1, and E the
    planned total. A strategy that is given a function and `total_epochs` creates this schedule
    from them.

    Such a function has no rate eta^i of a round. Therefore `start` returns None, and the plan of a
    round states the rate of the round's first epoch as its ``learning-rate``.

    Parameters
    ----------
    function : callable
        Takes the progress before an epoch, a float from 0, and returns the rate with which that
        epoch is trained, a finite number of at least 0.
    total_epochs : int
        E, the local epochs planned for the whole run. Epochs beyond it have a progress of at least
        1.

    Raises
    ------
    ColearnError
        If `function` cannot be called or `total_epochs` lies outside its range.

    Examples
    --------
    >>> rate = ProgressRate(lambda progress: 0.5 if progress < 0.5 else 0.125, total_epochs=4)
    >>> [rate.at(j, local_epochs=4) for j in range(1, 5)]
    [0.5, 0.5, 0.125, 0.125]
    """

    function: RateFunction
    total_epochs: int
    kind: ClassVar[str] = "function of the progress"

    def __post_init__(self) -> None:
        # A class is callable too, but a call would return an object and not a rate.
        if not callable(self.function) or isinstance(self.function, type):
            raise expected("function of ProgressRate", "a function of the progress", self.function)
        whole_number("total_epochs of ProgressRate", self.total_epochs, least=1)

    def start(self, round_index: int) -> None:
        """Return None, since the function depends on the progress and not on the round."""
        return None

    def at(
        self, epoch: int, local_epochs: int, round_index: int = 0, epochs_done: int = 0
    ) -> float:
        """Return function((epochs_done + epoch - 1) / total_epochs)."""
        _check_epoch(epoch, local_epochs)
        return self.function((epochs_done + epoch - 1) / self.total_epochs)


@dataclass(frozen=True)
class Warmup:
    """Another schedule whose rates rise linearly over the first epochs of the run.

    eta_e = rate_e * min(e / W, 1), with e = epochs done before this round + j and W the epochs of
    the warm-up. The first epoch has 1/W of the other schedule's rate; epoch W and all later ones
    have exactly its rate. eta^i is that of the other schedule.

    Parameters
    ----------
    rate : float or LearningRate
        The other schedule. A function of the progress is given as
        ``flwr_colearn.schedules.ProgressRate(function, total_epochs)``.
    epochs : int
        W, at least 1. The warm-up counts local epochs, so it may end within a round.

    Raises
    ------
    ColearnError
        If an argument is invalid.

    Examples
    --------
    >>> rate = Warmup(0.5, epochs=4)
    >>> [rate.at(j, local_epochs=6) for j in range(1, 7)]
    [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    """

    rate: float | LearningRate
    epochs: int
    kind: ClassVar[str] = "warm-up"

    def __post_init__(self) -> None:
        # A frozen dataclass can be changed in no other way.
        object.__setattr__(self, "rate", as_learning_rate(self.rate))
        whole_number("epochs of Warmup", self.epochs, least=1)

    @property
    def total_epochs(self) -> int | None:
        """The local epochs for which the other schedule is planned, or None."""
        return getattr(self.rate, "total_epochs", None)

    def start(self, round_index: int) -> float | None:
        """Return eta^i of the other schedule."""
        return self._schedule.start(round_index)

    def at(
        self, epoch: int, local_epochs: int, round_index: int = 0, epochs_done: int = 0
    ) -> float:
        """Return the other schedule's rate, times (epochs_done + epoch) / epochs up to 1."""
        rate = self._schedule.at(epoch, local_epochs, round_index, epochs_done)
        share = (epochs_done + epoch) / self.epochs
        # The rate itself after the warm-up, without a product that may round.
        return rate if share >= 1.0 else rate * share

    @property
    def _schedule(self) -> LearningRate:
        return as_learning_rate(self.rate)


@dataclass(frozen=True)
class Annealed:
    """Another schedule whose eta^i anneals over the rounds of the run.

    eta_j^i = rate_j^i * factor^i, with the factor of round i the other schedule's rate of the
    round's first epoch. Within a round the factor is constant, so with ``CyclicalRate`` every round
    follows eq. 3 and ends at exactly eta^i * decay. Mi et al. (2020) use one eta "for simplicity"
    and say that it can be updated as i grows; the factor is ours.

    Such a schedule has no rate eta^i that depends on the round alone. Therefore `start` returns
    None, and the plan of a round states the rate of the round's first epoch as its
    ``learning-rate``.

    Parameters
    ----------
    rate : float or LearningRate
        The schedule within a round, such as ``CyclicalRate``.
    factor : float or LearningRate
        The schedule of the factor over the run, such as ``CosineRate(1.0, total_epochs=120)``,
        ``ExponentialRate(1.0, decay, total_epochs)`` or ``ConstantRate(function of the round)``. A
        function of the progress is given as ``ProgressRate(function, total_epochs)``.

    Raises
    ------
    ColearnError
        If an argument is no schedule, or both are planned for different numbers of epochs.

    Examples
    --------
    >>> rate = Annealed(CyclicalRate(0.8), CosineRate(1.0, total_epochs=4))
    >>> [round(rate.at(j, 2, epochs_done=done), 6) for done in (0, 2) for j in (1, 2)]
    [0.4, 0.2, 0.2, 0.1]
    """

    rate: float | LearningRate
    factor: float | LearningRate
    kind: ClassVar[str] = "annealed"

    def __post_init__(self) -> None:
        # A frozen dataclass can be changed in no other way.
        object.__setattr__(self, "rate", as_learning_rate(self.rate))
        object.__setattr__(self, "factor", as_learning_rate(self.factor))
        planned = self._planned
        if len(set(planned)) > 1:
            raise expected(
                "total_epochs of Annealed's factor", f"the rate's {planned[0]}", planned[1]
            )

    @property
    def total_epochs(self) -> int | None:
        """The local epochs for which the schedules are planned, or None."""
        return next(iter(self._planned), None)

    def start(self, round_index: int) -> None:
        """Return None, since the factor depends on the epochs done and not on the round."""
        return None

    def at(
        self, epoch: int, local_epochs: int, round_index: int = 0, epochs_done: int = 0
    ) -> float:
        """Return the rate of the epoch, times the factor of the round's first epoch."""
        rate, factor = map(as_learning_rate, (self.rate, self.factor))
        share = factor.at(1, local_epochs, round_index, epochs_done)
        return rate.at(epoch, local_epochs, round_index, epochs_done) * share

    @property
    def _planned(self) -> list[int]:
        totals = (getattr(each, "total_epochs", None) for each in (self.rate, self.factor))
        return [total for total in totals if total is not None]


def as_learning_rate(
    value: float | LearningRate | RateFunction, total_epochs: int | None = None
) -> LearningRate:
    """Return a learning-rate schedule.

    Parameters
    ----------
    value : float, LearningRate or callable
        A schedule is returned unchanged, a number as ``ConstantRate``, and a function of the
        progress as ``ProgressRate``.
    total_epochs : int, optional
        The local epochs of the whole run; required for a function of the progress.

    Raises
    ------
    ColearnError
        If `value` is none of these, or a function without `total_epochs`.
    """
    if isinstance(value, Real):
        return ConstantRate(real_number("initial learning rate", value, least=0.0))
    # A class has the same methods as its objects, so it would pass the next check.
    if isinstance(value, type):
        raise expected("learning_rate", f"an object, such as {value.__name__}(...)", value)
    if isinstance(value, LearningRate):
        return value
    if not callable(value):
        raise expected(
            "learning_rate",
            "a number, a schedule such as CyclicalRate, an object with 'kind', 'start' and 'at', "
            "or a function of the progress",
            value,
        )
    if total_epochs is None:
        raise ColearnError(
            "learning_rate: expected total_epochs beside a function of the progress, which is the "
            "share of these epochs that are done, found None; give the strategy total_epochs, or "
            "wrap the function in flwr_colearn.schedules.ProgressRate(function, total_epochs)"
        )
    return ProgressRate(value, total_epochs)


def rates_of(
    schedule: LearningRate, local_epochs: int, round_index: int, epochs_done: int
) -> tuple[float, tuple[float, ...]]:
    """Return eta^i of a round and the rates of its local epochs 1 .. T.

    Raises
    ------
    ColearnError
        If the schedule returns anything but a finite number of at least 0.
    """
    name = f"{type(schedule).__name__} (kind {schedule.kind!r})"
    rates = tuple(
        real_number(
            f"learning rate of epoch {epoch} of round i={round_index} by {name}",
            schedule.at(epoch, local_epochs, round_index, epochs_done),
            least=0.0,
        )
        for epoch in range(1, local_epochs + 1)
    )
    start = schedule.start(round_index)
    if start is None:
        return rates[0], rates
    return real_number(f"start of round i={round_index} by {name}", start, least=0.0), rates


def rate_before(
    schedule: LearningRate, local_epochs: int, round_index: int, epochs_done: int
) -> float:
    """Return the rate at the beginning of a round, before its first local epoch has lowered it.

    A schedule has no rate for that moment, and eta^i may be that of the run's beginning. The first
    two rates in geometric proportion lead back to it: to eta^i for ``CyclicalRate``, and to the
    rate at the end of the round before for ``ExponentialRate``. It is no larger than both eta^i and
    the first rate.
    """
    # A round of one epoch has one rate, so its neighbours are those of a round of two.
    start, rates = rates_of(schedule, max(local_epochs, 2), round_index, epochs_done)
    first, second = rates[:2]
    if second == 0.0:
        return first
    return min(first * (first / second), max(start, first))


def describe_rate(schedule: LearningRate) -> str:
    """Return a description of a schedule that is the same in every process.

    The description is ``str(schedule)``. If that contains a memory address, as for functions and
    for objects without a ``__repr__`` of their own, it is the type and five rates over the run.
    """
    # A resumed run is another process, and compares this text with that in the checkpoint.
    text = str(schedule)
    if _ADDRESS not in text:
        return text
    total = getattr(schedule, "total_epochs", None) or 100
    done = [share * (total - 1) // 4 for share in range(5)]
    samples = [_sample(schedule, index, epochs) for index, epochs in enumerate(done)]
    return f"{type(schedule).__name__} with the rates {', '.join(samples)}"


_ADDRESS = " at 0x"


def _sample(schedule: LearningRate, round_index: int, epochs_done: int) -> str:
    try:
        return repr(float(schedule.at(1, 2, round_index, epochs_done)))
    except Exception as error:  # a user's function may be defined for fewer rounds than these
        return type(error).__name__


def _check_epoch(epoch: int, local_epochs: int) -> None:
    if not 1 <= epoch <= local_epochs:
        raise ColearnError(
            f"local epoch: expected a whole number from 1 to local_epochs={local_epochs}, "
            f"found {epoch!r}"
        )
