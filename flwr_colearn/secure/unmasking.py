"""Unmasking: the server's side of the protocol, which removes the masks of a sum."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import ColearnError, expected
from . import keys
from .masks import Attempt, Masks, sign_of


@dataclass
class Unmasking:
    """The public part of an attempt, and the shares that its participants told.

    Attributes
    ----------
    attempt : Attempt
        The attempt.
    threshold : int
        The number of shares that give a secret.
    public : list of bytes
        The public keys for masks, by participant.
    commitments : dict
        The commitments to own masks, by participant; those that sent shares.
    seeds, private : dict
        The shares that were told of own masks and private keys, by the participant whose they are.
    """

    attempt: Attempt
    threshold: int
    public: Sequence[bytes]
    commitments: dict[int, bytes] = field(default_factory=dict)
    seeds: dict[int, list[bytes]] = field(default_factory=dict)
    private: dict[int, list[bytes]] = field(default_factory=dict)

    def add(
        self, survivors: Sequence[int], seeds: Sequence[bytes], private: Sequence[bytes]
    ) -> None:
        """Add one participant's answer, see `Member.unmask`.

        Raises
        ------
        ColearnError
            If it has another number of shares than was asked for.
        """
        dropped = self.dropped(survivors)
        if len(seeds) != len(survivors) or len(private) != len(dropped):
            wanted = f"{len(survivors)} of own masks and {len(dropped)} of private keys"
            raise expected("shares", wanted, (len(seeds), len(private)))
        for told, of, shares in (
            (self.seeds, survivors, seeds),
            (self.private, dropped, private),
        ):
            for participant, share in zip(of, shares, strict=True):
                told.setdefault(participant, []).append(share)

    def dropped(self, survivors: Iterable[int]) -> list[int]:
        """Return the participants that sent shares and no vector."""
        return sorted(set(self.commitments) - set(survivors))

    def masks(self, survivors: Sequence[int]) -> Masks:
        """Return what removes all masks from the sum of the survivors' vectors.

        These are their own masks, and the masks that they have with those that dropped out.

        Raises
        ------
        ColearnError
            If shares are missing, or are not those of the secrets.
        """
        own = [(self.attempt.own_key(self._seed(j), j), -1) for j in survivors]
        return Masks(own + [self._pair(d, u) for d in self.dropped(survivors) for u in survivors])

    def _pair(self, dropped: int, survivor: int) -> tuple[bytes, int]:
        private = self._private(dropped)
        secret = keys.shared_secret(private, self.public[survivor])
        key = self.attempt.pair_key(secret, dropped, survivor)
        return key, -sign_of(survivor, dropped)

    def _seed(self, participant: int) -> bytes:
        seed = self._joined(self.seeds, participant)
        # Without this check a wrong share would make the average random numbers.
        if self.attempt.commitment(seed, participant) != self.commitments[participant]:
            raise _wrong(participant)
        return seed

    def _private(self, participant: int) -> bytes:
        number = self._joined(self.private, participant)
        private = keys.key_of(number, self.public[participant])
        if private is None:
            raise _wrong(participant)
        return private

    def _joined(self, told: Mapping[int, list[bytes]], participant: int) -> bytes:
        shares = told.get(participant, [])
        if len(shares) < self.threshold:
            raise expected(f"shares of participant {participant}", str(self.threshold), len(shares))
        try:
            return keys.join(shares[: self.threshold])
        except ColearnError:
            raise _wrong(participant) from None


def _wrong(participant: int) -> ColearnError:
    return ColearnError(
        f"shares of participant {participant}: expected those of its secret, found others, which "
        "a participant that does not follow the protocol may have sent; nothing was unmasked"
    )
