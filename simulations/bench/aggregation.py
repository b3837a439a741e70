"""Benchmark of the aggregation of K ResNet-152 models: time against FedAvg, and memory.

Both strategies get the same replies in turn, round after round; the table has the median round.
Co-learning gets them all at once, as FedAvg does, and one by one, as they arrive in a run. The
floor is the time to move what any sum in float64 must move when models arrive one at a time: K x 20
bytes per parameter (read the reply, read and write the sum). Every reply is a model of its own,
which takes 12 GB for K = 50.
"""

import argparse
import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flwr_colearn import CoLearn, InProcessGrid
from flwr_colearn.records import Outgoing, data_bytes, to_record
from simulations.bench.spread import ratios

REPEATS = 5


def shapes() -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shapes and types of the 932 arrays of ResNet-152 with ten classes."""
    import torch
    from torchvision.models import resnet152

    # On the meta device no memory is allocated and no weight initialised.
    with torch.device("meta"):
        state = resnet152(num_classes=10).state_dict()
    return {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in state.items()
    }


def random_model(seed: int) -> ArrayRecord:
    """Return a model of random numbers, since constant arrays would be faster than real ones."""
    rng = np.random.default_rng(seed)
    return to_record(
        {
            name: rng.random(shape, np.float32) if kind == "float32" else np.array(seed)
            for name, (shape, kind) in shapes().items()
        }
    )


def reply_to(message: Message, arrays: ArrayRecord, node_id: int) -> Message:
    """Return a train reply of a participant."""
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 10})})
    reply = Message(content, reply_to=message)
    # Flower sets the sender when a node sends its reply; here no node does.
    reply.metadata.__dict__["_src_node_id"] = node_id
    return reply


def asked(strategy: CoLearn, server_round: int, model: ArrayRecord) -> list[Message]:
    """Return the train messages of a co-learning strategy's round."""
    grid = InProcessGrid(ClientApp(), strategy.num_participants)
    return list(strategy.configure_train(server_round, model, ConfigRecord(), grid))


def time_rounds(k: int, model: ArrayRecord, models: list[ArrayRecord]) -> dict[str, list[float]]:
    """Return the seconds of each strategy's aggregation, by round; the strategies take turns."""
    at_hand, one_by_one = (CoLearn(k, local_epochs=1, learning_rate=0.01) for _ in range(2))
    ways: dict[str, tuple[FedAvg, Callable[[list[Message]], Iterable[Message]]]] = {
        "FedAvg": (FedAvg(), list),
        "CoLearn": (at_hand, list),
        "one by one": (one_by_one, iter),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for server_round in range(1, REPEATS + 1):
        # CoLearn only accepts replies of a round that it has configured.
        messages = asked(at_hand, server_round, model)
        asked(one_by_one, server_round, model)
        for name, (strategy, given) in ways.items():
            replies = [
                reply_to(message, models[index], index + 1)
                for index, message in enumerate(messages)
            ]
            gc.collect()  # outside of the measured time
            started = time.perf_counter()
            arrays, _ = strategy.aggregate_train(server_round, given(replies))
            seconds[name].append(time.perf_counter() - started)
            assert arrays is not None
            assert len(arrays) == len(model)
    return seconds


def copy_bandwidth(size: int) -> float:
    """Return the bytes per second (read and written) of a copy of `size` float32 numbers."""
    source, target = np.ones(size, np.float32), np.zeros(size, np.float32)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / statistics.median(seconds)


def peak_memory(strategy: str, k: int) -> float:
    """Return the peak memory of aggregating K new replies, in models, without the shared one.

    The models are smaller than ResNet-152: 64 arrays of 1 MiB.
    """

    def model_of(seed: int) -> ArrayRecord:
        rng, outgoing, like = np.random.default_rng(seed), Outgoing(), np.zeros((512, 512), "f4")
        arrays = {str(i): outgoing.empty(str(i), like) for i in range(64)}
        for array in arrays.values():  # in place, so that no temporary copies count
            rng.random(out=array, dtype=np.float32)
        return outgoing.record(arrays)

    model = model_of(0)
    colearn = CoLearn(k, local_epochs=1, learning_rate=0.01)
    messages = asked(colearn, 1, model)
    # A generator, since memory depends on whether a strategy holds all replies at a time.
    replies = (
        reply_to(message, model_of(index + 1), index + 1) for index, message in enumerate(messages)
    )
    tracemalloc.start()
    if strategy == "CoLearn":
        arrays, _ = colearn.aggregate_train(1, replies)
    else:
        arrays, _ = FedAvg().aggregate_train(1, list(replies))
    assert arrays is not None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / data_bytes(model)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the benchmark's results."""
    model = random_model(0)
    models = [random_model(seed) for seed in range(1, max(options.participants) + 1)]
    parameters = sum(int(np.prod(shape)) for shape, _ in shapes().values())
    bandwidth = copy_bandwidth(parameters)
    rows: list[dict[str, Any]] = []
    for k in options.participants:
        seconds = time_rounds(k, model, models)
        median = {name: statistics.median(each) for name, each in seconds.items()}
        at_hand, one_by_one = (
            ratios(seconds["FedAvg"], seconds[name]) for name in ("CoLearn", "one by one")
        )
        rows.append(
            {
                "participants": k,
                **{f"{name} s": round(value, 3) for name, value in median.items()},
                **at_hand,
                **{f"{name} one by one": value for name, value in one_by_one.items()},
                "floor s": round(k * 20 * parameters / bandwidth, 3),
            }
        )
    for row in rows:
        for strategy in ("FedAvg", "CoLearn"):
            row[f"{strategy} peak, models"] = round(peak_memory(strategy, row["participants"]), 1)
    return {
        "parameters": parameters,
        "bytes of a model": data_bytes(model),
        "copy GB/s": round(bandwidth / 1e9, 1),
        "rows": rows,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's own options."""
    parser.add_argument("--participants", type=int, nargs="+", default=[5, 20, 50], metavar="K")
