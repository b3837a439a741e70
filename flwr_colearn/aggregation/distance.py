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
        scratch: dict[type, NDArray] = {
            kind: np.empty(CHUNK, kind) for kind in (np.float32, np.float64)
        }

        def square(name: str, chunk: slice, kind: type) -> float:
            term = ours[name][chunk]
            part: NDArray = scratch[kind][: term.size]
            with np.errstate(over="ignore", invalid="ignore"):
                if theirs is None:
                    np.copyto(part, term, casting="same_kind")
                else:
                    np.subtract(term, theirs[name][chunk], out=part, dtype=kind)
                # Not a BLAS product, whose last bit would depend on the number of threads.
                return float(np.einsum("i,i->", part, part))

        sums = []
        for name, chunk in parts:
            kind = ours[name].dtype
            single = kind.kind == "f" and kind.itemsize < 8
            found = square(name, chunk, np.float32) if single else math.nan
            # Squares of float32 overflow beyond 1e19, and vanish below 1e-22.
            if not 1e-30 < found < math.inf:
                found = square(name, chunk, np.float64)
            sums.append(found)
        return sums

    return sum(part for share in Chunks(new).map(squares) for part in share)


def squared_norm(arrays: Arrays) -> float:
    """Return |arrays|^2 over all arrays taken as one vector, in float64."""
    return _sums_of_squares(arrays, arrays)[1]


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
        sums, scratch = [], np.empty(CHUNK)
        for name, chunk in parts:
            ours, theirs = one_flat[name][chunk], other_flat[name][chunk]
            part = scratch[: theirs.size]
            # In float64: the difference of two float32 models near each other loses most digits.
            np.subtract(ours, theirs, out=part, dtype=np.float64)
            difference = _sum_of_squares(part)
            np.copyto(part, theirs)
            sums.append((difference, _sum_of_squares(part)))
        return sums

    # One sum over all chunks in order, so that the number of threads does not change its last bit.
    sums = [pair for share in Chunks(other).map(squares) for pair in share]
    difference, size = (sum(column) for column in zip(*sums, strict=True)) if sums else (0.0, 0.0)
    return difference, size


def _sum_of_squares(vector: NDArray) -> float:
    """Return |vector|^2; `vector` contains the squares afterwards.

    A BLAS product would use threads of its own, and its last bit would depend on their number.
    """
    with np.errstate(over="ignore"):
        return float(np.square(vector, out=vector).sum())
