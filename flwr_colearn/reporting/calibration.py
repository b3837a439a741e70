"""What epsilon would do: the T that each epsilon gives for the relative changes of a run."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from ..aggregation import mean_loss
from ..epoch_rules import EpochRule, IncreasingEpochs, Observations, PlateauEpochs, is_level
from ..errors import ColearnError
from ..history import RoundRecord

LAST = 3
"""The number of rounds at the end of a T whose mean relative change is its level."""


class Measured(NamedTuple):
    """What a rule sees of one round: its T, relative change and mean training loss."""

    local_epochs: int
    change: float
    loss: float | None


@dataclass(frozen=True)
class Level:
    """The relative changes of a run at one T.

    Attributes
    ----------
    local_epochs : int
        T.
    rounds : int
        The number of rounds at it.
    first, last : float
        The first relative change, and the mean of the last three.
    settled : bool
        Whether the changes have stopped falling (see `flwr_colearn.PlateauEpochs`), so that `last`
        is the level that T holds. False where there are fewer than six.
    """

    local_epochs: int
    rounds: int
    first: float
    last: float
    settled: bool


@dataclass(frozen=True)
class Stage:
    """The rounds at one T of the path that a rule gives.

    Attributes
    ----------
    local_epochs : int
        T.
    rounds : int
        The rounds at it, as far as the run shows them.
    end : {"grows", "stays", "open", "unknown"}
        Whether T grows after these rounds; stays, since the changes are level and the rule does not
        let it grow; is left open, since the changes still fall where the run's rounds at it end; or
        does not occur in the run, so that nothing is known.
    """

    local_epochs: int
    rounds: int
    end: Literal["grows", "stays", "open", "unknown"]

    def __str__(self) -> str:
        """Return the stage as in a table: '5 x3' for three rounds, after which T grows."""
        ends = {
            "grows": f"{self.local_epochs} x{self.rounds}",
            "stays": f"{self.local_epochs} stays",
            "open": f"{self.local_epochs} x{self.rounds} or more",
            "unknown": f"{self.local_epochs} (not in this run)",
        }
        return ends[self.end]


@dataclass(frozen=True)
class Path:
    """The path of T for a range of epsilon: from `least` (included) to below `below`."""

    least: float
    below: float | None
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Calibration:
    """What a run shows of the rules for T.

    Attributes
    ----------
    levels : tuple of Level
        The relative changes at each T of the run.
    paths : tuple of Path
        The T of eq. 4 for every epsilon, ascending: within a range the path is the same.
    plateau : tuple of Stage
        The T of ``PlateauEpochs`` with its defaults.
    """

    levels: tuple[Level, ...]
    paths: tuple[Path, ...]
    plateau: tuple[Stage, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the calibration in types of JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the calibration as tables of text."""
        lines = ["Relative change of the shared model at each T", ""]
        lines += table(
            ("T", "rounds", "first", f"mean of last {LAST}", ""),
            [
                (
                    str(each.local_epochs),
                    str(each.rounds),
                    f"{each.first:.4g}",
                    f"{each.last:.4g}",
                    "level" if each.settled else "not level yet",
                )
                for each in self.levels
            ],
        )
        lines += ["", "T of eq. 4 for each epsilon (5 x3: three rounds with T=5, then T grows)", ""]
        lines += table(
            ("epsilon", "T"), [(_range(path), _spelled(path.stages)) for path in self.paths]
        )
        lines += ["", f"T of the plateau rule, which needs no epsilon: {_spelled(self.plateau)}"]
        return "\n".join(lines)


def calibration_of(records: Iterable[RoundRecord]) -> Calibration:
    """Return what the history of a run, by whatever rule, shows of the rules for T.

    The changes at a T are taken in the order in which the run had them, whatever came before. For
    the rule of the run itself that is exact; for another rule it is an estimate from the first
    round on in which T differs, since the model was then another one.

    Raises
    ------
    ColearnError
        If no round has a relative change.

    Examples
    --------
    >>> changes = {1: (0.5, 0.25), 2: (0.5,)}
    >>> records = [RoundRecord(i, t, 0.1, 0, c) for t in changes for i, c in enumerate(changes[t])]
    >>> for path in calibration_of(records).paths:
    ...     print(path.least, path.below, *path.stages)
    0.0 0.25 1 x2 or more
    0.25 0.5 1 x2 2 x1 or more
    0.5 None 1 x1 2 x1 4 (not in this run)
    """
    rounds = measured(records)
    if not rounds:
        raise ColearnError(
            "history: expected at least one round with a relative change, found none"
        )
    initial = rounds[0].local_epochs
    plateau = PlateauEpochs(initial, maximum=max(16, initial))
    return Calibration(_levels(rounds), _paths(rounds), replay(plateau, rounds))


def measured(records: Iterable[RoundRecord]) -> list[Measured]:
    """Return the rounds that have a relative change, without those that the budget cut short."""
    rounds: list[Measured] = []
    for record in records:
        shorter = rounds and record.local_epochs < rounds[-1].local_epochs
        if record.relative_change is not None and not shorter:
            loss = mean_loss([record.train_metrics])
            rounds.append(Measured(record.local_epochs, record.relative_change, loss))
    return rounds


def replay(rule: EpochRule, rounds: Sequence[Measured]) -> tuple[Stage, ...]:
    """Return the T that a rule gives for the rounds of a run."""
    stages: list[Stage] = []
    seen = Observations(rule.initial)
    while not stages or stages[-1].end == "grows":
        stage, seen = _stage(rule, seen, rounds)
        stages.append(stage)
    return tuple(stages)


def _stage(
    rule: EpochRule, seen: Observations, rounds: Sequence[Measured]
) -> tuple[Stage, Observations]:
    """Return the rounds at the T of `seen`, and what is seen at the beginning of the next one."""
    epochs = seen.local_epochs
    here = [each for each in rounds if each.local_epochs == epochs]
    for count, each in enumerate(here, 1):
        seen = seen.after(each.change, each.loss)
        then = seen.then(rule.next(seen))
        if then.local_epochs != epochs:
            return Stage(epochs, count, "grows"), then
    if not here:
        return Stage(epochs, 0, "unknown"), seen
    return Stage(epochs, len(here), "stays" if is_level(seen.changes) else "open"), seen


def _levels(rounds: Sequence[Measured]) -> tuple[Level, ...]:
    levels = []
    for epochs in sorted({each.local_epochs for each in rounds}):
        changes = [
            each.change
            for each in rounds
            if each.local_epochs == epochs and math.isfinite(each.change)
        ]
        if changes:
            last = changes[-LAST:]
            mean = sum(last) / len(last)
            levels.append(Level(epochs, len(changes), changes[0], mean, is_level(changes)))
    return tuple(levels)


def _paths(rounds: Sequence[Measured]) -> tuple[Path, ...]:
    """Return the paths of eq. 4, one for each range of epsilon in which they are the same."""
    # The path changes only where epsilon passes a relative change of the run.
    bounds = sorted({0.0, *(each.change for each in rounds if math.isfinite(each.change))})
    paths: list[Path] = []
    for least in bounds:
        stages = replay(IncreasingEpochs(rounds[0].local_epochs, least), rounds)
        if not paths or paths[-1].stages != stages:
            paths.append(Path(least, None, stages))
    ends = [path.least for path in paths[1:]]
    return tuple(
        Path(path.least, below, path.stages)
        for path, below in zip(paths, [*ends, None], strict=True)
    )


def _range(path: Path) -> str:
    if path.below is None:
        return f"{path.least:.4g} or more"
    return f"{path.least:.4g} to below {path.below:.4g}"


def _spelled(stages: Iterable[Stage]) -> str:
    return ", ".join(map(str, stages))


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table with aligned columns."""
    cells = [header, *body]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
