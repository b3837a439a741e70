"""What epsilon means: the level of the relative change at every T, and the T that epsilon reaches.

    python -m simulations.study epsilon digits --fixed 1 2 4

First CLR runs with T fixed, which show the level that every T holds. Then eq. 4 runs with epsilon
between the levels of two T: it should reach the larger one and stay there. The table has both.
"""

import argparse
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clients.settings import ParticipantSettings
from flwr_colearn import History
from simulations.arms import arm_named
from simulations.settings import CONF, RunSettings, read_config
from simulations.study.arguments import add_processes_argument, settings_of
from simulations.study.training import train_averaged

LAST = 3
"""The number of last rounds whose mean relative change is the level of a T."""


@dataclass(frozen=True)
class Study:
    """A task, and what to run on it: the T of fixed runs, and the rounds of each run.

    The participants of a round train in so many `processes`.
    """

    participants: ParticipantSettings
    settings: RunSettings
    fixed: Sequence[int]
    rounds: int
    processes: int = 1

    def level(self, local_epochs: int) -> list[float]:
        """Return the relative changes of a run with T fixed."""
        return _changes(self._run("clr-fle", initial_epochs=local_epochs))

    def path(self, epsilon: float, maximum: int) -> list[int]:
        """Return the T of every round of a run of eq. 4 from the smallest T."""
        history = self._run(
            "clr-ile",
            initial_epochs=min(self.fixed),
            epsilon=epsilon,
            max_local_epochs=maximum,
        )
        return history.epochs_path

    def _run(self, arm: str, **changes: Any) -> History:
        bounded = replace(self.settings, num_server_rounds=self.rounds, total_epochs=0)
        settings = replace(bounded, **changes)
        return train_averaged(
            arm, arm_named(arm), self.participants, settings, processes=self.processes
        )


def results(study: Study) -> dict[str, object]:
    """Return the changes at every fixed T, and the path of an epsilon between each two levels."""
    changes = {t: study.level(t) for t in study.fixed}
    levels = {t: sum(each[-LAST:]) / LAST for t, each in changes.items()}
    paths = []
    for low, high in zip(study.fixed, study.fixed[1:], strict=False):
        epsilon = math.sqrt(levels[low] * levels[high])
        path = study.path(epsilon, maximum=2 * max(study.fixed))
        paths.append({"epsilon": epsilon, "expected": high, "path": path})
    return {"changes": changes, "levels": levels, "paths": paths}


def main(arguments: Sequence[str]) -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.study epsilon",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", help="name of a config in simulations/conf")
    parser.add_argument("--fixed", type=int, nargs="+", default=[1, 2, 4], metavar="T")
    parser.add_argument("--rounds", type=int, default=12, help="of every run (default 12)")
    parser.add_argument("--examples", type=int, help="overrides the config's examples")
    parser.add_argument("--data-dir", help="overrides the config's data-dir")
    parser.add_argument("--output", type=Path, help="default outputs/epsilon-TASK.json")
    add_processes_argument(parser)
    options = parser.parse_args(arguments)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    config = read_config(CONF / f"{options.task}.toml")
    for key in ("examples", "data_dir"):
        if getattr(options, key) is not None:
            config[key.replace("_", "-")] = getattr(options, key)
    sides = settings_of(config, options.task)
    study = Study(*sides, options.fixed, options.rounds, options.processes)
    found = results(study)
    output = options.output or Path("outputs") / f"epsilon-{options.task}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def _changes(history: History) -> list[float]:
    return [float(record.relative_change or 0.0) for record in history]
