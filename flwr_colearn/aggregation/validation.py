"""Checks of a model before it is averaged or loaded: names, shapes, types, finite numbers."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import NOT_FINITE, ColearnError, expected
from ..roles import Arrays, NDArray
from .chunks import CHUNK, Chunks, Part, flat


def check_model(arrays: Arrays, like: Arrays, finite: Collection[str] = ()) -> None:
    """Raise a ColearnError unless `arrays` is finite and has the names, shapes, types of `like`.

    An array with infinity, such as a mask, is accepted if it is equal to that of `like`. The arrays
    named in `finite` are known to be finite.
    """
    check_structure(arrays, like)
    unknown = {name: array for name, array in floats(arrays).items() if name not in finite}
    for name in _not_finite(unknown):
        # Compared only now, since few models have such arrays. NaN is equal to nothing.
        if not np.array_equal(arrays[name], like[name]):
            raise ColearnError(f"array '{name}': {NOT_FINITE}")


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


def _not_finite(arrays: Arrays) -> list[str]:
    """Return the names of the arrays with a number that is not finite, in the model's order."""
    vectors = flat(arrays)

    def wrong(parts: list[Part]) -> list[str]:
        finite, found = np.empty(CHUNK, bool), []
        for name, chunk in parts:
            values = vectors[name][chunk]
            if not np.isfinite(values, out=finite[: values.size]).all():
                found.append(name)
        return found

    return list(dict.fromkeys(name for names in Chunks(arrays).map(wrong) for name in names))


def check_initial(arrays: Arrays) -> None:
    """Raise a ColearnError if a model from which a run starts has NaN in an array.

    Every participant would return NaN, and be refused for it, after a round of training.
    """
    vectors = flat(floats(arrays))

    def spoiled(parts: list[Part]) -> str | None:
        for name, chunk in parts:
            if np.isnan(vectors[name][chunk]).any():
                return name
        return None

    for name in filter(None, Chunks(vectors).map(spoiled)):
        raise expected(
            f"initial model, array '{name}'",
            "no NaN, from which nothing can be trained; check where the model comes from",
            int(np.isnan(vectors[name]).sum()),
        )


def check_variances(arrays: Arrays, names: Iterable[str]) -> None:
    """Raise a ColearnError that names the first of these arrays with a negative number."""
    for name in names:
        if is_negative(arrays[name]):
            least = arrays[name].min().item()
            raise expected(f"array '{name}' of variances", "numbers of at least 0", least)


def is_negative(array: NDArray) -> bool:
    """Return whether an array has a negative number."""
    return bool(array.size and array.min() < 0)


def refuse_first(wrong: Sequence[str | None]) -> None:
    """Raise a ColearnError for the first name of an array that is not finite; skip None."""
    for name in wrong:
        if name is not None:
            raise ColearnError(f"array '{name}': {NOT_FINITE}")


def check_weights(weights: Arrays, own: Mapping[str, Any], model: str) -> None:
    """Raise a ColearnError unless `weights` have the names, types and shapes of `own`.

    Parameters
    ----------
    weights : mapping
        The arrays that were received, by name.
    own : mapping
        The arrays (or objects with a shape and a dtype) of the participant's model, by name.
    model : str
        The name of that model in the error message.
    """
    # Types are compared too: an assignment would convert them and lose precision unnoticed.
    missing = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    differing = [
        f"'{name}' {_kind(weights[name])} in place of {_kind(array)}"
        for name, array in own.items()
        if name in weights and _kind(weights[name]) != _kind(array)
    ]
    if missing or unknown or differing:
        raise ColearnError(
            f"weights: expected those of this participant's {model}, found others; is it the "
            f"server's model, in the server's framework? {len(missing)} arrays missing "
            f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}, {len(differing)} of another "
            f"type or shape {differing[:3]}"
        )


def _kind(array: Any) -> str:
    # numpy's and TensorFlow's types have an attribute `name`; Keras's types are plain strings.
    return f"{getattr(array.dtype, 'name', array.dtype)} {tuple(array.shape)}"
