import math

import pytest

from simulations.arms import ARMS
from simulations.study.claims import CLAIMS, Finding, claims_table, compare
from simulations.study.training import ArmUnit

BEST, EPOCHS, DOUBLING, ENSEMBLE, VANILLA, INTERVAL = CLAIMS.values()


def unit(arm, score, seed=0, **changes):
    values = {
        "epochs": [1, 2, 4],
        "metrics": {"accuracy": [score / 200, score / 150, score / 100]},
        "headline": "accuracy",
        "doublings": [],
        "rounds": 3,
        "bytes": 0,
        "model_bytes": 0,
        "round_seconds": [10.0, 10.0, 20.0],
        "examples": 0,
        "seconds": 0.0,
        "config": {},
        "data": "",
    }
    return ArmUnit(arm=arm, seed=seed, **{**values, **changes})


def units(**scores):
    """Units by arm, named with underscores, a score for each seed."""
    return [
        unit(arm.replace("_", "-"), score, seed)
        for arm, each in scores.items()
        for seed, score in enumerate(each)
    ]


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([90, 92], [80, 82], "yes"),
        ([80, 82], [90, 92], "no"),
        ([90, 92], [89, 91], "undecided"),  # 1 apart, standard error sqrt(2 / 2 + 2 / 2)
        ([90, 92], [88, 90], "undecided"),  # 2 apart: one standard error, not two
        ([90], [80, 82], "yes, one seed"),
        ([80, 82], [90], "no, one seed"),
        ([80], [80], "no, one seed"),
        ([math.nan, 80], [80, 80], "undecided"),
    ],
)
def test_a_difference_counts_if_it_is_twice_its_standard_error(first, second, verdict):
    assert compare(first, second).verdict == verdict


def test_at_least_as_good_includes_as_good():
    assert VANILLA(units(clr_ile=(90,), vanilla_elr=(90,))).verdict == "yes, one seed"


def test_the_standard_error_by_hand():
    error = math.sqrt(2 / 2 + 8 / 2)
    assert compare([90, 92], [80, 84]) == Finding("yes", f"+9.00 (± {error:.2f})")


@pytest.mark.parametrize(
    ("others", "verdict"),
    [
        ({"clr_fle": (80, 81), "elr_ile": (80, 81), "elr_fle": (80, 81)}, "yes"),
        ({"clr_fle": (80, 81), "elr_ile": (95, 96), "elr_fle": (90, 91)}, "no"),
        ({"clr_fle": (80, 81), "elr_ile": (80, 81), "elr_fle": (90, 91)}, "undecided"),
        ({"clr_fle": (80, 81), "elr_ile": (80,), "elr_fle": (80, 81)}, "yes, one seed"),
        ({"clr_fle": (80, 81), "elr_ile": (99,), "elr_fle": (95, 96)}, "no"),
    ],
)
def test_the_best_of_four_is_ahead_of_all_three(others, verdict):
    finding = BEST(units(clr_ile=(90, 91), **others))
    assert finding.verdict == verdict


def test_ile_and_clr_by_hand():
    four = units(clr_ile=(90, 90), elr_ile=(88, 88), clr_fle=(81, 81), elr_fle=(79, 79))
    assert EPOCHS(four) == Finding("yes", "ILE +9.00, CLR +2.00")
    assert EPOCHS(four[::2]).verdict == "yes, one seed"
    swapped = units(clr_ile=(90,), clr_fle=(88,), elr_ile=(81,), elr_fle=(79,))
    assert EPOCHS(swapped).verdict == "no, one seed"


def test_doublings_are_judged_by_the_round_after_and_the_round_before():
    curve = {"epochs": [1, 2, 4, 6], "doublings": [2]}
    rising = unit("clr-ile", 0, metrics={"accuracy": [0.5, 0.51, 0.56, 0.57]}, **curve)
    evidence = (
        "+5.00 in the round after, of twice the epochs, +1.00 in the round before; doublings: 1"
    )
    assert DOUBLING([rising]) == Finding("yes, one seed", evidence)
    assert DOUBLING([rising, rising]).verdict == "yes"
    falling = unit("clr-ile", 0, metrics={"accuracy": [0.5, 0.55, 0.56, 0.7]}, **curve)
    assert DOUBLING([falling]).verdict == "no, one seed"
    assert DOUBLING(units(clr_ile=(90,))).verdict == "undecided"  # T never doubled
    assert DOUBLING(units(clr_fle=(90,))) is None


@pytest.mark.parametrize(("score", "verdict"), [(81, "yes"), (88, "no"), (99, "no")])
def test_the_ensemble_loses_about_ten_points(score, verdict):
    both = units(vanilla_elr=(91, 91), ensemble=(score, score))
    assert ENSEMBLE(both).verdict == verdict
    assert ENSEMBLE(both[1:]).verdict == f"{verdict}, one seed"


def test_points_of_other_metrics_are_not_points_of_accuracy():
    areas = {"headline": "roc-auc", "metrics": {"roc-auc": [0.9]}, "epochs": [1]}
    assert ENSEMBLE([unit("vanilla-elr", 0, **areas), unit("ensemble", 0, **areas)]) is None


def test_vanilla_with_the_papers_rate_decides_and_the_other_is_shown():
    finding = VANILLA(units(clr_ile=(90, 91), vanilla_elr=(80, 81), vanilla_clr=(95, 96)))
    assert finding.verdict == "yes"
    assert (
        finding.evidence
        == "against vanilla (ELR) +10.00 (± 0.71), vanilla (CLR+ILE) -5.00 (± 0.71)"
    )


def test_intervals_of_twice_the_epochs_are_compared_with_those_before():
    doubled = unit("clr-ile", 90, doublings=[2])
    evidence = "rounds of 2 T0 take 2.00 times as long"
    assert INTERVAL([doubled]) == Finding("yes, one seed", evidence)
    flat = unit("clr-ile", 90, doublings=[2], round_seconds=[10.0, 10.0, 11.0])
    assert INTERVAL([flat, flat]).verdict == "no"
    assert INTERVAL([unit("clr-ile", 90, doublings=[2], round_seconds=[])]).verdict == "undecided"


def test_what_was_not_run_is_said_to_be_and_nothing_else():
    table = claims_table({"digits": units(clr_fle=(90,))}).splitlines()[2:]
    assert len(table) == len(CLAIMS)
    assert all("| not run |" in line for line in table)
    everything = [unit(arm, 90, seed, doublings=[2]) for arm in ARMS for seed in (0, 1)]
    assert "not run" not in claims_table({"digits": everything})
