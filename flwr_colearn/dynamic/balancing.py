"""Balancing, the heart of dynamic averaging: which models to average so that the rest may be left.

Pure functions of numpy arrays; who sends them, and how, is not known here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random


@dataclass
class Balance:
    """One opportunity to exchange models, as the coordinator sees it.

    Attributes
    ----------
    learners : int
        m, those who take part.
    reporters : sequence of int
        Those who sent their model: B at first.
    violations : int
        v, the violations since the last full synchronisation; updated by `augment`.
    reference_square : float
        |r|^2.
    distance : callable
        ``() -> |mean_B - r|^2`` for the models in the average now.
    random : random.Random
        Chooses further learners.
    """

    learners: int
    reporters: Sequence[int]
    violations: int
    reference_square: float
    distance: Callable[[], float]
    random: Random


def augment(balance: Balance, delta: float) -> Iterator[list[int]]:
    """Yield the learners that B needs besides the violators, group by group.

    Nobody, while the mean of B lies within the sphere of squared radius `delta`; else random
    learners, 1, 2, 4, 8, ... at a time, until it does or B is everybody. Everybody at once when
    the violations since the last full synchronisation have reached m: then, and whenever B is
    everybody, they are counted from 0 again.

    Parameters
    ----------
    balance : Balance
        Its `violations` is brought up to date.
    delta : float
        Delta.
    """
    if not balance.reporters:
        return
    balance.violations += len(balance.reporters)
    others = sorted(set(range(balance.learners)) - set(balance.reporters))
    balance.random.shuffle(others)
    if balance.violations >= balance.learners and others:
        yield others
        others = []
    size = 1
    while others and balance.distance() > delta:
        yield others[:size]
        others, size = others[size:], 2 * size
    if not others:
        balance.violations = 0
