"""Figures of the study of dynamic averaging."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

MARKERS = {"periodic": "o", "fedavg": "s", "dynamic": "^", "full": "v", "none": "x", "serial": "*"}


def save_tradeoff(points: Sequence[tuple[str, float, float]], path: Path, title: str) -> None:
    """Draw cumulative loss against bytes, one point an operator.

    Parameters
    ----------
    points : sequence of (operator, bytes, cumulative loss)
        The means over seeds. Operators that move no model (none, serial) are drawn as
        levels.
    path : Path
        Of the figure.
    title : str
        Of the figure.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    kinds = list(dict.fromkeys(name.partition("-")[0] for name, _, _ in points))
    for index, kind in enumerate(kinds):
        own = [point for point in points if point[0].partition("-")[0] == kind]
        colour = f"C{index}"
        if kind in ("none", "serial"):
            axes.axhline(own[0][2], color=colour, linestyle="--", linewidth=1, label=kind)
            continue
        own.sort(key=lambda point: point[1])
        axes.plot([moved / 1e6 for _, moved, _ in own], [loss for *_, loss in own],
                  marker=MARKERS[kind], color=colour, label=kind)  # fmt: skip
        for name, moved, loss in own:
            axes.annotate(name.partition("-")[2], (moved / 1e6, loss), textcoords="offset points",
                          xytext=(5, 5), fontsize=8)  # fmt: skip
    axes.set(xscale="log", xlabel="MB, both directions", ylabel="cumulative loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save_over_time(
    curves: Sequence[tuple[str, list[int], list[float], list[int]]],
    drifts: Sequence[int],
    path: Path,
    title: str,
) -> None:
    """Draw cumulative loss, cumulative bytes, and dynamic averaging's traffic, drifts marked.

    Parameters
    ----------
    curves : sequence of (operator, steps, cumulative losses, cumulative bytes)
        One an operator.
    drifts : sequence of int
        Steps at which the data changed.
    path : Path
        Of the figure.
    title : str
        Of the figure.
    """
    figure, panels = plt.subplots(3, 1, figsize=(8, 9), sharex=True, layout="constrained")
    top, middle, bottom = panels
    for index, (name, steps, losses, moved) in enumerate(curves):
        style = {"label": name, "color": f"C{index}", "linewidth": 1.4}
        top.plot(steps, losses, **style)
        if name in ("none", "serial"):
            continue
        middle.plot(steps, [each / 1e6 for each in moved], **style)
        if name.startswith("dynamic"):
            bottom.stairs(*_traffic(steps, moved), label=name, color=f"C{index}", linewidth=1.4)
    for axes in panels:
        for drift in drifts:
            axes.axvline(drift, color="grey", linestyle=":", linewidth=1)
        axes.grid(alpha=0.3)
    top.set(ylabel="cumulative loss", title=title)
    middle.set(ylabel="cumulative MB", yscale="log")
    bottom.set(ylabel="MB a mini-batch", yscale="log", xlabel="mini-batches of every learner")
    top.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _traffic(steps: Sequence[int], moved: Sequence[int]) -> tuple[list[float], list[int]]:
    """Return MB a step in each of forty stretches of time, and their edges."""
    last, edges, totals = steps[-1], [0], [0]
    for stretch in range(1, 41):
        index = sum(step <= stretch * last / 40 for step in steps) - 1
        if index >= 0 and steps[index] > edges[-1]:
            edges.append(steps[index])
            totals.append(moved[index])
    pairs = list(itertools.pairwise(zip(edges, totals, strict=True)))
    return [(b[1] - a[1]) / (b[0] - a[0]) / 1e6 for a, b in pairs], edges
