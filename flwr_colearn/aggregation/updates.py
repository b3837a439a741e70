"""Updates: the norms of participants' updates, their bound (`Guard`) and their direction."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import expected
from ..policy import Guard
from ..roles import Arrays, NDArray
from .distance import squared_norm, squared_update
from .mean import RunningMean
from .validation import check_structure

SAMPLE = 1 << 12
"""The largest number of coordinates from which a cosine is computed; 16 KiB a participant."""

_TINY = 1e-3
"""The root mean square of a model below which it has no scale of its own."""

_STILL = 1e-6
"""The norm, relative to the model's, up to which an update is no more than rounding."""


@dataclass(frozen=True)
class Update:
    """One participant's update, the difference of its model to the one that was sent.

    Attributes
    ----------
    norm : float
        The L2 norm over all trainable arrays; not finite if the model is not.
    sample : numpy.ndarray
        Some of its coordinates, the same for all participants, as float32.
    """

    norm: float
    sample: NDArray


class Updates:
    """The updates of a run's participants: measured, bounded and, if accepted, remembered.

    Parameters
    ----------
    guard : Guard
        The bounds.
    names : iterable of str
        The names of the trainable arrays, over which norms are computed.
    gradients : bool, default False
        Whether participants send gradients in place of models, which are the update themselves.
    refuses : bool, default True
        Whether an update beyond the bound is refused; else it is only measured.
    """

    def __init__(
        self, guard: Guard, names: Iterable[str], gradients: bool = False, refuses: bool = True
    ) -> None:
        self.guard = guard
        self._names = list(names)
        self._gradients = gradients
        self._refuses = refuses
        self._largest = self._epochs = 0.0
        self._like: Arrays = {}
        self._sent: Arrays = {}
        self._now = 1.0
        self._scale: float | None = None
        self._accepted: dict[str, Update] = {}

    def renew(self, like: Arrays, epochs: float = 1) -> None:
        """Begin a round, in which participants train so many epochs from another model."""
        self._largest, self._epochs = self._remembered()
        self._like = like
        self._sent = {name: like[name] for name in self._names}
        # A round of a strategy that states no epochs counts as one.
        self._now, self._scale = float(epochs) or 1.0, None
        self._accepted = {}
        self._places = _places(tuple((name, array.size) for name, array in self._sent.items()))

    def admitted(self, arrays: Arrays, mean: RunningMean, weight: float) -> Update:
        """Return the update of a model that `mean` can add and whose norm is within the bound.

        Raises
        ------
        ColearnError
            As `RunningMean.check` and `check` do.
        """
        update = self.measure(arrays)
        # A finite norm shows that the arrays are finite, which saves the mean a pass over them.
        mean.check(arrays, weight, self._names if math.isfinite(update.norm) else ())
        self.check(update)
        return update

    def measure(self, arrays: Arrays) -> Update:
        """Return the update of a model.

        Raises
        ------
        ColearnError
            If the model has not the names, shapes and types of the one that was sent.
        """
        check_structure(arrays, self._like)
        new = {name: arrays[name] for name in self._names}
        old = None if self._gradients else self._sent
        return Update(math.sqrt(squared_update(new, old)), self._sample(new))

    def check(self, update: Update) -> None:
        """Raise a ColearnError if an update is beyond the bound.

        Raises
        ------
        ColearnError
            With the norm, the bound and where it comes from.
        """
        # An update of zero is within any bound, the first of which is a pass over the model.
        if not self._refuses or update.norm == 0.0:
            return
        limit, source = self._limit()
        # Not `norm > limit`, which is false for NaN.
        if not update.norm <= limit:
            raise expected(
                "norm of the update",
                f"at most {limit:.4g}, {source}; if the site is honest, raise the bounds of "
                "guard=Guard(...)",
                f"{update.norm:.4g}",
            )

    def accept(self, participant: str, update: Update) -> None:
        """Remember the update of a participant whose model is in the mean."""
        self._accepted[participant] = update

    def described(self, weights: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
        """Return norm, and cosine to the mean update, of accepted participants with these weights.

        The mean is that of the samples, so that no model is needed any more.
        """
        # Sorted, so that the order of arrival does not change the last bits.
        samples = {n: u.sample.astype(np.float64) for n, u in sorted(self._accepted.items())}
        with np.errstate(over="ignore", invalid="ignore"):
            direction = sum((weights[name] * s for name, s in samples.items()), np.zeros(()))
        return {
            name: {"norm": self._accepted[name].norm, "cosine": _cosine(sample, direction)}
            for name, sample in samples.items()
        }

    def state(self) -> dict[str, str]:
        """Return the largest accepted norm and its epochs in types of JSON, without rounding."""
        largest, epochs = self._remembered()
        return {"largest": repr(largest), "epochs": repr(epochs)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self._largest, self._epochs = float(state["largest"]), float(state["epochs"])

    def _remembered(self) -> tuple[float, float]:
        """Return the largest accepted norm, and the epochs of its round; 0 if there is none."""
        here = max((update.norm for update in self._accepted.values()), default=0.0)
        # The model's norm is a pass over memory, which is needed before the first norm only.
        if not self._largest and here and here <= _STILL * self._size():
            here = 0.0
        return max((here, self._now), (self._largest, self._epochs))

    def _limit(self) -> tuple[float, str]:
        guard = self.guard
        if not self._largest:
            return guard.first * self._size(), f"{guard.first:g} times the model's norm"
        growth = max(self._now / self._epochs, 1.0)
        limit = guard.growth * self._largest * growth
        return limit, f"{guard.growth:g} times the largest of earlier rounds, times T's growth"

    def _size(self) -> float:
        """Return |w|, or that of a model of ones where w is zero or has hardly any scale."""
        if self._scale is None:
            norm = math.sqrt(squared_norm(self._sent))
            ones = math.sqrt(sum(array.size for array in self._sent.values()))
            self._scale = norm if norm >= _TINY * ones else ones
        return self._scale

    def _sample(self, arrays: Arrays) -> NDArray:
        """Return some coordinates of the difference to the model sent, or of the gradient."""
        parts = []
        for name, at in self._places.items():
            part = arrays[name].reshape(-1)[at].astype(np.float64)
            parts.append(part if self._gradients else part - self._sent[name].reshape(-1)[at])
        with np.errstate(over="ignore"):
            return np.concatenate(parts or [np.empty(0)]).astype(np.float32)


def contributions(
    weights: Mapping[str, float], updates: Updates | None
) -> dict[str, dict[str, float | None]]:
    """Return each participant's share of the mean, and norm and cosine where they are measured."""
    total = sum(weights.values())
    measured = {} if updates is None else updates.described(weights)
    unknown: dict[str, float | None] = {"norm": None, "cosine": None}
    return {
        name: {"weight": weight / total, **measured.get(name, unknown)}
        for name, weight in sorted(weights.items())
    }


@lru_cache(maxsize=8)  # the same in every round, and drawn in a millisecond
def _places(sizes: tuple[tuple[str, int], ...]) -> Mapping[str, Any]:
    """Return the coordinates of every array that are in the sample: all of a small model."""
    total = sum(size for _, size in sizes)
    if total <= SAMPLE:
        return {name: slice(None) for name, _ in sizes}
    # A fixed seed, so that a resumed run has the same; sorted, which is faster to read.
    chosen = np.unique(np.random.default_rng(0).integers(total, size=SAMPLE))
    places, start = {}, 0
    for name, size in sizes:
        first, last = np.searchsorted(chosen, (start, start + size))
        places[name] = chosen[first:last] - start
        start += size
    return places


def _cosine(one: NDArray, other: NDArray) -> float | None:
    """Return the cosine of two vectors; None if one is zero or not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        size = math.sqrt(np.square(one).sum()) * math.sqrt(np.square(other).sum())
        return float((one * other).sum() / size) if 0.0 < size < math.inf else None
