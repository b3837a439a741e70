import math

import numpy as np
import pytest
from flwr.app import ConfigRecord
from hypothesis import given
from hypothesis import strategies as st

from flwr_colearn import (
    ColearnError,
    ConstantRate,
    CyclicalRate,
    Epoch,
    ExponentialRate,
    LocalPlan,
)

REQUIRED = {"server-round": 3, "local-epochs": 5, "learning-rate": 0.01}

counts = st.integers(1, 10**6)
etas = st.floats(0, 1e3)
decays = st.floats(0, 1, exclude_min=True)
schedules = st.one_of(
    st.fixed_dictionaries(
        {"schedule": st.just("constant")},
        optional={"decay": decays, "total_epochs": counts},
    ),
    st.fixed_dictionaries(
        {"schedule": st.just("cyclical"), "decay": decays}, optional={"total_epochs": counts}
    ),
    st.fixed_dictionaries(
        {"schedule": st.just("exponential"), "decay": decays, "total_epochs": counts}
    ),
)
plans = st.builds(
    lambda round_, local_epochs, eta, done, limit, schedule: LocalPlan(
        round_, local_epochs, eta, epochs_done=done, time_limit=limit, **schedule
    ),
    counts,
    st.integers(1, 50),
    etas,
    st.integers(0, 10**6),
    st.none() | st.floats(0, 1e9),
    schedules,
)


@pytest.mark.parametrize("config_type", [dict, ConfigRecord])
@given(plan=plans)
def test_plan_survives_the_config_of_either_api(config_type, plan):
    assert LocalPlan.from_config(config_type(plan.to_config())) == plan


@given(plan=plans)
def test_config_holds_only_plain_values_that_both_apis_accept(plan):
    assert {type(value) for value in plan.to_config().values()} <= {int, float, str}


def test_config_keys_are_kebab_case():
    plan = LocalPlan(
        2, 5, 0.01, "exponential", 0.25, epochs_done=5, total_epochs=100, time_limit=60.0
    )
    assert plan.to_config() == {
        "server-round": 2,
        "local-epochs": 5,
        "learning-rate": 0.01,
        "learning-rate-schedule": "exponential",
        "learning-rate-decay": 0.25,
        "epochs-done": 5,
        "total-epochs": 100,
        "time-limit": 60.0,
    }


def test_config_leaves_unused_entries_out():
    config = LocalPlan(1, 5, 0.01).to_config()
    assert "learning-rate-decay" not in config
    assert "total-epochs" not in config
    assert "time-limit" not in config


def test_config_of_a_plan_made_of_numpy_numbers_is_sendable():
    plan = LocalPlan(
        np.int64(2),
        np.int32(5),
        np.float32(0.5),
        "exponential",
        decay=np.float32(0.25),
        epochs_done=np.int64(5),
        total_epochs=np.int64(100),
        time_limit=np.float32(60),
    )
    assert {type(value) for value in plan.to_config().values()} == {int, float, str}
    assert LocalPlan.from_config(ConfigRecord(plan.to_config())) == plan


def test_other_entries_of_the_config_are_ignored():
    config = {**LocalPlan(1, 5, 0.01).to_config(), "batch-size": 32, "note": "hello"}
    assert LocalPlan.from_config(config) == LocalPlan(1, 5, 0.01)


def test_config_written_for_fedavg_is_a_plan_of_constant_rate():
    plan = LocalPlan.from_config(REQUIRED)
    assert plan == LocalPlan(3, 5, 0.01)
    assert plan.rate == ConstantRate(0.01)
    assert [epoch.learning_rate for epoch in plan] == [0.01] * 5


@pytest.mark.parametrize("key", list(REQUIRED))
def test_a_missing_key_is_named_with_what_was_found(key):
    config = {name: value for name, value in REQUIRED.items() if name != key}
    with pytest.raises(ColearnError, match=f"expected the key '{key}', found") as error:
        LocalPlan.from_config(ConfigRecord(config))
    for present in config:
        assert present in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("server-round", 0, "a whole number of at least 1"),
        ("server-round", "1", "a whole number of at least 1"),
        ("local-epochs", 0, "a whole number of at least 1"),
        ("local-epochs", 2.0, "a whole number of at least 1"),
        ("local-epochs", True, "a whole number of at least 1"),
        ("learning-rate", -0.1, "a number of at least 0"),
        ("learning-rate", math.nan, "a finite number"),
        ("learning-rate", "fast", "a finite number"),
        ("epochs-done", -1, "a whole number of at least 0"),
        ("total-epochs", 0, "a whole number of at least 1"),
        ("time-limit", -1.0, "a number of at least 0"),
        ("time-limit", math.inf, "a finite number"),
        ("learning-rate-decay", 1.5, "a number in (0, 1]"),
        ("learning-rate-schedule", "cosine", "one of cyclical, exponential, constant"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected_and_found(key, value, wanted):
    with pytest.raises(ColearnError) as error:
        LocalPlan.from_config(ConfigRecord({**REQUIRED, key: value}))
    message = str(error.value)
    assert f"'{key}'" in message
    assert f"expected {wanted}" in message
    assert f"found {value!r}" in message


@pytest.mark.parametrize(
    ("schedule", "given_entries", "missing"),
    [
        ("cyclical", {}, "learning-rate-decay"),
        ("exponential", {"total-epochs": 9}, "learning-rate-decay"),
        ("exponential", {"learning-rate-decay": 0.5}, "total-epochs"),
    ],
)
def test_a_schedule_without_what_it_needs_is_refused(schedule, given_entries, missing):
    config = {**REQUIRED, "learning-rate-schedule": schedule, **given_entries}
    with pytest.raises(ColearnError, match=f"'{missing}'.*expected a .*number.*found None"):
        LocalPlan.from_config(config)


@given(
    eta=etas,
    decay=decays,
    total=st.integers(1, 500),
    local_epochs=st.integers(1, 40),
    done=st.integers(0, 500),
    kind=st.sampled_from(["constant", "cyclical", "exponential"]),
)
def test_iterating_gives_the_rates_of_the_schedule(eta, decay, total, local_epochs, done, kind):
    schedule = {
        "constant": ConstantRate(eta),
        "cyclical": CyclicalRate(eta, decay),
        "exponential": ExponentialRate(eta, decay, total),
    }[kind]
    plan = LocalPlan(1, local_epochs, eta, kind, decay, done, total)
    assert plan.rate == schedule
    assert list(plan) == [
        Epoch(j, schedule.at(j, local_epochs, epochs_done=done)) for j in range(1, local_epochs + 1)
    ]


def test_a_plan_may_be_iterated_twice_and_changed_never():
    plan = LocalPlan(1, 3, 0.01, "cyclical", decay=0.25)
    assert list(plan) == list(plan)
    with pytest.raises(AttributeError):
        plan.local_epochs = 9
