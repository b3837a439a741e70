"""Co-learning under LocalStatistics that leaves its history and model in the output folder."""

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from flwr_colearn import CoLearn, LocalStatistics

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
        normalization=LocalStatistics(),
        history=output / "history.jsonl",
    )
    arrays = {
        "weight": np.zeros(2, np.float32),
        "bn.running_mean": np.zeros(3, np.float32),
        "bn.running_var": np.ones(3, np.float32),
    }
    initial = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    result = strategy.start(grid, initial, num_rounds=int(config["rounds"]))
    np.savez(output / "model.npz", **{n: a.numpy() for n, a in result.arrays.items()})
