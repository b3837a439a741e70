"""Learning-rate schedules and local-epoch rules: immutable values with pure methods.

The four arms of the co-learning paper (Mi et al., SCIS 63(8):182102, 2020) are four pairs of them:
CLR+ILE is ``CyclicalRate`` with ``IncreasingEpochs``, ELR+FLE (federated averaging) is
``ExponentialRate`` with ``FixedEpochs``, and so on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import ClassVar, Protocol, runtime_checkable

from .errors import ColearnError, decay_factor, expected, real_number, whole_number

InitialRate = float | Callable[[int], float]
"""eta^i: one number for every round, or a function of the round i = 0, 1, ..."""


class LearningRate(Protocol):
    """What a participant trains with: the learning rate of every local epoch of a round."""

    kind: ClassVar[str]

    def start(self, round_index: int) -> float:
        """Return eta^i, the rate from which round i = 0, 1, ... starts."""

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
            Local epochs that every participant has done before this round.
        """


@dataclass(frozen=True)
class ConstantRate:
    """The same learning rate in every epoch of a round.

    Parameters
    ----------
    initial : float or callable
        eta^i, at least 0; a function of the round i = 0, 1, ... lowers it as rounds go by.

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
        """Return eta^i, whatever the epoch."""
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
        What is left of `initial` after `total_epochs`, in (0, 1].
    total_epochs : int
        E, the local epochs planned for the whole run. Epochs beyond it go on decaying.

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


@runtime_checkable
class EpochRule(Protocol):
    """Decides how many local epochs the next round has."""

    @property
    def initial(self) -> int:
        """T_0, the local epochs of the first round."""

    def next(self, local_epochs: int, relative_change: float) -> int:
        """Return T_i from T_{i-1} and the shared model's relative change (see eq. 4)."""


@dataclass(frozen=True)
class IncreasingEpochs:
    """ILE: more local epochs once the shared model stands still.

    T_i = min(factor * T_{i-1}, maximum)   if |w^i - w^{i-1}| / |w^{i-1}| <= epsilon
    T_i = T_{i-1}                          otherwise        (eq. 4 of Mi et al., 2020)

    Parameters
    ----------
    initial : int
        T_0, at least 1. The paper's CIFAR-10 runs use 5 (20 for Inception-V4).
    epsilon : float
        At or below this relative change T grows; a tie grows. At least 0. The paper gives no value:
        read the relative change off the history of a few rounds and choose.
    factor : int, default 2
        At least 2.
    maximum : int, optional
        T never grows beyond it. Set it so that one round fits the deployment's clocks.

    Raises
    ------
    ColearnError
        If an argument lies outside its range.

    Examples
    --------
    >>> rule = IncreasingEpochs(5, epsilon=0.01, maximum=15)
    >>> rule.next(5, relative_change=0.02), rule.next(5, 0.01), rule.next(10, 0.0)
    (5, 10, 15)
    """

    initial: int
    epsilon: float
    factor: int = 2
    maximum: int | None = None

    def __post_init__(self) -> None:
        whole_number("initial local epochs (T0) of IncreasingEpochs", self.initial, least=1)
        real_number("epsilon of IncreasingEpochs", self.epsilon, least=0.0)
        whole_number("factor of IncreasingEpochs", self.factor, least=2)
        if self.maximum is not None:
            whole_number("maximum of IncreasingEpochs", self.maximum, least=self.initial)

    def next(self, local_epochs: int, relative_change: float) -> int:
        """Return the local epochs of the round after one of `local_epochs`."""
        if not relative_change <= self.epsilon:
            return local_epochs
        grown = local_epochs * self.factor
        return grown if self.maximum is None else min(grown, self.maximum)


@dataclass(frozen=True)
class FixedEpochs:
    """FLE: the same number of local epochs in every round.

    Parameters
    ----------
    initial : int
        Local epochs of every round, at least 1.

    Raises
    ------
    ColearnError
        If `initial` is not a whole number of at least 1.
    """

    initial: int

    def __post_init__(self) -> None:
        whole_number("local epochs of FixedEpochs", self.initial, least=1)

    def next(self, local_epochs: int, relative_change: float) -> int:
        """Return `local_epochs` unchanged."""
        return local_epochs


def as_learning_rate(value: float | LearningRate) -> LearningRate:
    """Return `value` itself if it is a schedule, else ``ConstantRate(value)``."""
    if isinstance(value, ConstantRate):
        return value
    if isinstance(value, Real):
        return ConstantRate(real_number("initial learning rate", value, least=0.0))
    raise expected(
        "learning_rate", "a number, CyclicalRate, ExponentialRate or ConstantRate", value
    )


def as_epoch_rule(value: int | EpochRule) -> EpochRule:
    """Return `value` itself if it is a rule, else ``FixedEpochs(value)``."""
    if isinstance(value, Integral):
        return FixedEpochs(whole_number("local epochs of FixedEpochs", value, least=1))
    if isinstance(value, EpochRule) and not isinstance(value, type):
        return value
    raise expected("local_epochs", "a whole number, IncreasingEpochs or FixedEpochs", value)


def _check_epoch(epoch: int, local_epochs: int) -> None:
    if not 1 <= epoch <= local_epochs:
        raise ColearnError(
            f"local epoch: expected a whole number from 1 to local_epochs={local_epochs}, "
            f"found {epoch!r}"
        )
