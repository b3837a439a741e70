"""The report of dynamic averaging, alone and beside runs with rounds of local epochs."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from flwr_colearn import DynamicHistory, DynamicRecord, History, RoundRecord
from flwr_colearn.reporting import Run
from flwr_colearn.reporting.command_line import main
from flwr_colearn.reporting.dynamic_runs import MOST_ROWS, DynamicRun, rows_of
from flwr_colearn.reporting.report import report_page

BESIDE = Path(__file__).with_name("test_report.py")
spec = importlib.util.spec_from_file_location("report_tests", BESIDE)
helpers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)
captions, points, Parsed, proportional = (
    helpers.captions,
    helpers.points,
    helpers.Parsed,
    helpers.proportional,
)


def record(number, **values):
    moved = {"models_down": 1, "models_up": 2, "bytes_down": 100, "bytes_up": 200 * number}
    moved |= {"control_down": 5, "control_up": 7}
    return DynamicRecord(
        number,
        10 * number,
        examples=40,
        loss=80.0 / number,
        cumulative_loss=80.0 * number,
        delta=0.5,
        largest_distance=0.1 * number**2,
        moved=values.pop("moved", moved),
        seconds=1.5,
        **values,
    )


def whole():
    return [
        record(1, server_metrics={"accuracy": 0.5}, evaluated="mean of all learners"),
        record(2, reporters=["leiden"], fetched=["delft"], synchronised="partial"),
        record(
            4,
            synchronised="full",
            lost=[{"participant": "utrecht", "reason": "its state was lost"}],
            server_metrics={"accuracy": 0.75},
        ),
    ]


def section(html, title):
    return html.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


def svgs(html):
    return re.findall(r"<svg class.*?</svg>", html, re.DOTALL)


def test_its_numbers_are_drawn_against_mini_batches():
    html = report_page([Run("dynamic", whole())])
    accuracy = section(html, "Metrics of the shared model")
    assert captions(accuracy)[0] == "accuracy against mini-batches per learner"
    assert not any("local epochs" in caption for caption in captions(html))
    charts = dict(zip(captions(html), svgs(html), strict=True))
    [loss] = points(charts["cumulative loss of all learners"])
    assert proportional([x for x, _ in loss], [10, 20, 40])
    assert proportional([y for _, y in loss], [80, 160, 320])


def test_a_metric_that_few_rounds_have_is_drawn_as_points():
    """A run may be evaluated in every tenth of many rounds, between which no line can be drawn."""
    records = [record(n) for n in range(1, 101)]
    for each in records[9::10]:
        each.server_metrics = {"accuracy": each.round / 100}
    html = section(report_page([Run("dynamic", records)]), "Metrics of the shared model")
    marks = re.search(r"<g clip-path[^>]*>(.*?)</g>", svgs(html)[0], re.DOTALL)
    assert marks[1].count("<use") == 10


def test_the_largest_distance_and_its_bound_are_in_one_chart():
    html = report_page([Run("dynamic", whole())])
    charts = dict(zip(captions(html), svgs(html), strict=True))
    distance, bound = points(charts["largest distance to the reference model"])
    assert proportional([y for _, y in [*distance, bound[0]]], [0.1, 0.4, 1.6, 0.5])


def test_the_summary_and_the_rows_say_what_happened():
    text = Parsed(report_page([Run("dynamic", whole())])).text
    assert "dynamic 3 40 mini-batches" in text
    assert "accuracy 0.75 in round 4" in text
    # Up 200 * (1 + 2 + 4) bytes, down three times 100, and configs 3 * 12.
    assert "300 B 1.4 kB 36 B" in text
    assert "Reinitialised: utrecht: its state was lost" in text
    assert "2 20 40 0.4 0.5 partial leiden delft" in text
    assert "1 rounds without an exchange" in text


@pytest.mark.parametrize(("delta", "spelled"), [(-1.0, "every model"), (math.inf, "none")])
def test_bounds_that_are_no_number_are_spelled(delta, spelled):
    one = record(1, synchronised="full")
    one.delta = delta
    assert f"0.1 {spelled} full" in Parsed(report_page([Run("dynamic", [one])])).text


def test_a_long_run_has_its_eventful_last_rounds_in_the_table():
    run = DynamicRun("long", [record(n, synchronised="full") for n in range(1, 1001)])
    shown, note = rows_of(run)
    assert [shown[0].round, shown[-1].round, len(shown)] == [601, 1000, MOST_ROWS]
    assert note.startswith("600 rounds")


def test_runs_of_both_kinds_are_in_the_same_charts(tmp_path, capsys):
    dynamic, epochs = tmp_path / "a" / "history.jsonl", tmp_path / "b" / "history.jsonl"
    history = DynamicHistory(dynamic)
    for one in whole():
        history.append(one)
    rounds = History(epochs)
    for n in (1, 2):
        rounds.append(RoundRecord(n, 2, 0.1, 2 * n, 0.1, server_metrics={"accuracy": 0.25 * n}))
    output = tmp_path / "both.html"
    arguments = ["report", str(dynamic), str(epochs), "--output", str(output), "--epsilon", "0.05"]
    assert main(arguments) == 0
    html = output.read_text()
    metrics = section(html, "Metrics of the shared model")
    found = dict(zip(captions(metrics), svgs(metrics), strict=True))
    both = [name for name, svg in found.items() if "var(--s0)" in svg and "var(--s1)" in svg]
    assert any(name.startswith("accuracy against rounds") for name in both)
    epochs_only = found["accuracy against local epochs per participant"]
    assert "var(--s0)" not in epochs_only
    assert "var(--s1)" in epochs_only
    assert "a, the bound" in html
    assert "b, epsilon 0.05" in html
    assert "a, epsilon" not in html


def test_what_was_written_is_read_with_numbers_that_are_not_finite(tmp_path):
    history = DynamicHistory(tmp_path / "history.jsonl")
    one = record(1, synchronised="full")
    one.loss = one.cumulative_loss = math.nan
    one.delta, one.largest_distance = math.inf, math.inf
    history.append(one)
    assert main(["report", str(tmp_path / "history.jsonl")]) == 0
    assert "nan inf none full" in Parsed((tmp_path / "report.html").read_text()).text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("round", "one"),
        ("mini_batches", 1.5),
        ("delta", [1]),
        ("moved", []),
        ("reporters", "leiden"),
        ("restarts", ["leiden"]),
        ("contributions", {"leiden": 1}),
        ("synchronised", None),
    ],
)
def test_records_of_other_types_are_refused_with_their_field(field, value, tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    path.write_text(json.dumps({**json.loads(record(1).to_json()), field: value}) + "\n")
    assert main(["report", str(path)]) == 2
    assert "expected" in (error := capsys.readouterr().err)
    assert field in error or "DynamicRecord a line" in error


def test_a_file_without_rounds_is_refused(tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    path.write_text('{"mini_batches"\n')
    assert main(["report", str(path)]) == 2
    assert "history" in capsys.readouterr().err
