"""Checks of a model before it is averaged: names, shapes, types and finite numbers."""

from collections.abc import Sequence

import numpy as np

from ..errors import NOT_FINITE, ColearnError
from ..roles import Arrays, NDArray
from .chunks import CHUNK, Chunks, Part, flat


def check_model(arrays: Arrays, like: Arrays) -> None:
    """Raise a ColearnError unless `arrays` is finite and has the names, shapes, types of `like`."""
    check_structure(arrays, like)
    check_finite(floats(arrays))


def check_structure(arrays: Arrays, like: Arrays) -> None:
    """Raise a ColearnError unless `arrays` has the names, shapes and types of `like`."""
    missing = [name for name in like if name not in arrays]
    extra = [name for name in arrays if name not in like]
    if missing or extra:
        raise ColearnError(
            f"arrays: expected the {len(like)} names that were sent, found "
            f"{len(missing)} missing {missing[:3]} and {len(extra)} unknown {extra[:3]}"
        )
    for name, wanted in like.items():
        array = arrays[name]
        if array.shape != wanted.shape or array.dtype != wanted.dtype:
            raise ColearnError(
                f"array '{name}': expected {wanted.dtype} of shape {wanted.shape}, found "
                f"{array.dtype} of shape {array.shape}"
            )


def floats(arrays: Arrays) -> dict[str, NDArray]:
    """Return the arrays of float types."""
    return {name: array for name, array in arrays.items() if array.dtype.kind == "f"}


def check_finite(arrays: Arrays) -> None:
    """Raise a ColearnError that names the first array with a number that is not finite."""
    vectors = flat(arrays)

    def wrong(parts: list[Part]) -> str | None:
        finite = np.empty(CHUNK, bool)
        for name, chunk in parts:
            values = vectors[name][chunk]
            if not np.isfinite(values, out=finite[: values.size]).all():
                return name
        return None

    refuse_first(Chunks(arrays).map(wrong))


def refuse_first(wrong: Sequence[str | None]) -> None:
    """Raise a ColearnError for the first name of an array that is not finite; skip None."""
    for name in wrong:
        if name is not None:
            raise ColearnError(f"array '{name}': {NOT_FINITE}")
