"""Compare the paper's arms at the same number of local epochs per participant, in process.

    python -m simulations.study digits --seeds 3

TASK names a config in simulations/conf (or is a path to one). Every (arm, seed) is a unit: its
result is written as it ends, and a re-run skips what is there. Two studies have commands of their
own: ``normalization`` compares normalization schemes, ``dynamic`` operators of model averaging.
"""

import argparse
import csv
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from clients.app import app
from clients.settings import ParticipantSettings
from clients.tasks.registry import load_task, participant_trainer, server_trainer
from clients.trainer import derive_seed, follow
from flwr_colearn import ColearnError, ExponentialRate, History, InProcessGrid, LocalPlan
from flwr_colearn.report import Curve, doublings, save_figure
from simulations.arms import ARMS, Arm, arm_named, schedules
from simulations.server_app import evaluate_with, make_strategy, to_record
from simulations.settings import RunSettings, check_keys, read_config

CONF = Path(__file__).parent / "conf"
STUDIES = {"dynamic": "simulations.dynamic", "normalization": "simulations.normalization"}
OVERRIDES = ("data_dir", "examples", "total_epochs", "compression_up", "compression_down")


@dataclass(frozen=True)
class Unit:
    """The result of one arm with one seed.

    Attributes
    ----------
    arm : str
        Key of `simulations.arms.ARMS`.
    seed : int
        Of partition, initial model and training.
    epochs, accuracies : list
        The task's headline metric, such as accuracy, of the shared model on the test set (of the
        averaged outputs, for the ensemble) after so many local epochs per participant.
    doublings : list of int
        Local epochs after which T was increased.
    rounds : int
        Communication rounds; 0 where nothing is exchanged.
    bytes : int
        Of arrays, up and down, over all participants.
    seconds : float
        Wall time.
    config : dict
        The settings that gave it.
    """

    arm: str
    seed: int
    epochs: list[int]
    accuracies: list[float]
    doublings: list[int]
    rounds: int
    bytes: int
    seconds: float
    config: dict[str, object]

    @property
    def accuracy(self) -> float:
        """The headline metric at the end, in percent."""
        return 100 * self.accuracies[-1]


def run_unit(name: str, participants: ParticipantSettings, settings: RunSettings) -> Unit:
    """Train one arm with one seed."""
    arm = arm_named(name)
    started = time.perf_counter()
    if not arm.averaged:
        epochs, accuracies = train_ensemble(participants, settings)
        rounds = moved = 0
        grown: list[int] = []
    else:
        history = train_averaged(name, arm, participants, settings)
        epochs = [record.epochs_done for record in history]
        headline = load_task(participants).objective.headline
        accuracies = [record.server_metrics[headline] for record in history]
        grown = doublings(history.records)
        # Vanilla learning exchanges no models: its rounds are only where it is evaluated.
        rounds, moved = (0, 0) if arm.pooled_data else (len(history), history.bytes_total)
    seconds = round(time.perf_counter() - started, 1)
    config = unit_config(participants, settings)
    return Unit(name, participants.seed, epochs, accuracies, grown, rounds, moved, seconds, config)


def train_averaged(
    name: str, arm: Arm, participants: ParticipantSettings, settings: RunSettings
) -> History:
    """Train an arm whose participants exchange models, or vanilla: one participant with all data.

    Vanilla with the exponential rate keeps its optimizer, so that its rounds of T0 epochs are one
    uninterrupted training.
    """
    if arm.pooled_data:
        settings = replace(settings, num_participants=1)
        participants = replace(participants, keep_optimizer=not arm.cyclical)
    trainer = server_trainer(participants)
    strategy = make_strategy(replace(settings, arm=name), trainer, None)
    grid = InProcessGrid(app, settings.num_participants, run_config=participants.to_config())
    strategy.start(
        grid,
        to_record(trainer),
        num_rounds=settings.num_server_rounds or None,
        evaluate_fn=evaluate_with(trainer),
    )
    return strategy.history


def train_ensemble(
    participants: ParticipantSettings, settings: RunSettings
) -> tuple[list[int], list[float]]:
    """Train every participant alone and average their output probabilities (paper, 4.1).

    Returns
    -------
    epochs, accuracies : list
        The ensemble's headline metric on the test set, every T0 local epochs.
    """
    objective = load_task(participants).objective
    k, total = settings.num_participants, settings.total_epochs
    rate = schedules(ARMS["ensemble"], settings)["learning_rate"]
    assert isinstance(rate, ExponentialRate)
    judge = server_trainer(participants)
    trainers = [participant_trainer(participants, index, k) for index in range(k)]
    epochs, accuracies = [], []
    for done in range(0, total, settings.initial_epochs):
        plan = LocalPlan(
            round=len(epochs) + 1,
            local_epochs=min(settings.initial_epochs, total - done),
            learning_rate=rate.start(len(epochs)),
            schedule=rate.kind,
            decay=rate.decay,
            epochs_done=done,
            total_epochs=total,
        )
        probabilities = []
        for index, trainer in enumerate(trainers):
            follow(plan, trainer, derive_seed(participants.seed, index))
            judge.set_weights(trainer.get_weights())
            outputs, targets = judge.predict()
            probabilities.append(objective.probabilities(outputs))
        epochs.append(done + plan.local_epochs)
        metrics = objective.metrics(np.mean(probabilities, axis=0), targets)
        accuracies.append(metrics[objective.headline])
    return epochs, accuracies


def run_study(
    arms: Sequence[str],
    seeds: Iterable[int],
    participants: ParticipantSettings,
    settings: RunSettings,
    output: Path,
) -> list[Unit]:
    """Run the units that `output` does not hold yet, and return all of them."""
    units = []
    plan = [(arm, seed) for seed in seeds for arm in arms]
    for arm, seed in tqdm(plan, desc="arms x seeds"):
        seeded = replace(participants, seed=seed)
        path = output / "units" / f"{arm}-{seed}.json"
        unit = read_unit(path, unit_config(seeded, settings))
        if unit is None:
            unit = run_unit(arm, seeded, settings)
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(".tmp")
            scratch.write_text(json.dumps(asdict(unit)) + "\n")
            scratch.replace(path)
        units.append(unit)
    return units


def unit_config(participants: ParticipantSettings, settings: RunSettings) -> dict[str, object]:
    """Return the settings that a result depends on; not those of the machine it came from."""
    config = {**participants.to_config(), **settings.to_config()}
    for key in ("data-dir", "devices", "workers", "output-dir", "wait-for-participants"):
        del config[key]
    return config


def read_unit(path: Path, config: dict[str, object]) -> Unit | None:
    """Return the unit written earlier, or None if there is none.

    Raises
    ------
    ColearnError
        If it was written with another config.
    """
    if not path.exists():
        return None
    unit = Unit(**json.loads(path.read_text()))
    different = {key for key in config if unit.config.get(key) != config[key]}
    if different:
        raise ColearnError(
            f"{path}: expected a result of the same config, found another "
            f"{', '.join(sorted(different))}; use another --output or remove it"
        )
    return unit


def rows(units: Sequence[Unit]) -> Iterator[dict[str, object]]:
    """Yield one row of the table for each arm, mean and spread over its seeds."""
    for name in dict.fromkeys(unit.arm for unit in units):
        runs = [unit for unit in units if unit.arm == name]
        accuracies = [run.accuracy for run in runs]
        yield {
            "arm": ARMS[name].title,
            "accuracy %": f"{statistics.mean(accuracies):.2f}",
            "spread": f"{statistics.stdev(accuracies):.2f}" if len(runs) > 1 else "",
            "rounds": f"{statistics.mean(run.rounds for run in runs):.1f}",
            "MB up+down": f"{statistics.mean(run.bytes for run in runs) / 1e6:.1f}",
            "local epochs": runs[0].epochs[-1],
            "seeds": len(runs),
            "seconds": f"{statistics.mean(run.seconds for run in runs):.1f}",
        }


def write_report(units: Sequence[Unit], output: Path, title: str) -> str:
    """Write results.json, results.csv, table.md and accuracy.png; return the table."""
    table = list(rows(units))
    (output / "results.json").write_text(json.dumps([asdict(u) for u in units], indent=1) + "\n")
    with (output / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=table[0])
        writer.writeheader()
        writer.writerows(table)
    markdown = tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)
    (output / "table.md").write_text(markdown + "\n")
    first = units[0].seed
    curves = [
        Curve(ARMS[u.arm].title, u.epochs, u.accuracies, u.doublings)
        for u in units
        if u.seed == first
    ]
    save_figure(curves, output / "accuracy.png", f"{title}, seed {first}", "test accuracy")
    return markdown


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", help="name of a config in simulations/conf, or a path to one")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N-1 (default 3)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--output", type=Path, help="default outputs/study-TASK")
    parser.add_argument("--data-dir", help="overrides the config's data-dir")
    parser.add_argument("--examples", type=int, help="overrides the config's examples")
    parser.add_argument("--total-epochs", type=int, help="overrides the config's total-epochs")
    for way in ("up", "down"):
        parser.add_argument(
            f"--compression-{way}", help=f"overrides the config's compression-{way}"
        )
    return parser.parse_args(arguments)


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
    check_keys(config, str(path))
    output = options.output or Path("outputs") / f"study-{path.stem}"
    units = run_study(
        options.arms,
        range(options.seeds),
        ParticipantSettings.from_config(config),
        RunSettings.from_config(config),
        output,
    )
    print(write_report(units, output, f"{path.stem}: test accuracy"))
    print(f"\nResults, table and picture are in {output}")


if __name__ == "__main__":
    main()
