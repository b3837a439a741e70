"""Arrays that have no mean, and which therefore must stay as the server sent them."""

import numpy as np

from ..errors import ColearnError
from ..roles import Arrays, NDArray

_MOST = 2**63 - 1


def has_infinity(array: NDArray) -> bool:
    """Return whether a float array has infinite elements, as masks have."""
    return array.dtype.kind == "f" and bool(np.isinf(array).any())


def without_mean(arrays: Arrays, models: int) -> list[str]:
    """Return the names of the arrays of which so many equal ones cannot be summed.

    These are floats with infinity, such as the -inf of a mask, and integers whose sum overflows
    int64, such as hashes and states of random generators.

    Parameters
    ----------
    arrays : mapping of str to numpy.ndarray
        The model that the server sends.
    models : int
        The largest number of models of a mean.
    """
    return [
        name
        for name, array in arrays.items()
        if array.size and (has_infinity(array) or _overflows(array, models))
    ]


def check_kept(arrays: Arrays, like: Arrays, names: list[str]) -> None:
    """Raise a ColearnError unless these arrays are equal to those that were sent.

    NaN is equal to nothing, since it is never the right value of a model.
    """
    for name in names:
        if not np.array_equal(arrays[name], like[name]):
            raise ColearnError(
                f"array '{name}': expected the values that the server sent, since they have no "
                f"mean (infinity, or integers beyond int64's sum), found others; keep the array "
                "constant, or leave it out of the model that is sent (an array that is trained "
                "and one with another role in roles= must have finite numbers)"
            )


def _overflows(array: NDArray, models: int) -> bool:
    if array.dtype.kind not in "iu":
        return False
    return bool(max(abs(array.max().item()), abs(array.min().item())) * models > _MOST)
