"""Only the participants with the given registered names take part."""

import pytest
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from flwr_colearn import (
    Averaging,
    CoLearn,
    ColearnError,
    DynamicAveraging,
    LocalPlan,
    Quorum,
    Recovery,
    SynchronousSGD,
    Transport,
    run,
)
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


# The strategies' own argument --------------------------------------------------------------------

RULES = {"local_epochs": 1, "learning_rate": 0.1}
MAKERS = {
    "CoLearn": lambda **kwargs: CoLearn(**RULES, **kwargs),
    "Averaging": lambda **kwargs: Averaging(**kwargs),
    "SynchronousSGD": lambda **kwargs: SynchronousSGD(learning_rate=0.1, **kwargs),
}
PLAN = ConfigRecord(LocalPlan(1, 1, 0.1).to_config())


@pytest.mark.parametrize("kind", MAKERS)
def test_a_strategy_has_as_many_participants_as_names(kind, grid):
    strategy = MAKERS[kind](participants=["utrecht", "leiden", "delft"])
    assert strategy.num_participants == strategy.min_available_nodes == 3
    strategy.start(grid, record_of(MODEL), num_rounds=2, train_config=PLAN)
    assert asked(grid) == {1, 3, 4}
    assert strategy.history.records[0].participants == ["delft", "leiden", "utrecht"]


def test_another_number_is_refused():
    for kind, make in MAKERS.items():
        with pytest.raises(ColearnError, match="num_participants: expected 2, the number of") as e:
            make(num_participants=3, participants=["utrecht", "leiden"])
        assert "found 3" in str(e.value), kind


@pytest.mark.parametrize("kind", MAKERS)
def test_on_a_grid_with_names_their_number_is_k(kind, grid):
    strategy = MAKERS[kind]()
    connected = Transport(participants=["utrecht", "leiden", "delft"]).connect(grid)
    strategy.start(connected, record_of(MODEL), num_rounds=1, train_config=PLAN)
    assert asked(grid) == {1, 3, 4}
    with pytest.raises(ColearnError, match=r"num_participants: expected 3, .* found 2"):
        MAKERS[kind](num_participants=2).start(connected, record_of(MODEL), 1, train_config=PLAN)


def test_a_quorum_counts_the_names(clock):
    grid = FaultyGrid(clock, {(1, 2, attempt): "raises" for attempt in range(9)}, k=4)
    grid.registered.update(NAMES)
    strategy = strategy_of(
        k=None,
        participants=["delft", "utrecht", "leiden"],
        recovery=Recovery(1, policy=Quorum(2)),
    )
    strategy.start(grid, record_of(MODEL), num_rounds=1)
    (record,) = strategy.history
    assert record.participants == ["delft", "leiden"]
    assert [absence["participant"] for absence in record.absences] == ["utrecht"]


def test_under_a_wrapper_the_grid_has_the_names(grid):
    strategy = strategy_of(k=None, participants=["delft", "utrecht"])
    private = DifferentialPrivacyServerSideFixedClipping(strategy, 0.0, 1e6, 2)
    with pytest.raises(ColearnError, match=r"participants under a wrapper.*connect"):
        private.start(grid=grid, initial_arrays=record_of(MODEL), num_rounds=1)
    assert asked(grid) == set()


def test_learners_are_named_too(grid):
    names = ["delft", "utrecht"]
    assert DynamicAveraging(0.1, participants=names).num_learners == 2
    assert DynamicAveraging(0.1, participants=names).transport.participants == names
    with pytest.raises(ColearnError, match="num_learners: expected 2, the number of"):
        DynamicAveraging(0.1, participants=names, num_learners=3)
    with pytest.raises(ColearnError, match="num_learners: expected a whole number"):
        DynamicAveraging(0.1)
    connected = Transport(participants=names).connect(grid)
    with pytest.raises(ColearnError, match="num_learners: expected 2, the number of"):
        DynamicAveraging(0.1, num_learners=3, wait_for_participants=5.0).start(
            connected, record_of(MODEL)
        )
