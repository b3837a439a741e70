"""The rules for T: eq. 4 to the letter, the plateau rule by vectors computed by hand."""

import itertools
import json
import math
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_colearn import (
    ColearnError,
    FixedEpochs,
    IncreasingEpochs,
    Observations,
    PlateauEpochs,
)
from flwr_colearn.epoch_rules import as_epoch_rule, is_level

NOT_COUNTS = [0, -1, 2.0, 2.5, math.nan, True, "5", None]


def after(local_epochs, change):
    return Observations(local_epochs, (change,))


def path_of(rule, rounds):
    """Return T of every round of a run with these (relative change, training loss) by round."""
    seen, path = Observations().then(rule.initial), [rule.initial]
    for change, loss in rounds:
        seen = seen.after(change, loss)
        seen = seen.then(rule.next(seen))
        path.append(seen.local_epochs)
    return path


# eq. 4 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (0.011, 5),
        (math.nextafter(0.01, 1), 5),
        (0.01, 10),  # a tie doubles
        (math.nextafter(0.01, 0), 10),
        (0.0, 10),
        (math.inf, 5),
        (math.nan, 5),
    ],
)
def test_epochs_double_at_or_below_epsilon(change, expected):
    assert IncreasingEpochs(5, epsilon=0.01).next(after(5, change)) == expected


def test_equation_4_compares_the_last_round_s_change_only():
    rule = IncreasingEpochs(5, epsilon=0.01)
    assert rule.next(Observations(5, (0.0, 0.0, 0.02))) == 5
    assert (
        rule.next(Observations(5, (9.0, 9.0, 0.01), losses=(7.0, 8.0, 9.0), first_loss=7.0)) == 10
    )
    assert rule.next(Observations(5)) == 5


def test_epochs_grow_from_the_last_round_and_not_from_the_first():
    rule = IncreasingEpochs(5, epsilon=0.01)
    assert [rule.next(after(t, 0.0)) for t in (5, 10, 20)] == [10, 20, 40]


@pytest.mark.parametrize(("maximum", "expected"), [(6, 6), (10, 10), (11, 10), (5, 5)])
def test_epochs_never_grow_beyond_the_maximum(maximum, expected):
    assert IncreasingEpochs(5, epsilon=1, maximum=maximum).next(after(5, 0.5)) == expected
    level = Observations(5, (0.5,) * 6)
    assert PlateauEpochs(5, maximum=maximum).next(level) == expected


def test_factor_may_be_larger_than_two():
    assert IncreasingEpochs(5, epsilon=1, factor=3).next(after(5, 0.5)) == 15


def test_epsilon_zero_grows_only_when_nothing_moved():
    rule = IncreasingEpochs(5, epsilon=0)
    assert (rule.next(after(5, 0.0)), rule.next(after(5, 5e-324))) == (10, 5)


@given(change=st.floats(), epochs=st.integers(1, 100))
def test_fixed_epochs_never_change(change, epochs):
    assert FixedEpochs(3).next(after(epochs, change)) == epochs


# The plateau rule -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Two means of two, tolerance 0.25: the last must not be below 0.75 times the one before.
        ([8.0, 8.0, 6.0, 6.0], 6),  # 6 against 0.75 * 8: a tie doubles
        ([8.0, 8.0, 6.0, 5.9], 3),
        ([8.0, 8.0, 5.9, 6.0], 3),
        ([8.0, 8.0, 6.0, 6.1], 6),
        ([99.0, 0.1, 8.0, 8.0, 6.0, 6.0], 6),  # earlier ones do not count
        ([8.0, 6.0, 6.0], 3),  # too few
        ([1.0, 2.0, 3.0, 4.0], 6),  # a rise is no fall
        ([0.0, 0.0, 0.0, 0.0], 6),
        ([8.0, 8.0, 8.0, math.inf], 3),
        ([8.0, math.inf, 8.0, 8.0], 3),
        ([math.inf, math.inf, math.inf, math.inf], 3),
        ([8.0, 8.0, math.nan, 8.0], 3),
        ([math.nan, 8.0, 8.0, 8.0], 3),
        ([math.nan, 8.0, 8.0, 8.0, 8.0], 6),  # out of both means again
    ],
)
def test_a_plateau_by_hand(changes, expected):
    rule = PlateauEpochs(3, patience=2, tolerance=0.25)
    assert rule.next(Observations(3, tuple(changes))) == expected


def test_the_defaults_are_those_of_the_text():
    assert PlateauEpochs(2) == PlateauEpochs(2, 3, 0.05, 16, 0.05)
    # Means 4 and 3.8 = 0.95 * 4, then just below.
    assert PlateauEpochs(2).next(Observations(2, (5.0, 4.0, 3.0, 3.0, 4.0, 4.5))) == 4
    assert PlateauEpochs(2).next(Observations(2, (5.0, 4.0, 3.0, 3.0, 4.0, 4.3))) == 2


def test_a_run_with_two_plateaus_and_the_maximum():
    """T=2 holds 0.5 from round 3 on, T=4 holds 0.75; 8 is the maximum."""
    at_2 = [1.0, 0.75, 0.5, 0.5, 0.5, 0.5]  # means of two: .875 .5 | .5 .5, after the sixth
    at_4 = [1.0, 0.75, 0.75, 0.75, 0.75]
    at_8 = [0.5] * 9
    rounds = [(change, 1.0 / number) for number, change in enumerate(at_2 + at_4 + at_8, 1)]
    rule = PlateauEpochs(2, patience=2, tolerance=0.05, maximum=8)
    # At 4: .875 .75 after four rounds falls by a seventh; .75 .75 after five is level.
    assert path_of(rule, rounds) == [2] * 6 + [4] * 5 + [8] * 10


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([4.0, 4.0, 4.0, 4.0], 1),
        ([4.0, 3.9, 3.9, 3.01], 1),
        ([4.0, 3.9, 3.9, 3.0], 2),  # by a quarter: enough
        ([4.0, 2.0, 4.0, 4.0], 2),  # it had begun to learn
        ([4.0, 5.0, 6.0, 9.0], 1),  # a rise is no learning
        ([None, None, None, None], 2),  # nobody reports a loss
        ([math.nan, math.inf, 4.0, 3.0], 2),
        ([math.nan, math.nan, math.inf, None], 2),
        ([-4.0, -4.0, -4.0, -4.9], 1),  # a likelihood
        ([-4.0, -4.0, -4.0, -5.0], 2),
        ([0.0, 0.0, 0.0, 0.0], 2),
    ],
)
def test_epochs_wait_until_the_training_loss_has_fallen(losses, expected):
    rule = PlateauEpochs(1, patience=2, learned=0.25)
    assert path_of(rule, [(0.5, loss) for loss in losses])[-1] == expected


def test_the_fall_counts_from_the_run_s_first_round():
    rule = PlateauEpochs(1, patience=1, learned=0.5)
    rounds = [(1.0, 8.0), (1.0, 4.0), (1.0, 4.0), (1.0, 4.0)]
    assert path_of(rule, rounds) == [1, 1, 2, 2, 4]


@given(
    st.lists(
        st.tuples(st.floats(0, 10), st.one_of(st.none(), st.floats(0, 10))), min_size=1, max_size=60
    ),
    st.integers(1, 10),
    st.integers(1, 64),
)
def test_epochs_double_or_stay_and_never_exceed_the_maximum(rounds, patience, maximum):
    rule = PlateauEpochs(1, patience=patience, maximum=maximum)
    path = path_of(rule, rounds)
    for before, now in itertools.pairwise(path):
        assert now in (before, min(2 * before, maximum))
    # A doubling needs two means at its T.
    lengths = [path.count(t) for t in sorted(set(path))[:-1]]
    assert all(length >= 2 * patience for length in lengths)


@given(st.lists(st.floats(0.001, 10), min_size=4, max_size=20), st.floats(0.01, 100))
def test_a_plateau_does_not_depend_on_the_scale(changes, scale):
    before, last = sum(changes[-4:-2]) / 2, sum(changes[-2:]) / 2
    if abs(last - 0.95 * before) > 1e-9:
        assert is_level([scale * c for c in changes], 2) == is_level(changes, 2)


# What rules see ---------------------------------------------------------------------------------


def test_observations_of_a_run():
    seen = Observations().then(2).after(0.5, 3.0).after(0.25, None)
    assert seen == Observations(2, (0.5, 0.25), (3.0,), 3.0)
    grown = seen.after(0.125, 1.0).then(4)
    assert grown == Observations(4, (), (), 3.0, doublings=1)
    assert grown.after(0.1, 2.0).then(8).doublings == 2
    assert grown.after(0.1, 2.0).then(4) == Observations(4, (0.1,), (2.0,), 3.0)
    assert grown.then(2) == Observations(2, (), (), 3.0)


def test_observations_are_bounded():
    seen = Observations(2)
    for number in range(1000):
        seen = seen.after(number, number)
    assert seen.changes == seen.losses == tuple(range(980, 1000))
    assert seen.first_loss == 0


@given(
    st.lists(st.floats(), max_size=20),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=20),
)
def test_observations_survive_json(changes, losses):
    seen = Observations(4, tuple(changes), tuple(losses), 0.1, 2)
    text = json.dumps(seen.to_json(), allow_nan=False)
    restored = Observations.from_json(json.loads(text))
    assert repr(restored) == repr(seen)  # NaN is not equal to itself


# Arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", NOT_COUNTS)
@pytest.mark.parametrize(
    "make", [FixedEpochs, lambda t0: IncreasingEpochs(t0, epsilon=0.1), PlateauEpochs]
)
def test_impossible_initial_epochs_are_refused(make, value):
    with pytest.raises(ColearnError, match="expected a whole number of at least 1") as error:
        make(value)
    assert f"found {value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": -1e-9}, "epsilon.*expected a number of at least 0"),
        ({"epsilon": math.nan}, "epsilon.*expected a finite number, found nan"),
        ({"epsilon": math.inf}, "epsilon.*expected a finite number, found inf"),
        ({"epsilon": "small"}, "epsilon.*found 'small'"),
        ({"epsilon": 0.1, "factor": 1}, "factor.*at least 2, found 1"),
        ({"epsilon": 0.1, "factor": 2.5}, "factor.*at least 2, found 2.5"),
        ({"epsilon": 0.1, "maximum": 4}, "maximum.*at least 5, found 4"),
        ({"epsilon": 0.1, "maximum": 7.5}, "maximum.*at least 5, found 7.5"),
    ],
)
def test_impossible_epoch_rules_are_refused(arguments, message):
    with pytest.raises(ColearnError, match=message):
        IncreasingEpochs(5, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patience": 0}, "patience.*at least 1, found 0"),
        ({"patience": 2.0}, "patience.*at least 1, found 2.0"),
        ({"patience": 11}, "patience.*at most 10.*found 11"),
        ({"tolerance": -0.1}, "tolerance.*from 0.0 to 1.0, found -0.1"),
        ({"tolerance": 1.5}, "tolerance.*from 0.0 to 1.0, found 1.5"),
        ({"tolerance": math.nan}, "tolerance.*finite"),
        ({"learned": -0.1}, "learned.*from 0.0 to 1.0"),
        ({"learned": "much"}, "learned.*found 'much'"),
        ({"maximum": 4}, "maximum.*at least 5, found 4"),
    ],
)
def test_impossible_plateau_rules_are_refused(arguments, message):
    with pytest.raises(ColearnError, match=message):
        PlateauEpochs(5, **arguments)


def test_a_plateau_rule_may_have_no_maximum():
    assert PlateauEpochs(20, maximum=None).next(Observations(20, (0.5,) * 6)) == 40


def test_epsilon_has_no_default_since_the_paper_gives_none():
    with pytest.raises(TypeError, match="epsilon"):
        IncreasingEpochs(5)


@pytest.mark.parametrize(
    "value",
    [IncreasingEpochs(5, 0.01), FixedEpochs(5), PlateauEpochs(5), Observations(5)],
    ids=lambda value: type(value).__name__,
)
def test_values_are_immutable_and_equal_by_content(value):
    with pytest.raises(FrozenInstanceError):
        value.initial = 7
    assert value == replace(value)
    assert hash(value) == hash(replace(value))


def test_a_number_is_shorthand_for_fixed_epochs():
    assert as_epoch_rule(5) == FixedEpochs(5)


@pytest.mark.parametrize("value", ["5", None, True, 5.0, [5], IncreasingEpochs])
def test_what_is_no_epoch_rule_is_refused(value):
    with pytest.raises(ColearnError, match=r"local.epochs.*: expected"):
        as_epoch_rule(value)


def test_a_rule_of_one_s_own_and_one_of_version_0_6():
    class Own:
        initial = 3

        def next(self, seen, more=1):
            return seen.local_epochs + more

    class Old:
        initial = 3

        def next(self, local_epochs, relative_change):
            return local_epochs

    assert as_epoch_rule(Own()).next(Observations(3)) == 4
    with pytest.raises(ColearnError, match=r"Old.next\(seen\), which takes one argument.*0.6"):
        as_epoch_rule(Old())
