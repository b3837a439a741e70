"""Dynamic averaging that leaves its history, checkpoints and model in the output folder."""

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from flwr_colearn import Compression, DynamicAveraging
from flwr_colearn.compression import codec_named

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    output = Path(str(config["output-dir"]))
    codec = codec_named(config["compression"])
    strategy = DynamicAveraging(
        float(config["threshold"]),
        check_every=2,
        num_learners=int(config["learners"]),
        history=output / "history.jsonl",
        checkpoints=output / "checkpoints",
        compression=Compression(codec, codec),
        seed=0,
    )
    initial = ArrayRecord({"weights": Array(np.zeros((3, 1), np.float32))})
    result = strategy.start(grid, initial, num_rounds=int(config["rounds"]), resume="auto")
    np.save(output / "model.npy", result.arrays["weights"].numpy())
