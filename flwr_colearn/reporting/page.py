"""The parts of a report's page: escaped texts, tables, figures and the style sheet."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from ..text import printable

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --line: #d5d9de; --soft: #5c636b;
  --s0: #0b63b0; --s1: #c2410c; --s2: #15803d; --s3: #9d174d; --s4: #6d28d9; --s5: #0e7490;
  --s6: #854d0e; --s7: #475569; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --paper: #14171a; --line: #363c43;
  --soft: #a2aab3; --s0: #63b3f7; --s1: #fb923c; --s2: #5fd38a; --s3: #f58ab8; --s4: #b9a1fb;
  --s5: #5ed0e6; --s6: #e8c468; --s7: #aab6c5; } }
@media print { :root { color-scheme: light; --ink: #000; --paper: #fff; --line: #bbb; --soft: #444;
  --s0: #0b63b0; --s1: #c2410c; --s2: #15803d; --s3: #9d174d; --s4: #6d28d9; --s5: #0e7490;
  --s6: #854d0e; --s7: #475569; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem;
  border-bottom: 1px solid var(--line); } h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: .85rem; color: var(--soft); }
svg.chart { display: block; width: 100%; height: auto; max-width: 34rem; }
svg.chart * { stroke-linejoin: round; stroke-linecap: butt; }
svg.chart text { font-family: inherit !important; }
ul.legend { list-style: none; margin: .3rem 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: .1rem 1rem; font-size: .85rem; }
ul.legend svg { width: 2rem; height: .6rem; margin-right: .35rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .5rem .25rem 0;
  border-bottom: 1px solid var(--line); }
thead { display: table-header-group; } tr { break-inside: avoid; }
td div + div { margin-top: .2rem; }
td { font-variant-numeric: tabular-nums; }
th { overflow-wrap: normal; }
td[data-label="Metrics"], td[data-label="Best"], td[data-label="Run"] { min-width: 8.5rem; }
td[data-label^="Bytes"], td[data-label="Seconds"], td[data-label="T"], td[data-label="Time"] {
  white-space: nowrap; }
.soft { color: var(--soft); }
@media screen and (max-width: 60rem) {
  table.rows thead { display: none; }
  table.rows tr { display: block; padding: .5rem 0; border-bottom: 2px solid var(--line); }
  table.rows td { display: grid; grid-template-columns: 9.5rem 1fr; border: 0; padding: .1rem 0; }
  table.rows td > * { grid-column: 2; }
  table.rows td::before { content: attr(data-label); color: var(--soft); grid-row: 1 / span 99; }
  table.rows td:empty { display: none; }
}
@media print { :root { font-size: 7pt; } body { max-width: none; padding: 0; }
  @page { margin: 12mm; }
  .charts { grid-template-columns: repeat(3, 1fr); }
  * { print-color-adjust: exact; } }
"""
_LONGEST = 4000
"""The largest number of characters of a text."""


class Key(NamedTuple):
    """An entry of a legend: its text, the number of its colour and its dash."""

    text: str
    colour: int
    dash: str = ""


def _text(value: str) -> str:
    """Return a text for HTML, with control characters spelled out; participants chose some."""
    return escape(printable(value, _LONGEST))


def page(title: str, sections: Iterable[str]) -> str:
    """Return a whole HTML page of sections, which are HTML already; the title is text."""
    # The policy holds even if a text were not escaped: no script runs and nothing is fetched.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{_text(title)}</h1>
{"".join(sections)}
</body>
</html>
"""


def section(title: str, *parts: str) -> str:
    """Return a section with a heading; nothing if it has no parts."""
    body = "\n".join(filter(None, parts))
    return f"<section>\n<h2>{_text(title)}</h2>\n{body}\n</section>\n" if body else ""


def subsection(title: str, *parts: str) -> str:
    """Return parts under a smaller heading; nothing if there are no parts."""
    body = "\n".join(filter(None, parts))
    return f"<h3>{_text(title)}</h3>\n{body}" if body else ""


def note(text: str) -> str:
    """Return a paragraph of text."""
    return f'<p class="soft">{_text(text)}</p>'


def figure(svg: str, caption: str) -> str:
    """Return a chart with its caption, which is its text for those who do not see it too."""
    labelled = svg.replace(
        "<svg", f'<svg class="chart" role="img" aria-label="{_text(caption)}"', 1
    )
    return f"<figure>{labelled}<figcaption>{_text(caption)}</figcaption></figure>"


def charts(figures: Iterable[str]) -> str:
    """Return figures side by side, as far as there is room."""
    body = "\n".join(figures)
    return f'<div class="charts">{body}</div>' if body else ""


def legend(keys: Iterable[Key]) -> str:
    """Return the legend of charts."""
    items = "".join(
        '<li><svg viewBox="0 0 32 10" aria-hidden="true"><path d="M0 5H32" fill="none" '
        f'stroke-width="2.5" stroke="var(--s{key.colour})" stroke-dasharray="{_text(key.dash)}"/>'
        f"</svg>{_text(key.text)}</li>"
        for key in keys
    )
    return f'<ul class="legend">{items}</ul>' if items else ""


Cell = str | Sequence[str]
"""The text of a table's cell, or several, of which each is a line."""


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Return a table of texts, whose rows become blocks where the screen is narrow."""
    head = "".join(f'<th scope="col">{_text(text)}</th>' for text in header)
    body = "\n".join(f"<tr>{''.join(map(_cell, header, row))}</tr>" for row in rows)
    return (
        f'<table class="rows"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'
        if body
        else ""
    )


def _cell(label: str, cell: Cell) -> str:
    lines = [cell] if isinstance(cell, str) else cell
    body = "".join(f"<div>{_text(line)}</div>" for line in lines if line)
    return f'<td data-label="{_text(label)}">{body}</td>'
