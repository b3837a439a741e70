import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import InProcessGrid
from flwr_colearn.grids.metering import MeteredGrid, Transfers

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

    return MeteredGrid(InProcessGrid(app, 2))


def messages():
    content = RecordDict({"arrays": MODEL, "config": ConfigRecord({"a": 1})})
    return [Message(content, node, "train") for node in (1, 2)]


SENT = Transfers(models_down=2, bytes_down=2 * BYTES, control_down=2 * 9)
BOTH = SENT + Transfers(models_up=1, bytes_up=BYTES, control_up=4 + 8)


def test_both_directions_are_counted_once():
    metered = grid()
    assert len(list(metered.send_and_receive(messages()))) == 2
    assert metered.take() == BOTH
    assert metered.take() == Transfers()
    assert BOTH.total == 3 * BYTES + 18 + 12


def test_pushing_and_pulling_count_apart():
    metered = grid()
    ids = metered.push_messages(messages())
    assert metered.take() == SENT
    metered.pull_messages(ids)
    assert SENT + metered.take() == BOTH


def test_it_is_the_grid_inside_otherwise():
    metered = grid()
    assert metered.get_node_ids() == [1, 2]
    assert metered.run is metered.grid.run
    content = RecordDict()
    assert metered.create_message(content, "train", 1, "").metadata.dst_node_id == 1
