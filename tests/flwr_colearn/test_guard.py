"""The guard in runs: who is refused, recorded and restarted, and where it is off."""

import logging
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedMedian,
    Krum,
)

from flwr_colearn import (
    Averaging,
    CoLearn,
    ColearnError,
    Guard,
    History,
    IncreasingEpochs,
    InProcessGrid,
    ModelAveraging,
    Quorum,
    Recovery,
    Transport,
    learner,
    participant_mod,
    run,
)
from flwr_colearn.dynamic import Periodic

ROOT = Path(__file__).resolve().parents[2]
K = 3
QUICK = Recovery(max_restarts=1, pause=0.0)
W = np.array([3.0, 4.0], np.float32)


def record_of(array):
    return ArrayRecord({"w": Array(np.asarray(array))})


def initial():
    return record_of(W)


def app_of(step, steps=()):
    """Participants that add ``step(k, round, attempt)`` to the model."""
    app, attempts = ClientApp(mods=[participant_mod]), {}

    @app.train()
    def _(message, context):
        k, config = context.node_config["partition-id"], message.content["config"]
        where = k, config["server-round"]
        attempts[where] = attempts.get(where, 0) + 1
        w = message.content["arrays"]["w"].numpy()
        new = w + np.asarray(step(*where, attempts[where]), np.float32)
        metrics = MetricRecord({"num-examples": k + 1})
        content = RecordDict({"arrays": record_of(new), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def once_too_far(k, server_round, attempt):
    """Steps of norm 0.1; participant 1 sends one of 3e38 on its first attempt in round 2."""
    return 3e38 if (k, server_round, attempt) == (1, 2, 1) else [0.1, 0.0]


def always_too_far(k, server_round, attempt):
    return 3e38 if (k, server_round) == (1, 2) else [0.1, 0.0]


def strategies(**kwargs):
    return {
        "CoLearn": CoLearn(K, local_epochs=1, learning_rate=0.1, fraction_evaluate=0.0, **kwargs),
        "Averaging": Averaging(K, fraction_evaluate=0.0, **kwargs),
    }


def outcome_of(name, step, grid=None, recovery=QUICK, guard=Guard(), **kwargs):  # noqa: B008
    """Run two rounds; return the model and the records."""
    grid = grid or InProcessGrid(app_of(step), K)
    if name == "FedAvg":
        history = History()
        transport = Transport(recovery=recovery, guard=guard)
        strategy = FedAvg(min_available_nodes=K, fraction_evaluate=0.0)
        result = run(strategy, grid, initial(), 2, transport=transport, history=history, **kwargs)
        return result.arrays["w"].numpy(), list(history)
    strategy = strategies(recovery=recovery, guard=guard)[name]
    result = strategy.start(grid, initial(), 2, **kwargs)
    return result.arrays["w"].numpy(), list(strategy.history)


NAMES = ["CoLearn", "Averaging", "FedAvg"]


@pytest.mark.parametrize("name", NAMES)
def test_an_update_beyond_the_bound_is_refused_named_and_restarted(name):
    w, (_, second) = outcome_of(name, once_too_far)
    assert w == pytest.approx([3.2, 4.0])
    assert len(second.participants) == K
    (refusal,), (restart,) = second.refusals, second.restarts
    assert refusal["participant"] == restart["participant"] == "partition-1"
    assert "norm of the update: expected at most 10, 100 times the largest" in refusal["reason"]


@pytest.mark.parametrize("name", NAMES)
def test_a_site_that_sends_it_every_time_is_lost_by_the_policy(name):
    with pytest.raises(ColearnError, match="norm of the update"):
        outcome_of(name, always_too_far)
    w, (_, second) = outcome_of(name, always_too_far, recovery=Recovery(1, 0.0, policy=Quorum(2)))
    assert w == pytest.approx([3.2, 4.0])
    assert [entry["participant"] for entry in second.absences] == ["partition-1"]


@pytest.mark.parametrize("name", NAMES)
def test_without_recovery_the_reply_is_left_out(name):
    w, (_, second) = outcome_of(name, always_too_far, recovery=None)
    assert w == pytest.approx([3.2, 4.0])
    assert [entry["participant"] for entry in second.refusals] == ["2"]  # the node of partition 1


@pytest.mark.parametrize("name", NAMES)
def test_none_switches_it_off(name):
    w, (_, second) = outcome_of(name, always_too_far, guard=None)
    assert w.max() > 1e37
    assert not second.refusals


@pytest.mark.parametrize("name", NAMES)
def test_the_first_round_is_bounded_by_the_model(name):
    def step(k, server_round, attempt):
        return [6000.0, 0.0] if (k, server_round, attempt) == (1, 1, 1) else [0.1, 0.0]

    _, (first, _) = outcome_of(name, step)
    assert "at most 5000, 1000 times the model's norm" in first.refusals[0]["reason"]


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_has_the_bound_of_the_uninterrupted_one(name, tmp_path):
    """Without the state a bound of 5000 would let the second round's step of 50 pass."""

    def step(k, server_round, attempt):
        return [50.0, 0.0] if (k, server_round, attempt) == (1, 2, 1) else [0.1, 0.0]

    def go(rounds, resume):
        transport = Transport(recovery=QUICK)
        if name == "FedAvg":
            strategy = FedAvg(min_available_nodes=K, fraction_evaluate=0.0)
        else:
            strategy, transport = strategies(recovery=QUICK)[name], None
        history = tmp_path / "history.jsonl"
        grid = InProcessGrid(app_of(step), K)
        run(
            strategy,
            grid,
            initial(),
            rounds,
            transport=transport,
            checkpoints=tmp_path / "checkpoints",
            history=history,
            resume=resume,
        )
        return history.read_text()

    go(1, "never")
    assert "norm of the update: expected at most 10" in go(2, "auto")


def test_the_bound_grows_with_t():
    """T is 1, 2, 4, and the updates are nearly so; without the growth of T they are refused."""
    strategy = CoLearn(
        K,
        local_epochs=IncreasingEpochs(1, epsilon=1e9),
        learning_rate=0.1,
        fraction_evaluate=0.0,
        recovery=QUICK,
        guard=Guard(growth=1),
    )
    app = app_of(lambda k, server_round, attempt: [0.1 * 1.9 ** (server_round - 1), 0.0])
    strategy.start(InProcessGrid(app, K), initial(), 3)
    assert [record.local_epochs for record in strategy.history] == [1, 2, 4]
    assert not any(record.refusals for record in strategy.history)


@pytest.mark.parametrize("name", NAMES)
def test_weight_norm_and_cosine_of_every_site_are_in_the_record(name):
    def step(k, server_round, attempt):
        return [[3.0, 0.0], [0.0, 1.0], [0.0, -1.0]][k]

    _, (first, _) = outcome_of(name, step)
    weights = [1 / 3] * 3 if name == "CoLearn" else [1 / 6, 2 / 6, 3 / 6]
    told = [first.contributions[f"partition-{k}"] for k in range(K)]
    assert [entry["weight"] for entry in told] == pytest.approx(weights)
    assert [entry["norm"] for entry in told] == pytest.approx([3.0, 1.0, 1.0], rel=1e-5)
    steps = np.array([step(k, 1, 1) for k in range(K)])
    mean = np.array(weights) @ steps
    cosines = steps @ mean / np.linalg.norm(mean) / np.linalg.norm(steps, axis=1)
    assert [entry["cosine"] for entry in told] == pytest.approx(list(cosines), abs=1e-5)


# Differential privacy and secure aggregation ------------------------------------------------------


def private_run(guard, by_run):
    strategy = CoLearn(
        K, local_epochs=1, learning_rate=0.1, fraction_evaluate=0.0, recovery=QUICK, guard=guard
    )
    wrapped = DifferentialPrivacyServerSideFixedClipping(strategy, 0.0, 1.0, K)
    grid = InProcessGrid(app_of(lambda k, i, a: [9e3, 0.0] if k == 1 else [0.1, 0.0]), K)
    if by_run:
        run(wrapped, grid, initial(), 1)
    else:
        wrapped.start(grid, initial(), 1)
    return strategy.history.records[0]


@pytest.mark.parametrize("by_run", [True, False])
def test_under_differential_privacy_it_refuses_nobody_and_records_no_norm(by_run):
    record = private_run(Guard(), by_run)
    assert len(record.participants) == K
    assert not record.refusals
    assert {entry["norm"] for entry in record.contributions.values()} == {None}


@pytest.mark.parametrize("by_run", [True, False])
def test_norms_are_recorded_under_differential_privacy_if_asked(by_run):
    record = private_run(Guard(records_private=True), by_run)
    assert len(record.participants) == K
    assert all(entry["norm"] is not None for entry in record.contributions.values())


def test_under_secure_aggregation_it_is_off_and_an_error_where_it_was_asked_for(caplog):
    from flwr_colearn import secagg

    logging.getLogger("flwr").propagate = True
    with caplog.at_level(logging.INFO, logger="flwr"):
        strategy = secagg.CoLearn(K, local_epochs=1, learning_rate=0.1)
    assert strategy.guard is None
    assert "Guard: off under SecAgg+" in caplog.text
    with pytest.raises(ColearnError, match="guard under SecAgg"):
        secagg.CoLearn(K, local_epochs=1, learning_rate=0.1, guard=Guard())


# Dynamic averaging and gradients ------------------------------------------------------------------


def learners(step):
    app = ClientApp(mods=[participant_mod])

    @learner(app)
    def train(message, context):
        k, server_round = (
            context.node_config["partition-id"],
            message.content["config"]["server-round"],
        )
        w = message.content["arrays"]["w"].numpy() + np.asarray(step(k, server_round), np.float32)
        metrics = MetricRecord({"num-examples": k + 1})
        return Message(RecordDict({"arrays": record_of(w), "metrics": metrics}), reply_to=message)

    return InProcessGrid(app, K)


@pytest.mark.parametrize("guard", [Guard(), None])
def test_a_learner_beyond_the_bound_is_refused_in_dynamic_averaging(guard):
    strategy = ModelAveraging(
        Periodic(1), K, recovery=Recovery(1, 0.0, policy=Quorum(2)), guard=guard
    )
    grid = learners(lambda k, i: 3e37 if (k, i) == (1, 2) else [0.1, 0.0])
    w = strategy.start(grid, initial(), 2).arrays["w"].numpy()
    first, second = strategy.history
    assert set(first.contributions) == {f"partition-{k}" for k in range(K)}
    weights = [first.contributions[f"partition-{k}"]["weight"] for k in range(K)]
    assert weights == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    if guard is None:
        assert w.max() > 1e36
        return
    assert w == pytest.approx([3.2, 4.0])
    assert "norm of the update: expected at most 10" in second.refusals[0]["reason"]
    assert {entry["participant"] for entry in second.refusals} == {"partition-1"}
    assert first.contributions["partition-0"]["norm"] == pytest.approx(0.1, rel=1e-5)


def test_a_resumed_dynamic_averaging_has_the_bound(tmp_path):
    def go(rounds, resume):
        strategy = ModelAveraging(
            Periodic(1),
            K,
            recovery=Recovery(0, 0.0, policy=Quorum(2)),
            checkpoints=tmp_path,
        )
        grid = learners(lambda k, i: [50.0, 0.0] if (k, i) == (1, 2) else [0.1, 0.0])
        strategy.start(grid, initial(), rounds, resume=resume)
        return strategy.history.records[-1]

    go(1, "never")
    assert "norm of the update: expected at most 10" in go(2, "auto").refusals[0]["reason"]


@pytest.mark.parametrize("kind", [FedMedian, partial(Krum, num_malicious_nodes=1)])
def test_a_stock_strategy_that_expects_malice_works_with_it(kind):
    grid = InProcessGrid(app_of(lambda k, i, a: [1.0, 0.0] if k == 1 else [0.1, 0.0]), 5)
    strategy = kind(min_available_nodes=5, fraction_evaluate=0.0)
    result = run(strategy, grid, initial(), 2, transport=Transport(recovery=QUICK))
    assert result.arrays["w"].numpy() == pytest.approx([3.2, 4.0])


def test_every_claim_of_the_threat_model_has_a_test():
    page = (ROOT / "docs" / "threat-model.md").read_text()
    claims = re.findall(r"`([\w/]+\.py)::(\w+)`", page)
    assert len(claims) > 12
    for file, test in claims:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text()


def test_every_row_of_the_page_of_faults_has_a_file_of_tests():
    page = (ROOT / "docs" / "faults.md").read_text()
    tables = [block for block in page.split("\n\n") if "| test |" in block.partition("\n")[0]]
    rows = [line for table in tables for line in table.splitlines()[2:]]
    assert len(rows) > 30
    for row in rows:
        files = re.findall(r"`([\w/]+\.py)`", row)
        assert files, row
        for file in files:
            folder = "" if file.startswith("tests/") else "tests/flwr_colearn"
            assert (ROOT / folder / file).is_file(), file


@pytest.mark.parametrize("wrong", [1, "on", True])
def test_another_value_is_an_error(wrong):
    with pytest.raises(ColearnError, match="guard: expected a Guard, or None"):
        Averaging(K, guard=wrong)


@pytest.mark.parametrize("name", ["growth", "first"])
@pytest.mark.parametrize("wrong", [0.5, -1, float("inf"), float("nan"), "100"])
def test_a_bound_is_a_finite_number_of_at_least_1(name, wrong):
    with pytest.raises(ColearnError, match=f"{name} of Guard"):
        Guard(**{name: wrong})
