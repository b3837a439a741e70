"""The vectors of torch's spectral normalization for an averaged weight."""

import re
from collections.abc import Mapping

import numpy as np

from ..roles import Arrays, NDArray, Role

_MOST_STEPS = 100
_TOLERANCE = 1e-7


def spectral_vectors(arrays: Arrays, roles: Mapping[str, Role], sent: Arrays) -> dict[str, NDArray]:
    """Return the vectors of role ``unit`` that fit the weights of their layers.

    Spectral normalization divides a weight W by u' W v, where u and v approximate the first
    singular vectors of W. The averages of the participants' vectors, though of length 1, are not
    those of the averaged weight: u' W v is too small, and the layer too large. The power iteration,
    which the layer itself computes in training, is continued from the averages.

    Parameters
    ----------
    arrays : mapping of str to numpy.ndarray
        The averages.
    roles : mapping of str to Role
        The roles of the model's arrays.
    sent : mapping of str to numpy.ndarray
        The model that the participants received.

    Returns
    -------
    dict
        The vectors by name; those without a weight of theirs among the arrays are left out.
    """
    found: dict[str, NDArray] = {}
    for name, role in roles.items():
        other, weight = f"{name[:-2]}_v", _weight_of(name)
        if role is Role.UNIT and name.endswith("_u") and {name, other, weight} <= arrays.keys():
            axis = _axis(sent[weight], sent[name], sent[other])
            if axis is not None:
                matrix = _matrix(arrays[weight], axis)
                found[name], found[other] = _iterated(matrix, arrays[name], arrays[other])
    return found


def _weight_of(name: str) -> str:
    """Return the name of the weight to which the vector u of this name belongs."""
    # A parametrization after another one normalises what that one returns, which is not sent.
    original, is_first = re.subn(r"(\.?parametrizations\.[^.]+)\.0\._u$", r"\1.original", name)
    return original if is_first else f"{name[:-2]}_orig"


def _axis(weight: NDArray, u: NDArray, v: NDArray) -> int | None:
    """Return the axis of outputs: the first of most layers, the second of transposed convolutions.

    Where both fit by size, it is the one of which u and v are the singular vectors, for which
    u' W v is larger. None fits where a subclass of torch's computes otherwise.
    """
    fitting = [
        axis
        for axis in range(min(weight.ndim, 2))
        if weight.shape[axis] == u.size and weight.size == u.size * v.size
    ]
    return max(fitting, key=lambda axis: _value(_matrix(weight, axis), u, v), default=None)


def _matrix(weight: NDArray, axis: int) -> NDArray:
    """Return the weight as a matrix [outputs, rest] in float64."""
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float64)


def _value(matrix: NDArray, u: NDArray, v: NDArray) -> float:
    return float(np.einsum("i,ij,j", u.astype(np.float64), matrix, v.astype(np.float64)))


def _iterated(matrix: NDArray, u: NDArray, v: NDArray) -> tuple[NDArray, NDArray]:
    """Continue the power iteration until u' W v no longer grows."""
    left, right, value = u.astype(np.float64), v.astype(np.float64), 0.0
    for _ in range(_MOST_STEPS):
        # einsum and not matmul, whose bits depend on the number of BLAS's threads.
        left = np.einsum("ij,j", matrix, right)
        length = np.sqrt(np.square(left).sum())
        if not length > 0:
            return u, v
        left = left / length
        right = np.einsum("ij,i", matrix, left)
        before, value = value, float(np.sqrt(np.square(right).sum()))
        right = right / value
        if value - before <= _TOLERANCE * value:
            break
    return left.astype(u.dtype), right.astype(v.dtype)
