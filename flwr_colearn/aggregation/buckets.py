"""BucketSum: sums of a model's many small arrays, concatenated to one vector.

The start of an addition takes numpy as long as the addition of a thousand numbers, and hundreds of
a deep network's arrays are smaller than that.
"""

import numpy as np

from ..errors import NOT_FINITE, ColearnError
from ..roles import Arrays, NDArray


class BucketSum:
    """The weighted sum of some float arrays of every model added, in float64.

    Parameters
    ----------
    like : mapping of str to numpy.ndarray
        Arrays with the names, shapes and types of those to add.
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
        """Add a model's arrays; return them in one vector, without the weight."""
        if not self._kinds:
            return self.total
        parts = [arrays[name].reshape(-1) for name in self._kinds]
        vector = np.concatenate(parts, dtype=np.float64)
        term = vector if weight == 1 else vector * weight
        # inf - inf is NaN, which `check` reports by the name of its array.
        with np.errstate(invalid="ignore"):
            self.total = self.total + term if self.total.size else term
        return vector

    def check(self) -> None:
        """Raise a ColearnError if a number that was added is not finite."""
        # The sum is not finite wherever one of its terms is not, so it is enough to check it once.
        (wrong,) = np.nonzero(~np.isfinite(self.total))
        if wrong.size:
            name = list(self._kinds)[np.searchsorted(self._ends, wrong[0], side="right")]
            raise ColearnError(f"array '{name}': {NOT_FINITE}")

    def split(self, vector: NDArray) -> dict[str, NDArray]:
        """Return a bucket's arrays, in their own shapes and types."""
        starts = self._ends - self._sizes
        return {
            name: vector[start:end].reshape(shape).astype(dtype)
            for (name, (shape, dtype)), start, end in zip(
                self._kinds.items(), starts, self._ends, strict=True
            )
        }

    @property
    def largest(self) -> NDArray:
        """The largest finite number of every element's own type, as float64."""
        most = [float(np.finfo(dtype).max) for _, dtype in self._kinds.values()]
        return np.repeat(most, self._sizes)
