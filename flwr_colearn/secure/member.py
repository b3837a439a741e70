"""Member: the secrets of one participant in one attempt, and what it tells of them."""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import ColearnError, expected
from . import keys
from .masks import Attempt, Masks, sign_of
from .settings import FEWEST

SEED_BYTES = 32


@dataclass
class Member:
    """The participant's side of the protocol, without messages.

    The stages have an order, and each is answered once: keys, `share`, `mask`, `unmask`. The last
    one may be repeated with the same survivors. A participant never gives both the share of
    another's own mask and that of its private key, with which the server could unmask one model.

    Attributes
    ----------
    attempt : Attempt
        The attempt, of which all keys are.
    private : list of bytes
        The private keys, for masks and for the encryption of shares.
    stage : str
        The last stage that was answered.
    index : int
        The participant's number among those of the attempt.
    threshold : int
        The number of shares that give a secret.
    public : list of bytes
        The public keys for masks, by participant.
    ciphers : list of bytes
        The public keys for the encryption of shares, by participant.
    seed : bytes
        The secret of the own mask.
    own : list of bytes
        The participant's shares of its own two secrets.
    senders : list of int
        The participants of whose shares the masks are made.
    seed_shares, key_shares : list of bytes
        The shares of the senders' own masks and private keys, in the order of `senders`.
    survivors : list of int
        The participants whose vectors are in the sum that was unmasked.
    names : list of str
        The names of the participants, by number.
    """

    attempt: Attempt
    private: list[bytes] = field(default_factory=lambda: [keys.new_key(), keys.new_key()])
    stage: str = "keys"
    index: int = -1
    threshold: int = 0
    public: list[bytes] = field(default_factory=list)
    ciphers: list[bytes] = field(default_factory=list)
    seed: bytes = b""
    own: list[bytes] = field(default_factory=list)
    senders: list[int] = field(default_factory=list)
    seed_shares: list[bytes] = field(default_factory=list)
    key_shares: list[bytes] = field(default_factory=list)
    survivors: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def to_config(self) -> dict[str, Any]:
        """Return the state as entries of a ConfigRecord."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        del own["attempt"]
        attempt = self.attempt
        return {**own, "of": [attempt.session, str(attempt.round), str(attempt.number)]}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Member":
        """Read the state from the entries that `to_config` returned."""
        values = dict(config)
        session, server_round, number = values.pop("of")
        return cls(Attempt(session, int(server_round), int(number)), **values)

    @property
    def public_keys(self) -> tuple[bytes, bytes]:
        """The public keys, for masks and for the encryption of shares."""
        mask, cipher = self.private
        return keys.public_key_of(mask), keys.public_key_of(cipher)

    def share(
        self, index: int, public: Sequence[bytes], ciphers: Sequence[bytes], threshold: int
    ) -> tuple[list[bytes], bytes]:
        """Return encrypted shares for all participants, and the commitment to the own mask.

        Parameters
        ----------
        index : int
            This participant's number.
        public, ciphers : sequence of bytes
            The public keys of all participants, by number.
        threshold : int
            The number of shares that give a secret.

        Raises
        ------
        ColearnError
            If there are fewer than 3 participants, the threshold is not more than half of them, or
            a key is not there or there twice. Masks with oneself would not hide anything.
        """
        self._enter("share", after=("keys",))
        count = len(public)
        if not max(FEWEST, count // 2 + 1) <= threshold <= count:
            wanted = f"at least {FEWEST}, and more than half, of {count} participants"
            raise expected("threshold", wanted, threshold)
        if len({*public, *ciphers}) != 2 * count or len(ciphers) != count:
            raise expected("public keys", f"two of each of {count} participants", "some twice")
        if not 0 <= index < count or (public[index], ciphers[index]) != self.public_keys:
            raise expected("public keys", "this participant's own at its place", index)
        self.index, self.threshold = index, threshold
        self.public, self.ciphers = list(public), list(ciphers)
        self.seed = secrets.token_bytes(SEED_BYTES)
        both = list(
            zip(
                keys.split(self.seed, threshold, count),
                keys.split(keys.number_of(self.private[0]), threshold, count),
                strict=True,
            )
        )
        self.own = list(both[index])
        sealed = [
            b"" if j == index else keys.seal(self._cipher(j), self.attempt, (index, j), both[j])
            for j in range(count)
        ]
        return sealed, self.attempt.commitment(self.seed, index)

    def mask(self, sealed: Mapping[int, bytes]) -> Masks:
        """Return the masks of this participant's vector.

        Parameters
        ----------
        sealed : mapping of int to bytes
            The encrypted shares for this participant, by the number of their sender.

        Raises
        ------
        ColearnError
            If fewer participants than the threshold sent shares, or one is not for this one.
        """
        self._enter("mask", after=("share",))
        self.senders = sorted({*sealed, self.index})
        if not set(self.senders) <= set(range(len(self.public))) or self.index in sealed:
            raise expected("senders of shares", "other participants of the attempt", self.senders)
        self._check_number(self.senders)
        for j in self.senders:
            seed, key = (
                self.own
                if j == self.index
                else keys.unseal(self._cipher(j), self.attempt, (j, self.index), sealed[j])
            )
            self.seed_shares.append(seed)
            self.key_shares.append(key)
        own = self.attempt.own_key(self.seed, self.index), 1
        return Masks([own, *(self._pair(j) for j in self.senders if j != self.index)])

    def unmask(self, survivors: Iterable[int]) -> tuple[list[bytes], list[bytes]]:
        """Return the shares with which the server unmasks the sum of the survivors' vectors.

        Parameters
        ----------
        survivors : iterable of int
            The participants whose vectors arrived.

        Returns
        -------
        seeds : list of bytes
            The shares of the survivors' own masks, in ascending order of their numbers.
        private : list of bytes
            The shares of the others' private keys, in ascending order of their numbers.

        Raises
        ------
        ColearnError
            If there are fewer survivors than the threshold, this participant is not among them, or
            it has answered for other ones.
        """
        wanted = sorted(set(survivors))
        self._enter("unmask", after=("mask", "unmask"))
        if not {self.index} <= set(wanted) <= set(self.senders):
            raise expected("survivors", f"this participant and others of {self.senders}", wanted)
        self._check_number(wanted)
        if self.survivors not in ([], wanted):
            raise expected("survivors", f"those of the first request, {self.survivors}", wanted)
        self.survivors = wanted
        seeds = dict(zip(self.senders, self.seed_shares, strict=True))
        private = dict(zip(self.senders, self.key_shares, strict=True))
        dropped = [j for j in self.senders if j not in set(wanted)]
        return [seeds[j] for j in wanted], [private[j] for j in dropped]

    def _enter(self, stage: str, after: tuple[str, ...]) -> None:
        """Note the stage; a second vector under the same masks would tell their difference."""
        if self.stage not in after:
            raise ColearnError(
                f"secure aggregation: expected '{stage}' after {' or '.join(map(repr, after))}, "
                f"found it after '{self.stage}'; the server repeats the round with new keys"
            )
        self.stage = stage

    def _check_number(self, participants: Sequence[int]) -> None:
        if len(participants) < self.threshold:
            wanted = f"at least {self.threshold} participants"
            raise expected("secure aggregation", wanted, len(participants))

    def _cipher(self, other: int) -> bytes:
        return keys.shared_secret(self.private[1], self.ciphers[other])

    def _pair(self, other: int) -> tuple[bytes, int]:
        secret = keys.shared_secret(self.private[0], self.public[other])
        key = self.attempt.pair_key(secret, self.index, other)
        return key, sign_of(self.index, other)
