"""Which normalization scheme holds when participants' labels are skewed, and what it costs.

    python -m simulations.study normalization digits --seeds 3

Every cell (training, partition, scheme, seed) is a unit: written as it ends, skipped by a re-run.
``--minutes`` starts no further unit after so many; what is missing is "not run" in the table.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

from clients.settings import ParticipantSettings
from flwr_colearn.normalization import SCHEMES
from simulations.settings import CONF, RunSettings, check_keys, read_config
from simulations.study.arguments import add_processes_argument
from simulations.study.normalization_cells import (
    PARTITIONS,
    TRAININGS,
    Cell,
    Unit,
    config_of,
    run_cell,
)
from simulations.study.normalization_figures import save_figure
from simulations.study.units import load_or_run


def cells(
    trainings: Sequence[str],
    partitions: Sequence[str],
    schemes: Sequence[str],
    seeds: Iterable[int],
    participants: ParticipantSettings,
    settings: RunSettings,
    test_examples: int = 0,
) -> Iterator[Cell]:
    """Yield the cells that there are, the most skewed partition first."""
    for seed in seeds:
        for partition in partitions:
            for training in trainings:
                for scheme in schemes:
                    # Every cell converts the plain model by itself.
                    seeded = replace(
                        participants, partition=partition, seed=seed, normalization="pooled"
                    )
                    cell = Cell(training, scheme, seeded, settings, test_examples)
                    if cell.possible:
                        yield cell


def run_study(plan: Sequence[Cell], output: Path, minutes: float, processes: int = 1) -> list[Unit]:
    """Run the units that `output` does not hold yet, as far as the time allows, in processes."""
    units, started = [], time.monotonic()
    for cell in tqdm(plan, desc="cells"):
        name = f"{cell.training}-{cell.participants.partition}-{cell.scheme}"
        path = output / "units" / f"{name}-{cell.participants.seed}.json"
        if path.exists() or time.monotonic() - started < 60 * minutes:
            units.append(
                load_or_run(path, Unit, config_of(cell), partial(run_cell, cell, processes))
            )
    return units


def rows(units: Sequence[Unit], plan: Sequence[Cell]) -> Iterator[dict[str, str]]:
    """Yield the rows of the table: training and scheme, and for each partition the accuracies."""
    wanted = {(cell.training, cell.scheme): None for cell in plan}
    partitions = list(dict.fromkeys(cell.participants.partition for cell in plan))
    for training, scheme in wanted:
        row = {"training": TRAININGS[training], "scheme": scheme}
        for partition in partitions:
            runs = [
                unit
                for unit in units
                if (unit.training, unit.scheme, unit.partition) == (training, scheme, partition)
            ]
            title = PARTITIONS[partition]
            row[f"{title}: global"] = _percent([u.shared_accuracy for u in runs], runs)
            row[f"{title}: local"] = _percent([u.local_accuracy for u in runs], runs)
        same = [u for u in units if (u.training, u.scheme) == (training, scheme) and not u.diverged]
        row["MB"] = f"{statistics.mean(u.bytes for u in same) / 1e6:.1f}" if same else ""
        row["of which scheme"] = (
            f"{statistics.mean(u.scheme_bytes for u in same) / 1e6:+.2f}" if same else ""
        )
        yield row


def _percent(values: Sequence[float | None], runs: Sequence[Unit]) -> str:
    """Return mean and spread in percent; the sites' own models' mean in parentheses if local."""
    if not values:
        return "not run"
    if diverged := sum(u.diverged for u in runs):
        return "diverged" if len(runs) == 1 else f"{diverged} of {len(runs)} diverged"
    if values[0] is None:
        sites = [u.sites_accuracy for u in runs if u.sites_accuracy is not None]
        return f"({100 * statistics.mean(sites):.1f})"
    numbers = [100 * value for value in values if value is not None]
    spread = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.1f}{spread}"


def write_report(units: Sequence[Unit], plan: Sequence[Cell], output: Path, title: str) -> str:
    """Write results.json, table.md and accuracy.png; return the table."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps([asdict(u) for u in units], indent=1) + "\n")
    table: str = tabulate(
        list(rows(units, plan)), headers="keys", tablefmt="github", disable_numparse=True
    )
    (output / "table.md").write_text(table + "\n")
    if units:
        save_figure(units, output / "accuracy.png", title)
    return table


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.study normalization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", help="digits, cifar10, or a path to a config")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. N-1 (default 1)")
    for name, choices in (
        ("trainings", list(TRAININGS)),
        ("partitions", list(PARTITIONS)[::-1]),
        ("schemes", list(SCHEMES)),
    ):
        parser.add_argument(
            f"--{name}", nargs="+", choices=choices, default=choices, metavar=name[:-1].upper()
        )
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--output", type=Path, help="default outputs/study-normalization-TASK")
    parser.add_argument("--data-dir", help="overrides the config's data-dir")
    parser.add_argument("--examples", type=int, help="overrides the config's examples")
    parser.add_argument("--test-examples", type=int, default=0, help="default 0: all")
    parser.add_argument("--total-epochs", type=int, help="overrides the config's total-epochs")
    add_processes_argument(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Run the study from the command line."""
    options = parse_arguments(arguments)
    logging.getLogger("flwr").setLevel(logging.ERROR)  # one progress bar says it all
    torch.set_num_threads(1)  # networks this small gain nothing from more
    path = Path(options.task)
    if path.suffix != ".toml":
        path = CONF / f"normalization-{options.task}.toml"
    config = read_config(path)
    for name in ("data_dir", "examples", "total_epochs"):
        if getattr(options, name) is not None:
            config[name.replace("_", "-")] = getattr(options, name)
    check_keys(config, str(path))
    task = path.stem.removeprefix("normalization-")
    output = options.output or Path("outputs") / f"study-normalization-{task}"
    plan = list(
        cells(
            options.trainings,
            options.partitions,
            options.schemes,
            range(options.seeds),
            ParticipantSettings.from_config(config),
            RunSettings.from_config(config),
            options.test_examples,
        )
    )
    units = run_study(plan, output, options.minutes, options.processes)
    print(write_report(units, plan, output, f"{task}: normalization schemes"))
    print(f"\n{len(units)} of {len(plan)} units; results, table and picture are in {output}")
