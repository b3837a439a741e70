"""The figure of the study at convergence: a metric against epochs, rounds and bytes."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from simulations.study.converged.tables import Runs
from simulations.study.converged.training import Run
from simulations.study.converged.variants import Study

AXES: dict[str, Callable[[Run], Sequence[float]]] = {
    "local epochs per participant": lambda run: run.epochs,
    "rounds": lambda run: run.rounds_at,
    "MB, both directions, all sites": lambda run: [moved / 1e6 for moved in run.bytes_at],
}
"""What the metric is drawn against; where a run moves nothing, its end is drawn as a level."""


def save_curves(study: Study, runs: Runs, shown: Sequence[str], path: Path) -> None:
    """Draw the means over seeds of some variants, and their range.

    Parameters
    ----------
    study : Study
        The study.
    runs : mapping
        Its runs by variant.
    shown : sequence of str
        The variants to draw, those that have runs.
    path : Path
        Of the figure.
    """
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained", sharey=True)
    for label, panel in zip(AXES, panels, strict=True):
        for index, name in enumerate(shown):
            if runs.get(name):
                _draw(runs[name], study.variant(name).title, label, panel, f"C{index}")
        panel.set(xlabel=label, xscale="linear" if label.startswith("local") else "log")
        panel.grid(alpha=0.3)
    headline = next(run.headline for name in shown for run in runs.get(name, ()))
    panels[0].set(ylabel=f"{headline} %, test")
    panels[0].legend(fontsize="small")
    figure.suptitle(study.title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw(runs: Sequence[Run], title: str, label: str, axes: Axes, colour: str) -> None:
    # Runs of the same variant are evaluated after other epochs where T grew at other times: each
    # is drawn, and the first has the name.
    for index, run in enumerate(runs):
        x = AXES[label](run)
        name = title if index == 0 else None
        if not x[-1]:
            level = statistics.mean(each.score for each in runs)
            axes.axhline(level, color=colour, linestyle="--", linewidth=1, label=name)
            return
        values = [100 * value for value in run.values]
        axes.plot(
            x, values, color=colour, linewidth=1.3, alpha=0.9 if index == 0 else 0.4, label=name
        )
