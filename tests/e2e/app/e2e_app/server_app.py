"""Co-learning that doubles T and leaves its history, checkpoints and model in the output folder."""

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from flwr_colearn import CoLearn, CyclicalRate, IncreasingEpochs

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    output = Path(str(context.run_config["output-dir"]))
    strategy = CoLearn(
        int(context.run_config["participants"]),
        local_epochs=IncreasingEpochs(1, epsilon=0.9, maximum=2),
        learning_rate=CyclicalRate(0.1),
        fraction_evaluate=0.0,
        history=output / "history.jsonl",
        checkpoints=output / "checkpoints",
    )
    result = strategy.start(
        grid,
        ArrayRecord({"weights": Array(np.ones(5, np.float32))}),
        num_rounds=int(context.run_config["rounds"]),
        timeout=float(context.run_config["timeout"]),
        resume="auto",
    )
    np.save(output / "model.npy", result.arrays["weights"].numpy())
