import itertools
from dataclasses import replace

import pytest

from flwr_colearn import (
    Annealed,
    ColearnError,
    CosineRate,
    CyclicalRate,
    ExponentialRate,
    FixedEpochs,
    IncreasingEpochs,
    PlateauEpochs,
)
from simulations.arms import ARMS, arm_named, schedules
from simulations.settings import RunSettings

SETTINGS = RunSettings(
    learning_rate=0.02, decay=0.5, initial_epochs=3, epsilon=0.01, total_epochs=40
)
CLR, ELR = CyclicalRate(0.02, 0.5), ExponentialRate(0.02, 0.5, total_epochs=40)
ILE, FLE = IncreasingEpochs(3, epsilon=0.01), FixedEpochs(3)


@pytest.mark.parametrize(
    ("name", "rate", "epochs", "pooled", "alone"),
    [
        ("clr-ile", CLR, ILE, False, False),
        ("clr-fle", CLR, FLE, False, False),
        ("elr-ile", ELR, ILE, False, False),
        ("elr-fle", ELR, FLE, False, False),
        ("vanilla-elr", ELR, FLE, True, True),
        ("vanilla-clr", CLR, ILE, True, False),
        ("ensemble", ELR, FLE, False, True),
    ],
)
def test_an_arm_is_a_pair_of_a_rate_and_an_epoch_rule(name, rate, epochs, pooled, alone):
    arm = arm_named(name)
    assert schedules(arm, SETTINGS) == {
        "learning_rate": rate,
        "local_epochs": epochs,
        "local_steps": None,
        "total_epochs": 40,
    }
    assert (arm.pooled_data, arm.alone) == (pooled, alone)


def test_these_are_all_the_arms_of_the_study_and_each_has_a_title_of_its_own():
    assert len({arm.title for arm in ARMS.values()}) == len(ARMS) == 7


def test_the_run_config_may_anneal_the_cyclical_arms_only():
    factors = {"cosine": CosineRate(1.0, 40), "exponential": ExponentialRate(1.0, 0.5, 40)}
    for (name, arm), (anneal, factor) in itertools.product(ARMS.items(), factors.items()):
        rate = schedules(arm, replace(SETTINGS, anneal=anneal))["learning_rate"]
        assert rate == (Annealed(CLR, factor) if "clr" in name else ELR)


def test_an_unknown_annealing_is_refused_by_its_key():
    with pytest.raises(ColearnError, match="'anneal': expected '', 'cosine' or 'exponential', f"):
        schedules(ARMS["clr-ile"], replace(SETTINGS, anneal="linear"))


def test_t_can_be_bounded():
    bounded = schedules(ARMS["clr-ile"], RunSettings(epsilon=0.01, max_local_epochs=8))
    assert bounded["local_epochs"] == IncreasingEpochs(1, 0.01, maximum=8)


@pytest.mark.parametrize("name", ["clr-ile", "elr-ile", "vanilla-clr"])
def test_an_automatic_epsilon_is_the_plateau_rule(name):
    auto = replace(SETTINGS, epsilon="auto")
    assert schedules(ARMS[name], auto)["local_epochs"] == PlateauEpochs(3, maximum=16)
    bounded = replace(auto, max_local_epochs=8)
    assert schedules(ARMS[name], bounded)["local_epochs"] == PlateauEpochs(3, maximum=8)
    assert schedules(ARMS["clr-fle"], auto)["local_epochs"] == FLE


def test_a_budget_in_steps():
    assert schedules(ARMS["clr-ile"], replace(SETTINGS, local_steps=9))["local_steps"] == 9


@pytest.mark.parametrize("name", ARMS)
def test_an_exponential_rate_needs_the_planned_total_and_a_cyclical_one_does_not(name):
    arm, settings = ARMS[name], RunSettings(total_epochs=0)
    if arm.cyclical:
        assert schedules(arm, settings)["total_epochs"] is None
    else:
        with pytest.raises(ColearnError, match="'total-epochs': expected the planned local epochs"):
            schedules(arm, settings)


def test_an_unknown_arm_is_refused_with_the_known_ones():
    with pytest.raises(ColearnError, match=r"arm: expected one of clr-ile, .*, found 'fedavg'"):
        arm_named("fedavg")
