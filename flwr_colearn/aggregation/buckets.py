"""Sums of a model's many small arrays, joined in one vector, and statistics pooled from them.

numpy takes as long to begin an addition as to add a thousand numbers, and hundreds of a deep
network's arrays are smaller than that.
"""

from collections.abc import Sequence

import numpy as np

from ..errors import NOT_FINITE, ColearnError
from ..roles import Arrays, NDArray


class JoinedSum:
    """The weighted sum of some float arrays of every model added, in float64.

    Parameters
    ----------
    like : mapping of str to numpy.ndarray
        The arrays that are summed have these names, shapes and types.
    """

    def __init__(self, like: Arrays) -> None:
        self._kinds = {name: (array.shape, array.dtype) for name, array in like.items()}
        self._sizes = np.array([array.size for array in like.values()], int)
        self._ends = np.cumsum(self._sizes)
        self.total: NDArray = np.zeros(0)

    def clear(self) -> None:
        """Begin a new sum."""
        self.total = np.zeros(0)

    def add(self, arrays: Arrays, weight: float) -> NDArray:
        """Add a model's arrays; return them joined, without the weight."""
        if not self._kinds:
            return self.total
        parts = [arrays[name].reshape(-1) for name in self._kinds]
        vector = np.concatenate(parts, dtype=np.float64)
        term = vector if weight == 1 else vector * weight
        with np.errstate(invalid="ignore"):  # see `check`
            self.total = self.total + term if self.total.size else term
        return vector

    def check(self) -> None:
        """Raise a ColearnError if a number that was added is not finite."""
        (wrong,) = np.nonzero(~np.isfinite(self.total))
        if wrong.size:
            name = list(self._kinds)[np.searchsorted(self._ends, wrong[0], side="right")]
            raise ColearnError(f"array '{name}': {NOT_FINITE}")

    def split(self, vector: NDArray) -> dict[str, NDArray]:
        """Return a joined vector's arrays, in their own shapes and types."""
        starts = self._ends - self._sizes
        return {
            name: vector[start:end].reshape(shape).astype(dtype)
            for (name, (shape, dtype)), start, end in zip(
                self._kinds.items(), starts, self._ends, strict=True
            )
        }

    @property
    def largest(self) -> NDArray:
        """The largest numbers that the types of the joined elements hold, in float64."""
        most = [float(np.finfo(dtype).max) for _, dtype in self._kinds.values()]
        return np.repeat(most, self._sizes)


class PooledStatistics:
    """Running means and variances of all models' normalization layers, pooled.

    mu  = sum n_k mu_k / n
    var = sum n_k var_k / n + sum n_k (mu_k - mu)^2 / n

    Memory is the running means of every model, a small part of it.

    Parameters
    ----------
    like : mapping of str to numpy.ndarray
        The model.
    pairs : sequence of (mean, variance)
        Names that belong together.
    """

    def __init__(self, like: Arrays, pairs: Sequence[tuple[str, str]]) -> None:
        self.means = JoinedSum({mean: like[mean] for mean, _ in pairs})
        self.variances = JoinedSum({variance: like[variance] for _, variance in pairs})
        self._added: list[tuple[float, NDArray]] = []

    def clear(self) -> None:
        """Begin anew."""
        self.means.clear()
        self.variances.clear()
        self._added = []

    def add(self, arrays: Arrays, weight: float) -> None:
        """Add a model's statistics."""
        self._added.append((weight, self.means.add(arrays, weight)))
        self.variances.add(arrays, weight)

    def check(self) -> None:
        """Raise a ColearnError if a number that was added is not finite."""
        self.means.check()
        self.variances.check()

    def pooled(self, weight: float) -> dict[str, NDArray]:
        """Return means and variances, given the sum of the weights."""
        center = self.means.total / weight
        with np.errstate(over="ignore"):
            terms = [each * (mean - center) ** 2 for each, mean in self._added]
            # Sorted: the same in any order.
            variance = self.variances.total / weight + np.sort(terms, axis=0).sum(axis=0) / weight
        # Means may be too far apart for the type of their variance.
        variance = np.minimum(variance, self.variances.largest)
        return {**self.means.split(center), **self.variances.split(variance)}
