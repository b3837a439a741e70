"""Keys of participants, and the shares of their secrets: Flower's own primitives, with checks."""

from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives.asymmetric import ec

from .._flwr import (
    bytes_to_private_key,
    bytes_to_public_key,
    combine_shares,
    create_shares,
    decrypt,
    encrypt,
    generate_key_pairs,
    generate_shared_key,
    private_key_to_bytes,
    public_key_to_bytes,
)
from ..errors import ColearnError, expected
from .masks import Attempt

_NUMBER = 48
"""The bytes of a private key of the curve P-384."""

_LENGTH = 4
"""The bytes that hold the length of the first of two shares."""


def new_key() -> bytes:
    """Return a new private key of the curve P-384."""
    private, _ = generate_key_pairs()
    return private_key_to_bytes(private)


def public_key_of(private: bytes) -> bytes:
    """Return the public key of a private key."""
    return public_key_to_bytes(bytes_to_private_key(private).public_key())


def number_of(private: bytes) -> bytes:
    """Return the number that is a private key, which is shorter to share than its file format."""
    number = bytes_to_private_key(private).private_numbers().private_value
    return number.to_bytes(_NUMBER, "big")


def key_of(number: bytes, public: bytes) -> bytes | None:
    """Return the private key with this number, or None if it is not that of the public key."""
    value = int.from_bytes(number, "big")
    try:
        private = private_key_to_bytes(ec.derive_private_key(value, ec.SECP384R1()))
    except ValueError:  # a number beyond the order of the curve
        return None
    return private if public_key_of(private) == public else None


def shared_secret(private: bytes, public: bytes) -> bytes:
    """Return the secret that two participants compute, each from its own and the other's key.

    Raises
    ------
    ColearnError
        If the public key is none of the curve.
    """
    own = bytes_to_private_key(private)
    # A participant may send any bytes, for which the library raises exceptions of many types.
    try:
        return generate_shared_key(own, bytes_to_public_key(public))
    except Exception as error:
        raise expected("public key", "one of the curve P-384", type(error).__name__) from None


def split(secret: bytes, threshold: int, participants: int) -> list[bytes]:
    """Return a share for each participant; `threshold` of them give the secret (Shamir)."""
    return create_shares(secret, threshold, participants)


def join(shares: list[bytes]) -> bytes:
    """Return the secret of at least as many shares as the threshold.

    Raises
    ------
    ColearnError
        If the shares are not those of one secret.
    """
    try:
        return combine_shares(shares)
    except Exception as error:
        raise expected("shares", "those of one secret", str(error) or type(error)) from None


def seal(key: bytes, attempt: Attempt, way: tuple[int, int], shares: tuple[bytes, bytes]) -> bytes:
    """Return two shares encrypted for one participant.

    Parameters
    ----------
    key : bytes
        The secret that sender and receiver share.
    attempt : Attempt
        The attempt, which is part of the text, so that shares of another are recognised.
    way : (int, int)
        The sender and the receiver.
    shares : (bytes, bytes)
        The shares of the sender's own mask and of its private key.
    """
    first, second = shares
    header = attempt.context(f"shares {way[0]} {way[1]}")
    return encrypt(key, header + len(first).to_bytes(_LENGTH, "little") + first + second)


def unseal(
    key: bytes, attempt: Attempt, way: tuple[int, int], sealed: bytes
) -> tuple[bytes, bytes]:
    """Return the two shares that `seal` encrypted.

    Raises
    ------
    ColearnError
        If they were encrypted with another key, for another participant or in another attempt.
    """
    header = attempt.context(f"shares {way[0]} {way[1]}")
    try:
        text = decrypt(key, sealed)
    except InvalidToken:
        text = b""
    if not text.startswith(header):
        raise ColearnError(
            f"shares of participant {way[0]}: expected those of this attempt for participant "
            f"{way[1]}, found others"
        )
    text = text[len(header) :]
    size = int.from_bytes(text[:_LENGTH], "little")
    return text[_LENGTH : _LENGTH + size], text[_LENGTH + size :]
