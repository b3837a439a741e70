"""What a participant may send: arrays, metrics and text that are larger than anybody needs."""

import json
import logging

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from flwr_colearn import (
    Averaging,
    Compression,
    Float16,
    InProcessGrid,
    Int8,
    Recovery,
    Transport,
    run,
)
from flwr_colearn.compression import CompressionGrid
from flwr_colearn.grids import bounded_metrics
from flwr_colearn.policy import Quorum
from tests.faults import MODEL, participants, record_of

K = 3
FORGED = "x\nERROR: forged \x1b[31m"


def grid_of(spoil, answers=("train",)):
    """A grid on which participant 1 spoils its replies of these types."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        # Not the query for the name, which has no config.
        asked = message.metadata.message_type in answers and "config" in message.content
        if asked and context.node_config["partition-id"] == 1:
            reply = spoil(message, reply) or reply
        return reply

    # Outermost, so that it changes the reply as it is sent.
    app = participants(train=lambda k, plan, arrays: arrays, mods=[mod])
    return InProcessGrid(app, K)


def averaging(**kwargs):
    return Averaging(K, recovery=Recovery(1, pause=0.0, policy=Quorum(2)), **kwargs)


CONFIG = ConfigRecord({"local-epochs": 1, "learning-rate": 0.1, "learning-rates": [0.1]})


def huge(message, reply):
    reply.content["arrays"]["fc.weight"] = Array(np.zeros(5_000_000, np.float32))


@pytest.mark.parametrize("compression", [Compression(), Compression(up=Int8(), down=Float16())])
def test_a_reply_far_larger_than_the_model_is_refused_before_it_is_decoded(
    compression, monkeypatch
):
    decoded = []
    incoming = CompressionGrid.incoming

    def note(self, sent, reply):
        arrays = [a for each in reply.content.array_records.values() for a in each.values()]
        decoded.append(sum(len(array.data) for array in arrays))
        incoming(self, sent, reply)

    monkeypatch.setattr(CompressionGrid, "incoming", note)
    strategy = averaging(compression=compression)
    strategy.start(grid_of(huge), record_of(MODEL), 1, train_config=CONFIG)
    (record,) = strategy.history
    assert record.participants == ["partition-0", "partition-2"]
    [refusal, _] = record.refusals  # the restart's too
    model = sum(len(array.data) for array in record_of(MODEL).values())
    assert refusal["participant"] == "partition-1"
    assert f"expected at most {4 * model + 2**24}, found 200" in refusal["reason"]
    # It was counted, since it has travelled.
    assert record.bytes_up > 2 * 20_000_000
    assert max(decoded, default=0) < 2**16


def test_stock_strategies_do_not_get_it_either():
    strategy = FedAvg(min_train_nodes=K, min_available_nodes=K, min_evaluate_nodes=K)
    transport = Transport(recovery=None)
    result = run(strategy, grid_of(huge), record_of(MODEL), 1, 60, CONFIG, transport=transport)
    for name, array in MODEL.items():
        np.testing.assert_array_equal(result.arrays[name].numpy(), array)


def with_metrics(message, reply):
    more = {f"{FORGED}{'k' * 10_000}{i}": 1.0 for i in range(2_000)}
    reply.content["metrics"] = MetricRecord({"num-examples": 1, "accuracy": 0.5, **more})


@pytest.mark.parametrize("stock", [False, True])
def test_metrics_are_bounded_in_history_and_checkpoints(stock, tmp_path, flower_log):
    file, folder = tmp_path / "history.jsonl", tmp_path / "checkpoints"
    grid = grid_of(with_metrics, answers=("train", "evaluate"))
    if stock:
        strategy = FedAvg(min_train_nodes=K, min_available_nodes=K, min_evaluate_nodes=K)
        run(strategy, grid, record_of(MODEL), 1, 60, CONFIG, checkpoints=folder, history=file)
    else:
        strategy = averaging(history=file, checkpoints=folder)
        strategy.start(grid, record_of(MODEL), 1, train_config=CONFIG)
    assert file.stat().st_size < 300_000
    assert sum(each.stat().st_size for each in folder.iterdir()) < 600_000
    [line] = file.read_text().splitlines()
    site = json.loads(line)["site_metrics"]["partition-1"]
    assert len(site) == 256
    assert site["accuracy"] == 0.5
    assert all(key.isprintable() and len(key) < 200 for key in site)
    assert "are left out" in flower_log.text
    assert not [line for line in flower_log.messages if "\nERROR" in line or "\x1b" in line]


def test_metrics_within_the_bounds_are_what_they_were():
    metrics = MetricRecord({"num-examples": 3, "loss": 0.25, "confusion": [1, 2, 3, 4]})
    assert dict(bounded_metrics(metrics)) == dict(metrics)


def test_lists_are_bounded_together():
    metrics = MetricRecord({"a": [1.0] * 6_000, "b": [2.0] * 6_000, "c": [3.0] * 4_000, "d": 4.0})
    assert list(bounded_metrics(metrics)) == ["a", "c", "d"]


@pytest.mark.parametrize("where", ["error", "array name", "echo"])
def test_a_participants_text_forges_no_line_and_is_bounded(where, tmp_path, flower_log):
    def spoil(message, reply):
        long = FORGED + "y" * 5_000_000
        if where == "error":
            return Message(Error(2, f"ValueError: {long}"), reply_to=message)
        if where == "array name":
            reply.content["arrays"][long] = Array(np.zeros(1))
            return None
        content = RecordDict({**reply.content})
        content["colearn"] = ConfigRecord({**reply.content["colearn"], "version": long})
        reply.content = content
        return None

    file = tmp_path / "history.jsonl"
    strategy = averaging(history=file)
    strategy.start(grid_of(spoil), record_of(MODEL), 1, train_config=CONFIG)
    (record,) = strategy.history
    [absence] = record.absences
    assert "forged" in absence["reason"]
    assert absence["reason"].isprintable()
    assert absence["reason"].endswith("(after 1 restarts, the same again)")
    assert file.stat().st_size < 20_000
    own = [each for each in flower_log.records if each.levelno == logging.WARNING]
    assert own
    assert all("\n" not in each.getMessage() and "\x1b" not in each.getMessage() for each in own)
    assert all(len(each.getMessage()) < 2_000 for each in own)
