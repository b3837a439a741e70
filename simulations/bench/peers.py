"""Benchmark of users per second: this project, pfl-research, and Flower's simulation with Ray.

The work is that of pfl-research's CIFAR-10 benchmark: 50 of 1,000 users a round, 50 images each,
one local epoch with batches of 10 and SGD at 0.1, and its small CNN. Every side is a process of its
own and trains the same number of steps on the same images; a first round is not timed. The sides
take turns, so that other load on the machine affects all of them; the table has the median and the
fastest round.

pfl-research needs an environment of its own, with pfl and torch, on the same machine:

    python -m venv pfl-venv && pfl-venv/bin/pip install pfl torch
    python -m simulations.bench peers --pfl-python pfl-venv/bin/python
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from flwr_colearn import ColearnError
from simulations.bench.peers_app import work_config
from simulations.bench.users import Work, as_json
from simulations.launch.simulation import run_app

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT = 3600.0
RAY = "Flower with Ray, FedAvg"

APP = """
[project]
name = "peers"
version = "0.1.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "flwr-colearn"
[tool.flwr.app.components]
serverapp = "simulations.bench.peers_app:server_app"
clientapp = "simulations.bench.peers_app:client_app"
[tool.flwr.app.config]
"""


@dataclass(frozen=True)
class Side:
    """One of the implementations that are compared.

    Attributes
    ----------
    name : str
        The name in the table.
    processes, threads : int
        The number of processes that train, and of torch's threads in each of them.
    run : callable
        The function ``(work, folder)`` that does the work and writes its results to the folder.
    apart : bool
        Whether participants train in other processes than the one whose CPU time is measured.
    """

    name: str
    processes: int
    threads: int
    run: Callable[[Work, Path], Any]
    apart: bool = False


def sides(pfl_python: Path | None, cores: int) -> Iterator[Side]:
    """Yield the sides, each with one core and with all cores."""
    ours = [sys.executable, "-m", "simulations.bench.peers_app"]
    for strategy, title in (("fedavg", "in process, FedAvg"), ("colearn", "in process, CoLearn")):
        for threads in sorted({1, cores}):
            yield Side(title, 1, threads, program(ours, threads, strategy, "1"))
        if cores > 1:
            yield Side(title, cores, 1, program(ours, 1, strategy, str(cores)), apart=True)
    if pfl_python:
        single = [str(pfl_python), "-m", "simulations.bench.pfl_side"]
        for threads in sorted({1, cores}):
            yield Side("pfl-research", 1, threads, program(single, threads))
        # pfl-research uses several cores by several processes, which torchrun starts.
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cores}"]
        workers = [str(pfl_python), *torchrun, *single[1:]]
        yield Side("pfl-research, torchrun", cores, 1, program(workers, 1))
    yield Side(RAY, cores, 1, in_ray, apart=True)


def left_out(options: argparse.Namespace) -> dict[str, str]:
    """Return the sides that are not run, each with the reason."""
    reasons = {}
    if not options.pfl_python:
        reasons["pfl-research"] = "see --pfl-python"
    if options.without_ray:
        reasons[RAY] = "--without-ray"
    return reasons


def program(command: list[str], threads: int, *last: str) -> Callable[[Work, Path], Any]:
    """Return the function that runs a side as a program."""

    def run(work: Work, folder: Path) -> None:
        completed = subprocess.run(
            [*command, as_json(work), str(folder), *last],
            cwd=ROOT,
            # All sides train on the CPU, with the same number of threads.
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
        if completed.returncode:
            raise ColearnError(
                f"{' '.join(command)}: expected it to finish, found exit code "
                f"{completed.returncode}:\n{completed.stdout[-2000:]}"
            )

    return run


def in_ray(work: Work, folder: Path) -> None:
    """Run the same ClientApp with ``flwr run``, one simulated SuperNode for every user."""
    config = {**work_config(work), "output": str(folder)}
    with tempfile.TemporaryDirectory() as app:
        # Flower packs an app's own folder only, so the packages are copied there.
        for package in ("clients", "flwr_colearn", "simulations"):
            shutil.copytree(ROOT / package, Path(app) / package)
        defaults = [f"{key} = {json.dumps(value)}\n" for key, value in config.items()]
        (Path(app) / "pyproject.toml").write_text(APP + "".join(defaults))
        run_app(Path(app), work.users, config, folder / "flwr-home", TIMEOUT)


def measure(side: Side, work: Work, folder: Path) -> dict[str, Any]:
    """Run a side once; return its start-up time and the seconds and CPU seconds of every round.

    Raises
    ------
    ColearnError
        If the side did not train the number of steps of the work.
    """
    started = time.time()
    side.run(work, folder)
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    steps = round(sum(part["steps"] for part in parts), 3)
    if len(parts) == 0 or steps != work.steps:
        raise ColearnError(f"{side.name}: expected {work.steps} steps, found {steps}")
    # One tuple a lap with the laps of all processes; the first lap is the start of training.
    ends = list(zip(*(part["laps"] for part in parts), strict=True))[1:]
    clock = [max(lap[0] for lap in laps) for laps in ends]
    cpu = [sum(lap[1] for lap in laps) for laps in ends]
    return {
        "start-up": clock[0] - started,
        "rounds": [after - before for before, after in pairwise(clock)],
        "cpu": [after - before for before, after in pairwise(cpu)],
    }


def row_of(side: Side, work: Work, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the table's row for all runs of a side."""
    seconds = [second for run in runs for second in run["rounds"]]
    cpu = statistics.median(second for run in runs for second in run["cpu"])
    return {
        "side": side.name,
        "processes": side.processes,
        "threads": side.threads,
        "users/s": round(work.cohort / statistics.median(seconds), 2),
        # The fastest round is the least disturbed by other load: torch's threads wait for the
        # slowest of them.
        "fastest round, users/s": round(work.cohort / min(seconds), 2),
        "slowest round, users/s": round(work.cohort / max(seconds), 2),
        "CPU ms a user": None if side.apart else round(1000 * cpu / work.cohort, 1),
        "start-up s": round(statistics.median(run["start-up"] for run in runs), 1),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the benchmark's results."""
    work = Work(options.users, options.cohort, rounds=options.rounds)
    chosen = [
        side
        for side in sides(options.pfl_python, options.cores)
        if side.run is not in_ray or RAY not in left_out(options)
    ]
    runs: list[list[dict[str, Any]]] = [[] for _ in chosen]
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for index, side in enumerate(chosen):
                runs[index].append(measure(side, work, Path(folder) / f"{repeat}-{index}"))
    rows = [row_of(side, work, each) for side, each in zip(chosen, runs, strict=True)]
    rows += [{"side": f"{name}: not run, {reason}"} for name, reason in left_out(options).items()]
    return {
        **work_config(work),
        "steps": work.steps,
        "repeats": options.repeats,
        "seconds": {
            f"{side.name}, {side.processes} x {side.threads}": [each["rounds"] for each in done]
            for side, done in zip(chosen, runs, strict=True)
        },
        "rows": rows,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's own options."""
    parser.add_argument("--users", type=int, default=Work.users)
    parser.add_argument("--cohort", type=int, default=Work.cohort)
    parser.add_argument("--rounds", type=int, default=Work.rounds)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--pfl-python", type=Path, help="a Python with pfl and torch")
    parser.add_argument("--without-ray", action="store_true")
