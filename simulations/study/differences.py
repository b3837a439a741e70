"""Differences between the scores of runs, paired by seed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Scored(Protocol):
    """The result of one run: its score, and the seed that it shares with other runs."""

    @property
    def seed(self) -> int:
        """The seed."""

    @property
    def score(self) -> float:
        """The score in percent."""


@dataclass(frozen=True)
class Difference:
    """The mean difference of the scores of two ways of training, paired by seed.

    Attributes
    ----------
    mean : float
        Of the first less the second, in percent.
    error : float or None
        The standard error of the mean; None with fewer than two common seeds.
    seeds : int
        The number of common seeds.
    """

    mean: float
    error: float | None
    seeds: int

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.2f}"
        return f"{self.mean:+.2f}{error}"


def difference(first: Sequence[Scored], second: Sequence[Scored]) -> Difference | None:
    """Return the difference of scores over the seeds that both have; None if there are none."""
    others = {run.seed: run.score for run in second}
    pairs = [run.score - others[run.seed] for run in first if run.seed in others]
    if not pairs:
        return None
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    return Difference(statistics.mean(pairs), error, len(pairs))
