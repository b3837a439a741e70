"""Recovery and Guard: restarts, lost participants, and the bounds of one participant's update."""

import math
from dataclasses import dataclass
from logging import INFO
from typing import Literal

from flwr.common import DEFAULT_TTL, log

from .errors import expected, real_number, whole_number

LONGEST_PAUSE = 60.0
"""The longest pause between two attempts, in seconds."""

SCARCE = 15.0
"""The pause after a participant ran out of memory, as a multiple of the other pauses."""

REPORT_WITHIN = 120.0
"""The seconds that Flower may take to report the end of a participant's process."""

UNLIMITED = 365 * 86_400.0
"""The time to live of messages in seconds where an attempt has no time limit."""

SLACK = 3.0
"""The time limit of an attempt, as a multiple of the time that its local epochs should take."""


@dataclass(frozen=True)
class Quorum:
    """Policy to complete a round without its lost participants, if at least `least` replied.

    Raises
    ------
    ColearnError
        If `least` is not a whole number of at least 1.
    """

    least: int

    def __post_init__(self) -> None:
        whole_number("quorum", self.least, least=1)


Policy = Literal["fail", "wait"] | Quorum
"""What the server does when a participant's restarts are spent: "fail" ends the run with the model
of the last completed round, "wait" restarts without a limit, and a `Quorum` completes the round
without the participant."""


@dataclass(frozen=True)
class Recovery:
    """The limits after which a participant counts as lost, and the policy for lost participants.

    Parameters
    ----------
    max_restarts : int, default 3
        The number of restarts of one participant in one round. A participant whose reply is refused
        for the same reason as before, or that raises the same exception, is restarted once only:
        with the same model, data and seed it would fail the same way. Exceptions of disks and
        networks (`OSError`, `ConnectionError`, `TimeoutError`) are not of this kind.
    pause : float, default 1.0
        The seconds before the first restart; doubled before each further one, up to a minute.
        After running out of memory the pause is 15 times as long, up to 15 minutes.
    patience : float, default 600.0
        The seconds within which a disconnected participant must reconnect. Under a `Quorum` they
        are spent once per absence: later rounds begin without it, until it is back.
    policy : "fail", "wait" or Quorum, default "fail"
        The policy when restarts or patience are spent.

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
        """Return the number of participants that must reply, of so many in the round."""
        return self.policy.least if isinstance(self.policy, Quorum) else participants

    @property
    def restarts_for_ever(self) -> bool:
        """Whether the number of restarts has no limit."""
        return self.policy == "wait"

    def pause_before(self, restarts: int, scarce: bool = False) -> float:
        """Return the seconds to wait before the next restart, after the given number of them.

        Parameters
        ----------
        restarts : int
            The number of restarts in this round.
        scarce : bool, default False
            Whether the participant ran out of memory, which others have to free.
        """
        # The power is bounded, since "wait" has no limit of restarts and a float would overflow.
        pause = min(self.pause * 2.0 ** min(restarts, 64), LONGEST_PAUSE)
        return SCARCE * pause if scarce else pause


DEFAULT_RECOVERY = Recovery()
"""The recovery of a user who gave none, recognised by identity."""


@dataclass(frozen=True)
class Guard:
    """The bounds of the norm of one participant's update, which is its model minus the one sent.

    A reply beyond the bound is refused by name and recorded, and its sender is restarted as after
    any other refused reply. The norm is L2 over all trainable arrays. The guard stops values that
    are broken or absurd. It does not stop a site that spoils the model within the bounds, for which
    there are ``FedMedian`` and ``Krum``; see docs/threat-model.md.

    Parameters
    ----------
    growth : float, default 100
        The bound, as a multiple of the largest accepted norm of earlier rounds. If a round has more
        local epochs than the one of that norm, the bound grows in proportion.
    first : float, default 1000
        The bound in round 1, and until an update is larger than rounding, as a multiple of the
        sent model's norm. A model of zeros, or of numbers below 1e-3 in the root mean square, has
        no scale of its own; then it is a multiple of the norm of a model of ones.
    largest_share : float, default 1
        The largest share of one participant in an average that is weighted by numbers of examples;
        see `flwr_colearn.aggregation.bounded_weights`. With less than 1 the models of a round are
        in memory together, since the shares are known only when all have arrived. Dynamic averaging
        does not use it.
    records_private : bool, default False
        Whether norms are recorded under differential privacy too. They are computed from models
        before noise is added to the average, so the wrapper's guarantee does not cover them. No
        reply is refused for its norm there, since the noise is calibrated for K participants.

    Raises
    ------
    ColearnError
        If a bound is not a finite number of at least 1, or the share is not above 0 and at most 1.

    Examples
    --------
    >>> Guard(growth=10)
    Guard(growth=10, first=1000.0, largest_share=1.0, records_private=False)
    """

    growth: float = 100.0
    first: float = 1000.0
    largest_share: float = 1.0
    records_private: bool = False

    def __post_init__(self) -> None:
        real_number("growth of Guard", self.growth, least=1.0)
        real_number("first of Guard", self.first, least=1.0)
        real_number("largest_share of Guard", self.largest_share, least=0.0)
        if not 0.0 < self.largest_share <= 1.0:
            raise expected(
                "largest_share of Guard", "a share above 0 and at most 1", self.largest_share
            )


DEFAULT_GUARD = Guard()
"""The guard that nobody asked for: it is off where there can be none, and any other is refused."""


def guard_under(guard: Guard | None, private: bool) -> Guard | None:
    """Return the guard of a run; None under differential privacy, unless norms are recorded."""
    if guard is None or not private or guard.records_private:
        return guard
    log(INFO, "Guard: off under a privacy wrapper, and norms of updates are not recorded")
    return None


def attempt_limit(timeout: float, expected_seconds: float = 0.0) -> float | None:
    """Return the time limit of one attempt of one participant, in seconds; None for no limit.

    Parameters
    ----------
    timeout : float
        The least limit; infinity for none.
    expected_seconds : float
        The expected duration of the attempt, computed from those of earlier ones.
    """
    limit = max(timeout, SLACK * expected_seconds)
    return None if math.isinf(limit) else limit


def timed(limit: float | None) -> dict[str, float]:
    """Return the entry of a message's config with the time limit of an attempt, if there is one.

    A ClientApp process of a deployment that takes longer ends itself.
    """
    return {} if limit is None else {"time-limit": limit}


def reply_within(limit: float | None) -> float | None:
    """Return the seconds to wait for a reply to an attempt with a time limit.

    They are more than the limit, since Flower detects the end of a process with a delay.
    """
    return None if limit is None else limit + REPORT_WITHIN


def time_to_live(within: float | None) -> float:
    """Return the time to live of a message, in seconds; it is longer than any wait for its reply.

    Flower drops a reply that arrives after the time to live of its message, by default 12 hours.

    Parameters
    ----------
    within : float or None
        The seconds for which the server waits for the reply; None or infinity for no limit.
    """
    if within is None or math.isinf(within):
        return UNLIMITED
    return max(float(DEFAULT_TTL), 2.0 * within)
