"""Benchmark of a round's time and peak memory by number of participants and by model size.

Participants in process return a copy of the arrays they receive, so that every reply has memory of
its own, like a real one. The baseline is FedAvg. Memory is the peak of what the round allocates
(tracemalloc, in a run of its own) beyond the model that it starts from.

The benchmark fits a least-squares line to each function. Expected: time is linear in both;
co-learning's memory is linear in the model's size and constant in K, because a reply is freed once
it is in the sum, while FedAvg holds all replies.
"""

import argparse
import gc
import statistics
import tracemalloc
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import InProcessGrid
from simulations.bench.app.noop.rounds import STRATEGIES, random_model, timed
from simulations.bench.spread import ratios

MIB = 2**20

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Return a copy of the model."""
    arrays = {
        name: Array(array.dtype, array.shape, array.stype, bytes(memoryview(array.data)))
        for name, array in cast(ArrayRecord, message.content["arrays"]).items()
    }
    metrics = MetricRecord({"num-examples": 1})
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
    return Message(content=content, reply_to=message)


def measure(k: int, mebibytes: float, rounds: int) -> dict[str, Any]:
    """Return the seconds and MiB of a round with `k` participants and a model of that size."""
    row: dict[str, Any] = {"participants": k, "model MiB": mebibytes}
    model = random_model(mebibytes)
    seconds: dict[str, list[float]] = {}
    for name, strategy in STRATEGIES.items():
        gc.collect()
        seconds[name] = timed(strategy(k), InProcessGrid(app, k), model, rounds)
        row[f"{name} s"] = round(statistics.median(seconds[name]), 4)
    row.update(ratios(seconds["FedAvg"], seconds["CoLearn"]))
    # A loop of its own, because tracemalloc slows every allocation down.
    for name, strategy in STRATEGIES.items():
        grid = InProcessGrid(app, k)  # outside: making it takes more memory than a small model
        gc.collect()
        tracemalloc.start()
        timed(strategy(k), grid, model, 1)
        row[f"{name} MiB"] = round(tracemalloc.get_traced_memory()[1] / MIB, 2)
        tracemalloc.stop()
    return row


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Fit y = intercept + slope * x by least squares.

    Returns
    -------
    dict
        ``slope``, ``intercept``; ``R^2``, which has no meaning for a constant; and ``rise``, the
        largest y over the smallest.
    """
    slope, intercept = np.polyfit(x, y, 1)
    fitted = intercept + slope * np.asarray(x)
    total = float(np.square(np.asarray(y) - np.mean(y)).sum())
    residual = float(np.square(y - fitted).sum())
    return {
        "slope": round(float(slope), 6),
        "intercept": round(float(intercept), 4),
        "R^2": round(1 - residual / total, 4) if total else 1.0,
        "rise": round(max(y) / min(y), 2),
    }


def fits(rows: Sequence[dict[str, Any]], variable: str) -> list[dict[str, Any]]:
    """Return the line of every measured column over a variable."""
    x = [row[variable] for row in rows]
    columns = [f"{name} {unit}" for unit in ("s", "MiB") for name in STRATEGIES]
    return [
        {"what": column, "over": variable, **line(x, [row[column] for row in rows])}
        for column in columns
    ]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the benchmark's results."""
    measure(2, 1, 1)  # a warm-up: imports and caches are not part of the first row
    by_k = [measure(k, options.mebibytes, options.rounds) for k in options.participants]
    by_size = [measure(options.k, size, options.rounds) for size in options.sizes]
    return {
        "rows": by_k + by_size,
        "lines": fits(by_k, "participants") + fits(by_size, "model MiB"),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's own options."""
    ks, sizes = [5, 10, 20, 50, 100, 200], [1, 10, 50, 100, 150, 200, 250]
    parser.add_argument("--participants", type=int, nargs="+", default=ks, metavar="K")
    parser.add_argument("--mebibytes", type=float, default=10, help="model while K grows")
    parser.add_argument("--sizes", type=float, nargs="+", default=sizes, metavar="MIB")
    parser.add_argument("--k", type=int, default=5, help="participants while the model grows")
    parser.add_argument("--rounds", type=int, default=5, help="counted ones of each strategy")
