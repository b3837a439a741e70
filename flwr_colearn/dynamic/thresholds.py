"""Thresholds: the ways to state Delta, the squared distance that a learner's model may move."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import real_number, whole_number


@dataclass(frozen=True)
class Relative:
    """A threshold as a fraction of |r|^2, since Delta scales with the model.

    Delta = fraction * |r|^2, computed for every reference. With ``Relative(0.01)`` a model may move
    by a tenth of the reference's norm.

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
    """A threshold Delta, a squared distance; with ``math.inf`` no model is ever sent.

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
        """Return Delta, the same for every reference."""
        return float(self.value)


@dataclass(frozen=True)
class Calibrated:
    """A threshold that is measured at the beginning of the run.

    The first `checks` checks synchronise fully, as periodic averaging does, and measure how far the
    learners move from one check to the next. From then on

        Delta = factor * mean over checks and learners of |f_i - r|^2.

    The rule is ours, not that of Kamp et al. (2018). With a factor of 1, the learners synchronise
    about as often as by the clock while they move as at the beginning. If they keep their
    direction, the squared distance grows with the square of the time, so a factor of 4 is about two
    checks of such movement; if their steps are independent of each other, it is about four.

    Parameters
    ----------
    factor : float, default 4
        The multiple of the mean squared distance.
    checks : int, default 5
        The number of checks that are measured.

    Raises
    ------
    ColearnError
        If the factor is negative or not finite, or `checks` is not a whole number of at least 1.

    Examples
    --------
    >>> Calibrated(factor=2.0, checks=2).after([3.0, 5.0])
    Absolute(value=8.0)
    """

    factor: float = 4.0
    checks: int = 5

    def __post_init__(self) -> None:
        real_number("factor of Calibrated", self.factor, least=0.0)
        whole_number("checks of Calibrated", self.checks, least=1)

    def after(self, measured: Sequence[float]) -> Absolute | None:
        """Return the threshold after the calibration; None as long as checks are missing.

        Parameters
        ----------
        measured : sequence of float
            The mean over the learners of |f_i - r|^2 at each check so far.
        """
        if len(measured) < self.checks:
            return None
        return Absolute(self.factor * math.fsum(measured[: self.checks]) / self.checks)
