"""Benchmark of co-learning's overhead in training, and in rounds in which nothing is trained.

Training: a run of co-learning in process against a bare PyTorch loop over the same batches, in the
same order, with the same model, transform and SGD. The run's time includes serialisation, checks
and averaging; the loop's time is that of training alone. The target is less than 2 % more time.

Rounds: participants that return the arrays they receive, co-learning against Flower's FedAvg: in
process, in Flower's simulation, and with five SuperNodes under TLS and authentication on loopback.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from clients.app import app
from clients.settings import ParticipantSettings
from clients.tasks.registry import participant_trainer, server_trainer
from clients.torch.trainer import TorchTrainer
from clients.trainer import derive_seed
from flwr_colearn import CoLearn, ColearnError, CyclicalRate, InProcessGrid, LocalPlan
from simulations.bench.app.noop.client_app import app as noop_app
from simulations.bench.app.noop.rounds import random_model, seconds_per_round
from simulations.bench.spread import ratios
from simulations.launch.deployment import Deployment
from simulations.launch.simulation import run_app
from simulations.server_app import to_record
from simulations.settings import CONF, read_config

APP = Path(__file__).parent / "app"
RATE = CyclicalRate(0.05)
K = 5
ROUNDS_IN_PROCESS = 20
ROUNDS_IN_SIMULATION = 10


def bare_loop(
    trainer: TorchTrainer, settings: ParticipantSettings, plan: LocalPlan, seed: int
) -> nn.Module:
    """Train the trainer's model in a plain PyTorch loop, and return it."""
    model, transform = trainer.model, trainer.transform
    images, labels = trainer.train_set.tensors  # type: ignore[attr-defined]
    optimizer = torch.optim.SGD(
        model.parameters(), momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    criterion = nn.CrossEntropyLoss()
    model.train()
    for epoch in plan:
        # The seeds of `clients.trainer.follow`, so that both sides train on the same batches.
        epoch_seed = derive_seed(seed, plan.epochs_done + epoch.index)
        torch.manual_seed(epoch_seed)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch_seed))
        optimizer.param_groups[0]["lr"] = epoch.learning_rate
        for batch in order.split(settings.batch_size):
            optimizer.zero_grad(set_to_none=True)
            loss = criterion(model(transform(images[batch], True)), labels[batch])
            loss.backward()
            optimizer.step()
    return model


def torch_trainer(settings: ParticipantSettings, index: int) -> TorchTrainer:
    """Return a participant's trainer, checked to be a `TorchTrainer`."""
    trainer = participant_trainer(settings, index, K)
    assert isinstance(trainer, TorchTrainer)
    return trainer


def bare(settings: ParticipantSettings, rounds: int, epochs: int) -> Callable[[], None]:
    """Return a function that trains all rounds as bare loops, participant by participant."""
    trainers = [torch_trainer(settings, index) for index in range(K)]
    plans = [LocalPlan.of(RATE, index + 1, epochs, index * epochs) for index in range(rounds)]

    def run() -> None:
        for plan in plans:
            for index, trainer in enumerate(trainers):
                bare_loop(trainer, settings, plan, derive_seed(settings.seed, index))

    return run


def colearn(settings: ParticipantSettings, rounds: int, epochs: int) -> Callable[[], Any]:
    """Return a function that runs co-learning; loading the data is not part of it."""
    strategy = CoLearn(K, local_epochs=epochs, learning_rate=RATE, fraction_evaluate=0.0)
    grid = InProcessGrid(app, K, run_config=settings.to_config())
    model = to_record(server_trainer(settings))
    return partial(strategy.start, grid, model, num_rounds=rounds)


def clocked(run: Callable[[], Any]) -> tuple[float, float]:
    """Return the wall-clock seconds and the CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def training_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure training with and without co-learning, in turns."""
    config = read_config(CONF / f"{options.task}.toml")
    config.update({"examples": options.examples, "devices": "cpu"})
    if options.data_dir:
        config["data-dir"] = options.data_dir
    settings = ParticipantSettings.from_config(config)
    colearn(settings, 1, 1)()  # loads the data, which is not counted
    seconds: dict[str, list[tuple[float, float]]] = {"bare": [], "colearn": []}
    # In turns and in alternating order, so that other load on the machine affects both alike.
    for repeat in range(options.repeats):
        for way in (bare, colearn) if repeat % 2 else (colearn, bare):
            run = way(settings, options.epoch_rounds, options.epochs)
            seconds[way.__name__].append(clocked(run))
    return [
        row(
            f"{options.task}, {title}",
            [each[clock] for each in seconds["bare"]],
            [each[clock] for each in seconds["colearn"]],
        )
        for clock, title in enumerate(("wall", "CPU"))
    ]


def in_process(mebibytes: float, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of rounds in this process."""
    grid = InProcessGrid(noop_app, K)
    model = random_model(mebibytes)
    return seconds_per_round(grid, K, model, ROUNDS_IN_PROCESS, options.repeats)


def in_simulation(mebibytes: float, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of rounds in Flower's simulation."""
    with TemporaryDirectory() as folder:
        output = Path(folder) / "seconds.json"
        config = {
            "output": str(output),
            "participants": K,
            "mebibytes": mebibytes,
            "rounds": ROUNDS_IN_SIMULATION,
        }
        done = run_app(APP, K, config, Path(folder) / "home", timeout=600)
        return read(output, done.stdout)


def in_deployment(mebibytes: float, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of rounds with SuperNodes on loopback."""
    with TemporaryDirectory() as folder:
        deployment = Deployment(Path(folder))
        output = Path(folder) / "seconds.json"
        try:
            deployment.start(K)
            deployment.run(
                APP, output=output, participants=K, mebibytes=mebibytes, rounds=options.rounds
            ).wait(timeout=1800)
            return read(output, (Path(folder) / "run.log").read_text())
        finally:
            deployment.stop()


def read(path: Path, log: str) -> dict[str, list[float]]:
    """Return the seconds that the app wrote.

    Raises
    ------
    ColearnError
        If the app did not finish.
    """
    if not path.exists():
        raise ColearnError(f"rounds: expected them to finish, found {log[-2000:]}")
    seconds: dict[str, list[float]] = json.loads(path.read_text())
    return seconds


def row(what: str, yardstick: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Return the medians of both sides, and the median and range of their ratios."""
    return {
        "what": what,
        "yardstick s": round(statistics.median(yardstick), 4),
        "co-learning s": round(statistics.median(ours), 4),
        **ratios(yardstick, ours),
        "pairs": len(ours),
    }


ROUNDS = {"process": in_process, "simulation": in_simulation, "deployment": in_deployment}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the benchmark's results."""
    torch.set_num_threads(options.threads)
    rows = training_rows(options) if "training" in options.parts else []
    for where, measure in ROUNDS.items():
        for mebibytes in options.mebibytes if where in options.parts else []:
            seconds = measure(mebibytes, options)
            title = f"round of no-ops, {mebibytes:g} MiB, {where}"
            rows.append(row(title, seconds["FedAvg"], seconds["CoLearn"]))
    return {"participants": K, "threads": options.threads, "rows": rows}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's own options."""
    parts = ("training", *ROUNDS)
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--task", default="cifar10", help="a config in simulations/conf")
    parser.add_argument("--data-dir", help="overrides the config's")
    parser.add_argument("--examples", type=int, default=10_000, help="of all participants together")
    parser.add_argument("--epochs", type=int, default=1, help="local epochs of a round")
    parser.add_argument("--epoch-rounds", type=int, default=1, help="rounds of training")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--repeats", type=int, default=5, help="of training, and in process")
    parser.add_argument("--mebibytes", type=float, nargs="+", default=[0.04, 10.0])
    parser.add_argument("--rounds", type=int, default=3, help="counted ones of a deployment's turn")
