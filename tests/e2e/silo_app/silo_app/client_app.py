"""A participant whose running mean counts its own rounds, and says what it began a round with."""

import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import participant_mod

app = ClientApp(mods=[participant_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    site, server_round = (
        int(context.node_config["partition-id"]),
        int(message.content["config"]["server-round"]),
    )
    wait_if_ordered(Path(str(context.run_config["output-dir"])), server_round, site)
    arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
    before = float(arrays["bn.running_mean"][0])
    arrays["bn.running_mean"] = arrays["bn.running_mean"] + (1 + site)
    arrays["weight"] = arrays["weight"] + (1 + site)
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
            "metrics": MetricRecord({"num-examples": 1, "before": before}),
        }
    )
    return Message(content=content, reply_to=message)


def wait_if_ordered(folder: Path, server_round: int, site: int) -> None:
    """Hang, once, where a file wait-R-S says so: until the test has done something to the node."""
    order = folder / f"wait-{server_round}-{site}"
    if order.exists():
        order.rename(order.with_suffix(".done"))
        time.sleep(600)
