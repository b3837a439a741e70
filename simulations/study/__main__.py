"""Compare the paper's arms at the same number of local epochs per participant, in process.

    python -m simulations.study digits --seeds 3
    python -m simulations.study cifar10-densenet40 --calibrate 10

TASK names a config in simulations/conf (or is a path to one). Every (arm, seed) is a unit: its
result is written as it ends, a re-run skips what is there, and an interrupted unit goes on from its
last round. Other studies have commands of their own: ``paper`` makes the paper's tables and figure,
``normalization`` compares normalization schemes, ``dynamic`` operators of model averaging.
"""

import argparse
import csv
import json
import logging
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clients.settings import ParticipantSettings
from clients.tasks.registry import load_task
from flwr_colearn import ColearnError
from flwr_colearn.report import Curve, save_figure
from simulations.arms import ARMS
from simulations.settings import RunSettings, check_keys, read_config
from simulations.study.calibration import calibrate
from simulations.study.training import ArmUnit, run_unit
from simulations.study.units import data_digest, digest, kept, unit_config

CONF = Path(__file__).parents[1] / "conf"
STUDIES = {
    "dynamic": "simulations.study.dynamic",
    "normalization": "simulations.study.normalization",
    "paper": "simulations.study.paper",
}
OVERRIDES = ("data_dir", "examples", "total_epochs", "compression_up", "compression_down")


def run_study(
    arms: Sequence[str],
    seeds: Iterable[int],
    participants: ParticipantSettings,
    settings: RunSettings,
    output: Path,
) -> list[ArmUnit]:
    """Run the units that `output` does not hold yet, and return all of them."""
    units = []
    plan = [(arm, seed) for seed in seeds for arm in arms]
    for arm, seed in tqdm(plan, desc="arms x seeds"):
        seeded = replace(participants, seed=seed)
        path, config = output / "units" / f"{arm}-{seed}.json", unit_config(seeded, settings)
        run = partial(run_from_checkpoint, arm, seeded, settings, path)
        units.append(kept(path, ArmUnit, config, run))
    check_same_data(units)
    return units


def run_from_checkpoint(
    arm: str, participants: ParticipantSettings, settings: RunSettings, path: Path
) -> ArmUnit:
    """Run a unit, with its checkpoint beside its result.

    The checkpoint is named after config and data, so that it never goes on from others.
    """
    data = data_digest(load_task(participants))
    config = {**unit_config(participants, settings), "data": data}
    return run_unit(arm, participants, settings, path.with_suffix(f".{digest(config)}.checkpoint"))


def check_same_data(units: Sequence[ArmUnit]) -> None:
    """Raise a ColearnError if units of one config were trained on different data."""
    found = {unit.data: f"{unit.arm}, seed {unit.seed}" for unit in units}
    if len(found) > 1:
        raise ColearnError(
            f"units: expected results of one data set, found other data in "
            f"{'; '.join(found.values())}; use another --output or remove the wrong ones"
        )


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
    markdown = tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)
    (output / "table.md").write_text(markdown + "\n")
    headline, seed = units[0].headline, units[0].seed
    save_figure(
        curves(units), output / f"{headline}.png", f"{title}: {headline}, seed {seed}", headline
    )
    return markdown


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", help="name of a config in simulations/conf, or a path to one")
    add_unit_arguments(parser)
    parser.add_argument("--output", type=Path, help="default outputs/study-TASK")
    parser.add_argument(
        "--calibrate",
        type=int,
        metavar="N",
        help="train N rounds with T fixed, and print the epsilon that doubles T after each",
    )
    parser.add_argument("--examples", type=int, help="overrides the config's examples")
    parser.add_argument("--total-epochs", type=int, help="overrides the config's total-epochs")
    for way in ("up", "down"):
        parser.add_argument(
            f"--compression-{way}", help=f"overrides the config's compression-{way}"
        )
    return parser.parse_args(arguments)


def add_unit_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which units to run, and where the data is."""
    parser.add_argument(
        "--seeds", type=seeds, default=range(3), metavar="N|A:B",
        help="seeds 0 .. N-1, or A .. B-1 (default 3)",
    )  # fmt: skip
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--data-dir", help="overrides the config's data-dir")


def seeds(text: str) -> range:
    """Read ``N`` or ``A:B``, so that a study can be shared between machines."""
    first, colon, last = text.partition(":")
    found = range(int(first), int(last)) if colon else range(int(first))
    if not found:
        raise argparse.ArgumentTypeError(f"expected at least one seed, found {text!r}")
    return found


def settings_of(config: Mapping[str, Any], where: str) -> tuple[ParticipantSettings, RunSettings]:
    """Return both sides' settings from a run config, whose keys are checked."""
    check_keys(config, where)
    return ParticipantSettings.from_config(config), RunSettings.from_config(config)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a study from the command line."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] in STUDIES:
        import_module(STUDIES[words[0]]).main(words[1:])
        return
    options = parse_arguments(arguments)
    logging.getLogger("flwr").setLevel(logging.WARNING)  # one progress bar says it all
    path = Path(options.task)
    config = read_config(path if path.suffix == ".toml" else CONF / f"{options.task}.toml")
    for name in OVERRIDES:
        if getattr(options, name) is not None:
            config[name.replace("_", "-")] = getattr(options, name)
    participants, settings = settings_of(config, str(path))
    if options.calibrate is not None:
        print(calibrate(participants, settings, options.calibrate))
        return
    output = options.output or Path("outputs") / f"study-{path.stem}"
    units = run_study(options.arms, options.seeds, participants, settings, output)
    try:
        print(write_report(units, output, path.stem))
    except (ModuleNotFoundError, ColearnError) as error:  # a machine that only trains needs neither
        print(f"No table or no picture ({error}); pip install 'flwr-colearn[report]'")
    print(f"\nResults are in {output}")


if __name__ == "__main__":
    main()
