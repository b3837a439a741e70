"""What the log says about a rule for T: the levels that a run has, and what to do about them."""

from collections.abc import Iterator
from logging import INFO, WARNING

from ..epoch_rules import (
    LEARNED,
    EpochRule,
    IncreasingEpochs,
    Observations,
    PlateauEpochs,
    is_level,
)

FIRST_ROUNDS = 3
"""The number of rounds at a T after which the log says what they show."""

Line = tuple[int, str]
"""A level of the log, and a text."""


def advice(rule: EpochRule, seen: Observations, then: Observations) -> Iterator[Line]:
    """Yield what the log should say about a rule after a round.

    Parameters
    ----------
    rule : EpochRule
        The rule.
    seen : Observations
        What was seen up to the end of the last round, at its T.
    then : Observations
        The same at the beginning of the next round, with the T that the rule chose.
    """
    if len(seen.changes) == FIRST_ROUNDS:
        yield INFO, _calibration(seen)
    if isinstance(rule, IncreasingEpochs):
        yield from _of_equation_4(rule, seen, then)
    elif isinstance(rule, PlateauEpochs):
        yield from _of_plateaus(rule, seen)


def _calibration(seen: Observations) -> str:
    least = min(seen.changes)
    return (
        f"at T={seen.local_epochs} the first {FIRST_ROUNDS} rounds moved the model by "
        f"{_listed(seen.changes)} (relative change). By eq. 4 T grows after a round that moves it "
        f"by at most epsilon: with an epsilon of {least:.4g} or more T would have grown by now, "
        "with a smaller one it grows if the relative change falls to it. `flwr-colearn calibrate` "
        "prints the T that each epsilon gives for the history of a run"
    )


def _of_equation_4(
    rule: IncreasingEpochs, seen: Observations, then: Observations
) -> Iterator[Line]:
    epsilon, changes = rule.epsilon, seen.changes
    if then.local_epochs > seen.local_epochs and _has_not_begun(seen):
        yield (
            WARNING,
            f"T grows although the model may not have begun to learn: {_loss_of(seen)}. Such a "
            "model moves as little as one that has converged. Check the learning rate, or use "
            "PlateauEpochs, which waits for the training loss",
        )
    if then.doublings == 3:
        yield (
            WARNING,
            f"T has grown after each of three rounds in a row, to {then.local_epochs}: epsilon="
            f"{epsilon:g} is above what a round moves this model by ({changes[-1]:.4g}). Lower "
            "epsilon, bound T by `maximum`, or use PlateauEpochs",
        )
    at_most = rule.maximum is not None and seen.local_epochs >= rule.maximum
    if not at_most and _becomes_level(changes, 3, 0.05) and min(changes[-6:]) > epsilon:
        yield (
            WARNING,
            f"epsilon={epsilon:g} is below the level that T={seen.local_epochs} holds "
            f"({min(changes[-6:]):.4g} to {max(changes[-6:]):.4g} in the last six rounds): T will "
            "not grow. If rounds should become longer, raise epsilon above that level, or use "
            "PlateauEpochs",
        )


def _of_plateaus(rule: PlateauEpochs, seen: Observations) -> Iterator[Line]:
    is_first_round = seen.local_epochs == rule.initial and len(seen.changes) == 1
    if is_first_round and seen.first_loss is None and rule.learned > 0.0:
        yield (
            WARNING,
            "no participant reports the metric train-loss with its trained model, so "
            "PlateauEpochs does not wait until the training loss has fallen. Reply with it, so "
            "that a model which has not begun to learn does not get longer rounds",
        )
    if _becomes_level(seen.changes, rule.patience, rule.tolerance) and not rule.has_learned(seen):
        yield (
            WARNING,
            f"the relative change at T={seen.local_epochs} is level, but {_loss_of(seen)}, and "
            f"PlateauEpochs waits for {rule.learned:.0%}: T stays. Check the learning rate, or "
            "lower `learned`",
        )


def _has_not_begun(seen: Observations) -> bool:
    # After the run's first round there is nothing to compare its loss with.
    if seen.learned is None or seen.losses == (seen.first_loss,):
        return False
    return seen.learned < LEARNED


def _loss_of(seen: Observations) -> str:
    return (
        f"the training loss has fallen by {seen.learned or 0.0:.1%} since the first round (from "
        f"{seen.first_loss:.4g} to {min(seen.losses):.4g})"
    )


def _becomes_level(changes: tuple[float, ...], patience: int, tolerance: float) -> bool:
    """Return whether the changes are level, and were not before: so that it is said once at a T."""
    return is_level(changes, patience, tolerance) and not any(
        is_level(changes[:count], patience, tolerance) for count in range(len(changes))
    )


def _listed(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{number:.4g}" for number in numbers)
