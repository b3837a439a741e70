"""Participants that join, leave and pause in the middle of a run: the table of operations.md.

Participant k adds k + 1 to the model and has EXAMPLES[k % 4] examples, so each round's step is a
weighted mean that can be computed by hand.
"""

import math

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg

from flwr_colearn import Averaging, ColearnError, Quorum, Recovery, run
from tests.faults import EXAMPLES, FaultyGrid, K, record_of

INITIAL = {"w": np.zeros(2)}
NEWCOMER = 50  # a node with partition 7


def add(k, plan, arrays):
    return {name: array + (k + 1) for name, array in arrays.items()}


def step(*participants):
    return np.average(
        [k + 1 for k in participants], weights=[EXAMPLES[k % K] for k in participants]
    )


def grid_of(clock, **kwargs):
    return FaultyGrid(clock, train=add, **kwargs)


def names(*participants):
    return [f"partition-{k}" for k in participants]


def averaging(**kwargs):
    return Averaging(K, fraction_evaluate=0.0, **kwargs)


CONFIG = {"local-epochs": 1, "learning-rate": 0.1, "learning-rates": [0.1]}


def start(strategy, grid, rounds, events=None, **kwargs):
    """Run with ``events[i]()`` after round i; return the step of every round."""
    shared = []

    def after(server_round, arrays):
        shared.append(arrays["w"].numpy()[0])
        (events or {}).get(server_round, lambda: None)()

    arguments = (grid, record_of(INITIAL), rounds, 60.0, ConfigRecord(CONFIG))
    if isinstance(strategy, Averaging):
        strategy.start(*arguments, evaluate_fn=after, **kwargs)
    else:
        run(strategy, *arguments, evaluate_fn=after, **kwargs)
    return np.diff(shared)


def test_one_that_joins_is_a_spare_and_changes_nothing(clock):
    grid, strategy = grid_of(clock), averaging()
    join = {1: lambda: grid.join(NEWCOMER, **{"partition-id": 7})}
    np.testing.assert_allclose(start(strategy, grid, 3, join), [step(0, 1, 2, 3)] * 3)
    assert strategy.num_participants == K
    assert NEWCOMER not in {each.node_id for each in grid.attempts}
    for record in strategy.history:
        assert record.participants == names(0, 1, 2, 3)
        assert record.absences == []


def test_a_spare_takes_the_place_of_one_that_left_between_rounds(clock):
    grid, strategy = grid_of(clock), averaging()

    def replace():
        grid.leave(3, seconds=math.inf)
        grid.join(NEWCOMER, **{"partition-id": 7})

    steps = start(strategy, grid, 3, {1: replace})
    np.testing.assert_allclose(steps, [step(0, 1, 2, 3), *[step(0, 1, 3, 7)] * 2])
    assert [record.participants for record in strategy.history][1:] == [names(0, 1, 3, 7)] * 2
    assert all(record.absences == [] for record in strategy.history)


def test_a_pause_within_the_patience_changes_nothing(clock):
    grid, strategy = grid_of(clock, faults={(2, 2, 0): "comes back as another node"}), averaging()
    np.testing.assert_allclose(start(strategy, grid, 3), [step(0, 1, 2, 3)] * 3)
    assert [record.participants for record in strategy.history] == [names(0, 1, 2, 3)] * 3
    assert [len(record.restarts) for record in strategy.history] == [0, 1, 0]


def test_with_a_quorum_the_weights_are_those_of_who_replied(clock):
    grid, strategy = grid_of(clock), averaging(recovery=Recovery(policy=Quorum(2)))

    def wait():
        clock.now += 1000.0

    events = {1: lambda: grid.leave(3, seconds=1000.0), 2: wait}
    steps = start(strategy, grid, 3, events)
    np.testing.assert_allclose(steps, [step(0, 1, 2, 3), step(0, 1, 3), step(0, 1, 2, 3)])
    absences = [[each["participant"] for each in r.absences] for r in strategy.history]
    assert absences == [[], names(2), []]
    assert strategy.num_participants == K


def test_one_that_leaves_for_good_ends_the_run_with_the_last_rounds_model(clock):
    grid, strategy = grid_of(clock, faults={(2, 2, 0): "leaves"}), averaging()
    grid.away = math.inf
    with pytest.raises(ColearnError, match="partition-2: it left and did not come back") as error:
        start(strategy, grid, 3)
    np.testing.assert_allclose(error.value.result.arrays["w"].numpy(), step(0, 1, 2, 3))
    assert [record.participants for record in strategy.history] == [names(0, 1, 2, 3)]


def test_a_resumed_run_goes_on_with_others_and_the_same_k(tmp_path, clock):
    start(averaging(checkpoints=tmp_path), grid_of(clock), 1)
    grid, strategy = grid_of(clock), averaging(checkpoints=tmp_path)
    grid.leave(3, seconds=math.inf)
    grid.join(NEWCOMER, **{"partition-id": 7})
    steps = start(strategy, grid, 3, resume="auto")
    np.testing.assert_allclose(steps, [step(0, 1, 3, 7)])  # of the third round
    assert [r.participants for r in strategy.history] == [
        names(0, 1, 2, 3),
        *[names(0, 1, 3, 7)] * 2,
    ]


def test_another_k_is_another_run(tmp_path, clock):
    start(averaging(checkpoints=tmp_path), grid_of(clock), 1)
    five = Averaging(5, fraction_evaluate=0.0, checkpoints=tmp_path)
    with pytest.raises(ColearnError, match="number of participants"):
        start(five, grid_of(clock, k=5), 2, resume="auto")


def test_a_stock_strategy_samples_of_all_that_are_connected(clock):
    grid = grid_of(clock)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    events = {
        1: lambda: grid.join(NEWCOMER, **{"partition-id": 7}),
        2: lambda: grid.leave(3, seconds=math.inf),
    }
    steps = start(strategy, grid, 3, events)
    np.testing.assert_allclose(steps, [step(0, 1, 2, 3), step(0, 1, 2, 3, 7), step(0, 1, 3, 7)])
