"""The command ``flwr-colearn``: what the files of a run say. It needs no framework."""

import argparse
import json
import sys
from collections.abc import Sequence

from ..errors import ColearnError
from ..history import History
from .calibration import calibration_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status, 2 for a file that cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        print(options.command(options))
    except ColearnError as error:
        print(f"flwr-colearn: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flwr-colearn", description="What the files of a run of flwr-colearn say."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_calibrate(commands)
    return parser


def _add_calibrate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "calibrate",
        help="the T that each epsilon would have given",
        description="Print for the history of a run the level of the relative change at each T, "
        "and the T that eq. 4 gives for each epsilon. The changes at a T are those of this run: "
        "for another epsilon than the run's the T are an estimate.",
    )
    parser.add_argument("history", help="the file of a History, JSON lines")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.set_defaults(command=_calibrate)


def _calibrate(options: argparse.Namespace) -> str:
    calibration = calibration_of(History.read(options.history))
    if options.json:
        return json.dumps(calibration.to_json(), indent=1, allow_nan=False)
    return str(calibration)
