"""The number of examples of a site is that which it stated first."""

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flwr_colearn import (
    Averaging,
    CheckpointFolder,
    CoLearn,
    ColearnError,
    Guard,
    History,
    InProcessGrid,
    LocalPlan,
    Transport,
    participant_mod,
    run,
)

K = 2


def follow(config):
    """Iterate the plan that CoLearn sends; other strategies send none."""
    if "learning-rates" in config:
        list(LocalPlan.from_config(config))


def grid():
    """Site k adds k; site 1 has 3 examples in round 1 and states 2^40 from then on."""
    app = ClientApp(mods=[participant_mod])

    @app.train()
    def _(message, context):
        k, config = context.node_config["partition-id"], message.content["config"]
        follow(config)
        w = message.content["arrays"]["w"].numpy() + np.float32(k)
        examples = [1, 3 if config["server-round"] == 1 else 2**40][k]
        content = {
            "arrays": ArrayRecord({"w": Array(w)}),
            "metrics": MetricRecord({"num-examples": examples}),
        }
        return Message(RecordDict(content), reply_to=message)

    return InProcessGrid(app, K)


def strategy_of(kind):
    if kind == "CoLearn":
        rules = {"local_epochs": 1, "learning_rate": 0.1, "weighting": "weighted"}
        return CoLearn(K, fraction_evaluate=0.0, **rules)
    if kind == "Averaging":
        return Averaging(K, fraction_evaluate=0.0)
    return FedAvg(min_available_nodes=K, fraction_evaluate=0.0)


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("kind", ["CoLearn", "Averaging", "FedAvg"])
def test_the_number_stated_first_is_used_and_a_change_is_in_the_record(kind, resumed, tmp_path):
    def go(rounds, resume="never"):
        return run(
            strategy_of(kind),
            connected,
            ArrayRecord({"w": Array(np.full(1, 4, np.float32))}),
            rounds,
            checkpoints=tmp_path / "checkpoints",
            history=tmp_path / "history.jsonl",
            resume=resume,
        )

    connected = grid()
    if resumed:
        go(1)
    result = go(2, "auto" if resumed else "never")
    assert result.arrays["w"].numpy() == pytest.approx([4 + 2 * 0.75])

    first, second = History.read(tmp_path / "history.jsonl")
    assert not first.warnings
    (warning,) = second.warnings
    assert warning["participant"] == "partition-1"
    assert "expected 3 as stated before" in warning["reason"]
    assert second.contributions["partition-1"]["weight"] == 0.75


@pytest.mark.parametrize("kind", ["CoLearn", "Averaging", "FedAvg"])
def test_a_resume_that_trains_nothing_keeps_what_was_stated_and_the_guards_norm(kind, tmp_path):
    def go(rounds, resume="auto", evaluate_fn=None):
        return run(
            strategy_of(kind),
            connected,
            ArrayRecord({"w": Array(np.full(1, 4, np.float32))}),
            rounds,
            evaluate_fn=evaluate_fn,
            checkpoints=tmp_path,
            resume=resume,
        )

    def broken(server_round, arrays):
        if server_round == 1:
            raise ValueError("no test set")

    def saved():
        return json.dumps(CheckpointFolder(tmp_path).latest().state)

    connected = grid()
    with pytest.raises(ValueError, match="no test set"):
        go(1, "never", broken)
    assert '"largest": "1.0"' in saved()
    go(1)  # only the evaluation is left
    assert '"largest": "1.0"' in saved()
    assert go(2).arrays["w"].numpy() == pytest.approx([4 + 2 * 0.75])


def stating(*examples):
    """Site k adds k, and states a number of examples."""
    app = ClientApp(mods=[participant_mod])

    @app.train()
    def _(message, context):
        follow(message.content["config"])
        k = context.node_config["partition-id"]
        w = message.content["arrays"]["w"].numpy() + np.float32(k)
        content = {
            "arrays": ArrayRecord({"w": Array(w)}),
            "metrics": MetricRecord({"num-examples": examples[k]}),
        }
        return Message(RecordDict(content), reply_to=message)

    return InProcessGrid(app, len(examples))


@pytest.mark.parametrize("kind", ["CoLearn", "Averaging", "FedAvg"])
@pytest.mark.parametrize(
    ("examples", "share", "weights"),
    [
        ((20, 30, 2**40), 0.5, (0.2, 0.3, 0.5)),
        ((20, 2**40, 2**40), 0.4, (0.2, 0.4, 0.4)),
        ((1, 1, 2**40), 0.25, (1 / 3, 1 / 3, 1 / 3)),  # not possible, so all are equal
        ((20, 30, 50), 0.5, (0.2, 0.3, 0.5)),  # at the bound
    ],
)
def test_no_site_has_more_than_the_largest_share(kind, examples, share, weights, tmp_path):
    rules = {"local_epochs": 1, "learning_rate": 0.1, "weighting": "weighted"}
    strategy = {
        "CoLearn": lambda: CoLearn(3, fraction_evaluate=0.0, **rules),
        "Averaging": lambda: Averaging(3, fraction_evaluate=0.0),
        "FedAvg": lambda: FedAvg(min_available_nodes=3, fraction_evaluate=0.0),
    }[kind]()
    result = run(
        strategy,
        stating(*examples),
        ArrayRecord({"w": Array(np.full(1, 4, np.float32))}),
        1,
        transport=Transport(guard=Guard(largest_share=share)),
        history=tmp_path / "history.jsonl",
    )
    assert result.arrays["w"].numpy() == pytest.approx([4 + weights[1] + 2 * weights[2]])
    (record,) = History.read(tmp_path / "history.jsonl")
    found = [each["weight"] for each in record.contributions.values()]
    assert found == pytest.approx(weights)
    lowered = {f"partition-{k}" for k in range(3) if examples[k] == 2**40}
    assert {warning["participant"] for warning in record.warnings} == lowered


def test_a_share_is_above_zero_and_at_most_one():
    for share in (0.0, 1.5, -1):
        with pytest.raises(ColearnError, match="largest_share of Guard"):
            Guard(largest_share=share)
