import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import ColearnError, InProcessGrid, __version__, participant_mod
from flwr_colearn.aggregation import echo_of


@pytest.fixture(autouse=True, scope="module")
def _identity():
    InProcessGrid(ClientApp(), 1)  # without which Flower lets nobody make a Message


def message_of(kind="train", **config):
    content = RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord(config)})
    message = Message(content, 7, kind)
    message.metadata.__dict__["_message_id"] = "sent"
    return message


def context_of(**node_config):
    return SimpleNamespace(node_config=node_config)


def asking_for_the_name():
    return Message(RecordDict({"colearn": ConfigRecord({"ask": "name"})}), 7, "train")


def never(message, context):
    pytest.fail("called")


def answer(message, context):
    return Message(RecordDict({"metrics": MetricRecord({"loss": 1})}), reply_to=message)


@pytest.mark.parametrize(
    ("node_config", "name"),
    [
        ({"name": "Genoa"}, {"participant": "Genoa"}),
        ({"partition-id": 3, "num-partitions": 5}, {"participant": "partition-3"}),
        ({"partition-id": 3, "name": "Genoa"}, {"participant": "Genoa"}),
        ({"partition-id": 0}, {"participant": "partition-0"}),
        ({"name": 12}, {"participant": "12"}),
        # What NVFlare's Flower integration passes.
        (
            {"client-name": "site-1", "partition-id": 0, "num-partitions": 5},
            {"participant": "site-1"},
        ),
        ({"client-name": "site-1"}, {"participant": "site-1"}),
        ({"client-name": "site-1", "name": "Genoa"}, {"participant": "Genoa"}),
        ({"data": "/srv"}, {}),
        ({}, {}),
    ],
)
def test_a_participant_says_its_name(node_config, name):
    context = context_of(**node_config)
    reply = participant_mod(asking_for_the_name(), context, never)
    assert echo_of(reply) == name
    reply = participant_mod(message_of(**{"server-round": 4}), context, answer)
    versions = {"version": __version__, "mod": 2}
    assert echo_of(reply) == {"server-round": 4, **name, **versions}
    assert reply.content["metrics"]["loss"] == 1


def test_the_echo_tells_models_of_other_names_shapes_and_types_apart():
    def echo(**arrays):
        def reply(message, context):
            record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
            return Message(RecordDict({"arrays": record}), reply_to=message)

        return echo_of(participant_mod(message_of(**{"server-round": 1}), context_of(), reply))

    one = echo(w=np.zeros((2, 3), "f4"))["model"]
    assert echo(w=np.ones((2, 3), "f4"))["model"] == one
    others = [
        echo(v=np.zeros((2, 3), "f4")),
        echo(w=np.zeros((3, 2), "f4")),
        echo(w=np.zeros((2, 3))),
    ]
    assert len({one, *(each["model"] for each in others)}) == 4


def test_a_server_of_another_version_is_refused_before_anything_is_trained():
    message = message_of(**{"server-round": 1, "colearn-version": "0.4.0"})
    with pytest.raises(ColearnError, match=r"expected the server's version 0\.4\.0, found"):
        participant_mod(message, context_of(), never)


def test_without_a_round_there_is_nothing_to_echo():
    reply = participant_mod(message_of(), context_of(name="a"), answer)
    assert list(reply.content) == ["metrics"]


def test_an_error_passes_as_it_is():
    def fail(message, context):
        return Message(Error(2, "no data"), reply_to=message)

    reply = participant_mod(message_of(**{"server-round": 1}), context_of(name="a"), fail)
    assert reply.has_error()
    assert reply.error.reason == "no data"


def test_an_error_of_this_plugin_passes_as_it_is():
    def fail(message, context):
        raise ColearnError("no data")

    with pytest.raises(ColearnError, match=r"^no data$"):
        participant_mod(message_of(**{"server-round": 1}), context_of(), fail)


def test_one_mod_is_all_that_an_app_needs():
    app = ClientApp(mods=[participant_mod])
    app.train()(answer)
    grid = InProcessGrid(app, 2)
    content = message_of(**{"server-round": 9}).content
    replies = grid.send_and_receive([Message(content, node, "train") for node in (1, 2)])
    assert [echo_of(reply)["participant"] for reply in replies] == ["partition-0", "partition-1"]
    question = Message(asking_for_the_name().content, 2, "train")
    assert echo_of(grid.send_and_receive([question])[0]) == {"participant": "partition-1"}


def test_an_app_with_a_client_fn_answers_through_the_mod():
    app = ClientApp(client_fn=lambda context: None, mods=[participant_mod])
    question = Message(asking_for_the_name().content, 2, "train")
    [reply] = InProcessGrid(app, 2).send_and_receive([question])
    assert echo_of(reply) == {"participant": "partition-1"}


# The time limit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.0, 1e-6, "soon"])
def test_outside_a_process_of_its_own_the_limit_is_ignored(limit, monkeypatch):
    """A simulation's actors serve many participants; so does this process, the tests."""
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("ended"))
    threads = []
    monkeypatch.setattr("threading.Timer", lambda *args: threads.append(args))
    config = {"server-round": 1, "time-limit": limit}
    assert participant_mod(message_of(**config), context_of(), answer).has_content()
    assert threads == []


CLIENTAPP = """
import signal, sys, time
from types import SimpleNamespace
from flwr.app import ConfigRecord, Message, RecordDict
from flwr_colearn import InProcessGrid, participant_mod
from flwr.clientapp import ClientApp

def hang(message, context):
    time.sleep(100)

def hang_deaf_to_signals(message, context):
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    time.sleep(100)

def hang_in_a_loop(message, context):
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            pass

def return_in_time(message, context):
    return Message(RecordDict(), reply_to=message)

InProcessGrid(ClientApp(), 1)  # without which Flower lets nobody make a Message
config = ConfigRecord({"server-round": 1, "time-limit": 0.5})
kind = "evaluate" if sys.argv[1] == "hang" else "train"
message = Message(RecordDict({"config": config}), 1, kind)
message.metadata.__dict__["_message_id"] = "sent"
participant_mod(message, SimpleNamespace(node_config={}), globals()[sys.argv[1]])
time.sleep(1.0)  # the limit is over: it was training's, not the process's
print("alive")
"""


@pytest.fixture(scope="module")
def clientapps(tmp_path_factory):
    """Processes like those in which a SuperNode runs a ClientApp, all at the same time."""
    script = tmp_path_factory.mktemp("bin") / "flwr-clientapp"
    script.write_text(CLIENTAPP)
    started = {
        what: subprocess.Popen(
            [sys.executable, str(script), what],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for what in ("hang", "hang_deaf_to_signals", "hang_in_a_loop", "return_in_time")
    }
    ended = {
        what: (*each.communicate(timeout=90), each.returncode) for what, each in started.items()
    }
    return ended


@pytest.mark.parametrize("what", ["hang", "hang_deaf_to_signals", "hang_in_a_loop"])
def test_a_clientapp_that_hangs_ends_itself(what, clientapps):
    out, err, code = clientapps[what]
    assert code == os.EX_TEMPFAIL, err
    assert "exceeded its time limit of 0.5 s" in out + err
    assert "alive" not in out


def test_a_clientapp_that_is_done_in_time_does_not(clientapps):
    out, err, code = clientapps["return_in_time"]
    assert code == 0, err
    assert out.strip().endswith("alive")
    assert "time limit" not in out + err
