"""Who a participant is: registered names, reported names, copies, and names that are none."""

import logging
from collections import Counter

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from flwr_colearn import ColearnError, Quorum, RecoveringGrid, Recovery
from flwr_colearn.recovery.identity import Directory, checked_name
from tests.faults import MODEL, FaultyGrid, K, record_of, strategy_of

SITES = ["site-a", "site-b", "site-c", "site-d"]


def trained(grid):
    return Counter(attempt.node_id for attempt in grid.attempts)


def run(grid, policy="fail", rounds=1, **kwargs):
    strategy = strategy_of(recovery=Recovery(1, policy=policy), fraction_evaluate=0.0, **kwargs)
    strategy.start(grid, record_of(MODEL), num_rounds=rounds, timeout=60.0)
    return strategy.history.records


class EchoingGrid(FaultyGrid):
    """A grid on which the participants of some nodes report what ``says(round, node)`` returns."""

    def __init__(self, clock, says, **kwargs):
        self.says = says
        super().__init__(clock, **kwargs)

    def _call(self, message):
        reply = super()._call(message)
        if reply.has_content() and "colearn" in reply.content:
            config = message.content.get("config", {})
            round_ = config.get("server-round", 0)  # 0: the query for the name
            name = self.says(round_, message.metadata.dst_node_id)
            if name is not None:
                reply.content["colearn"]["participant"] = name
        return reply


@pytest.mark.parametrize("from_round", [0, 1])
def test_a_registered_name_goes_before_a_reported_one(from_round, clock):
    """Node 1, which replies first, reports the name of node 2."""
    grid = EchoingGrid(
        clock, lambda round_, node: "site-a" if node == 1 and round_ >= from_round else None
    )
    grid.registered = {1: "site-x", 2: "site-a", 3: "site-b", 4: "site-c"}
    (record,) = run(grid, Quorum(3))
    assert record.participants == ["site-a", "site-b", "site-c"]
    assert {entry["participant"] for entry in record.refusals} == {"site-x"}
    assert "expected the registered name 'site-x', found 'site-a'" in record.refusals[0]["reason"]
    assert [entry["participant"] for entry in record.absences] == ["site-x"]


def test_without_registration_the_first_to_report_a_name_keeps_it(clock):
    names = [{"name": name} for name in SITES]
    grid = EchoingGrid(
        clock,
        lambda round_, node: "site-b" if node == 1 and round_ else None,
        node_configs=names,
    )
    (record,) = run(grid, Quorum(3))
    assert record.participants == ["site-b", "site-c", "site-d"]
    assert {entry["participant"] for entry in record.refusals} == {"site-a"}


def test_another_name_than_before_is_refused(clock):
    grid = EchoingGrid(clock, lambda round_, node: "me too" if (round_, node) == (2, 1) else None)
    _, record = run(grid, Quorum(3), rounds=2)
    assert record.participants == ["partition-1", "partition-2", "partition-3"]
    reason = "expected 'partition-0', which it reported before, found 'me too'"
    assert reason in record.refusals[0]["reason"]
    assert record.refusals[0]["participant"] == "partition-0"


BAD_NAMES = {
    "empty": "",
    "newline": "a\nINFO : all is well",
    "ANSI": "a\x1b[2J",
    "right to left": "a\u202eb",
    "line separator": "a\u2028b",
    "lone surrogate": "a\ud800",
    "5 MB": "x" * 5_000_000,
    "number": 7,
    "list": ["a", "b"],
}


@pytest.mark.parametrize("kind", BAD_NAMES)
def test_a_name_is_text_of_bounded_length_without_control_characters(kind):
    with pytest.raises(ColearnError, match="without control characters, found") as error:
        checked_name(BAD_NAMES[kind])
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["a", "Universitätsklinikum Köln", "site 1/β", "x" * 300])
def test_any_other_text_is_a_name(name):
    assert checked_name(name) == name


@pytest.mark.parametrize("kind", [kind for kind in BAD_NAMES if kind != "lone surrogate"])
def test_who_reports_no_name_is_refused_and_the_others_stay(kind, clock, flower_log):
    grid = EchoingGrid(clock, lambda round_, node: BAD_NAMES[kind] if node == 2 else None)
    (record,) = run(grid, Quorum(3))
    assert record.participants == ["partition-0", "partition-2", "partition-3"]
    assert {entry["participant"] for entry in record.refusals} == {"2"}
    assert len(record.to_json()) < 10_000
    assert all(
        "\x1b" not in each.getMessage() and "\u202e" not in each.getMessage()
        for each in flower_log.records
        if each.levelno >= logging.WARNING
    )


def test_a_site_does_not_train_under_a_name_that_is_none(clock):
    calls = []
    configs = [{"name": "a\nb"} if k == 1 else {} for k in range(K)]
    grid = FaultyGrid(
        clock, train=lambda k, plan, arrays: calls.append(k) or arrays, node_configs=configs
    )
    with pytest.raises(ColearnError, match="change `name` in the site's node config"):
        run(grid)
    assert 1 not in calls


# Copies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("configs", "registered", "name"),
    [
        ([{"name": "a hospital"}] * 2 + [{}] * 2, {}, "a hospital"),
        ([{"client-name": "site-1"}] * 2 + [{}] * 2, {}, "site-1"),
        ([{"partition-id": 7}] * 2 + [{}] * 2, {}, "partition-7"),
        (
            [{"partition-id": 7}] * 2 + [{}] * 2,
            dict(zip(range(1, 5), SITES, strict=True)),
            "partition-7",
        ),
        ([{}] * 4, {1: "site-a", 2: "site-a"}, "site-a"),
    ],
)
def test_a_copied_name_is_refused_before_anybody_trains(configs, registered, name, clock):
    grid = FaultyGrid(clock, node_configs=configs)
    grid.registered = registered
    match = f"reply of node 2: .*{name}, which is node 1 too; do two sites share a node config"
    with pytest.raises(ColearnError, match=match):
        run(grid)
    assert not grid.attempts


def test_with_a_quorum_the_copy_alone_is_left_out(clock):
    grid = FaultyGrid(clock, node_configs=[{"name": name} for name in "abca"])
    (record,) = run(grid, Quorum(3))
    assert record.participants == ["a", "b", "c"]
    assert "node 4" in record.absences[0]["reason"]
    assert "node 1 too" in record.absences[0]["reason"]
    assert trained(grid) == {1: 1, 2: 1, 3: 1}


def test_the_one_that_is_registered_with_the_name_is_no_copy(clock):
    grid = FaultyGrid(clock, node_configs=[{"name": name} for name in "abcd"])
    grid.registered = {4: "a"}  # whose node config says d, for which it is refused too
    (record,) = run(grid, Quorum(2))
    assert record.participants == ["b", "c"]
    assert 1 not in trained(grid)


def test_the_one_that_has_trained_before_is_no_copy(clock):
    grid = FaultyGrid(clock)

    def evaluate(server_round, arrays):
        if server_round == 1:
            grid.leave(1, seconds=1e9)
            grid.join(50, **{"partition-id": 2})  # in place of partition-0, with a name of another

    strategy = strategy_of(recovery=Recovery(1, patience=5.0, policy=Quorum(3)))
    strategy.start(grid, record_of(MODEL), num_rounds=2, evaluate_fn=evaluate)
    assert trained(grid) == {1: 1, 2: 2, 3: 2, 4: 2}
    assert strategy.history.records[1].participants == [f"partition-{k}" for k in (1, 2, 3)]


# Newcomers --------------------------------------------------------------------------------------


def test_a_registered_participants_place_is_not_taken_by_reporting_its_partition(clock):
    grid = FaultyGrid(clock, {(2, 1, 0): "leaves"})
    grid.registered = dict(zip(range(1, 5), SITES, strict=True))

    def leave(node, **kwargs):
        FaultyGrid.leave(grid, node, seconds=60.0, come_back_as=100)
        grid.registered[100] = "site-b"
        grid.partitions[100] = 1
        grid.join(50, **{"partition-id": 1})  # without a registered name

    grid.leave = leave
    run(grid, rounds=2)
    assert trained(grid) == {1: 2, 2: 2, 3: 2, 4: 2, 100: 1}


def test_the_log_names_a_newcomer_and_what_does_not_fit_once(clock, flower_log):
    grid = FaultyGrid(clock, {(2, 1, 0): "leaves"}, node_configs=[{"name": n} for n in SITES])

    def leave(node, **kwargs):
        FaultyGrid.leave(grid, node, seconds=60.0, come_back_as=100)
        grid.partitions[100] = 1
        grid.join(50, **{"partition-id": 1, "name": "Site B"})

    grid.leave = leave
    run(grid, rounds=2)
    lines = [r.getMessage() for r in flower_log.records if "does not take the place" in r.msg]
    assert lines == [
        "Recovery: node 50 (reported name 'Site B') has connected and does not take the place of "
        "participant site-b (reported name 'site-b'), which left, since the names differ"
    ]


def test_registered_nodes_may_report_the_number_of_their_partition():
    directory = Directory(registered={1: "utrecht"})
    assert directory.check_name(1, "partition-0") == "partition-0"
    assert directory.name_of(1) == "utrecht"
    with pytest.raises(ColearnError, match="expected the registered name 'utrecht'"):
        directory.check_name(1, "partition-zero")


@pytest.mark.parametrize("named", [True, False])
def test_every_node_is_queried_once(named, clock):
    grid, asked = FaultyGrid(clock, named=named), []
    call = grid._call

    def counting(message):
        if "config" not in message.content:
            asked.append(message.metadata.dst_node_id)
        return call(message)

    grid._call = counting
    run(grid, rounds=3)
    assert sorted(asked) == [1, 2, 3, 4]


def test_one_that_did_not_answer_the_query_cannot_take_a_name_either(clock):
    grid = EchoingGrid(clock, lambda round_, node: "partition-1" if node == 1 else None)
    call = grid._call

    def failing(message):
        if message.metadata.dst_node_id == 1 and "config" not in message.content:
            return Message(Error(2, "not now"), reply_to=message)
        return call(message)

    grid._call = failing
    (record,) = run(grid, Quorum(3))
    assert record.participants == ["partition-1", "partition-2", "partition-3"]
    assert "node 2 too" in record.refusals[0]["reason"]
    assert trained(grid) == {1: 2, 2: 1, 3: 1, 4: 1}


def ask(recovering, round_, nodes):
    config = ConfigRecord({"server-round": round_, "local-epochs": 1, "learning-rate": 0.1})
    content = RecordDict({"arrays": record_of(MODEL), "config": config})
    messages = [Message(content, node, "train") for node in nodes]
    return [r.metadata.src_node_id for r in recovering.send_and_receive(messages, timeout=60.0)]


def test_a_newcomer_is_the_copy_whichever_message_comes_first(clock):
    grid = FaultyGrid(clock)
    recovering = RecoveringGrid(grid, Recovery(1, policy=Quorum(2)))
    ask(recovering, 1, [1, 2, 3])
    grid.join(50, **{"partition-id": 0})
    assert sorted(ask(recovering, 2, [50, 1, 2])) == [1, 2]
    assert [(e.kind, "node 50" in e.reason) for e in recovering.take_events()] == [
        ("refusal", True),
        ("absence", True),
    ]


def test_a_resumed_run_knows_the_names_of_before(clock, tmp_path):
    """It does not query them again, and a participant that reports another one is refused."""

    def start(grid, rounds):
        strategy = strategy_of(
            recovery=Recovery(0, policy=Quorum(3)),
            checkpoints=tmp_path,
            fraction_evaluate=0.0,
            local_epochs=1,
        )
        strategy.start(grid, record_of(MODEL), num_rounds=rounds, resume="auto")
        return strategy.history.records

    whole = start(FaultyGrid(clock), 1)[0]
    grid = EchoingGrid(clock, lambda round_, node: "me too" if node == 1 else None)
    first, second = start(grid, 2)
    assert first.control_down == whole.control_down
    assert first.control_down - second.control_down == K * len("askname")
    assert second.participants == ["partition-1", "partition-2", "partition-3"]
    assert second.refusals[0]["participant"] == "partition-0"
