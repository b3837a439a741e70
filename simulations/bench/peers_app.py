"""The sides of ``peers`` in this project: one ClientApp, in process and in a simulation."""

import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Result
from torch.utils.data import TensorDataset

from clients.client_app import make_client_app
from clients.torch.trainer import TorchTrainer
from flwr_colearn import CoLearn, InProcessGrid, LocalPlan
from simulations.bench.users import SmallCnn, Stopwatch, Work, data, task

client_app = ClientApp()
server_app = ServerApp()


@cache
def model() -> SmallCnn:
    """Return the model of this process, which all its users train in turn."""
    torch.manual_seed(0)
    return SmallCnn()


def build(context: Context) -> TorchTrainer:
    """Return the trainer of one user."""
    work = work_of(context)
    images, labels = data(work.users, work.examples)[int(context.node_config["partition-id"])]
    return TorchTrainer(
        model(), TensorDataset(images, labels), batch_size=work.batch, momentum=0.0, device="cpu"
    )


user = make_client_app(build)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train one user, and count its steps on full batches."""
    batch = work_of(context).batch
    before = model().batches[batch]
    reply = user(message, context)
    cast(MetricRecord, reply.content["metrics"])["steps"] = model().batches[batch] - before
    return reply


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run federated averaging in Flower's simulation."""
    measure(grid, work_of(context), "fedavg", Path(str(context.run_config["output"])))


def in_process() -> None:
    """Run the strategy that the command line names in this process."""
    work, folder = task()
    # By name, since this module is the program, and its workers need the module's own app.
    app = "simulations.bench.peers_app:client_app"
    processes, config = int(sys.argv[4]), work_config(work)
    with InProcessGrid(app, work.users, config, processes=processes) as grid:
        measure(grid, work, sys.argv[3], folder)


def measure(grid: Grid, work: Work, strategy: str, folder: Path) -> None:
    """Train, and write laps and steps to the folder."""
    stopwatch = Stopwatch()

    # Flower calls evaluate_fn before the first round and after every round.
    def lap(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        stopwatch.lap()
        return MetricRecord()

    start: dict[str, Any] = {"num_rounds": work.rounds + 1, "evaluate_fn": lap}
    initial = ArrayRecord(model().state_dict())
    if strategy == "colearn":
        colearn = CoLearn(
            work.cohort, local_epochs=1, learning_rate=work.rate, fraction_evaluate=0.0
        )
        result: Result = colearn.start(grid, initial, **start)
    else:
        fedavg = FedAvg(
            fraction_train=work.cohort / work.users,
            min_train_nodes=work.cohort,
            min_available_nodes=work.users,
            fraction_evaluate=0.0,
        )
        plan = ConfigRecord(LocalPlan(1, 1, work.rate).to_config())
        result = fedavg.start(grid, initial, train_config=plan, **start)
    means = [
        float(cast(float, metrics["steps"])) for metrics in result.train_metrics_clientapp.values()
    ]
    # The strategies report a round's mean over its users: the steps are the means times the cohort.
    stopwatch.write(folder, 0, work.cohort * sum(means))


def work_of(context: Context) -> Work:
    """Return the work that the run config describes."""
    config: dict[str, Any] = {field.name: context.run_config[field.name] for field in fields(Work)}
    return Work(**config)


def work_config(work: Work) -> dict[str, Any]:
    """Return the work as entries of a run config."""
    return {field.name: getattr(work, field.name) for field in fields(Work)}


if __name__ == "__main__":
    in_process()
