"""Running the units of a comparison of arms, and its tables and curves."""

import csv
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from clients.settings import ParticipantSettings
from clients.tasks.registry import load_task
from flwr_colearn.reporting import Curve, save_figure
from simulations.arms import ARMS
from simulations.settings import RunSettings
from simulations.study.training import ArmUnit, run_unit
from simulations.study.units import (
    check_same_data,
    checkpoint_beside,
    data_digest,
    load_or_run,
    unit_config,
)


def run_study(
    arms: Sequence[str],
    seeds: Iterable[int],
    participants: ParticipantSettings,
    settings: RunSettings,
    output: Path,
    processes: int = 1,
) -> list[ArmUnit]:
    """Run the units that `output` does not hold yet, in so many processes, and return all."""
    units = []
    plan = [(arm, seed) for seed in seeds for arm in arms]
    for arm, seed in tqdm(plan, desc="arms x seeds"):
        seeded = replace(participants, seed=seed)
        path, config = output / "units" / f"{arm}-{seed}.json", unit_config(seeded, settings)
        run = partial(run_from_checkpoint, arm, seeded, settings, path, processes)
        units.append(load_or_run(path, ArmUnit, config, run))
    check_same_data({unit.data: f"{unit.arm}, seed {unit.seed}" for unit in units})
    return units


def run_from_checkpoint(
    arm: str,
    participants: ParticipantSettings,
    settings: RunSettings,
    path: Path,
    processes: int = 1,
) -> ArmUnit:
    """Run a unit, with its checkpoint beside its result."""
    config, data = unit_config(participants, settings), data_digest(load_task(participants))
    return run_unit(arm, participants, settings, checkpoint_beside(path, config, data), processes)


def rows(units: Sequence[ArmUnit]) -> Iterator[dict[str, object]]:
    """Yield one row of the table for each arm, mean and spread over its seeds."""
    for name in dict.fromkeys(unit.arm for unit in units):
        runs = [unit for unit in units if unit.arm == name]
        scores = [run.score for run in runs]
        rates = [run.examples / max(run.seconds, 1e-9) for run in runs]
        yield {
            "arm": ARMS[name].title,
            f"{runs[0].headline} %": f"{statistics.mean(scores):.2f}",
            "spread": f"{statistics.stdev(scores):.2f}" if len(runs) > 1 else "",
            "rounds": f"{statistics.mean(run.rounds for run in runs):.1f}",
            "MB up+down": f"{statistics.mean(run.bytes for run in runs) / 1e6:.1f}",
            "local epochs": runs[0].epochs[-1],
            "seeds": len(runs),
            "seconds": f"{statistics.mean(run.seconds for run in runs):.1f}",
            "examples/s": f"{statistics.mean(rates):.0f}",
        }


def curves(units: Sequence[ArmUnit]) -> list[Curve]:
    """Return the headline metric's curve of every arm, of its first seed."""
    first = {unit.arm: unit for unit in reversed(units)}
    return [
        Curve(ARMS[name].title, first[name].epochs, first[name].values, first[name].doublings)
        for name in ARMS
        if name in first
    ]


def write_report(units: Sequence[ArmUnit], output: Path, title: str) -> str:
    """Write results.json, results.csv, table.md and a picture of the curves; return the table."""
    from tabulate import tabulate

    table = list(rows(units))
    (output / "results.json").write_text(json.dumps([asdict(u) for u in units], indent=1) + "\n")
    with (output / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=table[0])
        writer.writeheader()
        writer.writerows(table)
    markdown: str = tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)
    (output / "table.md").write_text(markdown + "\n")
    headline, seed = units[0].headline, units[0].seed
    save_figure(
        curves(units), output / f"{headline}.png", f"{title}: {headline}, seed {seed}", headline
    )
    return markdown
