"""The protocol by itself: what must hold for any models, learners and thresholds."""

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flwr_colearn import ColearnError, RunningMean
from flwr_colearn.aggregation import squared_distance, squared_norm
from flwr_colearn.dynamic.balancing import Balance, augment
from tests.flwr_colearn.dynamic.divergence import divergence

numbers = st.floats(-100, 100, width=32)
deltas = st.sampled_from([0.0, 0.5, 4.0, 100.0, 1e4])


@st.composite
def situations(draw):
    """Models of m learners, a reference, a threshold, the violations so far, a seed."""
    m = draw(st.integers(1, 12))
    shape = (m, draw(st.integers(1, 4)))
    models = draw(arrays(np.float64, shape, elements=numbers))
    reference = draw(arrays(np.float64, shape[1], elements=numbers))
    return models, reference, draw(deltas), draw(st.integers(0, m - 1)), draw(st.integers(0, 99))


def named(array):
    return {"w": np.asarray(array)}


def synchronise(models, reference, delta, violations, seed):
    """Play one opportunity; return B, the groups asked for, the models, r and v afterwards."""
    m = len(models)
    members = [i for i in range(m) if np.sum((models[i] - reference) ** 2) > delta]
    reporters = list(members)
    balance = Balance(
        learners=m,
        reporters=reporters,
        violations=violations,
        reference_square=float(reference @ reference),
        distance=lambda: float(np.sum((models[members].mean(0) - reference) ** 2)),
        random=Random(seed),
    )
    groups = []
    for group in augment(balance, delta):
        groups.append(group)
        members += group
    after = models.copy()
    if members:
        after[members] = models[members].mean(0)
        if len(members) == m:
            reference = after[0]
    return members, groups, after, reference, balance.violations


# The sphere around the reference


@given(situations())
def test_models_within_the_sphere_have_a_divergence_within_delta(situation):
    models, reference, delta, _, _ = situation
    inside = [f for f in models if np.sum((f - reference) ** 2) <= delta]
    if inside:
        assert divergence([named(f) for f in inside]) <= delta * (1 + 1e-9) + 1e-9


@given(situations())
def test_after_balancing_every_model_is_within_the_sphere(situation):
    _, _, delta, _, _ = situation
    _, _, after, reference, _ = synchronise(*situation)
    for f in after:
        assert np.sum((f - reference) ** 2) <= delta * (1 + 1e-9) + 1e-9


@given(situations())
def test_balancing_leaves_the_mean_of_all_models_unchanged(situation):
    models = situation[0]
    _, _, after, _, _ = synchronise(*situation)
    np.testing.assert_allclose(after.mean(0), models.mean(0), rtol=1e-9, atol=1e-9)


@given(st.data())
def test_a_weighted_partial_average_leaves_the_weighted_mean_unchanged(data):
    m = data.draw(st.integers(2, 8))
    models = data.draw(arrays(np.float64, (m, 3), elements=numbers))
    weights = np.array(data.draw(st.lists(st.integers(1, 20), min_size=m, max_size=m)))
    members = data.draw(st.lists(st.integers(0, m - 1), min_size=1, unique=True))
    mean = RunningMean(like=named(models[0]))
    for i in members:
        mean.add(named(models[i]), float(weights[i]))
    after = models.copy()
    after[members] = mean.mean()["w"]
    np.testing.assert_allclose(weights @ after, weights @ models, rtol=1e-9, atol=1e-6)


# Whom balancing asks


@given(situations())
def test_groups_double_and_ask_nobody_twice(situation):
    members, groups, _, _, _ = synchronise(*situation)
    assert len(set(members)) == len(members)
    models, _, _, violations, _ = situation
    reporters = len(members) - sum(map(len, groups))
    if violations + reporters >= len(models):
        assert len(groups) <= 1
    else:
        left = len(models) - reporters
        for index, group in enumerate(groups):
            assert len(group) == min(2**index, left)
            left -= len(group)


@given(situations())
def test_nobody_is_asked_without_need(situation):
    models, reference, delta, violations, _ = situation
    members, groups, _, _, _ = synchronise(*situation)
    reporters = members[: len(members) - sum(map(len, groups))]
    if violations + len(reporters) < len(models) and reporters:
        for done in range(len(groups)):  # before each group was asked, the mean lay outside
            b = reporters + [i for group in groups[:done] for i in group]
            assert np.sum((models[b].mean(0) - reference) ** 2) > delta


@given(situations())
def test_violations_add_up_and_start_anew_with_everybody(situation):
    models, _, _, before, _ = situation
    members, groups, _, _, after = synchronise(*situation)
    reporters = len(members) - sum(map(len, groups))
    if len(members) == len(models):
        assert after == 0
    else:
        assert after == before + reporters < len(models)


@given(situations())
def test_without_delta_everybody_who_moved_is_averaged(situation):
    """Delta -> 0 is periodic averaging, but for learners that stand on the reference."""
    models, reference, _, violations, seed = situation
    members, *_ = synchronise(models, reference, 0.0, violations, seed)
    moved = {i for i in range(len(models)) if np.any(models[i] != reference)}
    assert moved <= set(members)


@given(situations())
def test_with_infinite_delta_nobody_is_ever_asked(situation):
    models, reference, _, violations, seed = situation
    members, groups, after, _, v = synchronise(models, reference, np.inf, violations, seed)
    assert (members, groups, v) == ([], [], violations)
    np.testing.assert_array_equal(after, models)


def test_groups_of_a_hand_made_case():
    """Nine learners, one far away: 1, 2 and 4 others are asked before the mean is near enough."""
    models = np.zeros((9, 1))
    models[3] = 8.0  # the mean with n others is 8 / (n + 1); delta 1 needs n >= 7
    members, groups, after, reference, violations = synchronise(models, np.zeros(1), 1.0, 0, 0)
    assert [len(group) for group in groups] == [1, 2, 4]
    assert members[0] == 3
    assert sorted(after[:, 0]) == [0.0] + [1.0] * 8
    assert (reference[0], violations) == (0.0, 1)


def test_at_m_violations_everybody_is_asked_at_once():
    models = np.zeros((4, 1))
    models[1] = 1.1
    members, groups, _, reference, violations = synchronise(models, np.zeros(1), 1.0, 3, 0)
    assert groups[0] != []
    assert sorted(members) == [0, 1, 2, 3]
    assert len(groups) == 1
    assert reference[0] == pytest.approx(1.1 / 4)
    assert violations == 0


def test_the_others_are_drawn_at_random():
    models = np.zeros((20, 1))
    models[0] = 1.5
    first = [synchronise(models, np.zeros(1), 1.0, 0, seed)[1][0][0] for seed in range(30)]
    assert len(set(first)) > 5


# Distances


@given(arrays(np.float32, 5, elements=numbers), arrays(np.float32, 5, elements=numbers))
def test_the_squared_distance_is_numpys(a, b):
    wanted = np.linalg.norm(a.astype(np.float64) - b.astype(np.float64)) ** 2
    split = squared_distance({"x": a[:2], "y": a[2:]}, {"x": b[:2], "y": b[2:]})
    assert split == pytest.approx(wanted, rel=1e-12)
    assert squared_norm({"x": a[:2], "y": a[2:]}) == pytest.approx(
        np.linalg.norm(a.astype(np.float64)) ** 2, rel=1e-12
    )


def test_the_distance_of_large_float32_numbers_does_not_overflow():
    assert squared_distance(
        named(np.array([3e38], np.float32)), named(np.array([-3e38], np.float32))
    ) == pytest.approx(3.6e77, rel=1e-6)


def test_models_of_other_shapes_have_no_distance():
    with pytest.raises(ColearnError, match="found 'w'"):
        squared_distance(named(np.zeros(2)), named(np.zeros(3)))
