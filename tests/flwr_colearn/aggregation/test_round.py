"""One round's mean: which participants and metrics `fold` returns."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import InProcessGrid
from flwr_colearn.aggregation import RoundMean

LIKE = {"w": np.zeros(2, np.float32)}


@pytest.fixture(autouse=True, scope="module")
def _identity():
    InProcessGrid(ClientApp(), 1)  # without which Flower lets nobody make a Message


def reply(node, *w):
    """What node replies to a message; no check has seen it."""
    sent = Message(RecordDict(), node, "train")
    content = {
        "arrays": ArrayRecord({"w": Array(np.array(w, np.float32))}),
        "metrics": MetricRecord({"num-examples": 1, "loss": float(node)}),
    }
    message = Message(RecordDict(content), reply_to=sent)
    message.metadata.__dict__["_src_node_id"] = node
    return message


@pytest.mark.parametrize("kind", [list, iter], ids=["at hand together", "one by one"])
def test_a_refused_reply_is_in_neither_mean_nor_metrics(kind):
    mean = RoundMean(LIKE)
    replies = kind([reply(1, 1, 2), reply(2, np.nan, 0), reply(3, 3, 4), reply(4, 1, 1, 1)])
    accepted = mean.fold(replies, "site-{}".format)
    assert [(name, metrics["metrics"]["loss"]) for name, metrics in accepted] == [
        ("site-1", 1.0),
        ("site-3", 3.0),
    ]
    assert mean.participants == ["site-1", "site-3"]
    assert [event.participant for event in mean.events] == ["site-2", "site-4"]
    np.testing.assert_array_equal(mean.mean()["w"], [2, 3])
