"""The exceptions of the plugin, and the checks of numbers that raise them."""

import math
from numbers import Integral, Real
from typing import Any

from .text import printable

_LONGEST = 10_000
"""The characters of an error's message. It may have a reason for each of many participants."""


class ColearnError(Exception):
    """Raised for every fault that flwr-colearn recognises.

    The message states what was expected, what was found and, where that helps, the remedy.

    Attributes
    ----------
    result : flwr.serverapp.strategy.Result or None
        The result up to the last completed round of the run that ended with this error, with its
        model; ``None`` where no run was under way.
    remedy : str
        What to do about it, as the end of the message; empty for nothing that is known.
    logged : bool
        Whether the log has its traceback already.
    """

    result: Any = None
    remedy: str = ""
    logged: bool = False

    def __str__(self) -> str:
        """Return the message, which may quote what a participant sent, as text for a log."""
        message = printable(super().__str__(), _LONGEST)
        return f"{message}. {self.remedy}" if self.remedy else message


class MissingExtraError(ColearnError, ModuleNotFoundError):
    """Raised by the import of a package of this plugin whose framework is not installed."""

    @classmethod
    def of(cls, package: str, extra: str, error: ModuleNotFoundError) -> "MissingExtraError":
        """Return the error for a package, with the extra that installs what it imports."""
        return cls(
            f"{package}: expected the framework to be installed, found no module {error.name!r}; "
            f"pip install 'flwr-colearn[{extra}]'",
            name=error.name,
        )


class ParticipantError(ColearnError):
    """Raised at a participant in place of a foreign exception, whose text must not leave the site.

    The message has the type of that exception; its text is in the participant's log.
    """


class NotAnsweredError(ColearnError):
    """Raised for a valid reply that does not contain the answer yet.

    The server sends the message again, and does not count the reply as refused.
    """


NOT_FINITE = "expected finite numbers, found NaN or Inf"
"""End of the error message for a diverged model; the name of its first such array precedes it."""


def expected(what: str, wanted: str, found: object) -> ColearnError:
    """Build the error ``{what}: expected {wanted}, found {found}``."""
    return ColearnError(f"{what}: expected {wanted}, found {printable(repr(found), 1000)}")


def whole_number(what: str, value: object, least: int) -> int:
    """Return `value` as int, or raise unless it is a whole number of at least `least`."""
    # bool is a subclass of int, and True as a number of rounds is a mistake.
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
    # Written so that NaN, for which every comparison is false, is refused too.
    if not 0.0 < number <= 1.0:
        raise expected(what, "a number in (0, 1]", value)
    return number


def _as_float(value: object) -> float:
    """Return a real number as float, and NaN for anything else."""
    return math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
