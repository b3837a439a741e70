"""Masks against published vectors of AES and HKDF, and against another library's stream."""

import hashlib
import hmac

import numpy as np
import pytest
from Crypto.Cipher import AES
from hypothesis import given
from hypothesis import strategies as st

from flwr_colearn.secure.masks import Attempt, Masks, sign_of

KEY = bytes(range(32))


def stream(key, size):
    """The keystream by PyCryptodome, which shares no code with the one in use."""
    return AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=bytes(16)).encrypt(bytes(size))


def test_the_generator_is_aes_256_in_counter_mode():
    # The first block is the encryption of a block of zeros: FIPS 197's key schedule of this key.
    words = np.zeros(4, np.uint32)
    Masks([(KEY, 1)]).add_to(words)
    assert words.tobytes() == AES.new(KEY, AES.MODE_ECB).encrypt(bytes(16))


@given(st.lists(st.tuples(st.integers(0, 70_000), st.booleans()), max_size=5))
def test_arrays_get_the_stream_one_after_the_other(shapes):
    arrays = [np.zeros(size, np.uint64 if wide else np.uint32) for size, wide in shapes]
    masks = Masks([(KEY, 1)])
    for array in arrays:
        masks.add_to(array)
    expected = stream(KEY, sum(array.nbytes for array in arrays))
    assert b"".join(array.tobytes() for array in arrays) == expected


@pytest.mark.parametrize("kind", [np.uint32, np.uint64])
def test_masks_are_added_and_subtracted_modulo_the_word(kind):
    other = bytes(reversed(KEY))
    array = np.full((300, 7), 5, kind)
    Masks([(KEY, 1), (other, -1)]).add_to(array)
    one, two = (np.frombuffer(stream(key, array.nbytes), kind) for key in (KEY, other))
    assert np.array_equal(array.reshape(-1), kind(5) + one - two)
    Masks([(KEY, -1), (other, 1)]).add_to(array)
    assert (array == 5).all()


def test_two_participants_masks_cancel():
    assert {sign_of(3, 7), sign_of(7, 3)} == {1, -1}
    attempt = Attempt("session", 1, 0)
    assert attempt.pair_key(b"secret", 3, 7) == attempt.pair_key(b"secret", 7, 3)


def hkdf(secret, info):
    """RFC 5869 with SHA-256, without salt, for 32 bytes."""
    extracted = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def test_keys_are_derived_by_hkdf():
    attempt = Attempt("ab", 4, 2)
    info = b"flwr-colearn secure|2:ab|4|2|pair 3 7"
    assert attempt.pair_key(b"secret", 7, 3) == hkdf(b"secret", info)


def test_every_session_round_attempt_pair_and_purpose_has_a_key_of_its_own():
    attempts = [Attempt(s, r, n) for s in ("a", "b") for r in (1, 2) for n in (0, 1)]
    derived = [
        key
        for attempt in attempts
        for key in (
            attempt.pair_key(b"secret", 0, 1),
            attempt.pair_key(b"secret", 0, 2),
            attempt.own_key(b"secret", 0),
            attempt.own_key(b"secret", 1),
            attempt.commitment(b"secret", 0),
        )
    ]
    assert len(set(derived)) == len(derived) == 8 * 5


def test_a_session_cannot_imitate_the_rest_of_another_context():
    assert Attempt("a|1|0|x", 2, 0).context("p") != Attempt("a", 1, 0).context("x|2|0|p")
