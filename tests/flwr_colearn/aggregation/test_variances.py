"""Variances are not negative: neither those of a reply, nor their averages."""

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg, FedAvgM

from flwr_colearn import (
    Average,
    ColearnError,
    Compression,
    History,
    Int8,
    LocalPlan,
    Quorum,
    Recovery,
    Role,
    RunningMean,
    Transport,
    run,
)
from tests.faults import MODEL, FaultyGrid, numpy_of, record_of, strategy_of

MEAN, VARIANCE = "bn.running_mean", "bn.running_var"
PLAN = ConfigRecord(LocalPlan(1, 1, 0.1).to_config())


def model_of(variance, dtype=np.float32):
    return {MEAN: np.zeros(2, dtype), VARIANCE: np.array([1.0, variance], dtype)}


def one_by_one(mean, models):
    for model in models:
        mean.add(model)


def at_once(mean, models):
    mean.add_all([(model, 1) for model in models])


@pytest.mark.parametrize("add", [one_by_one, at_once])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_negative_variance_is_refused(dtype, add):
    mean = RunningMean(model_of(1.0, dtype))
    with pytest.raises(ColearnError, match=r"'bn\.running_var' of variances.*at least 0, found -0"):
        add(mean, [model_of(1.0, dtype), model_of(-0.5, dtype)])
    assert mean.count == (add is one_by_one)


def test_zero_is_a_variance_and_a_negative_mean_is_a_mean():
    mean = RunningMean(model_of(1.0))
    mean.add({**model_of(0.0), MEAN: np.array([-3.0, -0.0], np.float32)})
    np.testing.assert_array_equal(mean.mean()[VARIANCE], [1.0, 0.0])


def test_a_variance_without_a_partner_is_checked_by_its_role():
    mean = RunningMean({"v": np.ones(2), "w": np.ones(2)}, {"v": Role.VARIANCE})
    mean.add({"v": np.ones(2), "w": -np.ones(2)})
    with pytest.raises(ColearnError, match="'v' of variances"):
        mean.add({"v": -np.ones(2), "w": np.ones(2)})


def test_a_model_that_is_negative_already_is_no_reason_to_refuse_its_replies():
    mean = RunningMean(model_of(-1.0))
    mean.add(model_of(-2.0))
    assert mean.mean()[VARIANCE][1] == -2.0


def test_what_rounding_made_negative_is_zero_on_average():
    mean = RunningMean(model_of(1.0), rounded=True)
    mean.add(model_of(-0.5))
    np.testing.assert_array_equal(mean.mean()[VARIANCE], [1.0, 0.0])


def spoiling(k, plan, arrays):
    """Participant 2 sends a negative variance."""
    return {**arrays, VARIANCE: np.float32([-1e-3, 2])} if k == 2 else arrays


@pytest.mark.parametrize("scheme", [None, Average()])
@pytest.mark.parametrize("kind", ["CoLearn", "FedAvg"])
def test_its_sender_is_refused_and_restarted_and_the_others_stay(kind, scheme, clock):
    grid = FaultyGrid(clock, train=spoiling)
    options = {} if scheme is None else {"normalization": scheme}
    recovery, history = Recovery(1, policy=Quorum(3)), History()
    if kind == "CoLearn":
        strategy = strategy_of(recovery=recovery, history=history, **options)
        strategy.start(grid, record_of(MODEL), num_rounds=1)
    else:
        run(
            FedAvg(min_train_nodes=4, min_available_nodes=4),
            grid,
            record_of(MODEL),
            1,
            train_config=PLAN,
            transport=Transport(recovery, **options),
            history=history,
        )
    (record,) = history
    assert record.participants == ["partition-0", "partition-1", "partition-3"]
    assert {entry["participant"] for entry in record.refusals} == {"partition-2"}
    assert "of variances" in record.refusals[0]["reason"]
    assert [entry["participant"] for entry in record.restarts] == ["partition-2"]


def test_int8_may_round_a_small_variance_below_zero_and_nobody_is_refused(clock):
    def shrink(k, plan, arrays):  # from 0.5, in a step of 99 / 127
        return {**arrays, VARIANCE: np.float32([[100.0, 0.001]])}

    grid = FaultyGrid(clock, train=shrink)
    initial = {
        **MODEL,
        MEAN: np.zeros((1, 2), np.float32),
        VARIANCE: np.float32([[1.0, 0.5]]),  # the codec rounds arrays of two dimensions only
    }
    strategy = strategy_of(recovery=Recovery(0), compression=Compression(up=Int8()))
    result = strategy.start(grid, record_of(initial), num_rounds=1)
    assert strategy.history.records[0].refusals == []
    assert numpy_of(result.arrays)[VARIANCE].min() >= 0


def test_momentum_makes_no_variance_negative_under_average_either(clock):
    def shrink(k, plan, arrays):
        return {**arrays, VARIANCE: arrays[VARIANCE] / 100}

    strategy = FedAvgM(
        min_train_nodes=4, min_available_nodes=4, server_momentum=0.9, fraction_evaluate=0.0
    )
    result = run(
        strategy,
        FaultyGrid(clock, train=shrink),
        record_of(MODEL),
        3,
        train_config=PLAN,
        transport=Transport(normalization=Average()),
    )
    assert numpy_of(result.arrays)[VARIANCE].min() == 0.0  # FedAvgM alone makes it negative


BEYOND = {
    "integer": {"bn.num_batches_tracked": np.array(2**63 - 1)},
    "float64": {"fc.bias": np.full(3, 1e308)},
}


@pytest.mark.parametrize("kind", [*BEYOND, "examples"])
def test_under_run_a_reply_that_cannot_be_summed_is_refused_too(kind, clock):
    def huge(k, plan, arrays):
        return {**arrays, **BEYOND[kind]} if k == 2 and kind in BEYOND else arrays

    grid = FaultyGrid(clock, train=huge)
    if kind == "examples":
        call = grid._call

        def boast(message):
            reply = call(message)
            if message.metadata.dst_node_id == 3 and "metrics" in reply.content:
                reply.content["metrics"]["num-examples"] = 2**60
            return reply

        grid._call = boast
    history = History()
    run(
        FedAvg(min_train_nodes=4, min_available_nodes=4, fraction_evaluate=0.0),
        grid,
        record_of(MODEL),
        1,
        train_config=PLAN,
        transport=Transport(Recovery(1, policy=Quorum(3))),
        history=history,
    )
    (record,) = history
    assert record.participants == ["partition-0", "partition-1", "partition-3"]
    assert {entry["participant"] for entry in record.refusals} == {"partition-2"}


def test_a_model_that_cannot_be_summed_itself_is_the_strategys_own_affair(clock):
    initial = {**MODEL, "hash": np.array(6 * 10**18)}
    history = History()
    run(
        FedAvg(min_train_nodes=4, min_available_nodes=4, fraction_evaluate=0.0),
        FaultyGrid(clock, train=lambda k, plan, arrays: arrays),
        record_of(initial),
        1,
        train_config=PLAN,
        history=history,
    )
    assert history.records[0].refusals == []
