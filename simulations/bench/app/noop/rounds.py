"""The measurement of rounds of FedAvg and co-learning in turn, on the same kind of grid."""

import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from flwr_colearn import CoLearn

STRATEGIES: dict[str, Callable[[int], FedAvg]] = {
    "FedAvg": lambda k: FedAvg(fraction_evaluate=0.0, min_train_nodes=k, min_available_nodes=k),
    "CoLearn": lambda k: CoLearn(k, local_epochs=1, learning_rate=0.01, fraction_evaluate=0.0),
}


def random_model(mebibytes: float, arrays: int = 10) -> ArrayRecord:
    """Return a float32 model of that size, of equally large arrays of random numbers.

    Flower sends equal chunks only once, so a constant model would be faster than a real one.
    """
    rng = np.random.default_rng(0)
    size = round(mebibytes * 2**20 / 4 / arrays)
    return ArrayRecord({f"w{i}": Array(rng.random((1, size), np.float32)) for i in range(arrays)})


def seconds_per_round(
    grid: Grid, participants: int, model: ArrayRecord, rounds: int, repeats: int
) -> dict[str, list[float]]:
    """Return the seconds of every timed round of each strategy; the strategies take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    for repeat in range(repeats):
        for name in sorted(STRATEGIES, reverse=repeat % 2 == 0):  # neither is always the first
            seconds[name] += timed(STRATEGIES[name](participants), grid, model, rounds)
    return seconds


def timed(strategy: FedAvg, grid: Grid, model: ArrayRecord, rounds: int) -> list[float]:
    """Return the seconds of each of `rounds` rounds, from one evaluation by the server to the next.

    A first round, in which processes start and caches fill, is not timed.
    """
    ends: list[float] = []

    def note(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        ends.append(time.perf_counter())
        return None

    strategy.start(grid, model, num_rounds=1 + rounds, evaluate_fn=note)
    # ends[0] is the evaluation of the initial model, ends[1] the end of the first round.
    return [end - start for start, end in pairwise(ends[1:])]
