"""Linear regression by SGD on an endless stream that a participant makes from its partition id."""

import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import learner, participant_mod

app = ClientApp(mods=[participant_mod])


@learner(app)
def train(message: Message, context: Context) -> Message:
    site, config = int(context.node_config["partition-id"]), message.content["config"]
    wait_if_ordered(Path(str(context.run_config["output-dir"])), config["server-round"], site)
    weights, losses = message.content["arrays"]["weights"].numpy(), []
    for index in range(config["batches-done"], config["batches-done"] + config["mini-batches"]):
        rng = np.random.default_rng((site, index))
        x = rng.normal(size=(5, 3)).astype(np.float32)
        noise = rng.normal(size=(5, 1)).astype(np.float32)
        error = x @ weights - (x @ np.arange(1, 4, dtype=np.float32)[:, None] + noise)
        weights = (weights - np.float32(0.02) * (x.T @ error)).astype(np.float32)
        losses.append(float(np.mean(error**2)))
    metrics = {"num-examples": 5 * len(losses), "loss": float(np.mean(losses))}
    arrays = ArrayRecord({"weights": Array(weights)})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)


def wait_if_ordered(folder: Path, server_round: int, site: int) -> None:
    """Hang, once, where a file wait-R-S says so: until the test has done something to the node."""
    order = folder / f"wait-{server_round}-{site}"
    if order.exists():
        order.rename(order.with_suffix(".done"))
        time.sleep(600)
