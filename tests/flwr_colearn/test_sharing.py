"""Which metrics leave a site, and which the server records by site."""

import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flwr_colearn import (
    CoLearn,
    ColearnError,
    History,
    InProcessGrid,
    SecureAggregation,
    Transport,
    participant_mod,
    run,
    share_metrics,
)

K = 3
TRAIN = {"num-examples": 10, "train-loss": 0.5, "accuracy": 0.8, "gradient-norm": 3.0}
EVALUATE = {"num-examples": 4, "loss": 0.7, "accuracy": 0.9, "examples:2": 3}


def app_of(*mods):
    app = ClientApp(mods=[participant_mod, *mods])

    @app.train()
    def train(message, context):
        arrays = message.content["arrays"]
        moved = {n: Array(a.numpy() + context.node_id) for n, a in arrays.items()}
        content = {"arrays": ArrayRecord(moved), "metrics": MetricRecord(TRAIN)}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        return Message(RecordDict({"metrics": MetricRecord(EVALUATE)}), reply_to=message)

    return app


def colearn(**options):
    return CoLearn(
        K,
        local_epochs=1,
        learning_rate=0.1,
        fraction_evaluate=1.0,
        wait_for_participants=0,
        **options,
    )


def record_of(app, lists, strategy=None, transport=None):
    """The record of one round in which sites have these lists in their node configs."""
    grid, history = InProcessGrid(app, K), History()
    for context, names in zip(grid.contexts.values(), lists, strict=True):
        if names is not None:
            context.node_config["share-metrics"] = names
    run(
        strategy or colearn(),
        grid,
        ArrayRecord({"w": Array(np.zeros(3, np.float32))}),
        num_rounds=1,
        history=history,
        transport=transport,
    )
    return history.records[0]


def test_without_a_list_everything_leaves_and_training_is_recorded_as_means_only():
    record = record_of(app_of(), [None] * K)
    assert record.site_metrics["partition-0"] == EVALUATE
    assert record.train_metrics == {n: v for n, v in TRAIN.items() if n != "num-examples"}
    assert record.site_train_metrics == {}


@pytest.mark.parametrize("strategy", [colearn, lambda: FedAvg(min_available_nodes=K)])
def test_a_list_of_the_site_is_all_that_leaves_and_is_recorded_by_site(strategy):
    lists = ["accuracy, train-loss", "", None]
    record = record_of(app_of(), lists, strategy())
    assert record.site_metrics["partition-0"] == {"accuracy": 0.9, "num-examples": 4}
    assert record.site_metrics["partition-1"] == {"num-examples": 4}
    assert record.site_metrics["partition-2"] == EVALUATE
    assert record.site_train_metrics == {"partition-0": {"train-loss": 0.5, "accuracy": 0.8}}
    # Of three sites one let the norm leave.
    assert record.train_metrics["gradient-norm"] == 3.0


def test_no_byte_of_what_is_not_listed_is_in_a_reply():
    grid = InProcessGrid(app_of(), 1)
    grid.contexts[1].node_config["share-metrics"] = "accuracy"
    arrays = ArrayRecord({"w": Array(np.zeros(3, np.float32))})
    for kind in ("train", "evaluate"):
        [reply] = grid.send_and_receive([Message(RecordDict({"arrays": arrays}), 1, kind)])
        assert set(reply.content["metrics"]) == {"accuracy", "num-examples"}
        assert "loss" not in repr(reply.content)
        assert "norm" not in repr(reply.content)


def test_names_may_be_patterns():
    record = record_of(app_of(), ["examples:*", "*", None])
    assert record.site_metrics["partition-0"] == {"examples:2": 3, "num-examples": 4}
    assert record.site_metrics["partition-1"] == EVALUATE


def test_an_app_s_list_and_the_site_s_must_both_have_a_metric():
    app = app_of(share_metrics("accuracy", "train-loss"))
    record = record_of(app, [None, "train-loss,gradient-norm", ""])
    trained = {"train-loss": 0.5}
    assert record.site_train_metrics == {
        "partition-0": {**trained, "accuracy": 0.8},
        "partition-1": trained,
    }
    assert "gradient-norm" not in record.train_metrics


@pytest.mark.parametrize("masked", [False, True])
def test_masked_metrics_are_nobody_s_and_what_is_not_listed_is_in_no_sum(masked):
    secure = SecureAggregation(masked_metrics=masked)
    lists = ["train-loss", "train-loss", "train-loss"]
    record = record_of(app_of(), lists, transport=Transport(secure=secure))
    assert record.train_metrics["train-loss"] == pytest.approx(0.5, rel=1e-6)
    assert set(record.train_metrics) == {"train-loss"}
    own = {f"partition-{k}": {"train-loss": 0.5} for k in range(K)}
    assert record.site_train_metrics == ({} if masked else own)


def test_a_record_with_the_metrics_of_sites_is_read_back():
    record = record_of(app_of(), ["train-loss"] * K)
    record.site_train_metrics["partition-1"]["train-loss"] = math.inf
    again = type(record).from_json(record.to_json())
    assert again.site_train_metrics == record.site_train_metrics


@pytest.mark.parametrize("value", [True, 3, 0.5])
def test_a_list_of_another_type_is_refused_before_the_site_trains(value):
    grid = InProcessGrid(app_of(), 1)
    grid.contexts[1].node_config["share-metrics"] = value
    arrays = ArrayRecord({"w": Array(np.zeros(3, np.float32))})
    message = Message(RecordDict({"arrays": arrays}), 1, "train")
    [reply] = grid.send_and_receive([message])
    assert "node config 'share-metrics'" in reply.error.reason
    with pytest.raises(ColearnError, match="share_metrics: expected names"):
        share_metrics(value)
