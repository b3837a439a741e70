"""Layout: how a model becomes words that can be summed, and how their sum becomes the mean."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..aggregation import (
    check_kept,
    check_model,
    check_structure,
    check_variances,
    is_negative,
    without_mean,
)
from ..errors import expected
from ..roles import Arrays, NDArray, Role, pair_statistics
from .quantization import Quantizer

_CHUNK = 1 << 18
"""The number of elements that are converted at a time, so that no float64 model is in memory."""

_LARGEST_STATISTIC = 2.0**24
"""The clipping range of statistics and metrics, whose words have 64 bits."""

_WORD, _WIDE_WORD = np.dtype("<u4"), np.dtype("<u8")


@dataclass(frozen=True)
class Layout:
    """The words of a round's models: the server states it, and both sides compute with it.

    ====================== ======================================================= ==============
    array                  word of each element, to be multiplied by n_k            bits
    ====================== ======================================================= ==============
    float                  trained - sent, quantized                                32, 64
    integer, boolean       trained - sent, exact                                    64
    mean of a pair         d = trained - sent, quantized                            64
    variance of a pair     trained + d^2 - sent, quantized                          64
    without a mean, local  none                                                     0
    ====================== ======================================================= ==============

    The words are added modulo 2^32 or 2^64. With the last two sums of a pair, the pooled variance
    of Chan et al. is E[var + d^2] - E[d]^2, which needs no participant's own statistics.

    Attributes
    ----------
    participants : int
        K, for which the sums have room.
    clipping_range : float
        c of floats.
    largest_weight : int
        The largest n_k; 1 where all participants weigh the same.
    bits : int
        The bits of the words of floats, 32 or 64. Words of 32 bits have room for weights only if
        the largest one is known to within some powers of two.
    means, variances : list of str
        The arrays of statistics in pairs.
    kept : list of str
        The arrays that have no mean, and which participants must not change.
    absent : list of str
        The arrays that participants do not return.
    """

    participants: int
    clipping_range: float
    largest_weight: int
    bits: int
    means: list[str]
    variances: list[str]
    kept: list[str]
    absent: list[str]

    @classmethod
    def of(
        cls,
        model: Arrays,
        roles: Mapping[str, Role],
        absent: list[str],
        participants: int,
        clipping_range: float,
        largest_weight: int,
        bits: int = 32,
    ) -> "Layout":
        """Return the layout of a model with these roles.

        Raises
        ------
        ColearnError
            If an array has the role "max" or "min", which is no sum.
        """
        out = [n for n in model if n in set(absent) or roles[n] is Role.KEEP]
        there = {name: array for name, array in model.items() if name not in set(out)}
        for name in there:
            if roles[name] in (Role.MAXIMUM, Role.MINIMUM):
                raise expected(
                    f"role of array '{name}' under secure aggregation",
                    "one whose average is a sum, such as 'keep'",
                    str(roles[name]),
                )
        kept = without_mean(there, participants)
        summed = {name: array for name, array in there.items() if name not in kept}
        pairs = pair_statistics(summed, {name: roles[name] for name in summed})
        return cls(
            participants,
            clipping_range,
            largest_weight,
            bits,
            [mean for mean, _ in pairs],
            [variance for _, variance in pairs],
            kept,
            out,
        )

    def to_config(self) -> dict[str, Any]:
        """Return the layout as entries of a ConfigRecord."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Layout":
        """Read the layout from the entries that `to_config` returned."""
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer of floats."""
        return Quantizer(self.clipping_range, (2 ** (self.bits - 1) - 1) // self.participants)

    @property
    def wide(self) -> Quantizer:
        """The quantizer of statistics and metrics."""
        return Quantizer(_LARGEST_STATISTIC, 2**62 // self.participants)

    def returned(self, model: Arrays) -> dict[str, NDArray]:
        """Return the arrays of a model that participants return."""
        absent = set(self.absent)
        return {name: array for name, array in model.items() if name not in absent}

    def empty(self, model: Arrays) -> dict[str, NDArray]:
        """Return words of 0 for a model, of the types and sizes that participants send."""
        kept = set(self.kept)
        return {
            name: np.zeros(array.size, _WIDE_WORD if self._is_wide(name, array) else _WORD)
            for name, array in self.returned(model).items()
            if name not in kept
        }

    def _is_wide(self, name: str, array: NDArray) -> bool:
        return self.bits == 64 or array.dtype.kind != "f" or name in self._statistics

    @cached_property
    def _statistics(self) -> frozenset[str]:
        return frozenset((*self.means, *self.variances))

    # At a participant ---------------------------------------------------------------------------

    def encode(
        self, sent: Arrays, trained: Arrays, weight: int, generator: np.random.Generator
    ) -> tuple[dict[str, NDArray], int]:
        """Return the words of a trained model, and the number of its elements that were clipped.

        Raises
        ------
        ColearnError
            If the model has other names, shapes or types than the one sent, NaN or infinity, or
            numbers beyond what a sum has room for.
        """
        sent = self.returned(sent)
        self._check(sent, trained, weight)
        words, clipped, share = self.empty(sent), 0, weight / self.largest_weight
        moved = self._moved_statistics(sent, trained)
        for name, out in words.items():
            if trained[name].dtype.kind != "f":
                self._encode_whole(name, sent[name], trained[name], weight, out)
            elif name in moved:
                out[:] = self._encode_wide(name, moved[name], share, generator).view(out.dtype)
            else:
                clipped += self._encode_float(sent[name], trained[name], share, generator, out)
        return words, clipped

    def _check(self, sent: Arrays, trained: Arrays, weight: int) -> None:
        check_structure(trained, sent)
        check_kept(trained, sent, self.kept)
        kept = set(self.kept)
        own, like = ({n: a for n, a in m.items() if n not in kept} for m in (trained, sent))
        check_model(own, like)
        check_variances(own, [n for n in self.variances if not is_negative(sent[n])])
        if not 1 <= weight <= self.largest_weight:
            wanted = f"1 to {self.largest_weight}, the largest_weight of SecureAggregation"
            raise expected("number of examples under secure aggregation", wanted, weight)

    def _moved_statistics(self, sent: Arrays, trained: Arrays) -> dict[str, NDArray]:
        """Return the numbers of the arrays of statistics that are summed, as float64."""
        moved = {}
        for mean, variance in zip(self.means, self.variances, strict=True):
            moved[mean] = _difference(trained[mean], sent[mean])
            moved[variance] = _difference(trained[variance], sent[variance]) + moved[mean] ** 2
        return moved

    def _encode_wide(
        self, name: str, values: NDArray, share: float, generator: np.random.Generator
    ) -> NDArray:
        words, clipped = self.wide.encode(values, generator, share)
        if clipped:
            wanted = f"changes of at most {_LARGEST_STATISTIC:g} under secure aggregation"
            raise expected(f"array '{name}' of statistics", wanted, float(np.abs(values).max()))
        return words

    def _encode_whole(
        self, name: str, sent: NDArray, trained: NDArray, weight: int, out: NDArray
    ) -> None:
        # Modulo 2^64, in which the differences of all integer types are exact.
        change = _words(trained) - _words(sent)
        signed = change.view(np.int64)
        largest = max(int(signed.max()), -int(signed.min())) if signed.size else 0
        if largest * weight * self.participants >= 2**63:
            raise expected(f"array '{name}'", "changes that sum within int64", largest)
        np.multiply(change, np.uint64(weight), out=out)

    def _encode_float(
        self,
        sent: NDArray,
        trained: NDArray,
        share: float,
        generator: np.random.Generator,
        out: NDArray,
    ) -> int:
        """Write the words of an array to `out`; return the number of clipped elements."""
        clipped, before, after = 0, sent.reshape(-1), trained.reshape(-1)
        for chunk in _chunks(out.size):
            change = _difference(after[chunk], before[chunk])
            words, beyond = self.quantizer.encode(change, generator, share)
            # Modulo 2^32 or 2^64: negative words become large ones.
            out[chunk], clipped = words.astype(_signed(out)).view(out.dtype), clipped + beyond
        return clipped

    # On the server ------------------------------------------------------------------------------

    def decode(
        self, sent: Arrays, sums: Mapping[str, NDArray], weight: int
    ) -> tuple[dict[str, NDArray], float]:
        """Return the mean of the arrays that have words, and the largest mean update of a float.

        Parameters
        ----------
        sent : mapping of str to numpy.ndarray
            The model as participants received it.
        sums : mapping of str to numpy.ndarray
            The sums of the participants' words, by array.
        weight : int
            The sum of the participants' weights.
        """
        average, largest = {}, 0.0
        for name, words in sums.items():
            array = sent[name]
            if array.dtype.kind != "f":
                average[name] = _moved_whole(array, words.view(np.int64), weight)
            elif name not in self._statistics:
                average[name], change = self._decode_float(array, words, weight)
                largest = max(largest, change)
        average.update(self._pooled(sent, sums, weight))
        return average, largest

    def _decode_float(self, sent: NDArray, words: NDArray, weight: int) -> tuple[NDArray, float]:
        out, largest, before = np.empty(sent.size, sent.dtype), 0.0, sent.reshape(-1)
        for chunk in _chunks(out.size):
            change = self._mean(self.quantizer, words[chunk].view(_signed(words)), weight)
            largest = max(largest, float(np.abs(change).max()))
            out[chunk] = before[chunk].astype(np.float64) + change
        return out.reshape(sent.shape), largest

    def _pooled(self, sent: Arrays, sums: Mapping[str, NDArray], weight: int) -> dict[str, NDArray]:
        pooled = {}
        for mean, variance in zip(self.means, self.variances, strict=True):
            d, s = (
                self._mean(self.wide, sums[name].view(np.int64), weight)
                for name in (mean, variance)
            )
            pooled[mean] = _sum_like(sent[mean], d)
            least = None if is_negative(sent[variance]) else 0
            pooled[variance] = _sum_like(sent[variance], s - d**2, least)
        return pooled

    def _mean(self, quantizer: Quantizer, words: NDArray, weight: int) -> NDArray:
        return quantizer.decode(words) * (self.largest_weight / weight)

    # Metrics ------------------------------------------------------------------------------------

    def encode_metrics(
        self, metrics: Mapping[str, Any], names: list[str], weight: int
    ) -> list[int]:
        """Return two words for each name: the metric times the weight, and the weight.

        Both are 0 where the participant does not have the metric as a finite number.
        """
        generator, words = np.random.default_rng(0), []
        for name in names:
            value = metrics.get(name)
            if not isinstance(value, int | float) or not np.isfinite(value):
                words += [0, 0]
                continue
            encoded, clipped = self.wide.encode(
                np.array([float(value)]), generator, weight / self.largest_weight
            )
            if clipped:
                raise expected(f"metric '{name}'", f"at most {_LARGEST_STATISTIC:g}", value)
            words += [int(encoded[0]), weight]
        return words

    def decode_metrics(self, names: list[str], sums: list[int]) -> dict[str, float]:
        """Return the mean of each metric, from the sums of the words of `encode_metrics`."""
        means = {}
        for index, name in enumerate(names):
            total, weight = sums[2 * index : 2 * index + 2]
            if weight:
                means[name] = float(self._mean(self.wide, np.array(total), weight))
        return means


def _signed(words: NDArray) -> np.dtype[Any]:
    return np.dtype(f"i{words.dtype.itemsize}")


def _chunks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK))


def _difference(after: NDArray, before: NDArray) -> NDArray:
    return after.reshape(-1).astype(np.float64) - before.reshape(-1).astype(np.float64)


def _words(array: NDArray) -> NDArray:
    """Return integers modulo 2^64."""
    flat = array.reshape(-1)
    return flat.astype(np.uint64 if flat.dtype.kind == "u" else np.int64).view(np.uint64)


def _moved_whole(sent: NDArray, total: NDArray, weight: int) -> NDArray:
    """Return integers plus total / weight, rounded to the nearest whole number, halves upwards."""
    quotient, rest = np.divmod(total, weight)
    change = quotient + (rest >= weight - rest)
    moved = _words(sent) + change.view(np.uint64)
    return moved.view(np.int64).astype(sent.dtype).reshape(sent.shape)


def _sum_like(sent: NDArray, change: NDArray, least: float | None = None) -> NDArray:
    moved = sent.reshape(-1).astype(np.float64) + change
    if least is not None:
        moved = np.maximum(moved, least)
    return moved.astype(sent.dtype).reshape(sent.shape)
