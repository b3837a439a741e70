"""What the log says about the rule for T, in runs whose changes and losses are given."""

from logging import INFO, WARNING

import pytest

from flwr_colearn import FixedEpochs, IncreasingEpochs, Observations, PlateauEpochs
from flwr_colearn.strategies.advice import advice


def lines_of(rule, changes, losses=None, level=WARNING):
    """Return what the log says by round."""
    seen, said = Observations().then(rule.initial), {}
    for number, change in enumerate(changes, 1):
        seen = seen.after(change, None if losses is None else losses[number - 1])
        then = seen.then(rule.next(seen))
        lines = [text for at, text in advice(rule, seen, then) if at == level]
        if lines:
            said[number] = lines
        seen = then
    return said


@pytest.mark.parametrize("rule", [FixedEpochs(2), IncreasingEpochs(2, 0.01), PlateauEpochs(2)])
def test_after_three_rounds_the_log_says_what_epsilon_would_do(rule):
    ((number, (text,)),) = lines_of(rule, [0.5, 0.25, 0.125, 0.1, 0.05], level=INFO).items()
    assert number == 3
    assert "at T=2 the first 3 rounds moved the model by 0.5, 0.25, 0.125" in text
    assert "with an epsilon of 0.125 or more T would have grown by now" in text


def test_it_is_said_for_every_t():
    rule = IncreasingEpochs(1, epsilon=0.25)
    said = lines_of(rule, [1.0, 0.5, 0.25, 1.0, 0.75, 0.5], level=INFO)
    assert list(said) == [3, 6]
    assert "at T=2 the first 3 rounds moved the model by 1, 0.75, 0.5" in said[6][0]


def test_an_epsilon_below_the_level_is_said_once():
    rule = IncreasingEpochs(2, epsilon=0.05)
    said = lines_of(rule, [0.5, 0.2] + [0.0625] * 14)
    assert list(said) == [8]  # rounds 3 to 8 are level
    assert "epsilon=0.05 is below the level that T=2 holds (0.0625 to 0.0625" in said[8][0]
    assert "T will not grow" in said[8][0]


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        (IncreasingEpochs(2, epsilon=0.05), [0.5 * 0.9**i for i in range(16)]),  # it falls still
        (IncreasingEpochs(2, epsilon=0.05, maximum=2), [0.0625] * 16),  # it may not grow anyway
        (FixedEpochs(2), [0.0625] * 16),
        (PlateauEpochs(2), [0.5] * 16),
    ],
)
def test_there_is_nothing_to_say(rule, changes):
    losses = [1.0 / number for number in range(1, 17)]
    assert lines_of(rule, changes, losses) == {}


def test_three_doublings_in_a_row_are_said():
    rule = IncreasingEpochs(1, epsilon=0.5)
    said = lines_of(rule, [0.4, 0.4, 0.4, 0.4, 0.4])
    assert list(said) == [3]
    assert "T has grown after each of three rounds in a row, to 8: epsilon=0.5" in said[3][0]
    assert "PlateauEpochs" in said[3][0]
    assert lines_of(rule, [0.4, 0.4, 0.9, 0.4, 0.4]) == {}


def test_a_model_that_has_not_begun_to_learn_is_said():
    rule = IncreasingEpochs(5, epsilon=0.01)
    changes = [0.02, 0.005, 0.02, 0.005]
    said = lines_of(rule, changes, [2.0, 1.98, 1.98, 1.96])
    assert list(said) == [2, 4]
    assert "fallen by 1.0% since the first round (from 2 to 1.98)" in said[2][0]
    assert lines_of(rule, changes, [2.0, 1.5, 1.5, 1.5]) == {}
    assert lines_of(rule, [0.005], [2.0]) == {}  # nothing to compare with
