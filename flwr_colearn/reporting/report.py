"""The report of one run or several, as one HTML file that needs nothing else."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..dynamic import DynamicRecord
from ..errors import ColearnError
from ..files import replace_file
from ..history import RoundRecord
from . import page
from .calibration import calibration_of
from .charts import COLOURS, Line, colour, dash, svg_chart
from .dynamic_runs import HEADER, DynamicRun, read_dynamic, row, rows_of
from .page import Cell, Key
from .runs import (
    ALONE,
    SOURCES,
    Run,
    is_dynamic,
    labels,
    metrics_in,
    names_in,
    number,
    read_records,
)

METRICS = 8
"""The number of metrics that are drawn; the names of the others are listed."""
_OF_A_KIND = ("local epochs per participant", "mini-batches per learner")
_EPSILON_DASH = "6 2 1 2"
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_EVENTS = (
    ("restarts", "Restarted"),
    ("refusals", "Refused"),
    ("absences", "Absent"),
    ("warnings", "Warning"),
    ("lost", "Reinitialised"),
)


def save_report(runs: Sequence[Run], path: str | Path, title: str = "Co-learning") -> Path:
    """Write the report of runs to a file, which only its owner may read.

    Raises
    ------
    ColearnError
        If there is no run, one without rounds, or more than eight; if matplotlib is not installed;
        or if the file cannot be written.
    """
    data = report_page(runs, title).encode()
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        raise ColearnError(
            f"report: expected a file that can be written, found {error}; choose another path"
        ) from error
    return path


def report_page(runs: Sequence[Run], title: str = "Co-learning") -> str:
    """Return the report of runs as a page of HTML, without scripts and references to elsewhere.

    Raises
    ------
    ColearnError
        As `save_report`, but for the file.
    """
    if not 1 <= len(runs) <= COLOURS:
        raise ColearnError(f"report: expected 1 to {COLOURS} runs, found {len(runs)}")
    for run in runs:
        if not len(run.records):
            raise ColearnError(f"report: expected rounds of run {run.label!r}, found none")
    runs = [_of_its_kind(run) for run in runs]
    return page.page(
        title,
        [
            page.section("Summary", _summary(runs)),
            page.section("Metrics of the shared model", *_metrics(runs)),
            page.section("Local epochs, learning rates and relative change", *_schedules(runs)),
            page.section("Distance, synchronisation and loss", *_synchronisation(runs)),
            *(_run_section(run) for run in runs),
        ],
    )


def read_runs(paths: Sequence[str | Path], epsilon: float | None = None) -> list[Run]:
    """Read the histories of runs, each labelled by what tells its path from the others'.

    Raises
    ------
    ColearnError
        If a file is no history of `flwr_colearn.History` or `flwr_colearn.DynamicHistory`, or has
        no rounds.
    """
    return [
        DynamicRun(label, read_dynamic(path))  # type: ignore[arg-type]  # records of another kind
        if is_dynamic(path)
        else Run(label, read_records(path), epsilon)
        for path, label in zip(paths, labels(paths), strict=True)
    ]


def _of_its_kind(run: Run) -> Run:
    """Return a run of the class of its records, which are a list then."""
    records: list[Any] = list(run.records)
    kind = DynamicRun if isinstance(records[0], DynamicRecord) else Run
    return kind(run.label, records, run.epsilon, run.configuration)


# All runs ---------------------------------------------------------------------------------------


def _summary(runs: Sequence[Run]) -> str:
    header = ["Run", "Rounds", "Local epochs", "T", "Last metrics", "Best", "Arrays down"]
    header += ["Arrays up", "Configs and metrics", "Evaluation", "Time", "Events"]
    return page.table(header, map(_summary_row, runs))


def _summary_row(run: Run) -> list[Cell]:
    records, evaluation = run.records, run.bytes_of_evaluation()
    return [
        run.label,
        str(len(records)),
        *run.length(),
        _spelled_metrics(_evaluated(records[-1])),
        _best(run),
        _size(run.total("bytes_down")),
        _size(run.total("bytes_up")),
        _size(run.total("control_down") + run.total("control_up")),
        _size(evaluation) if evaluation else "",
        _duration(sum(number(record.seconds) for record in records)),
        [
            f"{sum(len(getattr(record, name, ())) for record in records)} {word.lower()}"
            for name, word in _EVENTS
            if any(getattr(record, name, ()) for record in records)
        ],
    ]


def _evaluated(record: Any) -> Mapping[str, Any]:
    return metrics_in(record, "server_metrics") or metrics_in(record, "evaluate_metrics")


def _spelled_metrics(metrics: Mapping[str, Any]) -> list[str]:
    # A metric that is not finite is what a reader looks for, so it is shown here all the same.
    names = [name for name in ("accuracy", "loss") if name in metrics] or names_in([metrics])
    return [f"{name} {number(metrics[name]):.4g}" for name in names[:METRICS]]


def _best(run: Run) -> list[str]:
    """Return the best accuracy and the lowest loss, each with its round."""
    found = []
    for name, better in (("accuracy", max), ("loss", min)):
        values = [(number(_evaluated(r).get(name)), r.round) for r in run.records]
        finite = [pair for pair in values if math.isfinite(pair[0])]
        if finite:
            value, when = better(finite, key=lambda pair: pair[0])
            found.append(f"{name} {value:.4g} in round {when}")
    return found


def _metrics(runs: Sequence[Run]) -> list[str]:
    names = list(dict.fromkeys(name for run in runs for name in run.metrics()))
    names.sort(key=lambda name: ("accuracy", "loss", name).index(name))
    if not names:
        return [page.note("The histories have no metrics of an evaluation or of training.")]
    parts = [page.subsection(name, _metric(runs, name)) for name in names[:METRICS]]
    if names[METRICS:]:
        parts.append(page.note(f"Further metrics, not drawn: {', '.join(names[METRICS:])}"))
    return parts


def _metric(runs: Sequence[Run], name: str) -> str:
    """Return the charts of a metric against epochs or mini-batches, rounds and bytes."""
    found = [
        (index, run, source)
        for index, run in enumerate(runs)
        for source in SOURCES
        if any(map(math.isfinite, run.metric(source.field, name)))
    ]
    keys = [Key(f"{run.label}, {source.words}", i, source.dash) for i, run, source in found]
    moved = [value for run in runs for value in run.bytes_moved() if math.isfinite(value)]
    size, unit = _unit(max(moved, default=0))
    axes = {
        "local epochs per participant": [run.epochs() for _, run, _ in found],
        "mini-batches per learner": [run.mini_batches() for _, run, _ in found],
        "rounds": [run.rounds() for _, run, _ in found],
        f"bytes of arrays, both ways ({unit})": [
            [each / size for each in run.bytes_moved()] for _, run, _ in found
        ],
    }
    figures = []
    for words, xs in axes.items():
        # Runs of one kind have no axis of the other kind.
        if words in _OF_A_KIND and not any(math.isfinite(x) for each in xs for x in each):
            continue
        lines = [
            Line(x, run.metric(source.field, name), index, source.dash)
            for x, (index, run, source) in zip(xs, found, strict=True)
        ]
        figures.append(_figure(lines, words, f"{name} against {words}"))
    return page.legend(keys) + page.charts(figures)


def _schedules(runs: Sequence[Run]) -> list[str]:
    """Return the charts of the runs with rounds of local epochs; nothing without such a run."""
    # By index, so that a run has one colour in all charts.
    own = {i: run for i, run in enumerate(runs) if not isinstance(run, DynamicRun)}
    if not own:
        return []
    changes = [
        Line(run.rounds(), [number(record.relative_change) for record in run.records], index)
        for index, run in own.items()
    ]
    thresholds = {index: run.epsilon for index, run in own.items() if run.epsilon is not None}
    for index, epsilon in thresholds.items():
        rounds = own[index].rounds()
        changes.append(Line(rounds, [epsilon] * len(rounds), index, _EPSILON_DASH))
    figures = [
        _figure(
            [
                Line(run.rounds(), [number(record.local_epochs) for record in run.records], index)
                for index, run in own.items()
            ],
            "rounds",
            "T, the local epochs of a round",
            steps=True,
        ),
        _figure(
            [Line(*run.rates(), index) for index, run in own.items()],
            "local epochs per participant",
            "learning rate",
        ),
        _figure(changes, "rounds", "relative change of the shared model", logarithmic=True),
    ]
    keys = [Key(run.label, index) for index, run in own.items()]
    keys += [
        Key(f"{runs[index].label}, epsilon {epsilon:.4g}", index, _EPSILON_DASH)
        for index, epsilon in thresholds.items()
    ]
    return [page.legend(keys), page.charts(figures)]


def _synchronisation(runs: Sequence[Run]) -> list[str]:
    """Return the charts of the runs of dynamic averaging; nothing without such a run."""
    own = {i: run for i, run in enumerate(runs) if isinstance(run, DynamicRun)}
    if not own:
        return []
    distances = [Line(r.rounds(), r.series("largest_distance"), i) for i, r in own.items()]
    # -1, which asks for every model, is no bound that a chart could show.
    bounds = [
        Line(r.rounds(), [d if d >= 0 else math.nan for d in r.series("delta")], i, _EPSILON_DASH)
        for i, r in own.items()
    ]
    losses = [Line(r.mini_batches(), r.series("cumulative_loss"), i) for i, r in own.items()]
    models = [Line(r.mini_batches(), r.models(), i) for i, r in own.items()]
    batches = "mini-batches per learner"
    figures = [
        _figure([*distances, *bounds], "rounds", "largest distance to the reference model"),
        _figure(losses, batches, "cumulative loss of all learners"),
        _figure(models, batches, "models sent, both ways", steps=True),
    ]
    keys = [Key(run.label, index) for index, run in own.items()]
    keys += [Key(f"{run.label}, the bound", i, _EPSILON_DASH) for i, run in own.items()]
    return [page.legend(keys), page.charts(figures)]


def _figure(lines: Sequence[Line], xlabel: str, caption: str, **options: bool) -> str:
    """Return a chart; if it had no point, a figure that says so."""
    drawn = [line for line in lines if not line.is_empty]
    if not drawn:
        return f"<figure>{page.note(f'{caption}: nothing known')}</figure>"
    return page.figure(svg_chart(drawn, xlabel, **options), caption)


# One run ----------------------------------------------------------------------------------------


def _run_section(run: Run) -> str:
    if isinstance(run, DynamicRun):
        return _dynamic_section(run)
    return page.section(
        run.label,
        page.subsection("Rounds", page.table(_HEADER, map(_row, run.records))),
        page.subsection("Relative change at each T", _levels(run)),
        page.subsection("Evaluation by each participant", *_sites(run, "site_metrics")),
        page.subsection("Training by each participant", *_sites(run, "site_train_metrics")),
        page.subsection("Alone or shared", _alone(run)),
        page.subsection("Update of each participant", _contributions(run)),
        page.subsection("Configuration", _configuration(run.configuration)),
    )


def _dynamic_section(run: DynamicRun) -> str:
    shown, note = rows_of(run)
    rows = (row(r, _spelled_metrics(_evaluated(r)), _events(r)) for r in shown)
    return page.section(
        run.label,
        page.subsection("Rounds", page.table(HEADER, rows), page.note(note) if note else ""),
        page.subsection("Update of each participant", _contributions(run)),
        page.subsection("Configuration", _configuration(run.configuration)),
    )


_HEADER = ["Round", "T", "Epochs", "Learning rate", "Relative change", "Metrics", "Averaged"]
_HEADER += ["Events", "Bytes down", "Bytes up", "Seconds"]


def _row(record: RoundRecord) -> list[Cell]:
    change = number(record.relative_change)
    return [
        str(record.round),
        str(record.local_epochs),
        f"{record.epochs_done:,}",
        record.rates,
        "unknown" if record.relative_change is None else f"{change:.4g}",
        _spelled_metrics(_evaluated(record)),
        f"{len(record.participants)}: {', '.join(map(str, record.participants))}",
        _events(record),
        _count(record.bytes_down),
        _count(record.bytes_up),
        f"{number(record.seconds):,.1f}",
    ]


def _events(record: Any) -> list[str]:
    """Return what happened in a round, a line for each event."""
    lines = [
        f"{word}: {event.get('participant', '')}: {event.get('reason', '')}"
        for name, word in _EVENTS
        for event in getattr(record, name, ())
    ]
    normalization = getattr(record, "normalization", {})
    lines += [f"Reinitialised: {who}" for who in normalization.get("reinitialised", ())]
    if "shared-model" in normalization:
        lines.append(str(normalization["shared-model"]))
    return [*lines, f"The run ended: {record.stopped}"] if record.stopped else lines


def _levels(run: Run) -> str:
    """Return the table of the relative changes at each T, from which the plateau rule decides."""
    try:
        levels = calibration_of(run.records).levels
    except ColearnError:  # no relative change is known
        return ""
    return page.table(
        ("T", "Rounds", "First", "Mean of the last three", "Plateau"),
        (
            [
                str(each.local_epochs),
                str(each.rounds),
                f"{each.first:.4g}",
                f"{each.last:.4g}",
                "level" if each.settled else "not level yet",
            ]
            for each in levels
        ),
    )


def _sites(run: Run, source: str) -> list[str]:
    """Return the charts of each participant's metrics; nothing if the records have none."""
    tables = [metrics for record in run.records for metrics in getattr(record, source).values()]
    names = names_in(tables)[:METRICS]
    return _by_participant(run, source, [(name, name) for name in names])


def _alone(run: Run) -> str:
    """Return the table of the participants' own models beside the shared one, if they share it."""
    compared = [r for r in run.records if any(map(_alone_metrics, r.site_metrics.values()))]
    if not compared:
        return ""
    header = ("Participant", "Metric", "Alone", "Shared", "Difference", "Round")
    return page.table(
        header,
        (
            [who, name, *_compared(metrics, name), str(compared[-1].round)]
            for who, metrics in sorted(compared[-1].site_metrics.items())
            for name in _alone_metrics(metrics)
        ),
    )


def _alone_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of the metrics of a participant's own model, without the prefix."""
    names = [name.removeprefix(ALONE) for name in metrics if name.startswith(ALONE)]
    return [name for name in names if name != "epochs"]


def _compared(metrics: Mapping[str, Any], name: str) -> list[str]:
    alone, shared = number(metrics[ALONE + name]), number(metrics.get(name))
    known = name in metrics
    return [
        f"{alone:.4g}",
        f"{shared:.4g}" if known else "stays at the site",
        f"{shared - alone:+.4g}" if known else "",
    ]


def _contributions(run: Run) -> str:
    values = [("norm", "norm of the update"), ("cosine", "cosine to the mean update")]
    return "".join(_by_participant(run, "contributions", [*values, ("weight", "weight")]))


def _by_participant(run: Run, source: str, values: Iterable[tuple[str, str]]) -> list[str]:
    """Return legend and charts of values of every participant against rounds."""
    participants = run.participants(source)
    figures = []
    for name, words in values:
        lines = [
            Line(run.rounds(), run.of_participant(source, who, name), style)
            for style, who in enumerate(participants)
        ]
        if not all(line.is_empty for line in lines):
            figures.append(_figure(lines, "rounds", words))
    keys = [Key(who, colour(style), dash(style)) for style, who in enumerate(participants)]
    return [page.legend(keys), page.charts(figures)] if figures else []


def _configuration(values: Mapping[str, Any]) -> str:
    return page.table(("Setting", "Value"), ([str(k), str(v)] for k, v in sorted(values.items())))


# Numbers in words -------------------------------------------------------------------------------


def _count(size: int | None) -> str:
    return "not counted" if size is None else f"{size:,}"


def _unit(size: float) -> tuple[float, str]:
    return next(((least, unit) for least, unit in _UNITS if size >= least), (1.0, "B"))


def _size(size: float) -> str:
    if not math.isfinite(size):
        return "not counted"
    least, unit = _unit(size)
    return f"{size / least:.4g} {unit}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
