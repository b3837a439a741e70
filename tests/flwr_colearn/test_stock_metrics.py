"""Metrics that participants lack, or have as NaN, under a strategy of Flower in `run`."""

import math

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedMedian, QFedAvg

from flwr_colearn import InProcessGrid, participant_mod, run
from tests.faults import record_of

MODEL = {"w": np.zeros(2, np.float32)}
COUNTS = {"min_train_nodes": 3, "min_available_nodes": 3, "min_evaluate_nodes": 3}
KEY = "num-examples"


def grid_of(*sites, names=("metrics",) * 3):
    """Participants whose replies, to training and evaluation, have these metrics."""
    app = ClientApp(mods=[participant_mod])

    def answer(message, context):
        k = context.node_config["partition-id"]
        content = RecordDict({names[k]: MetricRecord(sites[k])} if sites[k] else {})
        if message.metadata.message_type == "train":
            content["arrays"] = record_of({"w": np.full(2, k, np.float32)})
        return Message(content, reply_to=message)

    app.train()(answer)
    app.evaluate()(answer)
    return InProcessGrid(app, 3)


def run_on(grid, strategy=FedAvg, **kwargs):
    return run(strategy(**COUNTS, **kwargs), grid, record_of(MODEL), 1)


@pytest.mark.parametrize("strategy", [FedAvg, FedMedian])
def test_a_metric_is_averaged_over_the_participants_that_have_it(strategy):
    """(1 * 0.9 + 3 * 0.5) / 4, and the loss of the first and the third."""
    grid = grid_of(
        {KEY: 1, "auc": 0.9, "loss": 1.0},
        {KEY: 3, "auc": 0.5, "loss": math.nan},
        {KEY: 4, "loss": 6.0},
    )
    result = run_on(grid, strategy)
    expected = pytest.approx({"auc": 0.6, "loss": 5.0})
    assert dict(result.train_metrics_clientapp[1]) == expected
    assert dict(result.evaluate_metrics_clientapp[1]) == expected
    mean = (0 * 1 + 1 * 3 + 2 * 4) / 8 if strategy is FedAvg else 1
    np.testing.assert_allclose(result.arrays["w"].numpy(), mean)


def test_lists_of_different_lengths_have_no_mean_and_end_no_run():
    grid = grid_of({KEY: 1, "hits": [1.0, 3.0]}, {KEY: 1, "hits": [1.0]}, {KEY: 1})
    assert dict(run_on(grid).train_metrics_clientapp[1]) == {}


def test_where_all_have_all_metrics_the_bits_are_flowers():
    sites = [{KEY: k + 1, "loss": 0.1 * (k + 1), "hits": [0.3, 0.7 / (k + 1)]} for k in range(3)]
    weights = [(k + 1) / 6 for k in range(3)]
    loss = 0.1 * weights[0]
    for k in (1, 2):
        loss += sites[k]["loss"] * weights[k]
    assert run_on(grid_of(*sites)).train_metrics_clientapp[1]["loss"] == loss


def test_a_record_of_another_name_ends_no_run():
    sites = [{KEY: 1, "loss": float(k)} for k in range(3)]
    result = run_on(grid_of(*sites, names=("metrics", "m", "metrics")))
    assert dict(result.train_metrics_clientapp[1]) == {"loss": 1.0}


@pytest.mark.parametrize("bad", [{"loss": 9.0}, {KEY: [1], "loss": 9.0}, {KEY: 0, "loss": 9.0}])
def test_an_evaluation_without_a_number_of_examples_is_left_out(bad, flower_log):
    grid = grid_of({KEY: 1, "loss": 1.0}, {KEY: 1, "loss": 3.0}, {KEY: 1, "loss": 5.0})
    good = grid.client_app

    def spoil(message, context):
        reply = good(message, context)
        if message.metadata.message_type == "evaluate" and context.node_id == 2:
            reply.content["metrics"] = MetricRecord(bad)
        return reply

    grid.client_app = spoil
    result = run_on(grid)
    assert dict(result.evaluate_metrics_clientapp[1]) == {"loss": 3.0}
    assert "evaluation of participant partition-1 left out" in flower_log.text


def test_a_function_of_the_users_gets_the_metrics_that_all_have():
    seen = []

    def largest(contents, key):
        records = [next(iter(content.metric_records.values())) for content in contents]
        seen.extend(dict(record) for record in records)
        return MetricRecord({"largest": max(record["loss"] for record in records)})

    grid = grid_of({KEY: 1, "loss": 1.0}, {KEY: 1, "loss": 3.0, "auc": 1.0}, {KEY: 1, "loss": 2.0})
    result = run_on(grid, train_metrics_aggr_fn=largest)
    assert dict(result.train_metrics_clientapp[1]) == {"largest": 3.0}
    assert [sorted(each) for each in seen] == [["loss", KEY]] * 3


def test_an_aggregation_of_the_users_own_gets_all_replies_as_they_are():
    class Own(FedAvg):
        def aggregate_evaluate(self, server_round, replies):
            seen.append([sorted(reply.content["metrics"]) for reply in replies])

    seen = []
    grid = grid_of({KEY: 1, "auc": 1.0}, {KEY: 1}, {KEY: 1})
    run_on(grid, Own)
    assert seen == [[["auc", KEY], [KEY], [KEY]]]


def test_a_strategy_that_reads_a_metric_still_has_it():
    sites = [{KEY: 1, "train_loss": 1.0, "loss": 1.0} for _ in range(3)]
    sites[1]["auc"] = 0.5
    result = run_on(grid_of(*sites), QFedAvg, client_learning_rate=0.1)
    assert dict(result.train_metrics_clientapp[1]) == {"train_loss": 1.0, "loss": 1.0, "auc": 0.5}
