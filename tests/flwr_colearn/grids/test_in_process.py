import platform
import subprocess
import sys

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import ColearnError, InProcessGrid, ThreadedGrid


def grid_of(train, num_supernodes=3, **kwargs):
    app = ClientApp()
    app.train()(train)
    return InProcessGrid(app, num_supernodes, **kwargs)


def ask(grid, *node_ids, **config):
    """Send one and the same content to several participants, and return their replies."""
    content = RecordDict(
        {"arrays": ArrayRecord([np.zeros(2)]), "config": ConfigRecord({"list": [1, 2], **config})}
    )
    messages = [Message(content, node_id, "train") for node_id in node_ids]
    return grid.send_and_receive(messages)


def answer(message, **metrics):
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def metrics_of(replies, name):
    return [reply.content["metrics"][name] for reply in replies]


def test_participants_have_flowers_node_config():
    def train(message, context):
        config = context.node_config
        return answer(message, k=config["partition-id"], n=config["num-partitions"])

    replies = ask(grid_of(train), 1, 2, 3)
    assert metrics_of(replies, "k") == [0, 1, 2]
    assert metrics_of(replies, "n") == [3, 3, 3]


def test_participants_see_the_run_config_and_their_own_node_config():
    def train(message, context):
        return answer(message, seed=context.run_config["seed"], gpu=context.node_config["gpu"])

    grid = grid_of(train, 2, run_config={"seed": 7}, node_configs=[{"gpu": 0}, {"gpu": 1}])
    replies = ask(grid, 1, 2)
    assert (metrics_of(replies, "seed"), metrics_of(replies, "gpu")) == ([7, 7], [0, 1])


def test_participants_are_called_in_the_order_of_the_messages():
    called = []

    def train(message, context):
        called.append(context.node_id)
        return answer(message, k=context.node_id)

    grid = grid_of(train)
    replies = ask(grid, 3, 1, 2)
    assert called == [3, 1, 2]
    assert [reply.metadata.src_node_id for reply in replies] == [3, 1, 2]
    assert sorted(grid.get_node_ids()) == [1, 2, 3]


def test_state_survives_rounds_and_is_each_participants_own():
    def train(message, context):
        count = context.state.get("count", MetricRecord({"n": 0}))["n"] + 1
        context.state["count"] = MetricRecord({"n": count})
        return answer(message, n=count)

    grid = grid_of(train)
    assert metrics_of(ask(grid, 1, 2), "n") == [1, 1]
    assert metrics_of(ask(grid, 1, 1, 3), "n") == [2, 3, 1]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content["config"].update({"seen": 1}),
        lambda content: content["arrays"].clear(),
        lambda content: content.clear(),
        lambda content: content["config"]["list"].append(3),
        lambda content: setattr(content["arrays"]["0"], "data", b""),
    ],
    ids=["config", "arrays", "content", "list in the config", "array"],
)
def test_what_a_participant_does_to_its_message_stays_its_own(spoil):
    def train(message, context):
        content = message.content
        intact = dict(content.get("config", {})) == {"list": [1, 2]} and [
            array.numpy().tolist() for array in content["arrays"].values()
        ] == [[0, 0]]
        spoil(content)
        return answer(message, intact=int(intact))

    grid = grid_of(train)
    assert metrics_of(ask(grid, 1, 2, 3), "intact") == [1, 1, 1]


def test_an_exception_becomes_an_error_reply_with_its_traceback_in_the_log(flower_log):
    def train(message, context):
        if context.node_id == 2:
            raise ValueError("no data on this node")
        return answer(message, k=context.node_id)

    first, failed, last = ask(grid_of(train), 1, 2, 3)
    assert not first.has_error()
    assert not last.has_error()
    assert failed.has_error()
    assert failed.metadata.src_node_id == 2
    assert failed.error.code == 2  # as Flower's own ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert failed.error.reason == "ValueError: no data on this node"
    assert "Traceback" in flower_log.text
    assert "in train" in flower_log.text


@pytest.mark.parametrize("kind", [InProcessGrid, ThreadedGrid])
@pytest.mark.parametrize(("code", "reason"), [(None, "SystemExit"), (3, "SystemExit: 3")])
def test_a_participant_that_exits_does_not_end_the_others(kind, code, reason):
    def train(message, context):
        if context.node_id == 2:
            sys.exit(code)
        return answer(message)

    app = ClientApp()
    app.train()(train)
    replies = kind(app, 3).send_and_receive([Message(RecordDict(), n, "train") for n in (1, 2, 3)])
    assert sorted(reply.has_error() for reply in replies) == [False, False, True]
    [failed] = [reply for reply in replies if reply.has_error()]
    assert failed.error.code == 2
    assert failed.error.reason.startswith(reason)


def test_a_participant_that_answers_nothing_becomes_an_error_reply():
    [reply] = ask(grid_of(lambda message, context: None), 1)
    assert reply.has_error()


def test_a_message_type_that_the_app_has_no_function_for_becomes_an_error_reply():
    grid = grid_of(lambda message, context: answer(message))
    [reply] = grid.send_and_receive([Message(RecordDict(), 1, "evaluate")])
    assert reply.has_error()
    assert "evaluate" in reply.error.reason


@pytest.mark.parametrize("node_id", [4, 99])
def test_an_unknown_node_is_refused_with_the_known_ones(node_id):
    grid = grid_of(lambda message, context: answer(message))
    with pytest.raises(ColearnError, match=f"a node id from 1 to 3, found {node_id}"):
        ask(grid, node_id)


def test_every_reply_is_pulled_once_and_belongs_to_its_message():
    grid = grid_of(lambda message, context: answer(message, k=context.node_id))
    ids = grid.push_messages([Message(RecordDict(), node_id, "train") for node_id in (2, 1)])
    assert len(set(ids)) == 2
    assert metrics_of(grid.pull_messages(reversed(ids)), "k") == [1, 2]
    assert list(grid.pull_messages(ids)) == []


def test_two_grids_give_the_same_replies():
    def train(message, context):
        rng = np.random.default_rng(context.run_config["seed"] + context.node_id)
        return answer(message, x=float(rng.normal()))

    first, second = (grid_of(train, run_config={"seed": 3}) for _ in range(2))
    for _ in range(2):
        assert metrics_of(ask(first, 1, 2, 3), "x") == metrics_of(ask(second, 1, 2, 3), "x")


PAGE_FAULTS = """
import resource
import numpy as np
from flwr.clientapp import ClientApp
from flwr_colearn import InProcessGrid

def models():
    arrays = [np.ones(2**20) for _ in range(4)]  # 8 MiB each
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del arrays
    arrays = [np.ones(2**20) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = [models() for _ in range(3)][-1]
grid = InProcessGrid(ClientApp(), 1)
print(first, [models() for _ in range(3)][-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other habits")
def test_the_memory_of_models_is_not_fetched_anew_every_time():
    run = subprocess.run([sys.executable, "-c", PAGE_FAULTS], check=True, capture_output=True)
    before, after = map(int, run.stdout.split())
    assert before > 0
    assert after < before / 10


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "3"])
def test_an_impossible_number_of_participants_is_refused(k):
    with pytest.raises(ColearnError, match="num_supernodes: expected a whole number"):
        InProcessGrid(ClientApp(), k)


def test_node_configs_of_another_length_are_refused():
    with pytest.raises(ColearnError, match="node_configs: expected one for each of 3"):
        InProcessGrid(ClientApp(), 3, node_configs=[{}])
