"""Distances of two models in float64, with the same bits for any number of threads."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import ColearnError
from ..roles import Arrays, NDArray, Role
from .chunks import CHUNK, Chunks, Part, flat


def relative_change(
    new: Arrays | Sequence[NDArray],
    old: Arrays | Sequence[NDArray],
) -> float:
    """Return |new - old| / |old|, the left side of eq. 4 (Mi et al., 2020).

    The norm is L2 over all arrays taken as one vector, in float64; the paper specifies none.

    Parameters
    ----------
    new, old : mapping of str to numpy.ndarray, or sequence of numpy.ndarray
        The trainable arrays of two successive shared models.

    Returns
    -------
    float
        The relative change, at least 0. It is ``inf`` if `old` is zero and `new` is not, and if the
        square of the change overflows in float64. It is 0 if both models are zero.

    Raises
    ------
    ColearnError
        If the two models differ in names or shapes.

    Examples
    --------
    >>> relative_change([np.array([3.0, 5.0])], [np.array([3.0, 4.0])])
    0.2
    """
    new_arrays, old_arrays = _by_name(new), _by_name(old)
    shapes = [{name: a.shape for name, a in side.items()} for side in (new_arrays, old_arrays)]
    if shapes[0] != shapes[1]:
        raise ColearnError(
            f"relative change: expected two models of the same arrays, found {shapes[0]} "
            f"and {shapes[1]}"
        )
    change, size = _sums_of_squares(new_arrays, old_arrays)
    # Two cases in which the quotient would be NaN: 0 / 0 and inf / inf.
    if size == 0.0 or math.isinf(change):
        return 0.0 if change == 0.0 else math.inf
    return math.sqrt(change) / math.sqrt(size)


def squared_distance(one: Arrays, other: Arrays) -> float:
    """Return |one - other|^2 over all arrays taken as one vector, in float64.

    Parameters
    ----------
    one : mapping of str to numpy.ndarray
        A model.
    other : mapping of str to numpy.ndarray
        Another model; further arrays in it are ignored.

    Raises
    ------
    ColearnError
        If an array is missing or has another shape.

    Examples
    --------
    >>> squared_distance({"w": np.array([3.0, 4.0])}, {"w": np.zeros(2)})
    25.0
    """
    for name, array in one.items():
        if name not in other or other[name].shape != array.shape:
            raise ColearnError(f"distance: expected two models of the same arrays, found '{name}'")
    return _sums_of_squares(one, {name: other[name] for name in one})[0]


def squared_update(new: Arrays, old: Arrays | None = None) -> float:
    """Return |new - old|^2, or |new|^2, to about four digits, in the time of one pass.

    In float32 where the arrays are float32 or float16: a bound of an update needs no more digits.
    The result is infinite or NaN if a number of `new` is, and `new` is finite if the result is.

    Parameters
    ----------
    new : mapping of str to numpy.ndarray
        A model.
    old : mapping of str to numpy.ndarray, optional
        Another model with arrays of the same names and shapes; zeros by default.
    """
    ours = flat(new)
    theirs = None if old is None else flat(old)

    def squares(parts: list[Part]) -> list[float]:
        scratch = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            return [
                _squared_difference(
                    ours[name][chunk], None if theirs is None else theirs[name][chunk], *scratch
                )
                for name, chunk in parts
            ]

    return sum(part for share in Chunks(new).map(squares) for part in share)


def squared_norm(arrays: Arrays) -> float:
    """Return |arrays|^2 over all arrays taken as one vector, in float64."""
    vectors = flat(arrays)

    def squares(parts: list[Part]) -> list[float]:
        scratch = np.empty(CHUNK)
        return [
            _sum_of_squares(_difference(vectors[n][chunk], None, scratch)) for n, chunk in parts
        ]

    return sum(part for share in Chunks(arrays).map(squares) for part in share)


def trainable(arrays: Arrays, roles: Mapping[str, Role]) -> dict[str, NDArray]:
    """Return the trainable arrays, over which eq. 4 is computed."""
    return {name: array for name, array in arrays.items() if roles[name] is Role.TRAINABLE}


def _by_name(model: Arrays | Sequence[NDArray]) -> Arrays:
    if isinstance(model, Mapping):
        return model
    return {str(index): array for index, array in enumerate(model)}


def _sums_of_squares(one: Arrays, other: Arrays) -> tuple[float, float]:
    """Return |one - other|^2 and |other|^2 of two models of the same names and shapes."""
    one_flat, other_flat = flat(one), flat(other)

    def squares(parts: list[Part]) -> list[tuple[float, float]]:
        sums, scratch, other_scratch = [], np.empty(CHUNK), np.empty(CHUNK)
        for name, chunk in parts:
            # In float64: the squares of small numbers vanish in float32. Two conversions of whole
            # chunks are faster than np.subtract, which converts a few elements at a time.
            ours = _difference(one_flat[name][chunk], None, scratch)
            theirs = _difference(other_flat[name][chunk], None, other_scratch)
            np.subtract(ours, theirs, out=ours)
            sums.append((_sum_of_squares(ours), _sum_of_squares(theirs)))
        return sums

    # One sum over all chunks in order, so that the number of threads does not change its last bit.
    sums = [pair for share in Chunks(other).map(squares) for pair in share]
    difference, size = (sum(column) for column in zip(*sums, strict=True)) if sums else (0.0, 0.0)
    return difference, size


def _squared_difference(
    new: NDArray, old: NDArray | None, single: NDArray, double: NDArray
) -> float:
    """Return |new - old|^2, or |new|^2, computed in float32 where that is enough."""
    if new.dtype.kind == "f" and new.dtype.itemsize < 8:
        found = _sum_of_squares(_difference(new, old, single))
        # Squares of float32 overflow beyond 1e19, and vanish below 1e-22.
        if 1e-30 < found < math.inf:
            return found
        # Frozen arrays do not change, and comparing them is faster than a sum in float64.
        if found == 0.0 and (np.array_equal(new, old) if old is not None else not new.any()):
            return 0.0
    return _sum_of_squares(_difference(new, old, double))


def _difference(new: NDArray, old: NDArray | None, scratch: NDArray) -> NDArray:
    """Return new - old, or new, in the memory and the type of `scratch`."""
    part = scratch[: new.size]
    if old is None:
        np.copyto(part, new, casting="same_kind")
    else:
        np.subtract(new, old, out=part, dtype=part.dtype)
    return part


_ROW = 1 << 10
"""The number of sums that run side by side: numpy adds rows faster than it sums one vector."""


def _sum_of_squares(vector: NDArray) -> float:
    """Return |vector|^2; `vector` contains the squares afterwards.

    A BLAS product would use threads of its own, and its last bit would depend on their number.
    """
    with np.errstate(over="ignore"):
        np.multiply(vector, vector, out=vector)
        rest = vector.size % _ROW if vector.size > 2 * _ROW else vector.size
        rows = vector[rest:].reshape(-1, _ROW)
        in_rows = float(rows.sum(axis=0).sum()) if rows.size else 0.0
        return in_rows + float(vector[:rest].sum())
