"""The client's half of the diff forgotten, in part or in whole: the server notices."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from flwr_colearn import (
    CoLearn,
    ColearnError,
    Compression,
    Float16,
    IncreasingEpochs,
    InProcessGrid,
    LocalPlan,
    Recovery,
    SynchronousSGD,
    legacy,
    numpy_client_app,
    participant_mod,
)
from tests.dropin import shapes
from tests.dropin.shapes import INITIAL, Participant, answer, filled, record_of, run_legacy

DOUBLING = {"local_epochs": IncreasingEpochs(1, epsilon=1e9), "learning_rate": 0.1}
FOUR = {"local_epochs": 4, "learning_rate": 0.1}


def nothing_read(config):
    """The ClientApp as it was with FedAvg: an epoch at its own rate."""


def read_only(config):
    LocalPlan.from_config(config)


def fewer(config):
    for epoch in LocalPlan.from_config(config):
        if epoch.index == 2:
            break


def another_plan(config):
    for _ in LocalPlan(1, 4, 0.3):
        pass


def iterated(config):
    for _ in LocalPlan.from_config(config):
        pass


def rates_listed(config):
    return [epoch.learning_rate for epoch in LocalPlan.from_config(config)]


def iterated_twice(config):
    plan = LocalPlan.from_config(config)
    print(len(list(plan)))
    for _ in plan:
        pass


def in_a_thread(config):
    plan = LocalPlan.from_config(config)
    with ThreadPoolExecutor() as pool:
        pool.submit(list, plan).result()


def resumed(config):
    for _ in LocalPlan.from_config(config).resumable(None, dict, print):
        pass


FORGETFUL = {
    nothing_read: "found 0, since LocalPlan was not read",
    read_only: "found 0, since LocalPlan was read and not iterated",
    fewer: "expected 4 iterated, found 2",
    another_plan: "expected the learning rates",
}
FOLLOWING = [iterated, rates_listed, iterated_twice, in_a_thread, resumed]


def app_of(trains, mods=(participant_mod,), seconds=None):
    """A ClientApp whose participant k calls ``trains[k]`` with the config."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message, context):
        k, config = context.node_config["partition-id"], message.content["config"]
        trains[k](config)
        if seconds is not None:
            seconds(config["local-epochs"])
        return answer(message, filled(1 + config["server-round"]))

    return app


def start(trains, rounds=1, seconds=None, mods=(participant_mod,), rules=FOUR, **arguments):
    strategy = CoLearn(len(trains), fraction_evaluate=0.0, **rules, **arguments)
    grid = InProcessGrid(app_of(trains, mods, seconds), len(trains))
    strategy.start(grid, record_of(INITIAL), num_rounds=rounds)
    return strategy


FEATURES = [
    {},
    {"recovery": None},
    {"guard": None},
    {"compression": Compression(up=Float16(), down=Float16())},
]


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("forgets", FORGETFUL)
def test_the_server_warns_at_once_of_a_participant_that_does_not_iterate_the_plan(
    forgets, features, flower_log
):
    strategy = start([iterated, forgets], rounds=2, **features)
    for record in strategy.history:
        assert len(record.participants) == 2
        [warning] = record.warnings
        assert warning["participant"] in ("partition-1", "2")
        assert FORGETFUL[forgets] in warning["reason"]
        assert "for epoch in LocalPlan.from_config(config)" in warning["reason"]
    # Once in the log, and in the first round.
    assert flower_log.text.count("local epochs of participant") == 1
    before, _, _ = flower_log.text.partition("[ROUND 2/2]")
    assert "local epochs of participant" in before


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("follows", FOLLOWING)
def test_a_participant_that_follows_the_plan_in_any_form_is_not_warned_of(follows, features):
    strategy = start([follows, iterated], rounds=2, **features, strict=True)
    assert [record.warnings for record in strategy.history] == [[], []]
    assert all(len(record.participants) == 2 for record in strategy.history)


@pytest.mark.parametrize("forgets", FORGETFUL)
def test_under_strict_its_reply_is_refused(forgets):
    with pytest.raises(ColearnError, match="local epochs: expected") as raised:
        start([iterated, forgets], strict=True, recovery=Recovery(max_restarts=0))
    assert FORGETFUL[forgets] in str(raised.value)


def test_under_strict_without_recovery_its_reply_is_left_out():
    strategy = start([iterated, nothing_read], strict=True, recovery=None)
    [record] = strategy.history
    assert record.participants == ["1"]
    assert "local epochs: expected 4" in record.refusals[0]["reason"]


def test_a_numpy_client_states_its_epochs_too():
    class Forgetful(Participant):
        def fit(self, parameters, config):
            return parameters, 1, {}

    def client_fn(context):
        k = context.node_config["partition-id"]
        return [Participant, Forgetful][k](k, [1, 1], []).to_client()

    strategy = CoLearn(2, fraction_evaluate=0.0, **FOUR)
    grid = InProcessGrid(numpy_client_app(client_fn), 2)
    strategy.start(grid, record_of(INITIAL), num_rounds=1)
    [record] = strategy.history
    assert [each["participant"] for each in record.warnings] == ["partition-1"]


def test_a_step_of_synchronous_sgd_is_no_plan_to_iterate():
    def gradients(message, context):
        return answer(message, filled(0.5))

    app = ClientApp(mods=[participant_mod])
    app.train()(gradients)
    strategy = SynchronousSGD(2, learning_rate=0.1, strict=True)
    strategy.start(InProcessGrid(app, 2), record_of(INITIAL), num_rounds=2)
    assert [record.warnings for record in strategy.history] == [[], []]


# Without the mod: by the time


@pytest.fixture
def constant(clock):
    """Training that takes as long for any number of epochs."""
    return lambda epochs: clock.sleep(10.0)


@pytest.fixture
def honest(clock):
    return lambda epochs: clock.sleep(3.0 + 10.0 * epochs)


def warnings_by_round(strategy):
    return [len(record.warnings) for record in strategy.history]


@pytest.mark.parametrize("recovery", [Recovery(), None], ids=["recovery", "none"])
def test_without_the_mod_unchanged_seconds_are_warned_of(recovery, constant, flower_log):
    quiet = start([read_only], 5, constant, mods=(), rules=DOUBLING, recovery=recovery, guard=None)
    assert quiet.history.epochs_path == [1, 1, 2, 4, 8]  # from a model of zeros
    assert warnings_by_round(quiet) == [0, 0, 1, 1, 1]
    [reason, *_] = [each["reason"] for record in quiet.history for each in record.warnings]
    assert "the local epochs grew from" in reason
    assert "participant_mod" in reason
    assert flower_log.text.count("local epochs of participant") == 1


@pytest.mark.parametrize("recovery", [Recovery(), None], ids=["recovery", "none"])
def test_without_the_mod_seconds_that_grow_with_them_are_not_warned_of(recovery, honest):
    strategy = start([iterated], 4, honest, mods=(), rules=DOUBLING, recovery=recovery, guard=None)
    assert warnings_by_round(strategy) == [0] * 4


def test_the_start_of_a_participant_in_the_first_round_is_no_sign(clock):
    """Imports and downloads: ten epochs' time in the first round, then what the epochs take."""
    rounds = []

    def starting(epochs):
        rounds.append(epochs)
        clock.sleep((100.0 if len(rounds) == 1 else 0.0) + 10.0 * epochs)

    strategy = start([iterated], 5, starting, mods=(), rules=DOUBLING, guard=None)
    assert warnings_by_round(strategy) == [0] * 5


def test_the_same_epochs_in_all_rounds_is_no_sign(constant):
    assert warnings_by_round(start([iterated], 3, constant, mods=(), guard=None)) == [0] * 3


@pytest.mark.parametrize("follows", [True, False])
def test_the_legacy_api_is_watched_by_the_time(follows, constant, honest, monkeypatch):
    class Timed(Participant):
        def fit(self, parameters, config):
            (honest if follows else constant)(config["local-epochs"])
            return [np.asarray(array + np.float32(1)) for array in parameters], 1, {}

    monkeypatch.setattr(shapes, "Participant", Timed)
    strategy = legacy.CoLearn(1, fraction_evaluate=0.0, guard=None, **DOUBLING)
    run_legacy(strategy, [1], num_rounds=5)
    assert strategy.history.epochs_path == [1, 1, 2, 4, 8]
    assert bool(sum(warnings_by_round(strategy))) != follows
