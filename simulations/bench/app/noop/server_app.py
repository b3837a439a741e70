"""The ServerApp that writes the seconds of all rounds to a file."""

import json
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from .rounds import random_model, seconds_per_round

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds that the run config describes."""
    config = context.run_config
    seconds = seconds_per_round(
        grid,
        int(config["participants"]),
        random_model(float(config["mebibytes"])),
        int(config["rounds"]),
        int(config["repeats"]),
    )
    Path(str(config["output"])).write_text(json.dumps(seconds))
