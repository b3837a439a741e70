"""Transport: layers put together, refusals of what cannot be, and one account of a round."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from flwr_colearn import (
    Average,
    ColearnError,
    Compression,
    Float16,
    InProcessGrid,
    Int8,
    LocalStatistics,
    Quorum,
    RecoveringGrid,
    Recovery,
    Role,
    Transport,
)
from flwr_colearn.records import data_bytes
from tests.faults import MODEL, FaultyGrid, K, bits, is_query, participants, record_of

SMALL = Compression(up=Int8(), down=Float16())
PLAN = {"local-epochs": 1, "learning-rate": 0.2, "server-round": 1}


def messages(nodes=range(1, K + 1), kind="train", **config):
    content = RecordDict({"arrays": record_of(MODEL), "config": ConfigRecord({**PLAN, **config})})
    return [Message(content, node, kind) for node in nodes]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"recovery": "always"}, "recovery: expected a Recovery, or None, found 'always'"),
        ({"normalization": "pooled"}, "normalization: expected .*found 'pooled'"),
        ({"normalization": LocalStatistics}, "normalization: expected"),
        ({"compression": Int8()}, "compression: expected a Compression.*found"),
        ({"compression": "int8"}, "compression: expected a Compression.*found 'int8'"),
        ({"compression": None}, "compression: expected a Compression.*found None"),
    ],
)
def test_a_value_of_another_type_is_refused(arguments, match):
    with pytest.raises(ColearnError, match=match):
        Transport(**arguments)


# Joining ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("recovery", Recovery(1), Recovery(2)),
        ("recovery", None, Recovery(2, policy=Quorum(3))),
        ("normalization", LocalStatistics(), Average()),
        ("compression", Compression(up=Int8()), SMALL),
        ("roles", {"fc.weight": Role.COUNTER}, {"fc.bias": Role.COUNTER}),
    ],
)
def test_a_feature_may_be_said_once(name, one, other):
    first, second = Transport(**{name: one}), Transport(**{name: other})
    grid = first.connect(first.connect(InProcessGrid(participants(), K)))
    with pytest.raises(ColearnError, match=f"{name}: expected it once") as error:
        second.connect(grid)
    assert str(one) in str(error.value)
    assert str(other) in str(error.value)


def test_features_that_are_said_apart_are_joined():
    grid = InProcessGrid(participants(), K)
    inner = Transport(compression=SMALL).connect(grid)
    outer = Transport(recovery=Recovery(7), normalization=LocalStatistics()).connect(inner)
    assert outer.transport == Transport(Recovery(7), LocalStatistics(), SMALL)
    assert outer.bottom is grid


def test_a_recovering_grids_limits_are_kept():
    recovering = RecoveringGrid(InProcessGrid(participants(), K), Recovery(7))
    assert Transport().connect(recovering).transport.recovery == Recovery(7)


# The account ------------------------------------------------------------------------------------


def test_the_account_is_of_all_that_moved_since_the_last(clock):
    faults = {(1, 0, 0): "raises", (1, 1, 0): "NaN"}
    faulty = FaultyGrid(clock, faults)
    faulty.seconds_per_epoch = 10.0
    grid = Transport().connect(faulty)
    size = data_bytes(record_of(MODEL))
    assert len(list(grid.send_and_receive(messages()))) == K
    traffic = grid.take()
    assert traffic.bytes.down == (K + 2) * size  # two attempts more
    assert traffic.bytes.up == (K + 1) * size  # one of which brought an error
    assert (traffic.models.down, traffic.models.up) == (K + 2, K + 1)
    assert traffic.control.down > 0
    assert {event.participant for event in traffic.events} == {"partition-0", "partition-1"}
    assert traffic.names == {node: f"partition-{node - 1}" for node in range(1, K + 1)}
    # The longest attempt that succeeded, to which the clock's polls add a little.
    assert 10.0 <= traffic.seconds < 15.0
    empty = grid.take()
    assert (empty.bytes.down, empty.bytes.up, empty.events) == (0, 0, [])


def test_control_records_are_counted_apart():
    grid = Transport().connect(InProcessGrid(participants(), K))
    list(grid.send_and_receive(messages()))
    grid.take()  # in the first round participants are queried for their names besides
    list(grid.send_and_receive(messages()))
    few = grid.take()
    list(grid.send_and_receive(messages(note="x" * 100)))
    more = grid.take()
    assert more.bytes == few.bytes
    assert more.control.down - few.control.down == K * (len("note") + 100)


def test_every_layers_account_is_of_what_travels():
    plain = Transport().connect(InProcessGrid(participants(), K))
    small = Transport(normalization=LocalStatistics(), compression=SMALL)
    compressed = small.connect(InProcessGrid(participants(), K))
    for grid in (plain, compressed):
        list(grid.send_and_receive(messages()))
    assert compressed.take().bytes.up < plain.take().bytes.up


def test_replies_are_in_the_order_of_the_names(clock):
    names = [{"name": name} for name in ("d", "b", "a", "c")]
    grid = Transport().connect(FaultyGrid(clock, {(1, 2, 0): "raises"}, node_configs=names))
    for _ in range(2):
        replies = grid.send_and_receive(messages([4, 2, 1, 3]))
        assert [reply.metadata.src_node_id for reply in replies] == [3, 2, 4, 1]


def test_without_recovery_those_that_fail_are_left_out(clock):
    grid = Transport(recovery=None).connect(FaultyGrid(clock, {(1, 2, 0): "raises"}))
    replies = list(grid.send_and_receive(messages()))
    assert [reply.has_error() for reply in replies].count(True) == 1
    assert grid.take().events == []


FEATURES = {
    "none": Transport(recovery=None),
    "recovery": Transport(),
    "normalization": Transport(recovery=None, normalization=LocalStatistics()),
    "compression": Transport(recovery=None, compression=SMALL),
    "all": Transport(normalization=LocalStatistics(), compression=SMALL),
}


@pytest.mark.parametrize("models", [{}, {"a": MODEL}, {"a": MODEL, "b": {"x": np.ones(3)}}])
@pytest.mark.parametrize("transport", FEATURES.values(), ids=FEATURES)
def test_other_messages_than_train_and_evaluate_pass_through_unchanged(transport, models):
    app = participants()

    def answer(message, context):
        seen.append(RecordDict({**message.content}))
        return Message(RecordDict({"answer": record_of(MODEL)}), reply_to=message)

    app.query()(answer)
    app.query("own")(answer)
    app.query("fails")(lambda message, context: 1 / 0)
    bottom, seen, pushed = InProcessGrid(app, K), [], []
    push = bottom.push_messages
    bottom.push_messages = lambda batch: push([pushed.append(each) or each for each in batch])
    grid = transport.connect(bottom)
    list(grid.send_and_receive(messages()))  # after which participants have local arrays
    pushed.clear()
    records = {name: record_of(arrays) for name, arrays in models.items()}
    content = RecordDict({**records, "config": ConfigRecord({"question": 1})})
    for kind in ("query", "query.own", "query.fails"):
        message = Message(RecordDict({**content}), 2, kind)
        (reply,) = grid.send_and_receive([message])
        # The very message, once: only a training is restarted.
        assert pushed.pop() is message
        assert message.content == content
        assert reply.metadata.src_node_id == 2
        assert reply.has_error() == (kind == "query.fails")
        if reply.has_content():
            assert reply.content == RecordDict({"answer": record_of(MODEL)})
            assert seen.pop() == content
    assert seen == pushed == []


# What is sent -----------------------------------------------------------------------------------


def test_models_are_sent_in_the_types_of_the_first():
    seen = []

    def train(k, plan, arrays):
        seen.append({name: array.dtype for name, array in arrays.items()})
        return arrays

    grid = Transport().connect(InProcessGrid(participants(train), K))
    list(grid.send_and_receive(messages()))
    wide = {name: Array(np.asarray(array, np.float64)) for name, array in MODEL.items()}
    content = {"arrays": ArrayRecord(wide), "config": ConfigRecord({**PLAN})}
    (reply,) = grid.send_and_receive([Message(RecordDict(content), 1, "train")])
    assert seen[-1] == seen[0] == {name: array.dtype for name, array in MODEL.items()}
    assert bits(reply.content["arrays"]) == bits(record_of(MODEL))
    assert content["arrays"]["fc.weight"].dtype == "float64"  # whose message it is keeps its own


def test_every_connected_grid_is_a_session_of_its_own():
    seen = set()
    for _ in range(2):
        grid = InProcessGrid(participants(), K)
        call = grid._call

        def watch(message, call=call):
            if not is_query(message):
                seen.add(message.content["config"]["session"])
            return call(message)

        grid._call = watch
        connected = Transport().connect(grid)
        list(connected.send_and_receive(messages()))
        list(connected.send_and_receive(messages(kind="evaluate")))
    assert len(seen) == 2


def test_a_site_with_another_version_is_refused_by_name(monkeypatch, clock):
    monkeypatch.setattr("flwr_colearn.transport.__version__", "9.9")
    calls = []

    def train(k, plan, arrays):
        calls.append(k)
        return arrays

    grid = FaultyGrid(clock, train=train, node_configs=[{"name": f"site-{k}"} for k in range(K)])
    with pytest.raises(ColearnError, match=r"lost participant .*version 9\.9, found"):
        FedAvg(fraction_evaluate=0.0).start(
            Transport(Recovery(0)).connect(grid),
            record_of(MODEL),
            1,
            train_config=ConfigRecord({**PLAN}),
        )
    assert calls == []  # nobody trained


def test_a_site_with_another_model_is_refused_by_name(clock):
    def train(k, plan, arrays):
        return {**arrays, "head": np.zeros(3)} if k == 2 else arrays

    names = [{"name": f"site-{k}"} for k in range(K)]
    grid = Transport(Recovery(0)).connect(FaultyGrid(clock, train=train, node_configs=names))
    with pytest.raises(ColearnError, match=r"lost site-2|lost participant site-2.*1 unknown"):
        list(grid.send_and_receive(messages()))
