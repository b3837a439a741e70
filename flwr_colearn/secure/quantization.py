"""Quantizer: numbers as whole words that can be masked and summed."""

from dataclasses import dataclass

import numpy as np

from ..roles import NDArray


@dataclass(frozen=True)
class Quantizer:
    """Numbers in [-c, c] as whole numbers in [-q, q], by stochastic rounding.

    A word is floor(x * q / c + u) with u uniform in [0, 1), so its expected value is x * q / c, and
    the error of a number is less than c / q. So is the error of a mean of such numbers.

    Parameters
    ----------
    clipping_range : float
        c, positive. Numbers beyond it are cut to it.
    levels : int
        q. With K participants K * q must fit a signed word.

    Examples
    --------
    >>> quantizer = Quantizer(clipping_range=2.0, levels=100)
    >>> words, clipped = quantizer.encode(np.array([-2.0, 0.5, 3.0]), np.random.default_rng(0))
    >>> words, clipped
    (array([-100,   25,  100]), 1)
    >>> quantizer.decode(words)
    array([-2. ,  0.5,  2. ])
    """

    clipping_range: float
    levels: int

    @property
    def step(self) -> float:
        """The difference of two neighbouring numbers, c / q."""
        return self.clipping_range / self.levels

    def encode(
        self, values: NDArray, generator: np.random.Generator, share: float = 1.0
    ) -> tuple[NDArray, int]:
        """Return the words of numbers times `share`, and how many numbers were clipped.

        Parameters
        ----------
        values : numpy.ndarray
            float64, finite.
        generator : numpy.random.Generator
            The source of the rounding.
        share : float, default 1
            A weight in (0, 1], by which the numbers are multiplied after they were clipped.

        Returns
        -------
        words : numpy.ndarray
            int64, of the shape of `values`.
        clipped : int
            The number of values beyond the clipping range.
        """
        clipped = int(np.count_nonzero(np.abs(values) > self.clipping_range))
        scaled = np.clip(values, -self.clipping_range, self.clipping_range)
        # One division, whose result for the range itself is exactly the number of levels.
        scaled = scaled / self.clipping_range * (self.levels * share)
        words = np.floor(scaled + generator.random(values.shape)).astype(np.int64)
        # The sum with u may be rounded up to the next whole number, beyond the levels.
        return np.clip(words, -self.levels, self.levels, out=words), clipped

    def decode(self, words: NDArray) -> NDArray:
        """Return the numbers of words, or the sum of numbers of a sum of words, as float64."""
        return words.astype(np.float64) * self.step
