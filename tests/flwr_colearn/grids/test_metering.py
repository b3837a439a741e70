import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import InProcessGrid
from flwr_colearn.grids import MeteringGrid, ThreadedGrid, control_bytes, group_of
from flwr_colearn.traffic import Transfers

MODEL = ArrayRecord([np.zeros(4, np.float32)])
BYTES = 128 + 16  # numpy's header and four numbers


def grid():
    app = ClientApp()

    @app.train()
    def train(message, context):
        if context.node_config["partition-id"] == 1:
            raise RuntimeError("no content comes back")
        content = {"arrays": MODEL, "metrics": MetricRecord({"loss": 1.0})}
        return Message(RecordDict(content), reply_to=message)

    return MeteringGrid(InProcessGrid(app, 2))


def messages():
    content = RecordDict({"arrays": MODEL, "config": ConfigRecord({"a": 1})})
    return [Message(content, node, "train") for node in (1, 2)]


DOWN = Transfers(models_down=1, bytes_down=BYTES, control_down=9)
UP = Transfers(models_up=1, bytes_up=BYTES, control_up=4 + 8)


def test_both_directions_are_counted_once_and_by_destination():
    metered = grid()
    assert len(list(metered.send_and_receive(messages()))) == 2
    assert metered.take() == {1: DOWN + UP, 2: DOWN}
    assert metered.take() == {}
    assert (DOWN + UP).total == 2 * BYTES + 9 + 12


def test_pushing_and_pulling_count_apart():
    metered = grid()
    ids = metered.push_messages(messages())
    assert metered.take() == {1: DOWN, 2: DOWN}
    metered.pull_messages(ids)
    assert metered.take() == {1: UP, 2: Transfers()}


def test_a_message_that_is_not_accepted_is_not_counted():
    class Refusing(InProcessGrid):
        def push_messages(self, messages):
            return [super(Refusing, self).push_messages([each])[0] for each in messages][:1]

    metered = MeteringGrid(Refusing(grid().grid.client_app, 2))
    metered.push_messages(messages())
    assert metered.take() == {1: DOWN}


def test_what_participants_exchange_in_groups_is_counted():
    app = ClientApp()

    @app.train()
    def train(message, context):
        group, rank = group_of(message.content["config"])
        group.sum(rank, np.zeros(3))
        return Message(RecordDict(), reply_to=message)

    threaded = ThreadedGrid(app, 2)
    threaded.exchanged = 1000  # of earlier runs on the same grid
    metered = MeteringGrid(threaded)
    metered.send_and_receive(messages())
    moved = 2 * 2 * 3 * 8  # in and out, two participants, three doubles
    assert metered.take()[0] == Transfers(bytes_down=moved // 2, bytes_up=moved // 2)
    assert metered.take() == {}


@pytest.mark.parametrize(
    ("value", "size"),
    [(1, 8), (2.5, 8), (True, 1), ("für", 4), ("\ud800", 3), (b"12", 2), ([1, 2], 16), (["a"], 1)],
)
def test_the_size_of_what_is_no_array(value, size):
    assert control_bytes(RecordDict({"c": ConfigRecord({"key": value})})) == 3 + size


def test_it_is_the_grid_inside_otherwise():
    metered = grid()
    assert metered.get_node_ids() == [1, 2]
    assert metered.run is metered.grid.run
    content = RecordDict()
    assert metered.create_message(content, "train", 1, "").metadata.dst_node_id == 1
