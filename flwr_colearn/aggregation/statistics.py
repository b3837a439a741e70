"""PooledStatistics: running means and variances of all models' normalization layers, pooled."""

from collections.abc import Sequence

import numpy as np

from ..roles import Arrays, NDArray
from .buckets import BucketSum


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
        self.means = BucketSum({mean: like[mean] for mean, _ in pairs})
        self.variances = BucketSum({variance: like[variance] for _, variance in pairs})
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
