"""Layers that change messages: ids, errors and contents as whoever uses them expects."""

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import ColearnError, InProcessGrid
from flwr_colearn._flwr import CLIENT_RAISED, REFUSED
from flwr_colearn.errors import NotAnsweredError
from flwr_colearn.grids import RewritingGrid


class Doubling(RewritingGrid):
    """Sends twice the number, and takes half of what comes back."""

    def outgoing(self, message):
        number = message.content["config"]["number"]
        if number == 0:
            return message.content
        return RecordDict({"config": ConfigRecord({"number": 2 * number})})

    def incoming(self, sent, reply):
        asked, found = sent.content["config"]["number"], reply.content["metrics"]["number"]
        if asked == 13:
            raise ColearnError("expected luck, found 13")
        if asked == 14:
            raise NotAnsweredError("asked too early")
        assert found == 2 * asked + 1
        reply.content["metrics"]["number"] = found / 2


def app():
    app = ClientApp()

    @app.train()
    def train(message, context):
        number = message.content["config"]["number"]
        if number == 2 * 15:
            raise ValueError("broken")
        metrics = MetricRecord({"number": number + 1})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


@pytest.fixture
def grid():
    return Doubling(Doubling(InProcessGrid(app(), 1)))


def message_of(number):
    content = RecordDict({"config": ConfigRecord({"number": number})})
    return Message(content, 1, "train")


def ways():
    def at_once(grid, message):
        return list(grid.send_and_receive([message]))

    def in_two(grid, message):
        ids = list(grid.push_messages([message]))
        assert ids == [message.metadata.message_id]
        return list(grid.pull_messages(ids))

    return pytest.mark.parametrize("exchange", [at_once, in_two])


@ways()
def test_a_layer_is_not_seen_by_whoever_uses_it(exchange):
    message = message_of(3)
    (reply,) = exchange(Doubling(InProcessGrid(app(), 1)), message)
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    assert message.content["config"]["number"] == 3
    assert reply.content["metrics"]["number"] == 3.5


@ways()
def test_a_message_that_needs_no_change_passes_as_it_is(exchange):
    message = message_of(0)
    (reply,) = exchange(Doubling(InProcessGrid(app(), 1)), message)
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    assert reply.content["metrics"]["number"] == 1


@ways()
@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [
        (13, REFUSED, "expected luck, found 13"),
        (14, CLIENT_RAISED, "asked too early"),
        (15, CLIENT_RAISED, "broken"),
    ],
)
def test_what_is_no_good_becomes_an_error_reply(exchange, number, code, reason):
    message = message_of(number)
    (reply,) = exchange(Doubling(InProcessGrid(app(), 1)), message)
    assert reply.has_error()
    assert reply.error.code == code
    assert reason in reply.error.reason
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    assert reply.metadata.src_node_id == 1


@ways()
def test_layers_may_be_stacked(exchange):
    class Adding(RewritingGrid):
        def outgoing(self, message):
            number = message.content["config"]["number"]
            return RecordDict({"config": ConfigRecord({"number": number + 10})})

        def incoming(self, sent, reply):
            assert sent.content["config"]["number"] == 1
            reply.content["metrics"]["number"] -= 10

    message = message_of(1)
    (reply,) = exchange(Adding(Doubling(InProcessGrid(app(), 1))), message)
    assert reply.content["metrics"]["number"] == (2 * 11 + 1) / 2 - 10
    assert reply.metadata.reply_to_message_id == message.metadata.message_id


def test_a_message_may_be_sent_again(grid):
    message = message_of(0)
    first = message.metadata.message_id
    grid = Doubling(InProcessGrid(app(), 1))
    list(grid.send_and_receive([message]))
    assert message.metadata.message_id != first


def test_nothing_is_remembered_of_messages_that_are_let_go():
    grid = Doubling(InProcessGrid(app(), 1))
    ids = list(grid.push_messages([message_of(3), message_of(4)]))
    grid.forget(ids[:1])
    late, reply = grid.pull_messages(ids)
    assert late.content["metrics"]["number"] == 7  # passed on as it is
    assert reply.content["metrics"]["number"] == 4.5
    assert not grid._sent
