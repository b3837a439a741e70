"""Tables of the study at convergence: means, spreads, and differences paired by seed."""

import statistics
from collections.abc import Iterator, Mapping, Sequence

from simulations.study.converged.training import TRAIN, Run
from simulations.study.converged.variants import Study
from simulations.study.differences import difference

LARGE = 58_164_298 * 4
"""The bytes of the parameters of ResNet-152 for 10 classes, the paper's largest network."""
LINK = 100e6
"""The bits a second of each site's link, up and down, for which times are stated."""
LAST = 0.9
"""The share of the epochs after which a curve should be flat."""

Runs = Mapping[str, Sequence[Run]]
"""The runs of a study by variant, each list in the order of seeds."""


def rows(study: Study, runs: Runs) -> Iterator[dict[str, str]]:
    """Yield the row of every variant that has runs."""
    headline = runs.get(study.headline, [])
    for variant in study.variants:
        own = runs.get(variant.name)
        if not own:
            continue
        gap = difference(own, headline) if variant.name != study.headline else None
        rounds = statistics.mean(run.rounds for run in own)
        yield {
            "variant": variant.title,
            f"{own[0].headline} %": mean_and_spread([run.score for run in own]),
            f"against {study.variant(study.headline).title}": "" if gap is None else str(gap),
            "rounds": f"{rounds:.1f}" if rounds else "-",
            "MB up+down": f"{statistics.mean(run.bytes for run in own) / 1e6:.1f}"
            if rounds
            else "-",
            "hours of transfers, ResNet-152": f"{hours(rounds):.2f}" if rounds else "-",
            "seeds": str(len(own)),
        }


def hours(rounds: float) -> float:
    """Return the hours in which a site sends and receives ResNet-152 in every round."""
    return rounds * 2 * LARGE * 8 / LINK / 3600


def mean_and_spread(values: Sequence[float]) -> str:
    """Return the mean, and the sample standard deviation where there are several values."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def convergence_rows(study: Study, runs: Runs) -> Iterator[dict[str, str]]:
    """Yield what each variant still gained in the last tenth of its epochs."""
    for variant in study.variants:
        own = runs.get(variant.name)
        if not own:
            continue
        headline = own[0].headline
        test = [100 * late_change(run, headline) for run in own]
        spread = statistics.stdev(run.score for run in own) if len(own) > 1 else None
        yield {
            "variant": variant.title,
            f"{headline} %, last tenth": f"{statistics.mean(test):+.2f}",
            "spread over seeds": "" if spread is None else f"{spread:.2f}",
            **_losses(own),
            f"training {headline} %": f"{_last(own, TRAIN + headline, 100):.2f}",
            "relative change, last rounds": _changes(own),
            "T": _path(own[0].local_epochs),
        }


def _losses(runs: Sequence[Run]) -> dict[str, str]:
    late = [late_change(run, TRAIN + "loss") for run in runs]
    return {
        "test loss": f"{_last(runs, 'loss'):.3f}",
        "training loss": f"{_last(runs, TRAIN + 'loss'):.3f}",
        "the same, last tenth": f"{statistics.mean(late):+.3f}",
    }


def late_change(run: Run, metric: str) -> float:
    """Return by how much a metric changed in the last tenth of the epochs."""
    values, end = run.metrics[metric], run.epochs[-1]
    before = max(i for i, epoch in enumerate(run.epochs) if epoch <= LAST * end or i == 0)
    return values[-1] - values[before]


def _last(runs: Sequence[Run], metric: str, scale: float = 1.0) -> float:
    return scale * statistics.mean(run.metrics[metric][-1] for run in runs)


def _changes(runs: Sequence[Run]) -> str:
    last = [statistics.mean(run.relative_changes[-3:]) for run in runs if run.relative_changes]
    return f"{statistics.mean(last):.4f}" if last else "-"


def _path(local_epochs: Sequence[int]) -> str:
    """Return T round by round, equal ones together: ``2 x 8, 4 x 5``."""
    parts: list[list[int]] = []
    for epochs in local_epochs:
        if parts and parts[-1][0] == epochs:
            parts[-1][1] += 1
        else:
            parts.append([epochs, 1])
    return ", ".join(f"{epochs} x {times}" for epochs, times in parts) or "-"
