"""RunningMean: the mean of participants' models, added one at a time or all at once."""

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from ..errors import ColearnError, expected
from ..roles import Arrays, NDArray, Role, Roles, assign_roles, pair_statistics
from .buckets import BucketSum
from .chunks import CHUNK, Chunks, Part, flat
from .kept import check_kept, without_mean
from .ruled import RuledArrays
from .spectral import spectral_vectors
from .statistics import PooledStatistics
from .validation import (
    check_model,
    check_structure,
    check_variances,
    floats,
    is_negative,
    refuse_first,
)

_LARGEST_WEIGHT = 2**53

_SMALL = 1 << 13
"""The number of elements below which an array is summed in a `BucketSum` with others."""


Empty = Callable[[str, NDArray], NDArray]


def empty_array(name: str, like: NDArray) -> NDArray:
    """Return an array of the shape and type of `like`."""
    return np.empty(like.shape, like.dtype)


class RunningMean:
    """The mean of K models, added one at a time or all at once (eq. 2 of Mi et al., 2020).

    w = sum_k n_k w_k / sum_k n_k, with n_k = 1 for the paper's plain mean. float16 and float32 are
    summed in float64, divided once and rounded once, so the bits do not depend on the order of the
    models (as long as an element's magnitudes lie within a factor of 2^24 of each other and the
    weights are whole numbers below 2^5; the last bit of float64 arrays does depend on it).
    Integers are summed as int64 and rounded to the nearest whole number, halves upwards.
    Arrays of `like` that have no mean (floats with infinity, integers whose sum overflows) stay as
    they are, and every model must have them unchanged. Batch-norm statistics are pooled:

    mu  = sum n_k mu_k / n
    var = sum n_k var_k / n + sum n_k (mu_k - mu)^2 / n

    The memory is one float64 sum (none for models added all at once) and the running means of
    every model, which are a small part of it.

    Parameters
    ----------
    like : mapping of str to numpy.ndarray
        The model from which the participants started. Every model added must have its names,
        shapes and types.
    roles : mapping or sequence, optional
        See `flwr_colearn.Role`; the default depends on the arrays' names.
    empty : callable, optional
        ``(name, like) -> array``: allocates an average, C-contiguous and of the shape and type of
        `like`.
    models : int, default 256
        The largest number of models. A model is refused if the sum of so many equal ones would
        overflow int64, float64 or the weight. The acceptance of a model therefore depends on that
        model alone, and not on those of other participants.
    variances : collection of str, optional
        The arrays that cannot be negative, by default those with the role ``variance``. A model
        with a negative number in one of them is refused, and their averages are at least 0. An
        array that is negative in `like` is left out.
    rounded : bool, default False
        Whether models were rounded so that a small variance may have become negative. They are not
        refused then, and the averages are at least 0 all the same.

    Raises
    ------
    ColearnError
        If the roles do not fit the model.

    Examples
    --------
    >>> mean = RunningMean(like={"w": np.zeros(2, np.float32)})
    >>> mean.add({"w": np.array([1, 2], np.float32)})
    >>> mean.add({"w": np.array([3, 4], np.float32)})
    >>> mean.mean()["w"]
    array([2., 3.], dtype=float32)
    """

    def __init__(
        self,
        like: Arrays,
        roles: Roles = None,
        empty: Empty = empty_array,
        models: int = 256,
        variances: Collection[str] | None = None,
        rounded: bool = False,
    ) -> None:
        self.roles = assign_roles(like, roles)
        by_role = [name for name, role in self.roles.items() if role is Role.VARIANCE]
        self._variances = by_role if variances is None else list(variances)
        self._rounds = rounded
        self.models = models
        self._empty = empty
        self._ruled = RuledArrays(self.roles)
        self._kept = without_mean(self._averaged(like), models)
        kept, whole = {*self._kept, *self._ruled.names}, like
        like = {name: array for name, array in whole.items() if name not in kept}
        summed_roles = {name: role for name, role in self.roles.items() if name not in kept}
        pairs = pair_statistics(like, summed_roles)
        self._statistics = PooledStatistics(like, pairs)
        paired = {name for pair in pairs for name in pair}
        plain = {name: array for name, array in floats(like).items() if name not in paired}
        self._small = BucketSum({name: a for name, a in plain.items() if a.size < _SMALL})
        self._large = [name for name, array in plain.items() if array.size >= _SMALL]
        self._whole = [name for name, array in like.items() if array.dtype.kind != "f"]
        # The arrays whose sums may overflow; a float64 sum of float16 or float32 cannot.
        self._bounded = [
            name
            for name, array in like.items()
            if array.size and not (array.dtype.kind == "f" and array.dtype.itemsize < 8)
        ]
        self._sums: dict[str, NDArray] = {}
        self.renew(whole)

    def renew(self, like: Arrays) -> None:
        """Begin a new mean, with another model of the same names, shapes and types.

        The memory of the sums is reused, since a new allocation takes as long as the addition of
        two models.
        """
        self._like = dict(like)
        # A model that is negative there already, for example by the noise of differential privacy,
        # is no reason to refuse what participants make of it.
        self._positive = [name for name in self._variances if not is_negative(like[name])]
        self._integers: dict[str, NDArray] = {}
        self._averages: dict[str, NDArray] | None = None
        self._at_once = False
        self._small.clear()
        self._ruled.clear()
        self._statistics.clear()
        self.weight: float = 0
        self.count = 0

    def add(self, arrays: Arrays, weight: float = 1) -> None:
        """Add one participant's model; no reference to it is kept.

        Parameters
        ----------
        arrays : mapping of str to numpy.ndarray
            The model. All of it is checked before any of it is added.
        weight : float, default 1
            n_k, positive and finite.

        Raises
        ------
        ColearnError
            As `check` does, and if the mean has its largest number of models. The mean is unchanged
            then.
        """
        self.check(arrays, weight)
        self.add_checked(arrays, weight)

    @property
    def weights(self) -> list[str]:
        """The names of the trainable arrays that have a mean."""
        trained = (name for name, role in self.roles.items() if role is Role.TRAINABLE)
        return [name for name in trained if name not in self._kept]

    def check(self, arrays: Arrays, weight: float = 1, finite: Collection[str] = ()) -> None:
        """Raise a ColearnError unless a model can be added, independently of other models.

        This is the only condition of acceptance; a check of replies before the aggregation uses it.

        Parameters
        ----------
        arrays : mapping of str to numpy.ndarray
            The model.
        weight : float, default 1
            n_k, positive and finite.
        finite : collection of str, optional
            The arrays that are known to be finite, which saves a pass over them.

        Raises
        ------
        ColearnError
            If the weight is not positive, an array is missing, unexpected, of another shape or
            type or not finite, a variance is negative, or `models` such models could not be summed.
        """
        check_structure(arrays, self._like)
        check_model(self._averaged(arrays), self._averaged(self._like), finite)
        self._ruled.check(arrays)
        check_kept(arrays, self._like, self._kept)
        self._check_variances(arrays)
        self._check_sizes(arrays, self._check_weight(weight))

    def _check_variances(self, arrays: Arrays) -> None:
        if not self._rounds:
            check_variances(arrays, self._positive)

    def add_checked(self, arrays: Arrays, weight: float = 1) -> None:
        """Do the same as `add`, with a model that `check` has accepted with the same weight.

        Raises
        ------
        ColearnError
            If the mean has its largest number of models.
        """
        if self._at_once:
            raise ColearnError("mean: expected none added after add_all, found another model")
        self._check_room(1)
        weight = _plain(weight)
        self._add_large(arrays, weight)
        self._add_rest(arrays, weight)

    def add_all(self, models: Sequence[tuple[Arrays, float]]) -> None:
        """Add all models of the mean at once, where all of them are in memory.

        The result has the same bits as with `add`, and takes a fraction of its time: a chunk of all
        models is summed, checked and divided while it is in the cache, so no float64 sum of the
        whole model is written to memory.

        Parameters
        ----------
        models : sequence of (arrays, weight)
            As for `add`; at least one.

        Raises
        ------
        ColearnError
            If there are no models, or some were added before; the mean is unchanged then. Otherwise
            as `add`, and if the sum of a chunk overflows in float64. The mean is empty then, and
            the error may not name the invalid model; `add` with one model after the other does.
        """
        if not models or self.count:
            raise ColearnError(
                f"mean: expected models for an empty mean, found {len(models)} for one of "
                f"{self.count}"
            )
        self._check_room(len(models))
        # Only names, shapes and types here: non-finite numbers are found in the sums, which saves a
        # pass over every model.
        for arrays, _ in models:
            check_structure(arrays, self._like)
            self._ruled.check(arrays)
            check_kept(arrays, self._like, self._kept)
        weighted = [(arrays, self._check_weight(weight)) for arrays, weight in models]
        try:
            for arrays, weight in weighted:
                self._check_variances(arrays)
                self._check_sizes(arrays, weight)
                self._add_rest(arrays, weight)
            self._small.check()
            self._statistics.check()
            self._averages, self._at_once = self._average_large(weighted), True
        except ColearnError:
            self.renew(self._like)
            raise

    def _add_rest(self, arrays: Arrays, weight: float) -> None:
        """Add all but the large arrays, and count the model."""
        self._small.add(arrays, weight)
        self._ruled.add(arrays)
        self._statistics.add(arrays, weight)
        for name in self._whole:
            self._add_whole(name, arrays[name].reshape(-1), weight)
        self.weight += weight
        self.count += 1

    def _add_whole(self, name: str, term: NDArray, weight: float) -> None:
        """Add weight * term to the sum of an integer array, chunk by chunk.

        The sum is the only copy of the whole array in a wider type: of an int8 array, each int64
        copy takes the memory of eight models.
        """
        total = self._integers.get(name)
        if total is None:
            total = np.zeros(term.size, np.int64)
        # The product with a fractional weight, and so the sum, is float64.
        if isinstance(weight, float):
            total = total.astype(np.float64, copy=False)
        for chunk in _chunks_of(term):
            total[chunk] += term[chunk].astype(np.int64) * weight
        self._integers[name] = total

    def mean(self) -> dict[str, NDArray]:
        """Return the mean of the models added, with the names, shapes and types of `like`.

        The caller may change the arrays. After `add_all` the mean can be returned only once, since
        the sums of the large arrays do not exist.

        Raises
        ------
        ColearnError
            If no model was added, or the mean after `add_all` was returned before.
        """
        if not self.count:
            raise ColearnError("mean: expected at least one model added, found none")
        if self._at_once:
            if self._averages is None:
                raise ColearnError("mean: expected to be asked once after add_all, found twice")
            averages, self._averages = self._averages, None
        else:
            averages = self._divide_large()
        averages.update(self._small.split(self._small.total / self.weight))
        averages.update(self._statistics.pooled(self.weight))
        averages.update({name: self._divide_whole(name) for name in self._whole})
        averages.update({name: self._copy(name) for name in self._kept})
        averages.update(self._ruled.averages(averages, self._like))
        averages.update(spectral_vectors(averages, self.roles, self._like))
        for name in self._positive:
            averages[name] = np.maximum(averages[name], 0)
        return {name: averages[name] for name in self._like}

    def _averaged(self, arrays: Arrays) -> dict[str, NDArray]:
        """Return the arrays without those that are not averaged because of their role."""
        return {name: array for name, array in arrays.items() if name not in self._ruled.names}

    def _add_large(self, arrays: Arrays, weight: float) -> None:
        """Add weight * arrays to the float64 sums, chunk by chunk."""
        large = {name: arrays[name] for name in self._large}
        # The first model is written over the last round's sums, so they need not be set to zero.
        first = not self.count
        for name, array in large.items():
            if first and (name not in self._sums or self._sums[name].shape != array.shape):
                self._sums[name] = np.empty(array.shape, np.float64)
        sums, terms = flat(self._sums), flat(large)

        def add(parts: list[Part]) -> None:
            scratch = np.empty(CHUNK)
            for name, chunk in parts:
                total, term = sums[name][chunk], terms[name][chunk]
                if first:
                    _scale(term, weight, out=total)
                else:
                    _add_scaled(total, term, weight, scratch)

        Chunks(large).map(add)

    def _average_large(self, models: Sequence[tuple[Arrays, float]]) -> dict[str, NDArray]:
        """Return the averages of the large arrays of all models, chunk by chunk."""
        averages = {name: self._empty(name, self._like[name]) for name in self._large}
        outs = flat(averages)
        terms = [(flat({n: arrays[n] for n in self._large}), weight) for arrays, weight in models]

        def average(parts: list[Part]) -> str | None:
            room, scratch = np.empty(CHUNK), np.empty(CHUNK)
            with np.errstate(over="ignore", invalid="ignore"):
                for name, chunk in parts:
                    total = room[: chunk.stop - chunk.start]
                    _add_chunk(total, terms, name, chunk, scratch)
                    # The sum of the chunk is not finite if any of its numbers is not.
                    if not math.isfinite(total.sum()):
                        return name
                    outs[name][chunk] = np.divide(total, self.weight, out=total)
            return None

        refuse_first(Chunks(averages).map(average))
        return averages

    def _check_room(self, more: int) -> None:
        if self.count + more > self.models:
            raise ColearnError(
                f"mean: expected at most {self.models} models, found {self.count + more}"
            )

    def _check_weight(self, weight: float) -> float:
        """Return the weight of a model, as an int if it is whole."""
        if not (weight > 0 and math.isfinite(weight)):
            raise expected("weight of a model", "a positive finite number", weight)
        most = _LARGEST_WEIGHT // self.models
        if weight > most:
            raise expected("weight of a model", f"at most {most}", weight)
        return _plain(weight)

    def _check_sizes(self, arrays: Arrays, weight: float) -> None:
        """Raise a ColearnError unless `models` models of these magnitudes can be summed."""
        for name in self._bounded:
            array = arrays[name]
            is_float = array.dtype.kind == "f"
            # As Python's integers: the magnitude of int64's least number overflows in int64.
            largest = max(abs(array.max().item()), abs(array.min().item()))
            most = sys.float_info.max if is_float else 2**63 - 1
            if largest * weight * self.models > most:
                kind = "numbers" if is_float else "integers"
                held = "float64" if is_float else "int64"
                raise expected(f"array '{name}'", f"{kind} that sum within {held}", largest)

    def _divide_large(self) -> dict[str, NDArray]:
        averages = {name: self._empty(name, self._like[name]) for name in self._large}
        sums, outs = flat(self._sums), flat(averages)

        def divide(parts: list[Part]) -> None:
            scratch = np.empty(CHUNK)
            for name, chunk in parts:
                total = sums[name][chunk]
                outs[name][chunk] = np.divide(total, self.weight, out=scratch[: total.size])

        Chunks(averages).map(divide)
        return averages

    def _copy(self, name: str) -> NDArray:
        """Return an array that has no mean: all participants have returned it as it was sent."""
        copy = self._empty(name, self._like[name])
        copy[...] = self._like[name]
        return copy

    def _divide_whole(self, name: str) -> NDArray:
        total, like = self._integers[name], self._like[name]
        average = np.empty(like.size, like.dtype)
        for chunk in _chunks_of(total):
            average[chunk] = self._rounded(total[chunk])
        return average.reshape(like.shape)

    def _rounded(self, total: NDArray) -> NDArray:
        """Return total / weight, rounded to the nearest whole number, halves upwards."""
        if total.dtype.kind == "f":
            return np.floor(total / self.weight + 0.5)
        # In integers: a float64 quotient would not be exact above 2^53.
        quotient, rest = np.divmod(total, self.weight)
        return quotient + (rest >= self.weight - rest)


def _chunks_of(vector: NDArray) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, vector.size, CHUNK))


def _plain(weight: float) -> float:
    """Return a weight as an int if it is whole, so that integers are summed exactly."""
    return int(weight) if float(weight).is_integer() else float(weight)


def _add_chunk(
    total: NDArray,
    models: Sequence[tuple[Mapping[str, NDArray], float]],
    name: str,
    chunk: slice,
    scratch: NDArray,
) -> None:
    """Write the weighted sum of one chunk of all models to `total`."""
    first, *others = models
    _scale(first[0][name][chunk], first[1], out=total)
    for terms, weight in others:
        _add_scaled(total, terms[name][chunk], weight, scratch)


def _add_scaled(total: NDArray, term: NDArray, weight: float, scratch: NDArray) -> None:
    """Add weight * term to `total`, in float64."""
    np.add(total, _scale(term, weight, out=scratch[: term.size]), out=total)


def _scale(term: NDArray, weight: float, out: NDArray) -> NDArray:
    """Return weight * term, written to `out` in float64."""
    # The conversion of a whole chunk first is faster than an operation on mixed types, for which
    # numpy converts a few elements at a time.
    np.copyto(out, term)
    return out if weight == 1 else np.multiply(out, weight, out=out)
