"""Plans that ask for steps in place of local epochs."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_colearn import (
    ColearnError,
    ConstantRate,
    CosineRate,
    CyclicalRate,
    ExponentialRate,
    LocalPlan,
)
from flwr_colearn.schedules import rate_before


def plan_of(schedule, local_epochs, steps, done=0, round=1):
    return LocalPlan.of(schedule, round, local_epochs, done, local_steps=steps)


@pytest.mark.parametrize(
    ("steps", "batches", "expected"),
    [
        (100, 40, [None, None, 20]),
        (80, 40, [None, None]),
        (40, 40, [None]),
        (7, 40, [7]),
        (1, 1, [None]),
        (5, 1, [None] * 5),
    ],
)
def test_the_passes_have_the_steps_and_the_last_may_be_shorter(steps, batches, expected):
    epochs = list(plan_of(CyclicalRate(0.1), 2, steps).over(batches))
    assert [epoch.steps for epoch in epochs] == expected
    assert [epoch.index for epoch in epochs] == list(range(1, len(expected) + 1))


@given(st.integers(1, 500), st.integers(1, 100), st.integers(1, 16))
def test_every_participant_trains_the_same_steps(steps, batches, local_epochs):
    passes = list(plan_of(CyclicalRate(0.1), local_epochs, steps).over(batches))
    assert sum(len(range(batches)[: epoch.steps]) for epoch in passes) == steps
    assert len(passes) == -(-steps // batches)


@given(st.integers(1, 60), st.integers(1, 10), st.integers(1, 16), st.floats(0.01, 1.0))
def test_the_rates_are_eq_3_with_the_participants_own_t(steps, batches, local_epochs, decay):
    plan = plan_of(CyclicalRate(0.2, decay), local_epochs, steps).over(batches)
    expected = [0.2 * decay ** (j / plan.local_epochs) for j in range(1, plan.local_epochs + 1)]
    assert [epoch.learning_rate for epoch in plan] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("local_epochs", [1, 2, 5])
@pytest.mark.parametrize("done", [0, 10])
def test_a_rate_without_restarts_goes_on_from_the_round_before(local_epochs, done):
    schedule = ExponentialRate(0.2, 0.25, total_epochs=40)
    plan = plan_of(schedule, local_epochs, 4, done, round=3).over(1)
    expected = [
        0.2 * 0.25 ** ((done + local_epochs * share) / 40) for share in (0.25, 0.5, 0.75, 1.0)
    ]
    assert [epoch.learning_rate for epoch in plan] == pytest.approx(expected)
    assert rate_before(schedule, local_epochs, 2, done) == pytest.approx(0.2 * 0.25 ** (done / 40))


@pytest.mark.parametrize(
    "schedule", [ConstantRate(0.1), CyclicalRate(0.1), ExponentialRate(0.1, 0.25, 8)]
)
def test_a_site_whose_epoch_has_the_steps_of_the_plan_s_has_the_server_s_rates(schedule):
    plain = LocalPlan.of(schedule, 2, 4, 2)
    stepped = plan_of(schedule, 4, 4 * 25, 2, round=2).over(25)
    assert stepped.learning_rates == plain.learning_rates
    assert list(stepped) == list(plain)


def test_rates_of_zero_have_no_geometric_mean():
    schedule = CosineRate(0.1, total_epochs=2)
    plan = plan_of(schedule, 2, 8).over(1)
    assert plan.learning_rates[-1] == schedule.at(2, 2)
    assert plan_of(ConstantRate(0.0), 1, 3).over(1).learning_rates == (0.0, 0.0, 0.0)


def test_the_plan_travels_in_both_configs():
    plan = plan_of(CyclicalRate(0.1), 2, 30)
    assert plan.to_config()["local-steps"] == 30
    assert LocalPlan.from_config(plan.to_config()) == plan
    fit = plan.to_fit_config()
    assert fit["local-steps"] == 30
    assert json.loads(fit["learning-rates"]) == list(plan.learning_rates)
    assert LocalPlan.from_config(fit).over(20) == plan.over(20)
    assert "local-steps" not in LocalPlan.of(CyclicalRate(0.1), 1, 2).to_config()


def test_a_plan_of_epochs_does_not_depend_on_the_batches():
    plan = LocalPlan.of(CyclicalRate(0.1), 1, 3)
    assert plan.over(7) is plan
    assert [list(itertools.islice(range(7), epoch.steps)) for epoch in plan] == [list(range(7))] * 3


def test_a_participant_that_trains_epochs_all_the_same_is_told():
    with pytest.raises(ColearnError, match=r"asks for 30 steps.*plan.over\(len\(batches\)\)"):
        list(plan_of(CyclicalRate(0.1), 2, 30))
    with pytest.raises(ColearnError, match="asks for 30 steps"):
        next(plan_of(CyclicalRate(0.1), 2, 30).resumable(None, dict, dict))


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "5"])
def test_impossible_steps_are_refused(value):
    with pytest.raises(ColearnError, match="'local-steps' in the train config"):
        LocalPlan(1, 1, 0.1, local_steps=value)
    with pytest.raises(ColearnError, match="mini-batches of a pass"):
        LocalPlan(1, 1, 0.1, local_steps=5).over(value)
