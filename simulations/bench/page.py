"""The page of measured figures, made from the JSON files of benchmarks on several machines.

Every file is what a benchmark wrote, or figures of a measurement that was published without such a
file, whose ``source`` says so. A ratio is stated as its range over all files of one version.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from flwr_colearn import ColearnError
from simulations.launch.simulation import ROOT

VERSION = "flwr-colearn"
RESULTS, PAGE = ROOT / "docs" / "results" / "bench", ROOT / "docs" / "performance.md"


class Section(NamedTuple):
    """What the page says of one benchmark.

    Attributes
    ----------
    title : str
        The heading.
    text : str
        What is compared.
    table : str
        The list in the JSON that holds the figures.
    key : tuple of str
        The columns that say what a row measures.
    figures : tuple of str
        The columns whose range over all measurements is stated.
    """

    title: str
    text: str
    table: str
    key: tuple[str, ...]
    figures: tuple[str, ...]


SECTIONS = {
    "aggregation": Section(
        "Aggregation",
        "Time to average K replies of ResNet-152 (222 MiB), as a ratio to Flower's "
        "`FedAvg.aggregate_train`: all replies at hand, and one by one as they arrive.",
        "rows",
        ("participants",),
        ("ratio", "ratio one by one"),
    ),
    "scale": Section(
        "Scale",
        "A round of no-op participants in process: the least-squares line of its time (s) and of "
        "its memory (MiB) over the number of participants and over the model's size (MiB).",
        "lines",
        ("what", "over"),
        ("slope", "R^2"),
    ),
    "overhead": Section(
        "Overhead",
        "Time of co-learning as a ratio to the yardstick: training to the bare PyTorch loop, "
        "rounds of no-op participants to Flower's FedAvg.",
        "rows",
        ("what",),
        ("ratio",),
    ),
    "peers": Section(
        "Peers",
        "Users a second in the shape of pfl-research's CIFAR-10 benchmark.",
        "rows",
        ("side", "processes", "threads"),
        ("users/s",),
    ),
    "communication": Section(
        "Communication",
        "MB in both directions and of all sites until a test accuracy: the median of the seeds.",
        "rows",
        ("task", "target %", "way"),
        ("MB", "rounds"),
    ),
    "secure": Section(
        "Secure aggregation",
        "The cost of masks, and the bytes of a site as a ratio to a round without them.",
        "rows",
        ("participants", "MiB"),
        ("ratio", "bytes up, ratio", "ms per mask and MiB"),
    ),
    "sites": Section(
        "Sites",
        "Accuracy of two sites with folders of their own in a deployment, together and alone.",
        "runs",
        ("seed",),
        ("both", "delft", "utrecht"),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to a parser."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")


def run(options: argparse.Namespace) -> None:
    """Write the page."""
    options.page.write_text(page_of(read(options.results)))
    print(f"Written to {options.page}")


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the measurements by file name.

    Raises
    ------
    ColearnError
        If a file is not a measurement of a benchmark that the page has.
    """
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for name, measured in found.items():
        lacking = {"machine", "versions"} - measured.keys()
        if measured.get("benchmark") not in SECTIONS or lacking:
            raise ColearnError(
                f"{folder / name}.json: expected 'benchmark' to be one of {', '.join(SECTIONS)}, "
                f"'machine' and 'versions', found {measured.get('benchmark')!r} and no "
                f"{' and no '.join(sorted(lacking)) or 'page for it'}; "
                "python -m simulations.bench writes such a file"
            )
    return found


def page_of(measurements: dict[str, dict[str, Any]]) -> str:
    """Return the page as Markdown."""
    parts = [
        "# Measured performance\n",
        "Made by `python -m simulations.bench page` from the files of `docs/results/bench/`; "
        "`python -m simulations.bench NAME` writes such a file. A range is that of the medians of "
        "all measurements of one version.\n",
    ]
    if headlines := headline(measurements):
        parts += [
            "Every ratio, as its range over all measurements of its newest version:\n",
            _markdown(headlines),
        ]
    for benchmark, section in SECTIONS.items():
        chosen = {n: m for n, m in measurements.items() if m["benchmark"] == benchmark}
        if chosen:
            parts += [f"## {section.title}\n", section.text + "\n", *_tables(section, chosen)]
    return "\n".join(parts)


def headline(measurements: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every ratio as its range over the measurements of its newest version."""
    rows: list[dict[str, Any]] = []
    for benchmark, section in SECTIONS.items():
        chosen = [m for m in measurements.values() if m["benchmark"] == benchmark]
        newest: dict[str, dict[str, Any]] = {}
        for row in sorted(ranges(section, chosen), key=lambda row: _release(row[VERSION])):
            newest[", ".join(f"{column} {row[column]}" for column in section.key)] = row
        rows += [
            {
                "benchmark": benchmark,
                "of": measured,
                "figure": figure,
                "range": row[figure],
                VERSION: row[VERSION],
                "measurements": row["measurements"],
            }
            for measured, row in newest.items()
            for figure in section.figures
            if "ratio" in figure and row[figure] != "-"
        ]
    return rows


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _tables(section: Section, measurements: dict[str, dict[str, Any]]) -> list[str]:
    parts = [_markdown(ranges(section, measurements.values()))]
    for name, measured in measurements.items():
        parts += [f"### {name}\n", _origin(measured), _markdown(measured[section.table])]
    return parts


def ranges(section: Section, measurements: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the range of each figure over the measurements of one version of this package."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for measured in measurements:
        for row in measured[section.table]:
            key = (measured["versions"][VERSION], *(row.get(column) for column in section.key))
            groups.setdefault(key, []).append(row)
    return [
        {
            **dict(zip((VERSION, *section.key), key, strict=True)),
            **{
                # A target that was not reached is a text.
                figure: _range([row[figure] for row in group if _is_number(row.get(figure))])
                for figure in section.figures
            },
            "measurements": len(group),
        }
        for key, group in groups.items()
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _range(values: Sequence[float]) -> str:
    if not values:
        return "-"
    lowest, highest = min(values), max(values)
    return f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"


def _origin(measured: dict[str, Any]) -> str:
    said = {**measured["machine"], **measured.get("versions", {})}
    if "source" in measured:
        said["source"] = measured["source"]
    return "; ".join(f"{key}: {value}" for key, value in said.items()) + "\n"


def _markdown(rows: list[dict[str, Any]]) -> str:
    # As text, since tabulate writes 0.50 as 0.5 and None as nothing where columns are numbers.
    table: str = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return table + "\n"
