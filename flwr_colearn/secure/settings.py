"""SecureAggregation: the settings of secure aggregation."""

from dataclasses import dataclass
from typing import Literal

from ..errors import expected, real_number, whole_number

FEWEST = 3
"""The smallest number of models in a sum. Of a sum of two, each of the two knows the other's."""

MOST = 50
"""The largest number of participants: every two of them have a mask, which takes K - 1 each."""


@dataclass(frozen=True)
class SecureAggregation:
    """Secure aggregation: the server receives the average and no participant's model.

    After the training of a round the participants exchange keys by the server, and send their
    models under masks that cancel in the sum (Bonawitz et al., CCS 2017, on the complete graph).
    ``Transport(secure=SecureAggregation())`` switches it on for any strategy whose aggregate is a
    mean. Participants need `flwr_colearn.participant_mod`. See docs/privacy.md for what the server
    sees.

    Parameters
    ----------
    threshold : int, optional
        The number of participants that must stay until the sum is unmasked; more than half of them
        and at least 3, which is the default. Fewer than this number of participants that collude
        with the server do not learn another one's model.
    clipping_range : float or "auto", default "auto"
        c: elements of an update, which is the trained model minus the one sent, are clipped to
        [-c, c]. "auto" is 8 times the largest element of the last mean update; it is doubled if
        participants clipped elements, whose number is masked too.
    first_range : float, default 8.0
        The clipping range of the first round under "auto".
    largest_weight : int, default 2**20
        The largest number of examples of a participant where the mean is weighted by it. Words have
        64 bits in the first round of a weighted mean, whose number of examples is not known, and 32
        bits later, with 64 times the largest number of examples in a sum as the bound.
    masked_metrics : bool, default False
        Whether metrics of training are masked too. The server then sees their means and not the
        participants' own. A metric must be a number of at most 2^24 in absolute value; lists are
        left out.
    timeout : float, default 600.0
        The seconds within which a participant must answer each of the three messages after the
        training. Afterwards it is left out of the round.
    seed : int, default 0
        The seed of stochastic rounding. Masks have keys from the system's own source.

    Raises
    ------
    ColearnError
        If an argument is invalid.

    Examples
    --------
    >>> SecureAggregation().threshold_of(5)
    3
    """

    threshold: int | None = None
    clipping_range: float | Literal["auto"] = "auto"
    first_range: float = 8.0
    largest_weight: int = 2**20
    masked_metrics: bool = False
    timeout: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.threshold is not None:
            whole_number("threshold of SecureAggregation", self.threshold, least=FEWEST)
        if self.clipping_range != "auto":
            _positive("clipping_range of SecureAggregation", self.clipping_range)
        _positive("first_range of SecureAggregation", self.first_range)
        whole_number("largest_weight of SecureAggregation", self.largest_weight, least=1)
        if self.largest_weight > 2**31:
            raise expected("largest_weight", "at most 2**31", self.largest_weight)
        _positive("timeout of SecureAggregation", self.timeout)
        whole_number("seed of SecureAggregation", self.seed, least=0)

    def __str__(self) -> str:
        """Return the settings on which averages depend."""
        return (
            f"threshold {self.threshold or 'of more than half'}, clipping range "
            f"{self.clipping_range} (at first {self.first_range:g}), seed {self.seed}"
        )

    def threshold_of(self, participants: int) -> int:
        """Return the number that must stay, of so many participants.

        Raises
        ------
        ColearnError
            If there are fewer than 3 participants or more than 50, or the threshold is not more
            than half of them and at most all.
        """
        if not FEWEST <= participants <= MOST:
            wanted = f"{FEWEST} to {MOST}, since of a sum of two each knows the other's model"
            raise expected("participants under secure aggregation", wanted, participants)
        least = max(FEWEST, participants // 2 + 1)
        if self.threshold is None:
            return least
        if not least <= self.threshold <= participants:
            wanted = f"{least} to {participants}, for {participants} participants"
            raise expected("threshold of SecureAggregation", wanted, self.threshold)
        return self.threshold


def as_secure(value: object) -> SecureAggregation | None:
    """Return `value` if it is a SecureAggregation or None.

    Raises
    ------
    ColearnError
        If `value` is anything else.
    """
    if value is None or isinstance(value, SecureAggregation):
        return value
    raise expected("secure", "a SecureAggregation, or None", value)


def _positive(what: str, value: object) -> None:
    if real_number(what, value, least=0.0) == 0.0:
        raise expected(what, "a number above 0", value)
