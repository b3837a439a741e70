"""Masks: the keystreams that hide a vector of words, and the keys from which they are made.

The generator is AES-256 in counter mode. Flower's own is not used: it reduces a seed to 32 bits for
a Mersenne Twister, and 2^32 seeds can be tried (see docs/privacy.md).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..roles import NDArray

_CHUNK = 1 << 17
"""The bytes of a chunk, which stays in the processor's cache while all masks are added to it."""

_BLOCK = 16
"""The bytes of a block of AES; `update_into` needs room for one more than it writes."""


@dataclass(frozen=True)
class Attempt:
    """One attempt to compute a round's sum; every attempt has keys of its own.

    Attributes
    ----------
    session : str
        The session of the training.
    round : int
        The number of the round, from 1.
    number : int
        The number of the attempt in this round, from 0.
    """

    session: str
    round: int
    number: int

    def pair_key(self, secret: bytes, one: int, other: int) -> bytes:
        """Return the key of the mask of two participants, from their shared secret."""
        return self._key(secret, f"pair {min(one, other)} {max(one, other)}")

    def own_key(self, secret: bytes, participant: int) -> bytes:
        """Return the key of the mask that a participant adds for itself."""
        return self._key(secret, f"own {participant}")

    def commitment(self, secret: bytes, participant: int) -> bytes:
        """Return 32 bytes by which the secret of a participant's own mask is recognised."""
        return self._key(secret, f"commitment {participant}")

    def context(self, purpose: str) -> bytes:
        """Return bytes that differ for every session, round, attempt and purpose."""
        # The session's length comes first, so that no two sets of values give the same bytes.
        session = f"{len(self.session)}:{self.session}"
        return f"flwr-colearn secure|{session}|{self.round}|{self.number}|{purpose}".encode()

    def _key(self, secret: bytes, purpose: str) -> bytes:
        derivation = HKDF(hashes.SHA256(), length=32, salt=None, info=self.context(purpose))
        return derivation.derive(secret)


def sign_of(own: int, other: int) -> int:
    """Return the sign with which participant `own` adds its mask with `other`; both cancel."""
    return 1 if own < other else -1


class Masks:
    """The sum of several keystreams, each added or subtracted.

    Every call of `add_to` continues the streams where the last one ended, so both sides must give
    the same arrays in the same order.

    Parameters
    ----------
    masks : iterable of (bytes, int)
        The key of each mask, of 32 bytes, and its sign, 1 or -1. A key must not be used for a
        second vector, since the stream begins at the same place.
    """

    def __init__(self, masks: Iterable[tuple[bytes, int]]) -> None:
        self._streams = [(_stream(key), np.add if sign > 0 else np.subtract) for key, sign in masks]
        self._zeros = bytes(_CHUNK)
        self._room = bytearray(_CHUNK + _BLOCK)

    def __len__(self) -> int:
        """Return the number of masks."""
        return len(self._streams)

    def add_to(self, words: NDArray) -> None:
        """Add the next words of all masks to a contiguous array of uint32 or uint64, in place."""
        flat, size = words.reshape(-1), _CHUNK // words.itemsize
        keystream = np.frombuffer(self._room, words.dtype.newbyteorder("<"), size)
        # All masks of a chunk before the next chunk: the words are read from memory once.
        for start in range(0, flat.size, size):
            chunk = flat[start : start + size]
            zeros = memoryview(self._zeros)[: chunk.nbytes]
            for stream, combine in self._streams:
                stream.update_into(zeros, self._room)
                combine(chunk, keystream[: chunk.size], out=chunk)


def _stream(key: bytes) -> CipherContext:
    # The counter begins at 0, since no key has a second stream.
    return Cipher(algorithms.AES256(key), modes.CTR(bytes(_BLOCK))).encryptor()
