"""The benchmarks' command line: ``python -m simulations.bench NAME``.

A benchmark prints its tables and writes one JSON file with them, the machine and the versions;
``page`` makes a page from such files.
"""

import argparse
import importlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from simulations.bench import page
from simulations.bench.origin import machine, versions

NAMES = ("aggregation", "overhead", "communication", "scale", "peers", "sites", "secure")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line names, or make the page."""
    options = parser().parse_args(arguments)
    # Flower's log lines would be mixed with the tables, and writing them takes time in a round.
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if options.name == "page":
        page.run(options)
    else:
        measure(options)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    whole = argparse.ArgumentParser(prog="python -m simulations.bench", description=__doc__)
    commands = whole.add_subparsers(dest="name", required=True)
    for name in (*NAMES, "page"):
        module = importlib.import_module(f"simulations.bench.{name}")
        command = commands.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        if name in NAMES:
            command.add_argument("--output", type=Path, default=Path("outputs/bench"))
            command.set_defaults(run=module.run)
    return whole


def measure(options: argparse.Namespace) -> None:
    """Run a benchmark; print its tables, write its JSON."""
    origin = {"benchmark": options.name, "machine": machine(), "versions": versions()}
    result = options.run(options)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{options.name}.json"
    path.write_text(json.dumps({**origin, **result}, indent=1) + "\n")
    tables = [value for value in result.values() if isinstance(value, list)]
    for table in tables:
        print(tabulate(table, headers="keys", tablefmt="github"), end="\n\n")
    print(", ".join(f"{key}: {value}" for key, value in result.items() if value not in tables))
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
