import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_colearn import ColearnError
from flwr_colearn.dynamic import (
    Absolute,
    Continuous,
    Dynamic,
    FractionAveraging,
    Never,
    Periodic,
    Relative,
    Serial,
)
from flwr_colearn.dynamic.balancing import Balance


def balance(reporters=(0,), learners=4, distance=0.0, violations=0, square=1.0):
    return Balance(learners, list(reporters), violations, square, lambda: distance, Random(0))


@pytest.mark.parametrize(
    ("operator", "bounds"),
    [
        (Dynamic(2.5), [2.5] * 3),
        (Dynamic(Absolute(2.5)), [2.5] * 3),
        (Dynamic(Relative(0.25)), [2.0] * 3),
        (Dynamic(math.inf), [math.inf] * 3),
        (Periodic(4), [-1.0] * 3),
        (Continuous(), [-1.0] * 3),
        (FractionAveraging(1.0, 4), [-1.0] * 3),
        (Never(), [math.inf] * 3),
        (Serial(), [math.inf] * 3),
    ],
)
def test_bounds(operator, bounds):
    assert operator.bounds(3, 8.0, Random(0)) == bounds


@given(st.integers(1, 50), st.floats(0.01, 1.0), st.integers(0, 9))
def test_a_fraction_of_the_learners_is_chosen(m, fraction, seed):
    bounds = FractionAveraging(fraction, 1).bounds(m, 1.0, Random(seed))
    chosen = [b for b in bounds if b < 0]
    assert len(bounds) == m
    assert 1 <= len(chosen) <= m
    assert abs(len(chosen) - fraction * m) <= max(0.5, 1 - fraction * m)


def test_every_learner_is_chosen_some_time():
    random = Random(0)
    operator = FractionAveraging(0.3, 1)
    chosen = {i for _ in range(100) for i, b in enumerate(operator.bounds(10, 1, random)) if b < 0}
    assert chosen == set(range(10))


@pytest.mark.parametrize("operator", [Periodic(1), FractionAveraging(0.5, 1), Never(), Serial()])
def test_only_dynamic_averaging_asks_for_more(operator):
    assert list(operator.further(balance(distance=99.0))) == []


def test_dynamic_averaging_compares_the_mean_with_its_threshold():
    operator = Dynamic(Relative(0.5))
    assert list(operator.further(balance(distance=1.9, square=4.0))) == []
    assert sum(map(len, operator.further(balance(distance=2.1, square=4.0)))) == 3


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Dynamic(-1.0), "threshold: expected .* at least 0.0, found -1.0"),
        (lambda: Dynamic(math.nan), "threshold: expected a finite number, found nan"),
        (lambda: Dynamic("1"), "threshold: expected a number, .*, found '1'"),
        (lambda: Dynamic(1.0, check_every=0), "check_every: expected .* at least 1, found 0"),
        (lambda: Relative(-0.1), "fraction of Relative: expected .* at least 0.0, found -0.1"),
        (lambda: Relative(math.inf), "fraction of Relative: expected a finite .* found inf"),
        (lambda: Periodic(0), "check_every: expected .* at least 1, found 0"),
        (lambda: Periodic(1.5), "check_every: expected a whole number .* found 1.5"),
        (lambda: FractionAveraging(0.0, 1), "fraction: expected a number above 0, found 0.0"),
        (lambda: FractionAveraging(1.1, 1), "fraction: expected .* from 0.0 to 1.0, found 1.1"),
        (lambda: FractionAveraging(0.5, 0), "check_every: expected .* at least 1, found 0"),
        (lambda: Never(0), "check_every: expected .* at least 1, found 0"),
        (lambda: Serial().check_learners(2), "num_learners of Serial: expected 1.* found 2"),
        (lambda: Periodic(1).check_learners(0), "num_learners: expected .* at least 1, found 0"),
    ],
)
def test_arguments_outside_their_range_are_refused(make, match):
    with pytest.raises(ColearnError, match=match):
        make()
