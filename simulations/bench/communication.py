"""Benchmark of communication: bytes and hours until a target accuracy is reached.

The methods are federated averaging with T=1 and T=T0, cyclical rates with fixed T=T0 and T=4*T0,
co-learning, and co-learning with int8 compression of uploads. All have the same total of local
epochs, the same data, initial model and seeds. The table has the first round after which the
server's test accuracy is at a target, as a median over the seeds. MB are 10^6 bytes, both
directions, all sites.

Hours: a round takes T local epochs of one site, and one model down and one up over its link; the
sites train and transfer at the same time, and the server's link is assumed to carry them all. A
second table computes the same for the models, intervals and T0 of the paper's Table 1 (Mi et al.,
2020), over 100 local epochs; it contains no measurement.
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch

from clients.settings import ParticipantSettings
from clients.tasks.registry import participant_trainer
from flwr_colearn import History
from simulations.arms import arm_named
from simulations.settings import CONF, RunSettings, check_keys, read_config
from simulations.study.training import train_averaged

MIB = 2**20

PAPER_EPOCHS = 100
"""The number of local epochs over which Table 1's settings are compared."""

TABLE_1 = (
    ("DenseNet-40", 13, 4.5, 5),
    ("ResNet-152", 223, 30, 5),
    ("Inception-V4", 168, 60, 20),
    ("Inception-ResNet-V2", 218, 27.5, 5),
)
"""The paper's model, its MiB one way, minutes of a round before the first doubling, and T0."""


@dataclass(frozen=True)
class Budget:
    """The budget of all methods on a task: examples (0: all), local epochs, T0, targets, seeds."""

    examples: int
    total_epochs: int
    initial_epochs: int
    targets: tuple[float, ...]
    seeds: int


BUDGETS = {
    "digits": Budget(0, total_epochs=60, initial_epochs=2, targets=(0.97, 0.98, 0.985), seeds=3),
    "cifar10-cpu": Budget(
        5000, total_epochs=24, initial_epochs=2, targets=(0.4, 0.45, 0.5), seeds=1
    ),
}
"""The budgets by run config."""


@dataclass(frozen=True)
class Link:
    """A site's link to the server: Mbit/s down and up, and milliseconds one way."""

    down: float
    up: float
    latency: float

    def seconds(self, bytes_down: float, bytes_up: float) -> float:
        """Return the seconds to receive and then to send these numbers of bytes."""
        # Mbit/s are 10^6 bits a second. Each direction has the latency once.
        bits = 8 * (bytes_down / self.down + bytes_up / self.up)
        return bits / 1e6 + 2 * self.latency / 1e3


def ways(initial_epochs: int) -> dict[str, dict[str, Any]]:
    """Return the run config of every method, by its title."""
    return {
        "FedAvg, T=1": {"arm": "elr-fle", "initial-epochs": 1},
        "FedAvg, T=T0": {"arm": "elr-fle", "initial-epochs": initial_epochs},
        "CLR, T=T0": {"arm": "clr-fle", "initial-epochs": initial_epochs},
        "CLR, T=4*T0": {"arm": "clr-fle", "initial-epochs": 4 * initial_epochs},
        "co-learning": {"arm": "clr-ile", "initial-epochs": initial_epochs},
        "co-learning, int8": {
            "arm": "clr-ile",
            "initial-epochs": initial_epochs,
            "compression-up": "int8",
        },
    }


def train(config: dict[str, Any], seed: int) -> History:
    """Train by a run config and return the history of its rounds."""
    check_keys(config, "communication")
    settings = RunSettings.from_config(config)
    participants = ParticipantSettings.from_config({**config, "seed": seed})
    return train_averaged(settings.arm, arm_named(settings.arm), participants, settings)


def until(history: History, target: float, link: Link, epoch_seconds: float) -> dict[str, float]:
    """Return rounds, local epochs, MB and hours to the target; infinite if it is not reached."""
    # The history counts the bytes of all sites. Time counts one site, since they work in parallel.
    moved = seconds = 0.0
    for record in history:
        k = len(record.participants)
        down, up = record.bytes_down or 0, record.bytes_up or 0
        moved += down + up
        seconds += record.local_epochs * epoch_seconds
        seconds += link.seconds(down / k, up / k)
        if record.server_metrics["accuracy"] >= target:
            return {
                "rounds": record.round,
                "epochs": record.epochs_done,
                "MB": moved / 1e6,
                "hours": seconds / 3600,
            }
    return dict.fromkeys(("rounds", "epochs", "MB", "hours"), math.inf)


def seconds_of_an_epoch(config: dict[str, Any]) -> float:
    """Return the median seconds of a local epoch of the first site, alone on this machine."""
    # Not taken from the runs: there all participants share the machine's cores.
    settings = ParticipantSettings.from_config(config)
    trainer = participant_trainer(settings, 0, RunSettings.from_config(config).num_participants)
    seconds = []
    for seed in range(4):
        started = time.perf_counter()
        trainer.train_epoch(0.01, seed)
        seconds.append(time.perf_counter() - started)
    # The first epoch includes what happens only once, such as allocations.
    return statistics.median(seconds[1:])


def task_tables(
    task: str, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the table of each method's cost to each target on a task, and that of its runs."""
    budget = BUDGETS[task]
    config = read_config(CONF / f"{task}.toml")
    config.update(
        {
            "examples": budget.examples if options.examples is None else options.examples,
            "total-epochs": options.total_epochs or budget.total_epochs,
            "num-server-rounds": 0,
            "epsilon": options.epsilon or config["epsilon"],
            "data-dir": options.data_dir or config.get("data-dir", ""),
        }
    )
    epoch_seconds = options.epoch_seconds or seconds_of_an_epoch(config)
    rows, runs = [], []
    for title, keys in ways(options.initial_epochs or budget.initial_epochs).items():
        seeds = range(options.seeds or budget.seeds)
        histories = [train({**config, **keys}, seed) for seed in seeds]
        for target in options.targets or budget.targets:
            each = [until(h, target, link_of(options), epoch_seconds) for h in histories]
            reached = {key: statistics.median(e[key] for e in each) for key in each[0]}
            rows.append(
                {
                    "task": task,
                    "target %": round(100 * target, 2),
                    "way": title,
                    **{key: shown(value) for key, value in reached.items()},
                    "seeds": f"{sum(e['rounds'] < math.inf for e in each)}/{len(each)}",
                }
            )
        runs.append(
            {
                "task": task,
                "way": title,
                "final %": round(100 * statistics.median(map(final_accuracy, histories)), 2),
                "MB in all": round(statistics.median(h.bytes_total for h in histories) / 1e6, 3),
                "rounds x T, seed 0": path_of(histories[0].epochs_path),
                "s an epoch": round(epoch_seconds, 3),
            }
        )
    return sorted(rows, key=itemgetter("target %")), runs


def final_accuracy(history: History) -> float:
    """Return the test accuracy after the last round."""
    return float(history.records[-1].server_metrics["accuracy"])


def path_of(epochs: list[int]) -> str:
    """Return T of every round with equal neighbours grouped: ``3x2 1x4``."""
    return " ".join(f"{len(list(same))}x{t}" for t, same in groupby(epochs))


def shown(value: float) -> float | str:
    """Return a number as the table shows it."""
    return float(f"{value:.4g}") if math.isfinite(value) else "not reached"


def on_paper(link: Link) -> list[dict[str, Any]]:
    """Return the hours of the models and intervals of the paper's Table 1 on a link."""
    rows = []
    for model, mebibytes, minutes, t0 in TABLE_1:
        # The paper gives the minutes of a round of T0 epochs.
        epoch = minutes / t0
        transfer = link.seconds(mebibytes * MIB, mebibytes * MIB) / 60
        row: dict[str, Any] = {
            "model (paper)": model,
            "MiB one way": mebibytes,
            "T0": t0,
            "training min a round": minutes,
            "transfer min a round": round(transfer, 2),
        }
        for title, local_epochs in (("1", 1), ("T0", t0), ("2*T0", 2 * t0), ("4*T0", 4 * t0)):
            hours = PAPER_EPOCHS / local_epochs * (local_epochs * epoch + transfer) / 60
            row[f"hours, T={title}"] = round(hours, 2)
            row[f"% transfer, T={title}"] = round(
                100 * transfer / (local_epochs * epoch + transfer), 1
            )
        rows.append(row)
    return rows


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the benchmark's results."""
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for task in options.tasks:
        for table, more in zip((rows, runs), task_tables(task, options), strict=True):
            table.extend(more)
    return {
        "rows": rows,
        "runs": runs,
        "table 1": on_paper(link_of(options)),
        "down Mbit/s": options.down,
        "up Mbit/s": options.up,
        "latency ms": options.latency,
    }


def link_of(options: argparse.Namespace) -> Link:
    """Return the link that the command line describes."""
    return Link(options.down, options.up, options.latency)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's own options; the defaults of a task are its budget's."""
    parser.add_argument("--tasks", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--data-dir", help="overrides the config's")
    parser.add_argument("--examples", type=int, help="of all participants together; 0 for all")
    parser.add_argument("--total-epochs", type=int, help="local epochs of every participant")
    parser.add_argument("--initial-epochs", type=int, help="T0")
    parser.add_argument("--epsilon", type=float, help="overrides the config's")
    parser.add_argument("--targets", type=float, nargs="+", help="test accuracies, from 0 to 1")
    parser.add_argument("--seeds", type=int, help="seeds 0 .. N-1")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--down", type=float, default=100, help="Mbit/s to a site (default 100)")
    parser.add_argument("--up", type=float, default=20, help="Mbit/s from a site (default 20)")
    parser.add_argument("--latency", type=float, default=50, help="ms one way (default 50)")
    parser.add_argument(
        "--epoch-seconds", type=float, help="of a local epoch at a site; by default measured"
    )
