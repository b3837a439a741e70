"""The benchmarks' command line: ``python -m simulations.bench NAME``."""

import argparse
import importlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

NAMES = ("aggregation", "overhead", "communication", "scale", "peers", "sites", "secure")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line names; print its table, write its JSON."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name in NAMES:
        module = importlib.import_module(f"simulations.bench.{name}")
        command = commands.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--output", type=Path, default=Path("outputs/bench"))
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    # Flower's log lines would be mixed with the tables, and writing them takes time in a round.
    logging.getLogger("flwr").setLevel(logging.ERROR)
    result = options.run(options)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{options.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    tables = [value for value in result.values() if isinstance(value, list)]
    for table in tables:
        print(tabulate(table, headers="keys", tablefmt="github"), end="\n\n")
    print(", ".join(f"{key}: {value}" for key, value in result.items() if value not in tables))
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
