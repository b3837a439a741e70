"""Least squares by gradient descent on data that a participant makes from its partition id."""

import os
import signal
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import LocalPlan, participant_mod

app = ClientApp(mods=[participant_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    site = int(context.node_config["partition-id"])
    plan = LocalPlan.from_config(message.content["config"])
    suffer_fault(Path(context.run_config["faults-dir"]), plan.round, site)
    rng = np.random.default_rng(site)
    x = rng.normal(size=(100, 4)).astype(np.float32)
    y = x @ np.arange(4, dtype=np.float32) + site
    weights = message.content["arrays"]["weights"].numpy()
    for epoch in plan:
        error = x @ weights[:4] + weights[4] - y
        gradient = np.append(error @ x, error.sum()).astype(np.float32) / len(x)
        weights = (weights - np.float32(epoch.learning_rate) * gradient).astype(np.float32)
    content = RecordDict(
        {
            "arrays": ArrayRecord({"weights": Array(weights)}),
            "metrics": MetricRecord({"num-examples": len(x), "loss": float(error @ error)}),
        }
    )
    return Message(content=content, reply_to=message)


def suffer_fault(folder: Path, server_round: int, site: int) -> None:
    """Do what a file round-R-site-S says, once."""
    order = folder / f"round-{server_round}-site-{site}"
    if not order.exists():
        return
    fault = order.read_text()
    order.rename(order.with_suffix(".done"))
    if fault == "raise":
        raise RuntimeError("injected fault")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault in ("hang", "wait"):  # "wait": until the test has done something to the SuperNode
        time.sleep(600)
