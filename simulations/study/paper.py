"""The paper's tables and figure: its figures and ours side by side.

    python -m simulations.study paper table-2 --seeds 5 --data-dir data
    python -m simulations.study paper figure-2 --models DenseNet-40 --seeds 1
    python -m simulations.study paper page

Each is described by a file in simulations/conf/paper: which run configs, which arms, and what the
paper printed. The command runs the units that the results folder does not hold yet; then, and with
``page`` at once, it writes the page of results and its files anew, from the result files alone.
"""

import argparse
import csv
import logging
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr_colearn import ColearnError
from flwr_colearn.reporting import Curve, save_panels
from simulations.arms import ARMS
from simulations.settings import CONF, read_config
from simulations.study.arguments import add_processes_argument, add_unit_arguments, settings_of
from simulations.study.claims import claims_table
from simulations.study.comparison import curves, rows, run_study
from simulations.study.converged.page import write_sections
from simulations.study.training import ArmUnit
from simulations.study.units import check_same_data, read_unit, unit_config

RESULTS = Path("docs/results")
NOT_RUN = "not run"
MIB = 2**20


@dataclass(frozen=True)
class Column:
    """What one column shows: a quantity of one arm.

    Attributes
    ----------
    title, arm : str
        Heading, and key of `simulations.arms.ARMS`.
    quantity : str
        A metric of the task, "interval" (minutes between two exchanges before the first doubling)
        or "volume" (MiB of one model).
    scale : float
        That a metric is multiplied by.
    """

    title: str
    arm: str
    quantity: str
    scale: float = 100

    def printed(self, figure: float | str) -> str:
        """Return a figure of the paper as the table has it; "" for none."""
        return f"{figure:.3f}" if self.scale == 1 and figure != "" else str(figure)

    def of(self, unit: ArmUnit) -> float | None:
        """Return the quantity, or None if the run did not measure it."""
        if self.quantity == "interval":
            return None if unit.interval is None else unit.interval / 60
        if self.quantity == "volume":
            return unit.model_bytes / MIB
        return self.scale * unit.metrics[self.quantity][-1]


@dataclass(frozen=True)
class Row:
    """One model: its run config, and what the paper printed in each column ("" for nothing)."""

    model: str
    config: str
    paper: Sequence[float | str] = ()


@dataclass(frozen=True)
class Exhibit:
    """A table or a figure of the paper, as its file describes it.

    Attributes
    ----------
    name : str
        Of the file.
    title, note : str
        What is shown, and what there is to say about it.
    rows : list of Row
        Models: rows of a table, panels of a figure.
    columns : list of Column
        None in a figure.
    arms : list of str
        To run.
    """

    name: str
    title: str
    note: str
    rows: Sequence[Row]
    columns: Sequence[Column]
    arms: Sequence[str]


def exhibits() -> dict[str, Exhibit]:
    """Return the paper's tables and figure by name."""
    return {path.stem: read_exhibit(path) for path in sorted((CONF / "paper").glob("*.toml"))}


def read_exhibit(path: Path) -> Exhibit:
    """Read the description of a table or figure."""
    content = tomllib.loads(path.read_text())
    columns = [Column(**column) for column in content.get("columns", [])]
    arms = content.get("arms") or list(dict.fromkeys(column.arm for column in columns))
    rows = [Row(**row) for row in content["rows"]]
    return Exhibit(path.stem, content["title"], content["note"], rows, columns, arms)


def run_exhibit(
    exhibit: Exhibit,
    models: Sequence[str],
    arms: Sequence[str],
    seeds: Sequence[int],
    data_dir: str | None,
    results: Path,
    processes: int = 1,
) -> None:
    """Run the units of a table or figure that the results do not hold yet, in so many processes."""
    for row in exhibit.rows:
        if row.model in models:
            participants, settings = _settings(row.config)
            if data_dir is not None:
                participants = replace(participants, data_dir=data_dir)
            wanted = [arm for arm in exhibit.arms if arm in arms]
            run_study(wanted, seeds, participants, settings, results / row.config, processes)


def read_results(config: str, results: Path) -> list[ArmUnit]:
    """Return the units of a run config that there are, by arm and seed.

    Raises
    ------
    ColearnError
        If the run config has changed since.
    """
    participants, settings = _settings(config)
    units = []
    for path in (results / config / "units").glob("*.json"):
        seeded = replace(participants, seed=int(path.stem.rpartition("-")[2]))
        units.append(read_unit(path, ArmUnit, unit_config(seeded, settings)))
    check_same_data({unit.data: f"{unit.arm}, seed {unit.seed}" for unit in units})
    return sorted(units, key=lambda unit: (list(ARMS).index(unit.arm), unit.seed))


def _settings(config: str) -> Any:
    return settings_of(read_config(CONF / f"{config}.toml"), config)


def table_of(exhibit: Exhibit, results: Path) -> list[dict[str, str]]:
    """Return the rows of a table, the paper's figures and ours."""
    table = []
    for row in exhibit.rows:
        units = read_results(row.config, results)
        cells = {"model": row.model}
        for index, column in enumerate(exhibit.columns):
            if any(len(each.paper) > index and each.paper[index] != "" for each in exhibit.rows):
                printed = row.paper[index] if row.paper else ""
                cells[f"{column.title}: paper"] = column.printed(printed)
            cells[f"{column.title}: ours"] = ours(column, units)
        wanted = [unit for unit in units if unit.arm in exhibit.arms]
        cells["local epochs"] = str(wanted[0].epochs[-1]) if wanted else ""
        table.append(cells)
    return table


def ours(column: Column, units: Sequence[ArmUnit]) -> str:
    """Return our figure: the mean over seeds, the spread, and how many seeds there are."""
    values = [column.of(unit) for unit in units if unit.arm == column.arm]
    known = [value for value in values if value is not None]
    if not known:
        return "not measured" if values else NOT_RUN
    digits = 3 if column.scale == 1 else 2
    mean = f"{statistics.mean(known):.{digits}f}"
    if len(known) == 1:
        return f"{mean} (1 seed)"
    return f"{mean} ± {statistics.stdev(known):.{digits}f} ({len(known)} seeds)"


def write_exhibit(exhibit: Exhibit, results: Path) -> str:
    """Write a table as CSV or a figure as PNG and SVG; return what the page shows of it."""
    from tabulate import tabulate

    lines = [f"## {exhibit.title}", "", exhibit.note, ""]
    if exhibit.columns:
        table = table_of(exhibit, results)
        with (results / f"{exhibit.name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=table[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
        lines.append(tabulate(table, headers="keys", tablefmt="github", disable_numparse=True))
    else:
        panels = {row.model: _curves(row.config, exhibit.arms, results) for row in exhibit.rows}
        for ending in ("png", "svg"):
            save_panels(panels, results / f"{exhibit.name}.{ending}", "test accuracy", NOT_RUN)
        missing = ", ".join(model for model, shown in panels.items() if not shown)
        lines.append(f"![{exhibit.title}]({results.name}/{exhibit.name}.png)")
        lines += ["", f"Not run: {missing}."] if missing else []
    command = f"python -m simulations.study paper {exhibit.name} --data-dir data"
    return "\n".join([*lines, "", f"`{command}`", ""])


def _curves(config: str, arms: Sequence[str], results: Path) -> list[Curve]:
    return curves([unit for unit in read_results(config, results) if unit.arm in arms])


def write_page(results: Path) -> Path:
    """Write the page of results, beside the results folder, from the result files alone."""
    found = {name: read_results(name, results) for name in configs_in(results)}
    studies = {name: units for name, units in found.items() if units}
    parts = [INTRODUCTION, *write_sections(results / "converged")]
    parts += [SHORT_RUNS, claims_table(studies), "", OPEN_QUESTIONS]
    parts += [write_exhibit(exhibit, results) for exhibit in exhibits().values()]
    for name, units in studies.items():
        parts += study_section(name, units, results)
    page = results.with_suffix(".md")
    page.write_text("\n".join(parts))
    return page


def configs_in(results: Path) -> list[str]:
    """Return the run configs that have results; studies with a command of their own have others."""
    folders = sorted(path.parent.name for path in results.glob("*/units") if path.is_dir())
    return [name for name in folders if (CONF / f"{name}.toml").exists()]


def study_section(name: str, units: Sequence[ArmUnit], results: Path) -> list[str]:
    """Return the lines about one run config: the table of its arms, and their curves."""
    from tabulate import tabulate

    headline = units[0].headline
    save_panels({name: curves(units)}, results / f"{name}.png", headline, NOT_RUN)
    table = tabulate(rows(units), headers="keys", tablefmt="github", disable_numparse=True)
    return [
        f"## All arms: {name}", "",
        f"`simulations/conf/{name}.toml`; the curves are of the first seed.", "",
        table, "",
        f"![{headline} against local epochs, {name}]({results.name}/{name}.png)", "",
        f"`python -m simulations.study {name} --output {results}/{name}`", "",
    ]  # fmt: skip


INTRODUCTION = """# The paper's study

Made by `python -m simulations.study paper page` from the result files beside it, and by nothing
else; cells without a run say "not run". Ours are means and spreads (sample standard deviation) over
seeds. All arms of a table have the same number of local epochs per participant; test accuracy is
of the last round, never of the best. The studies of [normalization schemes](normalization.md#study)
and of [dynamic averaging](dynamic.md) have pages of their own.
"""

SHORT_RUNS = """## The paper's claims, from short runs

The runs of the studies from here on have not converged, but for the digits: they show how far each
arm comes with few epochs, not what it loses or gains in the end. What they say of each claim, study
by study: yes or no, the figures, and on how few seeds it rests. With several seeds a difference
between arms counts if it is larger than twice its standard error, which with two or three seeds is
a weak test (one false finding in six to eight). Of claims 2, 3, 4 and 6 the means are compared.
"""

OPEN_QUESTIONS = """With the same number of local epochs a participant makes 1/K of vanilla's
steps: in the small studies, named `...-cpu`, none has converged when its epochs are over. Seconds
and intervals are of whatever machine and load there was.

Not to be seen in these runs: that the shared model dips after each restart of
the rate (claim 3), since models are evaluated at the rounds' ends, where the rate is lowest.

The paper gives neither epsilon, nor momentum, weight decay, augmentation on CIFAR-10, nor the total
of local epochs: the run configs' comments say which values are its own and which are ours.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a table or figure from the command line."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    known = exhibits()
    parser = argparse.ArgumentParser(
        prog="python -m simulations.study paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("exhibit", choices=[*known, "page"])
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="rows to run (default all)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default {RESULTS}")
    add_unit_arguments(parser)
    add_processes_argument(parser)
    options = parser.parse_args(arguments)
    if options.exhibit != "page":
        exhibit = known[options.exhibit]
        models = [row.model for row in exhibit.rows]
        unknown = set(options.models or []) - set(models)
        if unknown:
            raise ColearnError(f"--models: expected some of {models}, found {sorted(unknown)}")
        run_exhibit(
            exhibit,
            options.models or models,
            options.arms,
            options.seeds,
            options.data_dir,
            options.results,
            options.processes,
        )
    try:
        print(f"Written: {write_page(options.results)}")
    except ModuleNotFoundError as error:  # a machine that only trains needs no page
        print(f"No page ({error}); pip install 'flwr-colearn[report]'")
