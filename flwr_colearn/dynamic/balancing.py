"""Balancing: the choice of the models that dynamic averaging averages, without all of them.

The functions are pure; the caller fetches the models.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random


@dataclass
class Balance:
    """The state of the coordinator at one opportunity to exchange models.

    Attributes
    ----------
    learners : int
        m, the number of learners in the round.
    reporters : sequence of int
        The learners that sent their models, which are B at first.
    violations : int
        v, the violations since the last full synchronisation; updated by `augment`.
    reference_square : float
        |r|^2.
    distance : callable
        ``() -> |mean_B - r|^2`` for the models that are in the average at the call.
    random : random.Random
        The random generator for the choice of further learners.
    """

    learners: int
    reporters: Sequence[int]
    violations: int
    reference_square: float
    distance: Callable[[], float]
    random: Random


def augment(balance: Balance, delta: float) -> Iterator[list[int]]:
    """Yield the learners that are added to B after the violators, group by group.

    If the mean of B is within the sphere of squared radius `delta`, there are none. Otherwise the
    groups are random learners, 1, 2, 4, 8, ... of them, until the mean is within the sphere or B
    has all learners. If the violations since the last full synchronisation have reached m, the
    first group has all other learners. When B has all learners, the violations are set to 0.

    Parameters
    ----------
    balance : Balance
        The state; its `violations` is updated.
    delta : float
        Delta.
    """
    if not balance.reporters:
        return
    balance.violations += len(balance.reporters)
    others = sorted(set(range(balance.learners)) - set(balance.reporters))
    balance.random.shuffle(others)
    # Many partial synchronisations show that the reference is outdated, and cost more than a full
    # one, which sets a new reference.
    if balance.violations >= balance.learners and others:
        yield others
        others = []
    size = 1
    # The caller adds a group's models before it resumes the generator, which changes the distance.
    while others and balance.distance() > delta:
        yield others[:size]
        others, size = others[size:], 2 * size
    if not others:
        balance.violations = 0
