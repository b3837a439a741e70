"""The command of the study at convergence.

    python -m simulations.study converged cifar10 --seeds 0:3 --variants co-learning fedavg-1

Each study is described by a file in simulations/conf/converged: a task, and variants of training on
it. Every (variant, seed) is a unit: its result is written as it ends, a second call runs what is
missing, and an interrupted unit goes on from its last round. Tables and figures are on the page of
results, which ``python -m simulations.study paper page`` writes from the result files.
"""

import argparse
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from simulations.study.arguments import add_processes_argument, seeds
from simulations.study.converged.training import Run, run_config, train
from simulations.study.converged.variants import Study, read_study, studies, with_seed
from simulations.study.units import load_or_run

RESULTS = Path("docs/results/converged")


def run_study(
    study: Study,
    names: Sequence[str],
    wanted: Iterable[int],
    data_dir: str | None,
    results: Path,
    processes: int = 1,
) -> list[Run]:
    """Run the units that the results do not hold yet, in so many processes, and return all."""
    chosen = [study.variant(name) for name in names] or study.variants
    plan = [(variant, seed) for seed in wanted for variant in chosen]
    runs = []
    for variant, seed in tqdm(plan, desc="variants x seeds"):
        seeded = with_seed(variant, seed, data_dir)
        path = unit_path(results, study, variant.name, seed)
        run = partial(train, seeded, study.every, path, processes)
        runs.append(load_or_run(path, Run, run_config(seeded, study.every), run))
    return runs


def unit_path(results: Path, study: Study, variant: str, seed: int) -> Path:
    """Return the path of a unit's result."""
    return results / study.name / "units" / f"{variant}-{seed}.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a study from the command line."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    known = studies()
    parser = argparse.ArgumentParser(
        prog="python -m simulations.study converged",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=list(known))
    parser.add_argument("--variants", nargs="+", default=[], metavar="VARIANT", help="default all")
    parser.add_argument(
        "--seeds", type=seeds, default=range(3), metavar="N|A:B",
        help="seeds 0 .. N-1, or A .. B-1 (default 3)",
    )  # fmt: skip
    parser.add_argument("--data-dir", help="overrides the config's data-dir")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default {RESULTS}")
    add_processes_argument(parser)
    options = parser.parse_args(arguments)
    study = read_study(known[options.study])
    run_study(
        study, options.variants, options.seeds, options.data_dir, options.results, options.processes
    )
