"""Operators: the rules by which learners that keep their models exchange them.

The module has dynamic averaging (Kamp et al., 2018) and the operators that are compared with it. An
operator is an immutable value, independent of Flower.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from ..errors import expected, real_number, whole_number
from .balancing import Balance, augment
from .thresholds import Absolute, Calibrated, Relative

ALWAYS = -1.0
"""A bound that every squared distance exceeds, so that the learner always sends its model."""

NEVER = math.inf


class Operator(ABC):
    """The base class of operators, which decide when learners exchange models.

    Attributes
    ----------
    check_every : int
        b, the mini-batches of every learner between two opportunities to exchange models.
    """

    check_every: int

    @property
    def calibration_checks(self) -> int:
        """The number of checks at the beginning of a run whose distances the operator needs."""
        return 0

    def calibrated(self, measured: Sequence[float]) -> "Operator":
        """Return the operator to use at the next check.

        Parameters
        ----------
        measured : sequence of float
            The mean over the learners of |f_i - r|^2 at each check so far, up to
            `calibration_checks` of them.
        """
        return self

    @abstractmethod
    def bounds(self, learners: int, reference_square: float, random: Random) -> list[float]:
        """Return for each learner the squared distance beyond which it sends its model.

        Parameters
        ----------
        learners : int
            The number of learners.
        reference_square : float
            |r|^2 over the trainable arrays.
        random : random.Random
            The random generator for operators that choose at random.
        """

    def further(self, balance: Balance) -> Iterator[list[int]]:
        """Yield groups of further learners whose models are needed, one group at a time.

        The caller must add a group's models to the average before it continues the iteration.
        """
        yield from ()

    def check_learners(self, learners: int) -> None:
        """Raise a ColearnError if the operator cannot work with this number of learners."""
        whole_number("num_learners", learners, least=1)


@dataclass(frozen=True)
class Dynamic(Operator):
    """Dynamic averaging: a learner sends its model if it is outside a sphere around the reference.

    A learner sends its model if |f_i - r|^2 > Delta after b mini-batches. If the mean of these
    models is within the sphere, it replaces them. Otherwise the models of random other learners are
    added in groups of 1, 2, 4, ... until the mean is within the sphere. If it has all models, it is
    the new reference. If violations have added up to the number of learners, all models are fetched
    at once.

    Parameters
    ----------
    threshold : float, Absolute, Relative, Calibrated or "auto"
        Delta, the squared distance; a fraction of |r|^2; or a multiple of what learners move in the
        first checks, with "auto" for ``Calibrated()``.
    check_every : int, default 1
        b, the number of mini-batches.

    Raises
    ------
    ColearnError
        If an argument lies outside its range.

    Examples
    --------
    >>> Dynamic(Relative(0.5), check_every=4).bounds(2, reference_square=3.0, random=Random())
    [1.5, 1.5]
    """

    threshold: float | Absolute | Relative | Calibrated | Literal["auto"]
    check_every: int = 1

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "threshold", _threshold(self.threshold))

    @property
    def calibration_checks(self) -> int:
        """The number of checks that a `Calibrated` threshold measures."""
        return self.threshold.checks if isinstance(self.threshold, Calibrated) else 0

    def calibrated(self, measured: Sequence[float]) -> Operator:
        """Return periodic averaging during the calibration, then dynamic averaging with Delta."""
        if not isinstance(self.threshold, Calibrated):
            return self
        threshold = self.threshold.after(measured)
        return (
            Periodic(self.check_every) if threshold is None else replace(self, threshold=threshold)
        )

    def bounds(self, learners: int, reference_square: float, random: Random) -> list[float]:
        """Return Delta for every learner."""
        return [self._delta(reference_square)] * learners

    def further(self, balance: Balance) -> Iterator[list[int]]:
        """Yield learners that are added to the violators until the mean is within the sphere."""
        return augment(balance, self._delta(balance.reference_square))

    def _delta(self, reference_square: float) -> float:
        # A calibrated threshold is a number before it is used, see `calibrated`.
        assert isinstance(self.threshold, Absolute | Relative)
        return self.threshold.delta(reference_square)


def _threshold(value: object) -> Absolute | Relative | Calibrated:
    if isinstance(value, Absolute | Relative | Calibrated):
        return value
    if value == "auto":
        return Calibrated()
    if isinstance(value, str):
        raise expected("threshold", 'a number, Relative, Calibrated or "auto"', value)
    return Absolute(value)  # type: ignore[arg-type]  # which checks it


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

    The mean of the chosen models, at least one, replaces them; the other models stay.

    Raises
    ------
    ColearnError
        If C does not lie in (0, 1] or b is not a whole number of at least 1.
    """

    fraction: float
    check_every: int

    def __post_init__(self) -> None:
        _check(self)
        # real_number accepts 0, the only number in its range that is not in (0, 1].
        if not real_number("fraction", self.fraction, least=0.0, most=1.0):
            raise expected("fraction", "a number above 0", self.fraction)

    def bounds(self, learners: int, reference_square: float, random: Random) -> list[float]:
        """Return bounds that the models of the chosen learners exceed, and no other models."""
        chosen = set(random.sample(range(learners), max(1, round(self.fraction * learners))))
        return [ALWAYS if index in chosen else NEVER for index in range(learners)]


@dataclass(frozen=True)
class Never(Operator):
    """No averaging: every learner trains its own model.

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
    """Serial learning as a baseline: one learner with all the data.

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
