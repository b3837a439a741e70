"""Rules for T, the number of local epochs of a round: immutable values with pure methods."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

from .errors import ColearnError, expected, real_number, whole_number

MOST_ROUNDS = 20
"""The number of rounds at one T that `Observations` keep, so that checkpoints do not grow."""

LEARNED = 0.05
"""The share of its first value by which the training loss falls before T may grow: the default of
`PlateauEpochs`, below which `IncreasingEpochs` has a warning in the log."""


@dataclass(frozen=True)
class Observations:
    """What a rule sees of a run: a part of the progress, which checkpoints contain whole.

    Attributes
    ----------
    local_epochs : int
        T of the last round, without the limit of the budget; 0 before the first round.
    changes : tuple of float
        The relative changes |w^{i+1} - w^i| / |w^i| of the rounds at this T, the last round's last:
        at most the last 20. A round without an average has none.
    losses : tuple of float
        The training losses of the rounds at this T, means over the participants, at most the last
        20. A round without a finite training loss has none.
    first_loss : float or None
        The first training loss of the run, None if there is none yet.
    doublings : int
        The number of rounds in a row, up to the last one, after each of which T grew.
    """

    local_epochs: int = 0
    changes: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    first_loss: float | None = None
    doublings: int = 0

    def after(self, change: float, loss: float | None) -> "Observations":
        """Return the observations after one more round at this T.

        Parameters
        ----------
        change : float
            The relative change of the shared model in the round.
        loss : float or None
            The mean training loss; None, and any number that is not finite, for none.
        """
        kept = () if loss is None or not math.isfinite(loss) else (float(loss),)
        first = self.first_loss if self.first_loss is not None else next(iter(kept), None)
        return replace(
            self,
            changes=(*self.changes, float(change))[-MOST_ROUNDS:],
            losses=(*self.losses, *kept)[-MOST_ROUNDS:],
            first_loss=first,
        )

    def then(self, local_epochs: int) -> "Observations":
        """Return the observations at the beginning of a round with `local_epochs`."""
        if local_epochs == self.local_epochs:
            return replace(self, doublings=0)
        grown = self.doublings + 1 if 0 < self.local_epochs < local_epochs else 0
        return Observations(local_epochs, first_loss=self.first_loss, doublings=grown)

    @property
    def learned(self) -> float | None:
        """The share of its first value by which the training loss has fallen at this T.

        None if no participant reports a training loss; infinity after a first one of 0, which
        leaves nothing to fall.
        """
        if self.first_loss is None or not self.losses:
            return None
        if self.first_loss == 0.0:
            return math.inf
        return max(self.first_loss - min(self.losses), 0.0) / abs(self.first_loss)

    def to_json(self) -> dict[str, Any]:
        """Return the observations in types of JSON."""
        # repr, since JSON has no infinity and no NaN; losses are finite.
        return {**vars(self), "changes": [repr(change) for change in self.changes]}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "Observations":
        """Restore what `to_json` returned."""
        changes = tuple(float(change) for change in state["changes"])
        return cls(**{**state, "changes": changes, "losses": tuple(state["losses"])})


@runtime_checkable
class EpochRule(Protocol):
    """A rule for the number of local epochs of the next round."""

    @property
    def initial(self) -> int:
        """T_0, the local epochs of the first round."""

    def next(self, seen: Observations) -> int:
        """Return T_i from what was seen up to the end of round i-1.

        The rule is not asked after a round without an average; T then stays what it was. A rule is
        a pure function of its argument: whatever it needs is in `seen`, which a checkpoint keeps.
        """


@dataclass(frozen=True)
class IncreasingEpochs:
    """ILE: more local epochs once a round moves the shared model by at most epsilon.

    T_i = min(factor * T_{i-1}, maximum)   if |w^i - w^{i-1}| / |w^{i-1}| <= epsilon
    T_i = T_{i-1}                          otherwise        (eq. 4 of Mi et al., 2020)

    Epsilon is how far one round should move the model. Under a rate that restarts with every round
    the relative change falls for a few rounds and then stays at a level, which grows with T and
    with the learning rate. T therefore doubles until a round moves the model by more than epsilon,
    and then stays: epsilon decides the last T. A value below the level of the first T keeps T as it
    is. ``flwr-colearn calibrate history.jsonl`` prints the levels of a run and the T that each
    epsilon would have given; `PlateauEpochs` needs no epsilon.

    Parameters
    ----------
    initial : int
        T_0, at least 1. The paper's CIFAR-10 runs use 5 (20 for Inception-V4).
    epsilon : float
        T grows if the relative change is at most this; a tie grows. At least 0. The paper gives no
        value.
    factor : int, default 2
        The factor by which T grows, at least 2.
    maximum : int, optional
        The largest T. Set it so that one round is within the deployment's time limits.

    Raises
    ------
    ColearnError
        If an argument lies outside its range.

    Examples
    --------
    >>> rule = IncreasingEpochs(5, epsilon=0.01, maximum=15)
    >>> [rule.next(Observations(5, (change,))) for change in (0.02, 0.01)]
    [5, 10]
    >>> rule.next(Observations(10, (0.0,)))
    15
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

    def next(self, seen: Observations) -> int:
        """Return the local epochs of the next round by eq. 4."""
        # In this form so that NaN is no plateau: every comparison with it is false.
        if not seen.changes or not seen.changes[-1] <= self.epsilon:
            return seen.local_epochs
        return _grown(seen.local_epochs, self.factor, self.maximum)


@dataclass(frozen=True)
class PlateauEpochs:
    """Twice the local epochs when the relative change at the present T has stopped falling.

    T doubles if the mean of the last `patience` relative changes at this T is not below
    (1 - tolerance) times the mean of the `patience` before. So it needs at least 2 * patience
    rounds at a T, and no epsilon. A model that has not begun to learn moves as little as one that
    has converged; T therefore stays until the training loss has fallen by the share `learned` of
    its first value. The rule is ours and not of Mi et al. (2020), whose eq. 4 is
    `IncreasingEpochs`.

    The loss is the mean over the participants of their metric ``train-loss`` (or ``train_loss``).
    If no participant reports it, the condition on the loss is off, and the log has a warning. Noise
    that differential privacy adds to the average gives the relative change a level of its own, at
    which T doubles like at any other.

    The rule is made for a rate that restarts with every round, such as ``CyclicalRate``: a rate
    that falls over the whole run makes the relative change fall with it, and T may stay.

    Parameters
    ----------
    initial : int
        T_0, at least 1. With T=1 eq. 3 has one epoch, at eta * r; the cycle begins with T=2.
    patience : int, default 3
        The number of rounds of each mean, from 1 to 10.
    tolerance : float, default 0.05
        The relative fall of the mean below which the change counts as level, from 0 to 1.
    maximum : int or None, default 16
        The largest T, at least `initial`; None for no limit but the run's budget.
    learned : float, default 0.05
        The share of the first training loss by which it must have fallen; 0 for no condition.

    Raises
    ------
    ColearnError
        If an argument lies outside its range.

    Examples
    --------
    >>> rule = PlateauEpochs(2, patience=2, maximum=16)
    >>> falling, level = (0.4, 0.3, 0.2, 0.1), (0.3, 0.2, 0.2, 0.3)
    >>> [rule.next(Observations(2, changes)) for changes in (falling, level)]
    [2, 4]
    """

    initial: int
    patience: int = 3
    tolerance: float = 0.05
    maximum: int | None = 16
    learned: float = LEARNED

    def __post_init__(self) -> None:
        whole_number("initial local epochs (T0) of PlateauEpochs", self.initial, least=1)
        whole_number("patience of PlateauEpochs", self.patience, least=1)
        if self.patience > MOST_ROUNDS // 2:
            most = f"at most {MOST_ROUNDS // 2}, half of the rounds that are kept"
            raise expected("patience of PlateauEpochs", most, self.patience)
        real_number("tolerance of PlateauEpochs", self.tolerance, least=0.0, most=1.0)
        real_number("learned of PlateauEpochs", self.learned, least=0.0, most=1.0)
        if self.maximum is not None:
            whole_number("maximum of PlateauEpochs", self.maximum, least=self.initial)

    def next(self, seen: Observations) -> int:
        """Return twice the local epochs on a plateau after learning began, else the same."""
        if not is_level(seen.changes, self.patience, self.tolerance) or not self.has_learned(seen):
            return seen.local_epochs
        return _grown(seen.local_epochs, 2, self.maximum)

    def has_learned(self, seen: Observations) -> bool:
        """Return whether the training loss has fallen far enough, or is not reported."""
        return seen.learned is None or seen.learned >= self.learned


@dataclass(frozen=True)
class FixedEpochs:
    """FLE: the same number of local epochs in every round.

    Parameters
    ----------
    initial : int
        The local epochs of every round, at least 1.

    Raises
    ------
    ColearnError
        If `initial` is not a whole number of at least 1.
    """

    initial: int

    def __post_init__(self) -> None:
        whole_number("local epochs of FixedEpochs", self.initial, least=1)

    def next(self, seen: Observations) -> int:
        """Return the local epochs unchanged."""
        return seen.local_epochs


def is_level(changes: Sequence[float], patience: int = 3, tolerance: float = 0.05) -> bool:
    """Return whether relative changes have stopped falling.

    Parameters
    ----------
    changes : sequence of float
        The relative changes of rounds at one T, in order.
    patience, tolerance
        As for `PlateauEpochs`: the mean of the last `patience` changes is not below
        (1 - tolerance) times the mean of the `patience` before. Changes that are too few, or not
        finite, are not level.
    """
    if len(changes) < 2 * patience:
        return False
    before, last = changes[-2 * patience : -patience], changes[-patience:]
    # An infinite change among the last would be above any mean before.
    if not all(map(math.isfinite, (*before, *last))):
        return False
    return sum(last) / patience >= (1.0 - tolerance) * (sum(before) / patience)


def as_epoch_rule(value: int | EpochRule) -> EpochRule:
    """Return `value` itself if it is a rule, else ``FixedEpochs(value)``.

    Raises
    ------
    ColearnError
        If `value` is neither, or a rule whose ``next`` takes other arguments.
    """
    if isinstance(value, Integral):
        return FixedEpochs(whole_number("local epochs of FixedEpochs", value, least=1))
    if not isinstance(value, EpochRule) or isinstance(value, type):
        raise expected(
            "local_epochs",
            "a whole number, PlateauEpochs, IncreasingEpochs, FixedEpochs, or an object with "
            "'initial' and 'next'",
            value,
        )
    _check_signature(value)
    return value


def _check_signature(rule: EpochRule) -> None:
    """Raise a ColearnError for a rule of version 0.6, whose ``next`` took two arguments."""
    # In the first round, and not after it, when participants have trained for a day.
    try:
        inspect.signature(rule.next).bind(Observations())
    except TypeError as error:
        raise ColearnError(
            f"local_epochs: expected {type(rule).__name__}.next(seen), which takes one argument, "
            "the flwr_colearn.Observations with local_epochs and changes (up to version 0.6 it "
            f"took local_epochs and relative_change), found {error}"
        ) from None


def _grown(local_epochs: int, factor: int, maximum: int | None) -> int:
    grown = local_epochs * factor
    return grown if maximum is None else min(grown, maximum)
