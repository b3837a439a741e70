import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.settings import ParticipantSettings
from flwr_colearn import ColearnError, Frozen, GroupNorm, Pooled
from flwr_colearn.normalization import SCHEMES

VALUES = {
    str: st.text(max_size=5),
    int: st.integers(0, 10**6),
    float: st.floats(0, 1e6),
    bool: st.booleans(),
}
settings_of_any_values = st.builds(
    ParticipantSettings,
    **{
        field.name: VALUES[type(field.default)] for field in dataclasses.fields(ParticipantSettings)
    },
)


@given(settings_of_any_values)
def test_settings_survive_the_run_config(settings):
    config = settings.to_config()
    assert all("_" not in key for key in config)
    assert ParticipantSettings.from_config(config) == settings


def test_absent_keys_keep_their_default_and_foreign_keys_are_left_alone():
    config = {"batch-size": 8, "num-participants": 5, "user-key": "x"}
    assert ParticipantSettings.from_config(config) == ParticipantSettings(batch_size=8)


def test_a_whole_number_is_a_float_too():
    momentum = ParticipantSettings.from_config({"momentum": 0}).momentum
    assert (momentum, type(momentum)) == (0.0, float)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"batch-size": "32"}, "'batch-size': expected int, found '32'"),
        ({"batch-size": 32.0}, "'batch-size': expected int, found 32.0"),
        ({"batch-size": True}, "'batch-size': expected int, found True"),
        ({"momentum": "0.9"}, "'momentum': expected float, found '0.9'"),
        ({"momentum": True}, "'momentum': expected float, found True"),
        ({"augment": 1}, "'augment': expected bool, found 1"),
        ({"task": 3}, "'task': expected str, found 3"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_key(config, message):
    with pytest.raises(ColearnError, match=message):
        ParticipantSettings.from_config(config)


def test_every_scheme_can_be_named():
    assert ParticipantSettings().scheme == Pooled()
    for name in SCHEMES:
        assert ParticipantSettings(normalization=name).scheme.name == name
    assert ParticipantSettings(normalization="frozen", frozen_after=7).scheme == Frozen(7)
    assert ParticipantSettings(normalization="group-norm", frozen_after=7).scheme == GroupNorm(8)
    with pytest.raises(ColearnError, match="normalization: expected one of average, pooled,"):
        ParticipantSettings.from_config({"normalization": "bn"}).scheme  # noqa: B018
