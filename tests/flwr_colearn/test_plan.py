import math
import re

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
plans = st.integers(1, 50).flatmap(
    lambda local_epochs: st.builds(
        LocalPlan,
        counts,
        st.just(local_epochs),
        etas,
        st.none() | st.lists(etas, min_size=local_epochs, max_size=local_epochs),
        st.integers(0, 10**6),
        st.none() | st.floats(0, 1e9),
    )
)


@given(plan=plans)
def test_plan_survives_the_config_of_either_api(plan):
    assert LocalPlan.from_config(ConfigRecord(plan.to_config())) == plan
    assert LocalPlan.from_config(plan.to_config()) == plan
    assert LocalPlan.from_config(plan.to_fit_config()) == plan
    assert LocalPlan.from_config(ConfigRecord(plan.to_fit_config())) == plan


@given(plan=plans)
def test_config_holds_only_plain_values_that_both_apis_accept(plan):
    assert {type(value) for value in plan.to_config().values()} <= {int, float, list}
    assert {type(rate) for rate in plan.to_config()["learning-rates"]} == {float}
    assert {type(value) for value in plan.to_fit_config().values()} <= {int, float, str}


def test_config_keys_are_kebab_case():
    plan = LocalPlan(2, 3, 0.5, [0.5, 0.25, 0.125], epochs_done=5, time_limit=60.0)
    config = {
        "server-round": 2,
        "local-epochs": 3,
        "learning-rate": 0.5,
        "learning-rates": [0.5, 0.25, 0.125],
        "epochs-done": 5,
        "time-limit": 60.0,
    }
    assert plan.to_config() == config
    assert plan.to_fit_config() == {**config, "learning-rates": "[0.5, 0.25, 0.125]"}


def test_config_leaves_unused_entries_out():
    assert "time-limit" not in LocalPlan(1, 5, 0.01).to_config()


def test_config_of_a_plan_made_of_numpy_numbers_is_sendable():
    plan = LocalPlan(
        np.int64(2),
        np.int32(3),
        np.float32(0.5),
        np.array([0.5, 0.25, 0.125], np.float32),
        epochs_done=np.int64(5),
        time_limit=np.float32(60),
    )
    assert {type(value) for value in plan.to_config().values()} == {int, float, list}
    assert LocalPlan.from_config(ConfigRecord(plan.to_config())) == plan


def test_other_entries_of_the_config_are_ignored():
    config = {**LocalPlan(1, 5, 0.01).to_config(), "batch-size": 32, "note": "hello"}
    assert LocalPlan.from_config(config) == LocalPlan(1, 5, 0.01)


def test_config_written_for_fedavg_is_a_plan_of_constant_rate():
    plan = LocalPlan.from_config(REQUIRED)
    assert plan == LocalPlan(3, 5, 0.01)
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
        ("time-limit", -1.0, "a number of at least 0"),
        ("time-limit", math.inf, "a finite number"),
        ("learning-rates", 0.1, "a list of numbers"),
        ("learning-rates", "fast", "a list of numbers"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected_and_found(key, value, wanted):
    message = f"'{key}'.*expected {wanted}.*found {re.escape(repr(value))}"
    with pytest.raises(ColearnError, match=message):
        LocalPlan.from_config(ConfigRecord({**REQUIRED, key: value}))


@pytest.mark.parametrize(
    ("rates", "wanted"),
    [
        ([0.1] * 4, "one rate for each of the 5 local epochs"),
        ("[0.1, 0.2]", "one rate for each of the 5 local epochs"),
        ([0.1, 0.1, 0.1, 0.1, -0.1], "a number of at least 0.0, found -0.1"),
        ([0.1, 0.1, math.nan, 0.1, 0.1], "a finite number"),
        ("[0.1, 0.1, NaN, 0.1, 0.1]", "a finite number"),
        ('["a", "b", "c", "d", "e"]', "a finite number"),
        ("0.1", "a list of numbers"),
        ("__import__('os')", "a list of numbers"),
    ],
)
def test_rates_that_are_none_are_refused(rates, wanted):
    config = {**REQUIRED, "learning-rates": rates}
    with pytest.raises(ColearnError, match="'learning-rates' in the train config") as error:
        LocalPlan.from_config(config)
    assert wanted in str(error.value)


@given(
    eta=etas,
    decay=st.floats(0, 1, exclude_min=True),
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
    plan = LocalPlan.of(schedule, 1, local_epochs, done)
    assert plan.learning_rate == eta
    assert list(plan) == [
        Epoch(j, schedule.at(j, local_epochs, epochs_done=done)) for j in range(1, local_epochs + 1)
    ]


def test_a_plan_may_be_iterated_twice_and_changed_never():
    plan = LocalPlan.of(CyclicalRate(0.01, 0.25), 1, 3)
    assert list(plan) == list(plan)
    with pytest.raises(AttributeError):
        plan.local_epochs = 9
