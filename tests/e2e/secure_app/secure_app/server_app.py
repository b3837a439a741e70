"""Co-learning under secure aggregation; it leaves history and model in the output folder."""

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from flwr_colearn import CoLearn, SecureAggregation, Transport

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    output = Path(str(config["output-dir"]))
    strategy = CoLearn(
        int(config["participants"]),
        local_epochs=1,
        learning_rate=0.1,
        fraction_evaluate=0.0,
        history=output / "history.jsonl",
    )
    transport = Transport(secure=SecureAggregation(timeout=120.0) if config["secure"] else None)
    initial = ArrayRecord({"weight": Array(np.zeros(1000, np.float32))})
    rounds = int(config["rounds"])
    result = strategy.start(transport.connect(grid), initial, num_rounds=rounds)
    np.save(output / "model.npy", result.arrays["weight"].numpy())
