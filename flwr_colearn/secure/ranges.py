"""Ranges: the ranges of updates and of weights, which follow from the last mean."""

from collections.abc import Mapping

from .settings import SecureAggregation

MULTIPLE = 8.0
"""The clipping range as a multiple of the largest element of the last mean update."""

ROOM = 64
"""The largest weight as a multiple of the largest sum of weights. A participant that was absent
from all sums may have far more examples than the others together."""


class Ranges:
    """The clipping range of the next round's updates, and the largest weight.

    Parameters
    ----------
    secure : SecureAggregation
        The settings; a number for its `clipping_range` stays what it is.

    Attributes
    ----------
    clipping : float
        c.
    weight : int
        The largest sum of weights so far; 0 while there is none.
    """

    def __init__(self, secure: SecureAggregation) -> None:
        self._secure = secure
        self._fixed = secure.clipping_range != "auto"
        self.clipping = float(
            secure.first_range if secure.clipping_range == "auto" else secure.clipping_range
        )
        self.weight = 0

    def largest_weight(self, weighted: bool) -> tuple[int, int]:
        """Return the largest weight of a participant, and the bits of words for it.

        In the first round of a weighted mean only a generous bound is known, with which words of 32
        bits would leave few for the model.
        """
        most = self._secure.largest_weight
        if not weighted:
            return 1, 32
        return (min(ROOM * self.weight, most), 32) if self.weight else (most, 64)

    def update(self, largest: float, clipped: int, weight: int) -> None:
        """Set the ranges after a round.

        Parameters
        ----------
        largest : float
            The largest absolute value of the mean update.
        clipped : int
            The number of elements that participants clipped.
        weight : int
            The sum of the participants' weights.
        """
        self.weight = max(self.weight, weight)
        if self._fixed:
            return
        # An update of zeros, as with a learning rate of 0, has no scale.
        following = MULTIPLE * largest or self.clipping
        self.clipping = max(following, 2.0 * self.clipping) if clipped else following

    def state(self) -> dict[str, float]:
        """Return the ranges for a checkpoint."""
        return {"clipping": self.clipping, "weight": self.weight}

    def restore(self, state: Mapping[str, float]) -> None:
        """Restore the ranges that `state` returned."""
        self.clipping, self.weight = float(state["clipping"]), int(state["weight"])
