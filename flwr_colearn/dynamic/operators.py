"""Operators: when learners that keep their models exchange them, and which ones.

Dynamic averaging (Kamp et al., 2018) and the operators that it is compared with, behind one
interface. No flwr in sight: an operator is an immutable value that answers two questions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from ..errors import expected, real_number, whole_number
from .balancing import Balance, augment

ALWAYS = -1.0
"""A bound that every squared distance exceeds: the learner sends its model in any case."""

NEVER = math.inf


@dataclass(frozen=True)
class Relative:
    """A threshold as a fraction of |r|^2, since Delta scales with the model.

    Delta = fraction * |r|^2, anew for every reference: ``Relative(0.01)`` lets a model move by a
    tenth of the reference's length.

    Raises
    ------
    ColearnError
        If the fraction is negative or not finite.
    """

    fraction: float

    def __post_init__(self) -> None:
        real_number("fraction of Relative", self.fraction, least=0.0)

    def delta(self, reference_square: float) -> float:
        """Return Delta for a reference with that squared norm."""
        return self.fraction * reference_square


@dataclass(frozen=True)
class Absolute:
    """Delta itself, a squared distance; ``math.inf`` never communicates.

    Raises
    ------
    ColearnError
        If Delta is negative or NaN.
    """

    value: float

    def __post_init__(self) -> None:
        if self.value != math.inf:
            real_number("threshold", self.value, least=0.0)

    def delta(self, reference_square: float) -> float:
        """Return Delta, whatever the reference."""
        return float(self.value)


class Operator(ABC):
    """When learners exchange models.

    Attributes
    ----------
    check_every : int
        b: mini-batches of every learner between two opportunities to exchange models.
    """

    check_every: int

    @abstractmethod
    def bounds(self, learners: int, reference_square: float, random: Random) -> list[float]:
        """Return for each learner the squared distance beyond which it sends its model.

        Parameters
        ----------
        learners : int
            How many take part.
        reference_square : float
            |r|^2 over the trainable arrays.
        random : random.Random
            For operators that choose at random.
        """

    def further(self, balance: Balance) -> Iterator[list[int]]:
        """Yield groups of further learners whose models are needed, one group at a time.

        The caller adds a group's models to the average before it asks for the next.
        """
        yield from ()

    def check_learners(self, learners: int) -> None:
        """Raise a ColearnError if the operator cannot work with so many learners."""
        whole_number("num_learners", learners, least=1)


@dataclass(frozen=True)
class Dynamic(Operator):
    """Dynamic averaging: a learner speaks when its model has left the sphere around the reference.

    A learner that finds |f_i - r|^2 > Delta after b mini-batches sends its model. The mean of
    those who sent goes back to them if it lies within the sphere; else random others are asked in
    groups of 1, 2, 4, ... until it does, or everybody is in: then the mean is the new reference.
    Everybody is asked at once when violations have added up to the number of learners.

    Parameters
    ----------
    threshold : float, Absolute or Relative
        Delta, the squared distance; or a fraction of |r|^2.
    check_every : int, default 1
        b.

    Raises
    ------
    ColearnError
        If an argument lies outside its range.

    Examples
    --------
    >>> Dynamic(Relative(0.5), check_every=4).bounds(2, reference_square=3.0, random=Random())
    [1.5, 1.5]
    """

    threshold: float | Absolute | Relative
    check_every: int = 1

    def __post_init__(self) -> None:
        _check(self)
        if not isinstance(self.threshold, Absolute | Relative):
            object.__setattr__(self, "threshold", Absolute(self.threshold))

    def bounds(self, learners: int, reference_square: float, random: Random) -> list[float]:
        """Return Delta for all of them."""
        return [self._delta(reference_square)] * learners

    def further(self, balance: Balance) -> Iterator[list[int]]:
        """Yield what augments the violators until their mean lies within the sphere."""
        return augment(balance, self._delta(balance.reference_square))

    def _delta(self, reference_square: float) -> float:
        assert isinstance(self.threshold, Absolute | Relative)
        return self.threshold.delta(reference_square)


@dataclass(frozen=True)
class Periodic(Operator):
    """Periodic averaging: every learner sends its model every b mini-batches.

    Raises
    ------
    ColearnError
        If b is not a whole number of at least 1.
    """

    check_every: int

    def __post_init__(self) -> None:
        _check(self)

    def bounds(self, learners: int, reference_square: float, random: Random) -> list[float]:
        """Return bounds that every model exceeds."""
        return [ALWAYS] * learners


def Continuous() -> Periodic:  # noqa: N802  (a name among the operators)
    """Continuous averaging: every learner sends its model after every mini-batch."""
    return Periodic(1)


@dataclass(frozen=True)
class FractionAveraging(Operator):
    """Federated averaging of a random fraction C of the learners every b mini-batches.

    The mean of the chosen, at least one, replaces their models; the others go on with their own.

    Raises
    ------
    ColearnError
        If C does not lie in (0, 1] or b is not a whole number of at least 1.
    """

    fraction: float
    check_every: int

    def __post_init__(self) -> None:
        _check(self)
        if not real_number("fraction", self.fraction, least=0.0, most=1.0):
            raise expected("fraction", "a number above 0", self.fraction)

    def bounds(self, learners: int, reference_square: float, random: Random) -> list[float]:
        """Return bounds that the chosen exceed and the others never do."""
        chosen = set(random.sample(range(learners), max(1, round(self.fraction * learners))))
        return [ALWAYS if index in chosen else NEVER for index in range(learners)]


@dataclass(frozen=True)
class Never(Operator):
    """No averaging at all: every learner for itself.

    Raises
    ------
    ColearnError
        If b is not a whole number of at least 1.
    """

    check_every: int = 1

    def __post_init__(self) -> None:
        _check(self)

    def bounds(self, learners: int, reference_square: float, random: Random) -> list[float]:
        """Return bounds that no model exceeds."""
        return [NEVER] * learners


@dataclass(frozen=True)
class Serial(Never):
    """Serial learning, the yardstick: one learner that has all the data.

    Raises
    ------
    ColearnError
        If b is not a whole number of at least 1; for more than one learner.
    """

    def check_learners(self, learners: int) -> None:
        """Raise a ColearnError for more than one learner."""
        if learners != 1:
            raise expected("num_learners of Serial", "1, with the data of all", learners)


def _check(operator: Operator) -> None:
    whole_number("check_every", operator.check_every, least=1)
