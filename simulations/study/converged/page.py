"""What the page of results says of the studies at convergence."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from simulations.study.claims import CLAIMS, claims_table
from simulations.study.converged.figures import save_curves
from simulations.study.converged.tables import Runs, convergence_rows, hours, rows
from simulations.study.converged.training import Run, run_config
from simulations.study.converged.variants import FOLDER, Study, read_study, with_seed
from simulations.study.differences import difference
from simulations.study.units import check_same_data, read_unit

ARMS = {
    "pooled": "vanilla-elr",
    "pooled-clr": "vanilla-clr",
    "co-learning": "clr-ile",
    "clr-fle-2": "clr-fle",
    "elr-ile": "elr-ile",
    "fedavg-2": "elr-fle",
    "ensemble": "ensemble",
}
"""The variants that are the paper's arms, all with the same T0."""

JUDGED = {claim: finder for claim, finder in CLAIMS.items() if claim[0] in "1245"}
"""The claims that need no evaluation in every round and no times."""

FEWEST_SEEDS = 3
"""The seeds from which on a difference is shown and a claim judged."""


def read_runs(study: Study, results: Path) -> Runs:
    """Return the runs of a study that there are, by variant, in the order of seeds.

    Raises
    ------
    ColearnError
        If a result is of another config, or of other data than the rest.
    """
    runs: dict[str, list[Run]] = {}
    for path in sorted((results / study.name / "units").glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        variant = with_seed(study.variant(name), int(seed))
        runs.setdefault(name, []).append(read_unit(path, Run, run_config(variant, study.every)))
    check_same_data(
        {run.data: f"{run.variant}, seed {run.seed}" for own in runs.values() for run in own}
    )
    return {name: sorted(own, key=lambda run: run.seed) for name, own in runs.items()}


def write_sections(results: Path) -> list[str]:
    """Draw the figures, and return the lines of the page, from the result files alone."""
    found = {}
    for path in sorted(FOLDER.glob("*.toml")):
        study = read_study(path)
        if runs := read_runs(study, results):
            found[study] = runs
    compared = {study: runs for study, runs in found.items() if study.compares}
    lines = [INTRODUCTION, _table(answers(compared)), "", CLAIMS_INTRODUCTION]
    judged = {study.name: as_arms(runs) for study, runs in compared.items()}
    lines += [claims_table(judged, JUDGED), ""]
    # Comparisons first: how their rates were chosen comes after them.
    for study in sorted(found, key=lambda study: not study.compares):
        lines += section(study, found[study], results)
    return lines


def answers(found: Mapping[Study, Runs]) -> list[dict[str, str]]:
    """Return the row of every study: what co-learning loses, saves, and is spared."""
    table = []
    for study, runs in found.items():
        ours, fedavg = runs.get("co-learning"), runs.get("fedavg-1")
        pooled, ensemble = runs.get("pooled"), runs.get("ensemble")
        table.append(
            {
                "task": study.title,
                "co-learning - pooled": _difference(ours, pooled),
                "the same, eta by cosine": _difference(runs.get("co-learning-cosine"), pooled),
                "co-learning - FedAvg, T=1": _difference(ours, fedavg),
                "co-learning - FedAvg, as many rounds": _against_rival(ours, runs),
                "rounds": _both(ours, fedavg, lambda run: f"{run.rounds}"),
                "MB": _both(ours, fedavg, lambda run: f"{run.bytes / 1e6:.0f}"),
                "hours, ResNet-152": _both(ours, fedavg, lambda run: f"{hours(run.rounds):.1f}"),
                "ensemble - pooled": _difference(ensemble, pooled),
            }
        )
    return table


def _difference(first: Sequence[Run] | None, second: Sequence[Run] | None) -> str:
    found = difference(first or (), second or ())
    if found is None:
        return "not run"
    few = found.seeds < FEWEST_SEEDS
    return f"too few seeds ({found.seeds})" if few else f"{found} ({found.seeds} seeds)"


def _against_rival(ours: Sequence[Run] | None, runs: Runs) -> str:
    """Return the difference to federated averaging with the fixed T whose rounds are nearest."""
    rivals = [own for name, own in runs.items() if name.startswith("fedavg-")]
    if not ours or not rivals:
        return "not run"
    nearest = min(rivals, key=lambda own: abs(own[0].rounds - ours[0].rounds))
    epochs = nearest[0].local_epochs[0]
    return f"{_difference(ours, nearest)}, T={epochs}, {nearest[0].rounds} rounds"


def _both(ours: Sequence[Run] | None, theirs: Sequence[Run] | None, quantity: Any) -> str:
    if not ours or not theirs:
        return "not run"
    # Of the first seed: T may double after other rounds with another.
    return f"{quantity(ours[0])} and {quantity(theirs[0])}"


def as_arms(runs: Runs) -> list[Any]:
    """Return the runs of the arms with enough seeds, in the form that claims are judged from."""
    return [
        SimpleNamespace(arm=arm, seed=run.seed, score=run.score, headline=run.headline)
        for name, arm in ARMS.items()
        if len(runs.get(name, ())) >= FEWEST_SEEDS
        for run in runs[name]
    ]


def section(study: Study, runs: Runs, results: Path) -> list[str]:
    """Return the lines about one study; its figure is drawn."""
    picture = results / f"{study.name}.png"
    save_curves(study, runs, study.figure, picture)
    return [
        f"## {study.title}", "", study.note, "",
        _table(list(rows(study, runs))), "",
        f"![{study.title}](results/{results.name}/{picture.name})", "",
        "What the last tenth of the epochs still changed:", "",
        _table(list(convergence_rows(study, runs))), "",
        f"`python -m simulations.study converged {study.name} --data-dir data`", "",
    ]  # fmt: skip


def _table(table: Sequence[Mapping[str, str]]) -> str:
    from tabulate import tabulate

    text: str = tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)
    return text


INTRODUCTION = """## At convergence: what co-learning loses and saves

What users ask: how much accuracy does co-learning lose against training on pooled data, what does
it save against federated averaging, and what would the ensemble, which exchanges nothing, lose?
Federated averaging has T=1 where nothing else is said; the fair rival is its fixed T with about
as many rounds as co-learning, which has to be known beforehand. With "eta by cosine" the initial
rate of co-learning's rounds falls over the run, which is not the paper's.
All arms of a task are trained for the same local epochs, but for pooled data at equal steps; how
flat their curves are at the end is in the tables below. Differences are in points of the task's
metric, paired by seed, with the standard error of their mean; differences and verdicts are shown
from three seeds on. Rounds, MB (of arrays, up and down, over all sites) and hours are
co-learning's and federated averaging's of the first seed; the hours are those in which a site
sends and receives a model of ResNet-152's size, 233 MB, in so many rounds over 100 Mbit/s.
"""

CLAIMS_INTRODUCTION = """The paper's claims from these runs, all with the same T0; the ones about
single rounds are judged below:
"""
