"""Curves and figures from a history; the only module that needs matplotlib (extra ``[report]``)."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ColearnError
from ..history import RoundRecord


@dataclass(frozen=True)
class Curve:
    """A metric of the shared model against local epochs per participant.

    Attributes
    ----------
    label : str
        The curve's text in the legend.
    epochs : list of int
        The local epochs done, ascending.
    values : list of float
        The metric after these numbers of epochs.
    doublings : list of int
        The local epochs after which T was increased.
    """

    label: str
    epochs: list[int]
    values: list[float]
    doublings: list[int] = field(default_factory=list)


def curve(records: Iterable[RoundRecord], label: str, metric: str = "accuracy") -> Curve:
    """Return the curve of a metric over the rounds of a history.

    The metric is that of the server's evaluation, or without one that of the participants'.

    Raises
    ------
    ColearnError
        If a round does not have the metric.
    """
    records = list(records)
    values = [record.server_metrics or record.evaluate_metrics for record in records]
    for record, metrics in zip(records, values, strict=True):
        if metric not in metrics:
            raise ColearnError(
                f"curve: expected the metric '{metric}' from an evaluation in every round, found "
                f"{sorted(metrics)} in round {record.round}"
            )
    return Curve(
        label,
        [record.epochs_done for record in records],
        [metrics[metric] for metrics in values],
        doublings(records),
    )


def doublings(records: Sequence[RoundRecord]) -> list[int]:
    """Return the local epochs done when T was increased."""
    return [
        before.epochs_done
        for before, after in itertools.pairwise(records)
        if after.local_epochs > before.local_epochs
    ]


def save_figure(
    curves: Sequence[Curve], path: str | Path, title: str = "", ylabel: str = "accuracy"
) -> Path:
    """Draw curves against local epochs, with marks where T increased, as in the paper's Figure 2.

    Parameters
    ----------
    curves : sequence of Curve
        The curves, in the order of the legend.
    path : str or Path
        The file; the suffix gives the format (.png, .svg, .pdf).
    title, ylabel : str
        The title of the axes and the label of the y axis.

    Returns
    -------
    Path
        The path of the figure.
    """
    return save_panels({title: curves}, path, ylabel)


def save_panels(
    panels: Mapping[str, Sequence[Curve]],
    path: str | Path,
    ylabel: str = "accuracy",
    empty: str = "",
) -> Path:
    """Draw several panels of curves side by side, one for each model, as in the paper's Figure 2.

    Parameters
    ----------
    panels : mapping
        The curves by the panel's title.
    path : str or Path
        The file; the suffix gives the format (.png, .svg, .pdf).
    ylabel : str
        The label of the y axes.
    empty : str
        The text of a panel without curves.

    Returns
    -------
    Path
        The path of the figure.

    Raises
    ------
    ColearnError
        If there are no panels, or matplotlib is not installed.
    """
    if not panels:
        raise ColearnError("figure: expected at least one panel, found none")
    plt = _pyplot()
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    size = (8, 5) if len(panels) == 1 else (5.2 * columns, 3.8 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        axes.set(xlabel="local epochs per participant", ylabel=ylabel, title=title)
        if curves:
            _draw(curves, axes)
        else:
            axes.text(0.5, 0.5, empty, ha="center", va="center", transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date and with a fixed salt, the same curves give the same SVG file.
    with plt.rc_context({"svg.hashsalt": "flwr-colearn"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)
    plt.close(figure)
    return path


def _pyplot() -> Any:
    try:
        import matplotlib as mpl

        mpl.use("Agg")  # a server has no display
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ColearnError(
            "figure: expected matplotlib, found none; pip install 'flwr-colearn[report]'"
        ) from error
    return plt


def _draw(curves: Sequence[Curve], axes: Any) -> None:
    """Draw the curves, with a triangle where T was increased."""
    for each in curves:
        (line,) = axes.plot(each.epochs, each.values, label=each.label, linewidth=1.5)
        marked = [each.epochs.index(epoch) for epoch in each.doublings]
        axes.plot(
            [each.epochs[i] for i in marked],
            [each.values[i] for i in marked],
            linestyle="none",
            marker="^",
            markersize=8,
            color=line.get_color(),
        )
    if any(each.doublings for each in curves):
        axes.plot([], [], linestyle="none", marker="^", color="grey", label="T increased")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
