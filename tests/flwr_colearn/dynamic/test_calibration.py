"""Calibrated thresholds: Delta from the distances of the first full synchronisations."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_colearn import Calibrated, ColearnError, DynamicAveraging, ModelAveraging, Relative
from flwr_colearn.dynamic import Absolute, Dynamic, FractionAveraging, Never, Periodic
from flwr_colearn.policy import Quorum, Recovery
from tests.flwr_colearn.dynamic.test_strategy import (
    CrashError,
    Crashing,
    M,
    batch,
    client_app,
    failing,
    final,
    grid_of,
    models,
    run,
    sgd,
    zeros,
)

# The threshold by itself ------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9), st.floats(0, 10), st.integers(1, 9))
def test_delta_is_a_multiple_of_the_mean_of_the_first_checks(measured, factor, checks):
    after = Calibrated(factor, checks).after(measured)
    if len(measured) < checks:
        assert after is None
    else:
        assert after.value == pytest.approx(factor * np.mean(measured[:checks]))


def test_auto_is_the_default_calibration():
    assert Dynamic("auto").threshold == Calibrated() == Calibrated(factor=4.0, checks=5)
    assert Dynamic("auto", 8).calibration_checks == 5
    strategy = DynamicAveraging("auto", num_learners=2)
    assert strategy.operator == Dynamic(Calibrated())


@pytest.mark.parametrize("operator", [Dynamic(1.0), Dynamic(Relative(0.1)), Periodic(2), Never()])
def test_other_operators_measure_nothing(operator):
    assert operator.calibration_checks == 0
    assert operator.calibrated([]) is operator


def test_the_operator_is_periodic_until_delta_is_known():
    operator = Dynamic(Calibrated(2.0, checks=2), 8)
    assert operator.calibrated([]) == operator.calibrated([3.0]) == Periodic(8)
    assert operator.calibrated([3.0, 5.0]) == Dynamic(Absolute(8.0), 8)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Calibrated(-1.0), "factor of Calibrated: expected .* at least 0.0, found -1.0"),
        (lambda: Calibrated(math.inf), "factor of Calibrated: expected a finite .* found inf"),
        (lambda: Calibrated("4"), "factor of Calibrated: expected a finite .* found '4'"),
        (lambda: Calibrated(1.0, 0), "checks of Calibrated: expected .* at least 1, found 0"),
        (lambda: Calibrated(1.0, 2.5), "checks of Calibrated: expected a whole .* found 2.5"),
        (lambda: Dynamic("Auto"), "threshold: expected a number, .* or \"auto\", found 'Auto'"),
    ],
)
def test_arguments_outside_their_range_are_refused(make, match):
    with pytest.raises(ColearnError, match=match):
        make()


# A run ------------------------------------------------------------------------------------------


def distances_by_hand(checks, b):
    """The mean |f_i - r|^2 of periodic averaging, in plain numpy."""
    r, measured = np.zeros(3, np.float32), []
    for t in range(checks):
        f = []
        for k in range(M):
            w = r
            for index in range(t * b, t * b + b):
                w, _ = sgd(w, *batch(k, index))
            f.append(w)
        measured.append(np.mean([np.sum((w.astype(float) - r) ** 2) for w in f]))
        r = np.mean(f, axis=0, dtype=np.float64).astype(np.float32)
    return measured


@pytest.mark.parametrize(("factor", "checks", "b"), [(1.0, 3, 1), (4.0, 5, 2), (0.5, 1, 3)])
def test_delta_is_that_computed_by_hand(factor, checks, b, flower_log):
    strategy, _, _ = run(Dynamic(Calibrated(factor, checks), b), checks + 6)
    records = strategy.history.records
    assert [entry.synchronised for entry in records[:checks]] == ["full"] * checks
    assert [entry.delta for entry in records[:checks]] == [-1.0] * checks
    delta = factor * np.mean(distances_by_hand(checks, b))
    for entry in records[checks:]:
        assert entry.delta == pytest.approx(delta, rel=1e-5)
        assert bool(entry.reporters) == (entry.largest_distance > entry.delta)
    assert f"calibrated in {checks} checks: Dynamic(threshold=Absolute" in flower_log.text


@pytest.mark.parametrize(("threshold", "measured"), [(Calibrated(2.0, 3), 3), (0.3, 0)])
def test_no_more_is_measured_than_the_checks(threshold, measured, flower_log):
    strategy, seen = DynamicAveraging(threshold, num_learners=M), []

    def look(server_round, arrays):
        seen.append(len(strategy.strategy_state()[0].get("measured", ())))

    strategy.start(grid_of(), zeros(), num_rounds=5, evaluate_fn=look)
    assert seen == [min(round_, measured) for round_ in range(6)]
    assert flower_log.text.count("calibrated in") == bool(measured)


def test_after_the_calibration_the_run_is_that_of_a_fixed_delta():
    """Periodic averaging for five checks, and then dynamic averaging from the model it reached."""
    strategy, _, grid = run(Dynamic(Calibrated(1.0, 5)), 5)
    periodic, _, other = run(Periodic(1), 5)
    assert final(grid) == final(other)
    assert [e.moved for e in strategy.history] == [e.moved for e in periodic.history]
    assert [e.loss for e in strategy.history] == [e.loss for e in periodic.history]


def test_learners_that_do_not_move_have_a_delta_of_zero_and_send_nothing():
    still = grid_of(step=lambda k, t, arrays: {"w": np.zeros(3, np.float32)})
    strategy, _, _ = run(Dynamic(Calibrated(4.0, 2)), 6, grid=still)
    assert [entry.delta for entry in strategy.history] == [-1, -1, 0, 0, 0, 0]
    assert [entry.synchronised for entry in strategy.history][2:] == ["none"] * 4


def test_an_absent_learner_does_not_count_in_a_measurement():
    recovery = Recovery(max_restarts=0, pause=0.0, patience=0.0, policy=Quorum(3))
    grid = grid_of(step=failing(1, server_round=1))
    strategy, _, _ = run(Dynamic(Calibrated(2.0, 1)), 2, grid=grid, recovery=recovery)
    moved = [sgd(np.zeros(3, np.float32), *batch(k, 0))[0] for k in (0, 2, 3)]
    mean = np.mean([np.sum(w.astype(float) ** 2) for w in moved])
    assert strategy.history.records[1].delta == pytest.approx(2.0 * mean, rel=1e-5)


# Golden trace and checkpoints -------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden" / "calibrated.json"
FIELDS = ("round", "delta", "reporters", "fetched", "groups", "synchronised", "violations")


def golden_trace():
    """Every round of one fixed run; golden/regenerate_dynamic.py writes it anew."""
    strategy, _, _ = run(Dynamic("auto", 2), 30, m=6)
    return [{name: getattr(entry, name) for name in FIELDS} for entry in strategy.history]


def test_the_run_is_what_it_was():
    golden, trace = json.loads(GOLDEN.read_text()), golden_trace()
    for row, wanted in zip(trace, golden, strict=True):
        assert row.pop("delta") == pytest.approx(wanted.pop("delta"), rel=1e-6)
        assert row == wanted


def test_the_golden_run_has_every_kind_of_round():
    kinds = [row["synchronised"] for row in json.loads(GOLDEN.read_text())]
    assert kinds[:5] == ["full"] * 5
    assert set(kinds[5:]) == {"none", "partial", "full"}


def calibrating(folder=None):
    return DynamicAveraging(Calibrated(2.0, 4), num_learners=M, checkpoints=folder)


@pytest.mark.parametrize("after", range(1, 61, 4))
def test_a_run_that_was_killed_at_any_message_has_the_same_delta(tmp_path, after):
    clean, grid = calibrating(), grid_of()
    clean.start(grid, zeros(), num_rounds=8)
    crashing = Crashing(client_app(), M)
    crashing.after = after
    with pytest.raises(CrashError):
        calibrating(tmp_path).start(crashing, zeros(), num_rounds=8)
    crashing.after = math.inf
    resumed = calibrating(tmp_path)
    resumed.start(crashing, zeros(), num_rounds=8, resume="auto")
    assert final(crashing) == final(grid)
    deltas = [entry.delta for entry in clean.history]
    assert [entry.delta for entry in resumed.history] == deltas[-len(resumed.history) :]


def test_another_calibration_is_not_resumed(tmp_path):
    calibrating(tmp_path).start(grid_of(), zeros(), 2)
    other = DynamicAveraging(Calibrated(3.0, 4), num_learners=M, checkpoints=tmp_path)
    with pytest.raises(ColearnError, match="found another operator"):
        other.start(grid_of(), zeros(), 3, resume="auto")


def test_a_second_run_of_a_strategy_measures_anew():
    strategy = calibrating()
    first, second = grid_of(), grid_of()
    strategy.start(first, zeros(), 6)
    deltas = [entry.delta for entry in strategy.history]
    strategy.start(second, zeros(), 6)
    assert [entry.delta for entry in strategy.history] == deltas
    assert deltas[:5] == [-1.0] * 4 + [deltas[4]]


# Reproducible by default ------------------------------------------------------------------------


def test_two_runs_choose_the_same_learners():
    def trace():
        strategy = DynamicAveraging(0.3, num_learners=7)
        grid = grid_of(7)
        strategy.start(grid, zeros(), 20)
        fetched = [tuple(entry.fetched) for entry in strategy.history]
        return fetched, [model["w"].tobytes() for model in models(grid)]

    first = trace()
    assert first == trace()
    assert any(first[0])


def test_two_fractions_are_the_same_random_choice():
    def chosen():
        strategy = ModelAveraging(FractionAveraging(0.5, 1), 8)
        strategy.start(grid_of(8), zeros(), 6)
        return [entry.reporters for entry in strategy.history]

    first = chosen()
    assert first == chosen()
    assert len({tuple(sorted(each)) for each in first}) > 1


def test_without_a_seed_every_run_chooses_differently():
    def orders():
        strategy = DynamicAveraging(0.3, num_learners=9, seed=None)
        strategy.start(grid_of(9), zeros(), 15)
        return [entry.fetched for entry in strategy.history]

    assert any(a != b for a, b in itertools.combinations([orders() for _ in range(3)], 2))
