"""The study's command line, and the settings that it and a run config make up."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clients.settings import ParticipantSettings
from flwr_colearn import ColearnError
from simulations.arms import ARMS
from simulations.settings import RunSettings, check_keys

OVERRIDES = ("data_dir", "examples", "total_epochs", "compression_up", "compression_down")
"""Keys of the run config that have arguments of their own."""


def parse_arguments(arguments: Sequence[str], description: str | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.study",
        description=description,
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
    add_processes_argument(parser)
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
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM",
        help="arms of the paper's study (default all seven)",
    )  # fmt: skip
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
    settings = RunSettings.from_config(config)
    # Arms are compared after equally many local epochs; the best model is in the curves anyway.
    if settings.stop_patience:
        raise ColearnError(
            f"{where}: expected 'stop-patience' 0 in a study, whose arms train equally many local "
            f"epochs, found {settings.stop_patience}"
        )
    return ParticipantSettings.from_config(config), settings


def add_processes_argument(parser: argparse.ArgumentParser) -> None:
    """Add the number of processes in which the participants of a round train."""
    parser.add_argument(
        "--processes", type=int, default=1, metavar="P",
        help="train the participants of a round side by side in P processes (default 1)",
    )  # fmt: skip
