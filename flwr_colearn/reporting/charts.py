"""Line charts as SVG that a page can hold; needs matplotlib (extra ``[report]``)."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ColearnError

COLOURS = 8
"""The number of series colours that the page's style sheet has, as ``--s0``, ``--s1``, ..."""
DASHES = ("", "5 2", "1 2", "6 2 1 2")
"""The dashes of lines, as an SVG has them: after all colours the next one is used."""
_MARKED = 40
"""A line of up to so many points has a mark at each, so that a single point is visible."""
_DRAWABLE = 1e100
"""The largest number that is drawn: matplotlib multiplies the limits of an axis."""


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes
    ----------
    x, y : sequence of float
        The points; those that are not finite are gaps.
    style : int
        The number of the line's style: the colours come first, then the dashes.
    dash : str
        The dash in place of the style's, a ``stroke-dasharray``.
    """

    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    dash: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is no point to draw."""
        return not any(map(_is_drawable, self.x, self.y))


def colour(style: int) -> int:
    """Return the number of a style's colour."""
    return style % COLOURS


def dash(style: int) -> str:
    """Return the dash of a style."""
    return DASHES[style // COLOURS % len(DASHES)]


def svg_chart(
    lines: Sequence[Line], xlabel: str, *, logarithmic: bool = False, steps: bool = False
) -> str:
    """Return lines as an ``<svg>`` whose colours are those of the page around it.

    The chart has no text but numbers and `xlabel`: the page writes title and legend, escaped.

    Parameters
    ----------
    lines : sequence of Line
        The lines.
    xlabel : str
        The label of the x axis.
    logarithmic : bool
        Whether the y axis is logarithmic, if all values are positive.
    steps : bool
        Whether a value holds from its point back to the one before.

    Raises
    ------
    ColearnError
        If matplotlib is not installed.
    """
    mpl, figure_class = _matplotlib()
    # Text stays text, in the page's font; the salt makes the same chart the same file.
    style = {"svg.fonttype": "none", "svg.hashsalt": "flwr-colearn", "font.size": 9}
    with mpl.rc_context(style):
        figure = figure_class(figsize=(4.4, 2.7), layout="constrained")
        axes = figure.subplots()
        for line in lines:
            _draw(axes, line, "steps-pre" if steps else "default")
        values = [y for line in lines for y in line.y if _is_drawable(y, y)]
        # Rounds and T are whole numbers, and so are the ticks.
        axes.xaxis.get_major_locator().set_params(integer=xlabel == "rounds")
        axes.yaxis.get_major_locator().set_params(integer=steps)
        if logarithmic and values and min(values) > 0:
            axes.set_yscale("log")
        _dress(axes, xlabel)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue())


def _matplotlib() -> tuple[Any, Any]:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ColearnError(
            "report: expected matplotlib, found none; pip install 'flwr-colearn[report]'"
        ) from error
    # A figure without pyplot needs no display, and may be drawn in any thread.
    return mpl, Figure


def _is_drawable(x: float, y: float) -> bool:
    return math.isfinite(x) and abs(x) <= _DRAWABLE and math.isfinite(y) and abs(y) <= _DRAWABLE


def _draw(axes: Any, line: Line, drawstyle: str) -> None:
    y = [y if _is_drawable(x, y) else math.nan for x, y in zip(line.x, line.y, strict=True)]
    x = [x if _is_drawable(x, x) else math.nan for x in line.x]
    pattern = dash(line.style) if line.dash is None else line.dash
    axes.plot(
        x,
        y,
        color=_stand_in(colour(line.style)),
        linestyle=(0, tuple(map(float, pattern.split()))) if pattern else "-",
        linewidth=1.4,
        marker="." if (len(x) <= _MARKED and not pattern) or _has_lone_point(x, y) else None,
        drawstyle=drawstyle,
    )


def _has_lone_point(x: Sequence[float], y: Sequence[float]) -> bool:
    """Return whether a point has gaps on both sides, so that no line would show it."""
    drawn = [False, *map(_is_drawable, x, y), False]
    return any(
        here and not (before or after)
        for before, here, after in zip(drawn, drawn[1:], drawn[2:], strict=False)
    )


def _dress(axes: Any, xlabel: str) -> None:
    """Set the labels, and the colour of everything that is no line."""
    axes.set_xlabel(xlabel, color=_INK)
    axes.tick_params(which="both", color=_INK, labelcolor=_INK)
    axes.grid(alpha=0.25, color=_INK, linewidth=0.6)
    axes.xaxis.get_offset_text().set_color(_INK)
    axes.yaxis.get_offset_text().set_color(_INK)
    for name, spine in axes.spines.items():
        spine.set_color(_INK)
        spine.set_visible(name in ("left", "bottom"))


# Matplotlib draws fixed colours. These stand for the page's, which differ in the dark and in print.
_INK = "#fe00ff"


def _stand_in(number: int) -> str:
    return f"#fe01{number:02x}"


def _inline(document: str) -> str:
    """Return the ``<svg>`` of a document, without what a page must not have twice or at all."""
    svg = document[document.index("<svg") :]
    # The namespaces are implied in HTML. The style sheet would hold for the whole page.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg)
    # A group's id is not referred to, and would occur in every chart.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"#fe01([0-9a-f]{2})", lambda match: f"var(--s{int(match[1], 16)})", svg)
    return svg.replace(_INK, "currentColor").strip()
