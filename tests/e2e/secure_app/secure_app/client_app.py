"""A participant that adds its number to the model, and hangs in a stage if a file says so."""

import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import participant_mod


def wait_if_ordered(message: Message, context: Context, call_next):
    """Hang, once, where a file wait-STAGE-SITE says so: until the test has ended the SuperNode."""
    request = message.content.get("colearn.secure")
    if request is not None:
        site, folder = context.node_config["partition-id"], context.run_config["output-dir"]
        order = Path(str(folder)) / f"wait-{request['stage']}-{site}"
        if order.exists():
            order.rename(order.with_suffix(".done"))
            time.sleep(600)
    return call_next(message, context)


app = ClientApp(mods=[wait_if_ordered, participant_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    site = int(context.node_config["partition-id"])
    weight = message.content["arrays"]["weight"].numpy() + (1 + site)
    content = RecordDict(
        {
            "arrays": ArrayRecord({"weight": Array(weight)}),
            "metrics": MetricRecord({"num-examples": 100 + site}),
        }
    )
    return Message(content=content, reply_to=message)
