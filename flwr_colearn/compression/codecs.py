"""The codecs, which encode a model in fewer bytes.

Only floating-point arrays of two or more dimensions are compressed. Arrays that must stay exact
have fewer in every framework: biases, batch-norm scales and statistics have one dimension,
counters have none. So messages need no roles, and the `stype` of each array is its codec:
``"colearn.<codec>"``, or ``"colearn.exact"`` for the bytes of the array itself (numpy's own header
has more bytes than many a bias). An encoded array also has its type and shape, and its data are a
CRC-32 and the little-endian bytes.
"""

import math
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from logging import WARNING
from typing import ClassVar, Literal

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.common import log

from ..errors import expected
from ..records import view
from ..roles import Arrays, NDArray

_FLOATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))
_CHECKSUM = 4  # bytes
_EXACT = "colearn.exact"


class Codec(ABC):
    """An encoding of models as bytes; an immutable value without state.

    A codec of your own is a subclass of `PackedCodec` with a `name`, an `itemsize`, `pack` and
    `unpack`. `register` it on the server and at every participant, so that its name is known there.

    Attributes
    ----------
    name : str
        The codec's name in messages and run configs.
    differential : bool
        Whether the codec encodes the difference to a reference model that both sides have.
    """

    name: ClassVar[str]
    differential: ClassVar[bool] = False

    @abstractmethod
    def encode(
        self, model: ArrayRecord, reference: Arrays | None = None, residual: Arrays | None = None
    ) -> tuple[ArrayRecord, Arrays]:
        """Return the encoded model, and the model that the other side will decode from it.

        Parameters
        ----------
        model : ArrayRecord
            The model; the encoded one has the same names in the same order.
        reference : mapping of str to numpy.ndarray, optional
            The reference model, which both sides have.
        residual : mapping of str to numpy.ndarray, optional
            The rounding errors of earlier rounds; a differential codec adds them to the difference.

        Raises
        ------
        ColearnError
            If an entry of `model` is not a serialised numpy array.
        """

    @abstractmethod
    def decode(self, model: ArrayRecord, reference: Arrays | None = None) -> Arrays:
        """Return the arrays of an encoded model; those that are sent exactly as read-only views.

        Parameters
        ----------
        model : ArrayRecord
            The encoded model.
        reference : mapping of str to numpy.ndarray, optional
            The same as in `encode`; if given, encoded arrays must have its names, shapes and types.

        Raises
        ------
        ColearnError
            If an entry is neither a serialised numpy array nor one that this codec encoded.
        """

    @property
    def stype(self) -> str:
        """The `stype` of an array that this codec has rounded."""
        return f"colearn.{self.name}"

    def __str__(self) -> str:
        """Return the codec's name."""
        return self.name


@dataclass(frozen=True)
class Uncompressed(Codec):
    """The codec that does not change arrays, of any type."""

    name: ClassVar[str] = "float32"

    def encode(
        self, model: ArrayRecord, reference: Arrays | None = None, residual: Arrays | None = None
    ) -> tuple[ArrayRecord, Arrays]:
        """Return the model itself, and views of its arrays."""
        return model, view(model)

    def decode(self, model: ArrayRecord, reference: Arrays | None = None) -> Arrays:
        """Return views of the model's arrays."""
        return view(model)


class PackedCodec(Codec):
    """A codec that encodes the floats of weight arrays in fewer bytes, array by array.

    An array that would not be finite after decoding, since it holds NaN or numbers beyond the
    codec's range, is sent exactly. With a differential codec, an array without a `reference` of its
    shape and type is sent exactly too.

    Attributes
    ----------
    itemsize : int
        The bytes of one encoded number; arrays whose numbers have no more are sent exactly.
    """

    itemsize: ClassVar[int]

    @abstractmethod
    def pack(self, values: NDArray) -> bytes:
        """Return `values`, float32 or float64 of two or more dimensions, as bytes."""

    @abstractmethod
    def unpack(self, data: memoryview, shape: tuple[int, ...]) -> NDArray:
        """Return the values that `pack` encoded, as float16 or float32.

        Raises
        ------
        ValueError
            If `data` has another length than values of this shape.
        """

    def compresses(self, array: NDArray) -> bool:
        """Return whether the codec rounds an array of this type and shape."""
        return (
            array.dtype in _FLOATS
            and array.dtype.itemsize > self.itemsize
            and array.ndim >= 2
            and array.size > 0
        )

    def encode(
        self, model: ArrayRecord, reference: Arrays | None = None, residual: Arrays | None = None
    ) -> tuple[ArrayRecord, Arrays]:
        """Return the encoded model, and the model that the other side will decode from it."""
        sent, arriving = dict(model), view(model)
        too_large = []
        for name, array in arriving.items():
            base = (reference or {}).get(name) if self.differential else None
            if self.compresses(array) and (not self.differential or _alike(base, array)):
                # Overflow is no error here: a result that is not finite is sent exactly below.
                with np.errstate(all="ignore"):
                    payload = self.pack(difference(array, base, (residual or {}).get(name)))
                    # Decoded as on the other side, which gives the exact rounding error.
                    arrived = self._restore(memoryview(payload), array, base)
                if np.isfinite(arrived).all():
                    sent[name] = _sealed(self.stype, array, payload)
                    arriving[name] = arrived
                    continue
                # An array with NaN or Inf is refused on the server, with a reason of its own.
                if np.isfinite(array).all():
                    too_large.append(name)
            if array.dtype.kind in "fiub":
                sent[name] = _sealed(_EXACT, array, array.tobytes())
        if too_large:
            log(
                WARNING,
                "Compression: beyond the range of %s, sent as they are: %s",
                self,
                too_large,
            )
        return ArrayRecord(sent), arriving

    def decode(self, model: ArrayRecord, reference: Arrays | None = None) -> Arrays:
        """Return the arrays of an encoded model."""
        sealed = {name: a for name, a in model.items() if a.stype in (self.stype, _EXACT)}
        arrays = view(ArrayRecord({name: model[name] for name in model if name not in sealed}))
        arrays.update({name: self._open(name, sealed[name], reference) for name in sealed})
        return {name: arrays[name] for name in model}

    def _open(self, name: str, array: Array, reference: Arrays | None) -> NDArray:
        try:
            dtype, shape = np.dtype(array.dtype), tuple(array.shape)
            if dtype.kind not in "fiub":
                raise ValueError(f"type {dtype}")
            # A view of one element: a false shape in a message must not make this allocate memory.
            like = np.broadcast_to(np.zeros((), dtype), shape)
            base = like if reference is None else reference.get(name)
            if not _alike(base, like) or not (array.stype == _EXACT or self.compresses(like)):
                raise ValueError(f"{array.dtype} of shape {shape}")
            data = memoryview(array.data)
            if zlib.crc32(data[_CHECKSUM:]).to_bytes(_CHECKSUM, "little") != data[:_CHECKSUM]:
                raise ValueError(f"{len(data)} bytes of another checksum")
            if array.stype == _EXACT:
                return np.frombuffer(data[_CHECKSUM:], dtype).reshape(shape)
            # The caller checks whether numbers are finite.
            with np.errstate(all="ignore"):
                return self._restore(data[_CHECKSUM:], like, base if self.differential else None)
        except Exception as error:  # malformed data make numpy and `unpack` raise many types
            reason = f"{type(error).__name__}: {error}"
        raise expected(
            f"array '{name}'", f"one of the model, with its shape and type, as {self}", reason
        )

    def _restore(self, data: memoryview, like: NDArray, base: NDArray | None) -> NDArray:
        values = self.unpack(data, like.shape)
        return (values if base is None else base + values).astype(like.dtype, copy=False)


@dataclass(frozen=True)
class Float16(PackedCodec):
    """IEEE half precision: 11 significant bits, magnitudes from 6e-8 to 65504."""

    name: ClassVar[str] = "float16"
    itemsize: ClassVar[int] = 2

    def pack(self, values: NDArray) -> bytes:
        """Round to the nearest half-precision number."""
        return values.astype("<f2").tobytes()

    def unpack(self, data: memoryview, shape: tuple[int, ...]) -> NDArray:
        """Return the numbers as float16."""
        return np.frombuffer(data, "<f2").reshape(shape)


@dataclass(frozen=True)
class BFloat16(PackedCodec):
    """The upper half of a float32: 8 significant bits, and the range of float32.

    As a codec from participants it drops every change of a number by less than 1/512 of it, in
    every round. With small learning rates ``Float16``, or better ``Int8``, loses less.
    """

    name: ClassVar[str] = "bfloat16"
    itemsize: ClassVar[int] = 2

    def pack(self, values: NDArray) -> bytes:
        """Round to the nearest bfloat16, halves to even; NaN stays NaN."""
        bits: NDArray = values.astype("<f4").view("<u4")
        # Half a unit of the last kept bit, less one if that bit is even: a tie goes to even.
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        # The sum above would change some NaN into infinities or zeros.
        upper: NDArray = np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype("<u2")
        return upper.tobytes()

    def unpack(self, data: memoryview, shape: tuple[int, ...]) -> NDArray:
        """Return the numbers as float32."""
        upper: NDArray = np.frombuffer(data, "<u2").reshape(shape).astype("<u4")
        values: NDArray = (upper << 16).view("<f4")
        return values


@dataclass(frozen=True)
class Int8(PackedCodec):
    """The difference to the shared model, rounded to 255 steps; a codec from participants only.

    The steps are ``q = round(d / s)`` with ``s = max |d| / 127``. The rounding error ``d - s q`` is
    stored at the participant and added to its next round's difference (error feedback; Seide et
    al., 1-bit SGD, 2014), so that rounding errors do not accumulate.

    Parameters
    ----------
    channel_axis : {0, -1}, optional
        One scale for each channel, along the first axis (PyTorch's output channels) or the last
        (Keras's, TF-slim's). By default one scale for each array.

    Raises
    ------
    ColearnError
        If `channel_axis` is another axis.
    """

    channel_axis: Literal[0, -1] | None = None

    itemsize: ClassVar[int] = 1
    differential: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.channel_axis not in (None, 0, -1):
            raise expected("channel_axis", "0, -1 or None", self.channel_axis)

    @property
    def name(self) -> str:  # type: ignore[override]
        """The codec's name: "int8", "int8-first-axis" or "int8-last-axis"."""
        return {None: "int8", 0: "int8-first-axis", -1: "int8-last-axis"}[self.channel_axis]

    def pack(self, values: NDArray) -> bytes:
        """Return the scales, then the steps."""
        scale_shape = self._scale_shape(values.shape)
        axes = tuple(i for i, size in enumerate(scale_shape) if size != values.shape[i])
        scale: NDArray = (np.abs(values).max(axis=axes, keepdims=True) / 127).astype("<f4")
        # Channels without any change have the scale 0, and so 0 steps.
        steps = np.divide(values, scale, out=np.zeros(values.shape, values.dtype), where=scale > 0)
        # A scale that is rounded down to float32 would give more than 127 steps.
        steps = np.clip(np.rint(steps, out=steps), -127, 127, out=steps)
        return scale.tobytes() + steps.astype(np.int8).tobytes()

    def unpack(self, data: memoryview, shape: tuple[int, ...]) -> NDArray:
        """Return the differences as float32."""
        scale_shape = self._scale_shape(shape)
        split = 4 * math.prod(scale_shape)
        scale = np.frombuffer(data[:split], "<f4").reshape(scale_shape)
        values: NDArray = np.frombuffer(data[split:], np.int8).reshape(shape) * scale
        return values

    def _scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        sizes = [1] * len(shape)
        if self.channel_axis is not None:
            sizes[self.channel_axis] = shape[self.channel_axis]
        return tuple(sizes)


_CODECS: dict[str, Codec] = {
    str(codec): codec
    for codec in (Uncompressed(), Float16(), BFloat16(), Int8(), Int8(0), Int8(-1))
}


def register(codec: Codec) -> None:
    """Make a codec known by its name; a participant calls this in the module of its ClientApp.

    Parameters
    ----------
    codec : Codec
        The codec; its `name` must not be that of another codec.

    Raises
    ------
    ColearnError
        If the argument is no codec, or its name is that of another codec.
    """
    if not isinstance(codec, Codec):
        raise expected("codec", "an object of a subclass of Codec", codec)
    # A module may be imported twice, so the same class may register itself again.
    if type(_CODECS.get(str(codec), codec)) is not type(codec):
        raise expected(f"codec {codec}", "a name that no other codec has", _CODECS[str(codec)])
    _CODECS[str(codec)] = codec


def codec_named(name: object) -> Codec:
    """Return the codec of this name, as in run configs and messages.

    Raises
    ------
    ColearnError
        If no codec has this name.

    Examples
    --------
    >>> codec_named("int8-first-axis")
    Int8(channel_axis=0)
    """
    if not isinstance(name, str) or name not in _CODECS:
        raise expected("codec", f"one of {', '.join(_CODECS)}", name)
    return _CODECS[name]


def difference(array: NDArray, base: NDArray | None, residual: NDArray | None) -> NDArray:
    """Return array - base + residual, in float32 at least; base and residual count as 0 if None."""
    # A difference in float16 would round once more, before the codec does.
    wide = np.result_type(array.dtype, np.float32)
    values = array.astype(wide, copy=False)
    values = values if base is None else values - base
    return values if residual is None else (values + residual).astype(wide, copy=False)


def _sealed(stype: str, array: NDArray, payload: bytes) -> Array:
    """Return an encoded array, with a checksum."""
    data = zlib.crc32(payload).to_bytes(_CHECKSUM, "little") + payload
    return Array(str(array.dtype), array.shape, stype, data)


def _alike(one: NDArray | None, other: NDArray) -> bool:
    return one is not None and one.shape == other.shape and one.dtype == other.dtype
