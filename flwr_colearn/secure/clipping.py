"""ClippingRange: the range to which elements of updates are clipped, from round to round."""

from .settings import SecureAggregation

MULTIPLE = 8.0
"""The range as a multiple of the largest element of the last mean update."""


class ClippingRange:
    """The clipping range c of the next round.

    Parameters
    ----------
    secure : SecureAggregation
        The settings; a number for its `clipping_range` stays what it is.

    Attributes
    ----------
    value : float
        c.
    """

    def __init__(self, secure: SecureAggregation) -> None:
        self._fixed = secure.clipping_range != "auto"
        self.value = float(
            secure.first_range if secure.clipping_range == "auto" else secure.clipping_range
        )

    def update(self, largest: float, clipped: int) -> None:
        """Set the range after a round.

        Parameters
        ----------
        largest : float
            The largest absolute value of the mean update.
        clipped : int
            The number of elements that participants clipped.
        """
        if self._fixed:
            return
        # An update of zeros, as with a learning rate of 0, has no scale.
        following = MULTIPLE * largest or self.value
        self.value = max(following, 2.0 * self.value) if clipped else following
