"""Balancing, the heart of dynamic averaging: which models to average so that the rest may be left.

Pure functions of numpy arrays; who sends them, and how, is not known here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from ..errors import ColearnError
from ..roles import Arrays


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


def squared_distance(one: Arrays, other: Arrays) -> float:
    """Return |one - other|^2 over all arrays taken as one vector, in float64.

    Raises
    ------
    ColearnError
        If an array is missing or has another shape.

    Examples
    --------
    >>> squared_distance({"w": np.array([3.0, 4.0])}, {"w": np.zeros(2)})
    25.0
    """
    total = 0.0
    for name, array in one.items():
        if name not in other or other[name].shape != array.shape:
            raise ColearnError(f"distance: expected two models of the same arrays, found '{name}'")
        difference = np.subtract(array, other[name], dtype=np.float64).ravel()
        total += float(difference @ difference)
    return total


def squared_norm(arrays: Arrays) -> float:
    """Return |arrays|^2 over all arrays taken as one vector, in float64."""
    flat = [array.astype(np.float64).ravel() for array in arrays.values()]
    return float(sum(each @ each for each in flat))


def divergence(models: Sequence[Arrays]) -> float:
    """Return the mean squared distance of models to their mean.

    Examples
    --------
    >>> divergence([{"w": np.array([0.0])}, {"w": np.array([2.0])}])
    1.0
    """
    mean = {
        name: np.asarray(np.mean([model[name] for model in models], axis=0, dtype=np.float64))
        for name in models[0]
    }
    return sum(squared_distance(model, mean) for model in models) / len(models)
