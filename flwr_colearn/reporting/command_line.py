"""The command ``flwr-colearn``: what the files of a run say. It needs no framework."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ColearnError
from ..history import History
from .calibration import calibration_of, table
from .checkpoints import FORMATS, export, listed, verified
from .report import read_runs, save_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status, 2 for a file that cannot be used, 1 for damage."""
    options = _parser().parse_args(arguments)
    try:
        answer = options.command(options)
    except ColearnError as error:
        print(f"flwr-colearn: {error}", file=sys.stderr)
        return 2
    print(answer.text)
    return int(answer.status)


class Answer(NamedTuple):
    """What a command prints, and its exit status."""

    text: str
    status: int = 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flwr-colearn", description="What the files of a run of flwr-colearn say."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_report(commands)
    _add_calibrate(commands)
    _add_checkpoints(commands)
    return parser


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report",
        help="one HTML file that shows a run, or compares several",
        description="Write the histories of one run or several as one HTML file, which needs no "
        "network and no script. It needs matplotlib: pip install 'flwr-colearn[report]'.",
    )
    parser.add_argument("histories", nargs="+", metavar="HISTORY", help="the file of a History")
    parser.add_argument(
        "--output", metavar="FILE", help="the file to write (default: report.html beside HISTORY)"
    )
    parser.add_argument("--title", default="Co-learning", help="the title of the page")
    parser.add_argument(
        "--epsilon", type=float, help="the threshold of eq. 4, drawn beside the relative change"
    )
    parser.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> Answer:
    output = Path(options.output or Path(options.histories[0]).with_name("report.html"))
    if any(output.absolute() == Path(history).absolute() for history in options.histories):
        raise ColearnError(f"report: expected an output beside the histories, found {output}")
    save_report(read_runs(options.histories, options.epsilon), output, options.title)
    return Answer(str(output))


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


def _calibrate(options: argparse.Namespace) -> Answer:
    calibration = calibration_of(History.read(options.history))
    if options.json:
        return Answer(_json(calibration.to_json()))
    return Answer(str(calibration))


def _add_checkpoints(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "checkpoints",
        help="list, verify and export the checkpoints of a run",
        description="List the checkpoints of a run, verify them, or export a shared model.",
    )
    parser.add_argument("folder", help="the folder of the checkpoints")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.set_defaults(command=_list)
    actions = parser.add_subparsers(title="actions (default: list)", metavar="ACTION")
    listing = actions.add_parser("list", help="the files, newest round first")
    listing.set_defaults(command=_list)
    verify = actions.add_parser("verify", help="read every file; exit status 1 if one is damaged")
    verify.set_defaults(command=_verify)
    export = actions.add_parser("export", help="write the arrays of the shared model to a file")
    export.add_argument("output", metavar="FILE", help=f"a new file: {', '.join(FORMATS)}")
    export.add_argument("--round", type=int, help="the round (default: the newest sound one)")
    export.add_argument(
        "--model", metavar="MODULE:FUNCTION", help="for .keras, what returns the built model"
    )
    export.set_defaults(command=_export)
    for action in (listing, verify, export):
        # Without a default of its own, so that --json before the action holds too.
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS)


def _list(options: argparse.Namespace) -> Answer:
    return Answer(_spelled(listed(options.folder), options.json))


def _verify(options: argparse.Namespace) -> Answer:
    found = verified(options.folder)
    damaged = any(not each["sound"] for each in found)
    return Answer(_spelled(found, options.json), int(damaged))


def _export(options: argparse.Namespace) -> Answer:
    done = export(options.folder, options.output, options.round, options.model)
    return Answer(_json(done) if options.json else f"{done['file']} (round {done['round']})")


def _spelled(rows: Sequence[Mapping[str, Any]], as_json: bool) -> str:
    if as_json:
        return _json(rows)
    return "\n".join(table(list(rows[0]), [list(map(str, row.values())) for row in rows]))


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False)
