"""PooledStatistics: the pooled running means and variances of all models' normalization layers."""

from collections.abc import Sequence

import numpy as np

from ..roles import Arrays, NDArray
from .buckets import BucketSum


class PooledStatistics:
    """The pooled running means and variances of all models' normalization layers.

    mu  = sum n_k mu_k / n
    var = sum n_k var_k / n + sum n_k (mu_k - mu)^2 / n

    The memory is the running means of every model, which are a small part of the model.

    Parameters
    ----------
    like : mapping of str to numpy.ndarray
        The model.
    pairs : sequence of (mean, variance)
        The names of each layer's two arrays.
    """

    def __init__(self, like: Arrays, pairs: Sequence[tuple[str, str]]) -> None:
        self.means = BucketSum({mean: like[mean] for mean, _ in pairs})
        self.variances = BucketSum({variance: like[variance] for _, variance in pairs})
        self._added: list[tuple[float, NDArray]] = []

    def clear(self) -> None:
        """Remove all statistics."""
        self.means.clear()
        self.variances.clear()
        self._added = []

    def add(self, arrays: Arrays, weight: float) -> None:
        """Add a model's statistics."""
        # The means are kept one by one: (mu_k - mu)^2 needs mu, which is known only at the end. The
        # one-pass form E[mu^2] - mu^2 would cancel most digits.
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
            # Sorted, so that the sum has the same bits for any order of the models.
            variance = self.variances.total / weight + np.sort(terms, axis=0).sum(axis=0) / weight
        # The squared distance of two means may overflow in the type of their variance.
        variance = np.minimum(variance, self.variances.largest)
        return {**self.means.split(center), **self.variances.split(variance)}
