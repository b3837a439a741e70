"""The one error family of the plugin."""

import math
from numbers import Integral, Real
from typing import Any


class ColearnError(Exception):
    """Raised for every fault that flwr-colearn recognises.

    The message says what was expected, what was found and where to mend it.

    Attributes
    ----------
    result : flwr.serverapp.strategy.Result or None
        What a run had reached when it ended with this error, the model of its last completed
        round included; ``None`` where no run was under way.
    """

    result: Any = None


class NotAnsweredError(ColearnError):
    """Raised for a reply that answers nothing yet: its participant is asked again.

    Unlike a reply that is refused, there is nothing wrong with it.
    """


NOT_FINITE = "expected finite numbers, found NaN or Inf"
"""What is wrong with a model that has diverged, after the name of its first such array."""


def expected(what: str, wanted: str, found: object) -> ColearnError:
    """Build the error ``{what}: expected {wanted}, found {found}``."""
    return ColearnError(f"{what}: expected {wanted}, found {found!r}")


def whole_number(what: str, value: object, least: int) -> int:
    """Return `value` as int, or raise unless it is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise expected(what, f"a whole number of at least {least}", value)
    return int(value)


def real_number(what: str, value: object, least: float, most: float = math.inf) -> float:
    """Return `value` as float, or raise unless it is a finite number in [least, most]."""
    number = _as_float(value)
    if not math.isfinite(number):
        raise expected(what, "a finite number", value)
    if not least <= number <= most:
        bounds = f"at least {least}" if math.isinf(most) else f"from {least} to {most}"
        raise expected(what, f"a number of {bounds}", value)
    return number


def decay_factor(what: str, value: object) -> float:
    """Return `value` as float, or raise unless it is a number in (0, 1]."""
    number = _as_float(value)
    if not 0.0 < number <= 1.0:
        raise expected(what, "a number in (0, 1]", value)
    return number


def _as_float(value: object) -> float:
    """Return a real number as float, and NaN for anything else."""
    return math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
