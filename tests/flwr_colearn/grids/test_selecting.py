"""Only the participants with the given registered names take part."""

import pytest
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg

from flwr_colearn import ColearnError, LocalPlan, Transport, run
from flwr_colearn.grids import SelectingGrid
from flwr_colearn.recovery import wait_for_nodes
from tests.faults import MODEL, FaultyGrid, record_of, strategy_of

NAMES = {1: "delft", 2: "stranger", 3: "utrecht", 4: "leiden"}


@pytest.fixture
def grid(clock):
    grid = FaultyGrid(clock, k=4)
    grid.registered.update(NAMES)
    return grid


def asked(grid):
    return {attempt.node_id for attempt in grid.attempts}


def test_other_nodes_do_not_exist(grid):
    selected = SelectingGrid(grid, ["utrecht", "delft", "absent"])
    assert list(selected.get_node_ids()) == [1, 3]
    assert [node.name for node in selected.get_nodes()] == ["delft", "utrecht"]


def test_the_model_goes_to_the_participants_only(grid):
    transport = Transport(participants=["utrecht", "delft"])
    strategy_of(k=2).start(transport.connect(grid), record_of(MODEL), num_rounds=3)
    assert asked(grid) == {1, 3}


def test_a_strategy_of_flowers_obeys_too(grid):
    run(
        FedAvg(min_train_nodes=2, min_available_nodes=2, min_evaluate_nodes=2),
        grid,
        record_of(MODEL),
        num_rounds=2,
        train_config=ConfigRecord(LocalPlan(1, 1, 0.1).to_config()),
        transport=Transport(participants=["utrecht", "leiden"]),
    )
    assert asked(grid) == {3, 4}


def test_a_stranger_never_takes_the_place_of_a_participant_that_left(clock):
    grid = FaultyGrid(clock, {(2, 0, 0): "leaves"}, k=2)
    grid.registered.update({1: "delft", 2: "utrecht", 77: "stranger", 100: "delft"})

    def leave(node, **kwargs):
        FaultyGrid.leave(grid, node, seconds=60.0, come_back_as=100)
        grid.partitions[100] = 0
        grid.join(77, **{"partition-id": 0})  # it says that it is the one that left

    grid.leave = leave
    transport = Transport(participants=["delft", "utrecht"])
    strategy_of(k=2).start(transport.connect(grid), record_of(MODEL), num_rounds=3)
    assert asked(grid) == {1, 2, 100}


@pytest.mark.parametrize("names", ["delft", [], ["delft", "delft"]])
def test_names_are_a_sequence_of_different_ones(names):
    with pytest.raises(ColearnError, match="participants: expected a sequence of different names"):
        Transport(participants=names)


def test_the_server_says_who_is_missing_and_not_every_second(grid, clock, flower_log):
    connected = Transport(participants=["utrecht", "delft", "absent"]).connect(grid)
    with pytest.raises(ColearnError, match=r"found 2 connected .*\(delft, utrecht\); missing: abs"):
        wait_for_nodes(connected, 3, 600.0)
    lines = [r.getMessage() for r in flower_log.records if "Waiting" in r.getMessage()]
    text = "Waiting for participants: 2 of 3 connected (delft, utrecht); missing: absent"
    assert lines == [text] * len(lines)
    assert 9 <= len(lines) <= 11  # one a minute


def test_a_change_is_logged_at_once(grid, clock, flower_log):
    grid.leave(1, seconds=5.0)
    wait_for_nodes(grid, 4, 600.0)
    lines = [r.getMessage() for r in flower_log.records if "Waiting" in r.getMessage()]
    assert lines == ["Waiting for participants: 3 of 4 connected (stranger, utrecht, leiden)"]
