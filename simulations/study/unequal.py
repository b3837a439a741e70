"""Sites of unequal sizes: plain mean, weighted mean, and equal steps at every site.

    python -m simulations.study unequal digits --seeds 3

Five sites have 1, 2, 4, 8 and 16 parts of the data. Every treatment is co-learning with the same
budget, and differs from the config in `weighting` and `local-steps` only. The results are units, as
those of the other studies. A local epoch of equal steps has as many steps as all sites together
have mini-batches, over their number, so that all treatments train the same number of steps in all.
"""

import argparse
import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clients.data import batches_in
from clients.settings import ParticipantSettings
from clients.tasks.registry import shards
from simulations.settings import CONF, RunSettings, read_config
from simulations.study.arguments import add_processes_argument, seeds, settings_of
from simulations.study.comparison import run_study
from simulations.study.differences import difference
from simulations.study.training import ArmUnit

PLAIN = "1/K, local epochs"
ARM = "clr-ile"


def treatments(steps: int) -> dict[str, dict[str, Any]]:
    """Return the settings of every treatment by its name in the table."""
    return {
        PLAIN: {},
        "weights, local epochs": {"weighting": "weighted"},
        "1/K, equal steps": {"local_steps": steps},
    }


def mean_batches(participants: ParticipantSettings, settings: RunSettings) -> int:
    """Return the mini-batches of an epoch, the mean over the sites."""
    k = settings.num_participants
    sizes = [len(shard) for shard in shards(participants, k)]
    return round(sum(batches_in(size, participants.batch_size) for size in sizes) / k)


def rows(units: Mapping[str, Sequence[ArmUnit]]) -> Iterator[dict[str, object]]:
    """Yield one row for each treatment, with its difference to the plain mean seed by seed."""
    for name, runs in units.items():
        gap, n = difference(runs, units[PLAIN]), len(runs)
        assert gap is not None  # all treatments have the same seeds
        yield {
            "treatment": name,
            f"{runs[0].headline} %": f"{statistics.mean(run.score for run in runs):.2f}",
            "spread": f"{statistics.stdev([run.score for run in runs]):.2f}" if n > 1 else "",
            "against 1/K": "" if name == PLAIN else f"{gap.mean:+.2f} ({gap.error or 0.0:.2f})",
            "rounds": f"{statistics.mean(run.rounds for run in runs):.1f}",
            "seeds": n,
        }


def run(
    participants: ParticipantSettings,
    settings: RunSettings,
    which: range,
    output: Path,
    processes: int = 1,
) -> dict[str, list[ArmUnit]]:
    """Run the units that `output` does not hold yet, in processes; return all by treatment."""
    participants = replace(participants, partition="shares")
    steps = mean_batches(participants, settings)
    units = {}
    for name, changes in treatments(steps).items():
        folder = output / name.replace("1/K", "plain").replace(", ", "-").replace(" ", "-")
        changed = replace(settings, **changes)
        units[name] = run_study([ARM], which, participants, changed, folder, processes)
    return units


def main(arguments: Sequence[str]) -> None:
    """Run the study from the command line."""
    from tabulate import tabulate

    parser = argparse.ArgumentParser(
        prog="python -m simulations.study unequal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", help="name of a config in simulations/conf")
    parser.add_argument("--seeds", type=seeds, default=range(3), help="N or A:B (default 3)")
    parser.add_argument("--output", type=Path, help="default outputs/unequal-TASK")
    add_processes_argument(parser)
    options = parser.parse_args(arguments)
    logging.getLogger("flwr").setLevel(logging.WARNING)  # one progress bar says it all
    participants, settings = settings_of(read_config(CONF / f"{options.task}.toml"), options.task)
    output = options.output or Path("outputs") / f"unequal-{options.task}"
    units = run(participants, settings, options.seeds, output, options.processes)
    table = list(rows(units))
    print(tabulate(table, headers="keys", tablefmt="github", disable_numparse=True))
    print(f"\nResults are in {output}")
