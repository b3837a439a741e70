"""The clock of every message: its time to live, and the time limit that its participant gets."""

import math
from collections import defaultdict

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import DEFAULT_TTL
from flwr.serverapp.strategy import FedAvg

from flwr_colearn import (
    Averaging,
    InProcessGrid,
    ModelAveraging,
    Recalibrated,
    Transport,
    participant_mod,
    run,
)
from flwr_colearn.dynamic import Never, Periodic, learner
from flwr_colearn.policy import attempt_limit
from tests.faults import participants, record_of

K = 2
MODEL = {
    "fc.weight": np.ones(2, np.float32),
    "bn.running_mean": np.zeros(2, np.float32),
    "bn.running_var": np.ones(2, np.float32),
}
YEAR = 365 * 86_400.0
REPORT = 120.0  # the seconds that Flower may take to report the end of a process
FRACTIONS = {"min_train_nodes": K, "min_available_nodes": K, "min_evaluate_nodes": K}


class ClockGrid(InProcessGrid):
    """Notes the time to live and the time limit of every message that has a round."""

    def __init__(self, app):
        super().__init__(app, K)
        self.seen = defaultdict(set)

    def push_messages(self, messages):
        batch = list(messages)
        for message in batch:
            config = message.content.get("config")
            if config is not None:
                kind = config.get("action", message.metadata.message_type)
                self.seen[kind].add((message.metadata.ttl, config.get("time-limit")))
        return super().push_messages(batch)

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))


def recalibrating():
    app = participants(train=lambda k, plan, arrays: arrays)

    @app.train("recalibrate")
    def _(message, context):
        content = {"arrays": message.content["arrays"]}
        content["metrics"] = MetricRecord({"num-examples": 1})
        return Message(RecordDict(content), reply_to=message)

    return app


def learners():
    app = ClientApp(mods=[participant_mod])

    @learner(app)
    def _(message, context):
        content = {"arrays": message.content["arrays"]}
        content["metrics"] = MetricRecord({"num-examples": 1, "loss": 1.0})
        return Message(RecordDict(content), reply_to=message)

    return app


def config():
    return ConfigRecord({"local-epochs": 1, "learning-rate": 0.1, "learning-rates": [0.1]})


def of_this_package(timeout):
    grid = ClockGrid(recalibrating())
    strategy = Averaging(K, normalization=Recalibrated())
    strategy.start(grid, record_of(MODEL), 1, timeout, config())
    return grid.seen, {"train", "train.recalibrate", "evaluate"}


def stock_under_run(timeout):
    grid = ClockGrid(recalibrating())
    transport = Transport(normalization=Recalibrated())
    strategy = FedAvg(**FRACTIONS)
    run(strategy, grid, record_of(MODEL), 1, timeout, config(), transport=transport)
    return grid.seen, {"train", "train.recalibrate", "evaluate"}


def dynamic(timeout):
    grid = ClockGrid(learners())
    for operator in (Periodic(1), Never()):
        ModelAveraging(operator, K).start(grid, record_of(MODEL), 2, timeout)
    return grid.seen, {"train", "set", "fetch"}


@pytest.mark.parametrize(
    ("timeout", "ttl", "limit"),
    [
        (math.inf, YEAR, None),
        (60.0, DEFAULT_TTL, 60.0),
        (86_400.0, 2 * (86_400 + REPORT), 86_400.0),
    ],
)
@pytest.mark.parametrize("start", [of_this_package, stock_under_run, dynamic])
def test_every_message_outlives_its_round_and_has_the_time_limit(start, timeout, ttl, limit):
    seen, kinds = start(timeout)
    assert seen == {kind: {(ttl, limit)} for kind in kinds}


def foreign(timeout, recovery, grid=None, **kwargs):
    grid = grid or ClockGrid(recalibrating())
    connected = Transport(**recovery).connect(grid)
    FedAvg(**FRACTIONS).start(
        connected, record_of(MODEL), 2, timeout, kwargs.get("config", config())
    )
    return grid.seen


@pytest.mark.parametrize("recovery", [{}, {"recovery": None}])
def test_in_flowers_loop_the_limit_is_the_wait_for_the_reply(recovery):
    day = 86_400.0
    assert foreign(day, recovery) == {kind: {(2 * day, day)} for kind in ("train", "evaluate")}
    assert foreign(math.inf, recovery) == {kind: {(YEAR, None)} for kind in ("train", "evaluate")}


def test_the_users_own_config_gets_no_limit_of_an_earlier_run():
    mine = config()
    foreign(60.0, {}, config=mine)
    assert "time-limit" not in mine
    seen = foreign(90.0, {}, config=mine)
    assert {limit for _, limit in seen["train"]} == {90.0}


def test_a_message_with_a_time_to_live_of_its_own_keeps_it():
    grid = ClockGrid(recalibrating())
    content = RecordDict({"config": ConfigRecord({"server-round": 1})})
    messages = [Message(content, 1, "evaluate", ttl=5.0), Message(content, 2, "evaluate")]
    Transport().connect(grid).push_messages(messages)
    assert grid.seen["evaluate"] == {(5.0, None), (YEAR, None)}


def test_without_a_measured_duration_the_timeout_is_the_limit():
    assert attempt_limit(0.5) == 0.5
    assert attempt_limit(math.inf) is None
    assert attempt_limit(1.0, expected_seconds=2.0) == 6.0  # three times
