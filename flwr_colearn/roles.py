"""Roles of a model's arrays: trainable weights, statistics, counters and buffers."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum
from logging import WARNING
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.common import log

from .errors import ColearnError, expected

NDArray = npt.NDArray[Any]

Arrays = Mapping[str, NDArray]
"""A model: its arrays by name, in the order of the messages."""


class Role(StrEnum):
    """The role of an array, which decides how it is averaged.

    An array of the initial model that has no mean is not averaged in any role: one with infinity,
    such as a mask of -inf, or one of integers whose sum over all participants overflows int64, such
    as a hash. It stays as the server sent it, and a reply with other values is refused.

    ============= ============================================ =================================
    role          in the average                               in eq. 4's relative change
    ============= ============================================ =================================
    ``trainable`` mean                                         counts
    ``mean``      mean; pooled with its variance where paired  left out
    ``variance``  pooled with its mean where paired            left out
    ``counter``   mean rounded to the nearest whole number     left out
    ``buffer``    mean                                         left out
    ``unit``      mean, divided by its L2 norm                 left out
    ``max``       largest value of each element                left out
    ``min``       smallest value of each element               left out
    ``keep``      as the server sent it                        left out
    ============= ============================================ =================================

    ``unit`` is for the vectors of spectral normalization, of which a shorter mean would make the
    layer too large; those of torch are also fitted to the averaged weight by power iteration.
    ``max`` and ``min`` are for extremes that a layer has seen, such as those of quantization's
    observers; ``keep`` is for what each participant may change for itself, such as states of random
    generators, and for codebooks that are trained elsewhere.
    """

    TRAINABLE = "trainable"
    MEAN = "mean"
    VARIANCE = "variance"
    COUNTER = "counter"
    BUFFER = "buffer"
    UNIT = "unit"
    MAXIMUM = "max"
    MINIMUM = "min"
    KEEP = "keep"


RULED = frozenset((Role.UNIT, Role.MAXIMUM, Role.MINIMUM, Role.KEEP))
"""The roles of arrays whose value in the average is none of the means."""

UNTRAINED = frozenset((Role.MEAN, Role.VARIANCE, Role.COUNTER)) | RULED
"""The roles whose average is not a plain mean of floats."""


@dataclass(frozen=True)
class Names:
    """Names of a model's arrays, in order, for a model that is sent without names.

    Parameters
    ----------
    names : sequence of str
        The names, such as ``list(net.state_dict())``, from which the roles follow.
    roles : mapping or sequence, optional
        Roles by these names, as in `assign_roles`; the others get their default.
    """

    names: tuple[str, ...]
    roles: "Mapping[str, Role | str] | Sequence[Role | str] | None" = None

    def assign(self, arrays: Arrays) -> dict[str, Role]:
        """Return the role of every array of a model without names.

        Raises
        ------
        ColearnError
            If there is not one name for every array, or as in `assign_roles`.
        """
        if len(self.names) != len(arrays):
            raise expected("names", f"one for each of the {len(arrays)} arrays", len(self.names))
        named = dict(zip(self.names, arrays.values(), strict=True))
        roles = assign_roles(named, self.roles)
        return {own: roles[name] for own, name in zip(arrays, self.names, strict=True)}


Roles = Mapping[str, Role | str] | Sequence[Role | str] | Names | None
"""Roles as an argument: by array name, one for every array in order, or None for the default."""


def named_roles(names: Sequence[str] | None, roles: Roles) -> Roles:
    """Return the roles of a model with these names; `roles` itself without names.

    Raises
    ------
    ColearnError
        If `names` is not a sequence of different names.
    """
    if names is None:
        return roles
    given = () if isinstance(names, str) else tuple(names)
    if not given or len(set(given)) < len(given) or isinstance(roles, Names):
        raise expected("names", "different names, such as list(net.state_dict())", names)
    return Names(given, roles)


# The last part of an array's name: torch's state_dict, Keras's and TF-slim's variables.
_BY_NAME = {
    "running_mean": Role.MEAN,
    "running_var": Role.VARIANCE,
    "num_batches_tracked": Role.COUNTER,
    "moving_mean": Role.MEAN,
    "moving_variance": Role.VARIANCE,
}


def assign_roles(arrays: Arrays, given: Roles = None, quiet: bool = False) -> dict[str, Role]:
    """Return the role of every array of a model.

    Parameters
    ----------
    arrays : mapping of str to numpy.ndarray
        The model. Names that are all numbers count as nameless (``ArrayRecord(list)``, legacy
        ``Parameters``).
    given : mapping or sequence, optional
        Roles by name (the others get their default), or one role for every array in order.
        The default depends on the name (``running_mean``, ``running_var``, ``num_batches_tracked``
        of torch; ``moving_mean``, ``moving_variance`` of Keras and TF-slim; the vectors of
        spectral normalization; ``min_val`` and ``max_val`` of observers), then on the type: floats
        are trainable, or buffers if they have infinity; integers and booleans are counters.
    quiet : bool, default False
        Whether to log no warning about a model without names, or of integers only.

    Raises
    ------
    ColearnError
        If a given role is unknown, belongs to no array, contradicts an array's type, or if a list
        has another length than the model.
    """
    if isinstance(given, Names):
        return given.assign(arrays)
    roles = {name: _default_role(name, array) for name, array in arrays.items()}
    roles.update(_roles_by_partner(arrays))
    # A role for a name that is not in the model is a spelling mistake, not a role to ignore.
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in arrays]
        if unknown:
            raise expected("roles", f"names of the model's arrays {_few(arrays)}", unknown[0])
        roles.update({name: _as_role(role) for name, role in given.items()})
    elif given is not None:
        if isinstance(given, str) or len(given) != len(arrays):
            raise expected("roles", f"one role for each of the {len(arrays)} arrays", given)
        roles = {name: _as_role(role) for name, role in zip(arrays, given, strict=True)}
    elif not quiet:
        _warn_of(arrays)
    # A mean of integers is no integer unless it is rounded, which only counters are.
    for name, role in roles.items():
        if role in (Role.MAXIMUM, Role.MINIMUM, Role.KEEP):
            continue
        is_float = arrays[name].dtype.kind == "f"
        if is_float == (role is Role.COUNTER):
            wanted = "a float type" if role is not Role.COUNTER else "an integer type"
            raise expected(f"array '{name}' with role '{role}'", wanted, str(arrays[name].dtype))
    return roles


def _warn_of(arrays: Arrays) -> None:
    """Log a warning about a model whose statistics are not known, or which has no weights."""
    if arrays and all(array.dtype.kind in "iub" for array in arrays.values()):
        log(
            WARNING,
            "The model's arrays are all integers, which count as counters: their averages are "
            "rounded, and there is no relative change, so the local epochs do not grow (eq. 4). "
            "Send weights as floats. The bytes of a serialised model, such as trees of XGBoost, "
            "have no average.",
        )
    elif all(name.isdigit() for name in arrays) and _may_hold_statistics(arrays):
        log(
            WARNING,
            "The model's arrays have no names, so batch-norm statistics cannot be told from "
            "weights: floats are averaged as weights and nothing is pooled. Pass "
            "names=list(net.state_dict()), or send the arrays with names "
            "(ArrayRecord(model.state_dict()) or ArrayRecord of a dict).",
        )


def _may_hold_statistics(arrays: Arrays) -> bool:
    """Return whether an array of a model may be a mean or variance of a normalization layer.

    They are float arrays of one dimension. One that follows a matrix or kernel of as many outputs
    is the bias of that layer.
    """
    before: tuple[int, ...] = ()
    for array in arrays.values():
        is_bias = len(before) > 1 and array.size in (before[0], before[-1])
        if array.ndim == 1 and array.dtype.kind == "f" and not is_bias:
            return True
        before = array.shape
    return False


def pair_statistics(arrays: Arrays, roles: Mapping[str, Role]) -> list[tuple[str, str]]:
    """Return the pairs of names (mean, variance) that are pooled together.

    Within one layer (the name up to its last separator) the first mean belongs to the first
    variance, and so on. A mean or variance without a partner is averaged like a weight.

    Raises
    ------
    ColearnError
        If the two arrays of a pair differ in shape.
    """
    layers: dict[str, tuple[list[str], list[str]]] = {}
    for name, role in roles.items():
        if role in (Role.MEAN, Role.VARIANCE):
            layer = layers.setdefault(split_name(name)[0], ([], []))
            layer[role is Role.VARIANCE].append(name)
    # Not strict, since a mean or variance without a partner is allowed.
    pairs = [pair for means, variances in layers.values() for pair in zip(means, variances)]  # noqa: B905
    for mean, variance in pairs:
        if arrays[mean].shape != arrays[variance].shape:
            raise ColearnError(
                f"roles: expected mean '{mean}' and variance '{variance}' of one shape, found "
                f"{arrays[mean].shape} and {arrays[variance].shape}"
            )
    return pairs


def _roles_by_partner(arrays: Arrays) -> dict[str, Role]:
    """Return the roles of arrays whose names mean something only beside others of their layer."""
    layers: dict[str, dict[str, str]] = {}
    for name, array in arrays.items():
        if array.dtype.kind == "f":
            layer, last = split_name(name)
            layers.setdefault(layer, {})[last] = name
    return {
        name: role
        for layer, names in layers.items()
        for last, name in names.items()
        if (role := _role_beside(last, layer, names.keys())) is not None
    }


def _role_beside(last: str, layer: str, names: Set[str]) -> Role | None:
    """Return the role of the array `last` of a layer with arrays of these names, if they say it."""
    stem = last[:-2]
    vectors = {f"{stem}_u", f"{stem}_v"}
    # torch's two spectral norms; a weight_u alone may be any weight.
    original = f"{stem}_orig" in names or "parametrizations" in layer.split(".")
    if last == "vector_u" or (last in vectors and vectors <= names and original):
        return Role.UNIT
    if {"min_val", "max_val", "eps"} <= names:  # torch's observers
        return {"min_val": Role.MINIMUM, "max_val": Role.MAXIMUM}.get(last)
    return None


def _default_role(name: str, array: NDArray) -> Role:
    if array.dtype.kind not in "fiub":
        # numpy reads the bytes of a bfloat16 array as void16.
        wanted = (
            "a float, integer or boolean type of numpy's own; bfloat16 is sent as float32, which "
            "get_arrays of flwr_colearn.torch and flwr_colearn.keras returns"
        )
        raise expected(f"array '{name}'", wanted, str(array.dtype))
    if array.dtype.kind != "f":
        return Role.COUNTER
    # Infinite elements, as masks have, are never trained, and eq. 4 cannot measure their change.
    if np.isinf(array).any():
        return Role.BUFFER
    role = _BY_NAME.get(split_name(name)[1], Role.TRAINABLE)
    # A counter in a float type is averaged without rounding, and is left out of eq. 4.
    return Role.BUFFER if role is Role.COUNTER else role


def split_name(name: str) -> tuple[str, str]:
    """Split 'layer/moving_mean:0' or 'layer.running_mean' into the layer and the last part."""
    path = name.partition(":")[0].replace("/", ".")
    layer, _, last = path.rpartition(".")
    return layer, last


def _as_role(role: object) -> Role:
    try:
        return Role(role)  # type: ignore[arg-type]
    except ValueError:
        raise expected("roles", "one of " + ", ".join(Role), role) from None


def _few(names: Iterable[str]) -> str:
    shown = list(names)
    return f"{shown[:5]}" + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
