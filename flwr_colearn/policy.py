"""How hard to try before a participant counts as lost, and what follows then."""

import math
from dataclasses import dataclass
from typing import Literal

from .errors import expected, real_number, whole_number

LONGEST_PAUSE = 60.0
"""Seconds between two attempts, at most."""

REPORT_WITHIN = 120.0
"""Seconds that Flower may take to report the end of a participant's process."""

SLACK = 3.0
"""An attempt may take so many times what its local epochs are expected to take."""


@dataclass(frozen=True)
class Quorum:
    """Go on without the participants that are lost, as long as at least `least` replied.

    Raises
    ------
    ColearnError
        If `least` is not a whole number of at least 1.
    """

    least: int

    def __post_init__(self) -> None:
        whole_number("quorum", self.least, least=1)


Policy = Literal["fail", "wait"] | Quorum
"""What happens when a participant's restarts are spent: end the run with the model of the last
completed round, wait and go on restarting for ever, or go on without it."""


@dataclass(frozen=True)
class Recovery:
    """How hard to try before a participant counts as lost.

    Parameters
    ----------
    max_restarts : int, default 3
        Restarts of one participant in one round.
    pause : float, default 1.0
        Seconds before the first restart; doubled before each further one, up to a minute.
    patience : float, default 600.0
        Seconds that a participant which left may take to come back.
    policy : "fail", "wait" or Quorum, default "fail"
        When restarts or patience are spent.

    Raises
    ------
    ColearnError
        If an argument lies outside its range.
    """

    max_restarts: int = 3
    pause: float = 1.0
    patience: float = 600.0
    policy: Policy = "fail"

    def __post_init__(self) -> None:
        whole_number("max_restarts", self.max_restarts, least=0)
        real_number("pause", self.pause, least=0.0)
        real_number("patience", self.patience, least=0.0)
        if not isinstance(self.policy, Quorum) and self.policy not in ("fail", "wait"):
            raise expected("policy", "'fail', 'wait' or Quorum(n)", self.policy)

    def required(self, participants: int) -> int:
        """Return how many of a round's participants it must have."""
        return self.policy.least if isinstance(self.policy, Quorum) else participants

    @property
    def restarts_for_ever(self) -> bool:
        """Whether nobody is ever given up."""
        return self.policy == "wait"

    def pause_before(self, restarts: int) -> float:
        """Return the seconds to wait before the next restart, after so many."""
        # The power is bounded: "wait" restarts more often than a float can be doubled.
        return min(self.pause * 2.0 ** min(restarts, 64), LONGEST_PAUSE)


def attempt_limit(timeout: float, expected_seconds: float = 0.0) -> float | None:
    """Return the seconds that one attempt of one participant may take; None for no limit.

    Parameters
    ----------
    timeout : float
        The least limit; infinity for none.
    expected_seconds : float
        What the attempt is expected to take, from what earlier ones took.
    """
    limit = max(timeout, SLACK * expected_seconds)
    return None if math.isinf(limit) else limit


def reply_within(limit: float | None) -> float | None:
    """Return the seconds to wait for a reply: Flower takes some to notice that a process ended."""
    return None if limit is None else limit + REPORT_WITHIN
