"""The report: its numbers against the records, hostile texts, and files that are no histories."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flwr_colearn import ColearnError, History, RoundRecord
from flwr_colearn.reporting import Run, read_runs, save_report
from flwr_colearn.reporting.charts import Line, svg_chart
from flwr_colearn.reporting.command_line import main
from flwr_colearn.reporting.report import report_page

HOSTILE = """<script>alert(1)</script><img src=x onerror='alert("2")'>&lt;$\\frac{$"""


class Parsed(HTMLParser):
    """The elements, attributes and texts of a page, as a browser finds them."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self.within = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.within.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self.within and self.within.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.within:
            self.texts.append(data)

    @property
    def tags(self):
        return {tag for tag, _ in self.elements}

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def record(number, epochs=2, done=None, **values):
    return RoundRecord(number, epochs, 0.1, done or epochs * number, **values)


def whole(number, **values):
    return record(
        number,
        relative_change=0.5 / number,
        bytes_down=1000,
        bytes_up=2000,
        control_down=10,
        control_up=20,
        participants=["leiden", "utrecht"],
        restarts=[{"participant": "leiden", "reason": "connection lost"}],
        refusals=[{"participant": "delft", "reason": "2 arrays are not finite"}],
        contributions={
            who: {"weight": 0.5, "norm": 1.5 * number, "cosine": 0.75}
            for who in ("leiden", "utrecht")
        },
        seconds=61.25,
        train_metrics={"train-loss": 2 / number, "num-examples": 90},
        server_metrics={"accuracy": 1 - 0.5**number, "loss": 1 / number},
        evaluate_metrics={"accuracy": 0.5},
        site_metrics={"leiden": {"accuracy": 0.5}, "utrecht": {"accuracy": 0.25}},
        learning_rates=[0.1, 0.05],
        **values,
    )


def page_of(*records, **values):
    return report_page([Run("run", records, **values)])


@pytest.fixture(scope="module")
def page():
    """The page of two whole rounds; to draw it takes a second."""
    return page_of(whole(1), whole(2))


def captions(html):
    return re.findall(r"<figcaption>(.*?)</figcaption>", html)


def points(svg):
    """Return the points of the lines of a chart, in the picture's own units."""
    paths = re.findall(r'<path d="([^"]*)" clip-path[^>]*var\(--s', svg, re.DOTALL)
    return [
        [(float(x), -float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
        for path in paths
    ]


def proportional(found, wanted):
    """Return whether numbers are a linear map of others, as positions on an axis are."""
    scale = (found[-1] - found[0]) / (wanted[-1] - wanted[0])
    return all(
        math.isclose(found[0] + scale * (each - wanted[0]), at, abs_tol=1e-3)
        for at, each in zip(found, wanted, strict=True)
    )


# What is drawn ----------------------------------------------------------------------------------


def test_a_line_goes_through_its_points_and_leaves_gaps():
    xs, ys = [1, 2, 4, 8], [0.25, 0.5, 0.375, 1.0]
    [line] = points(svg_chart([Line(xs, ys)], "rounds"))
    assert proportional([x for x, _ in line], xs)
    assert proportional([y for _, y in line], ys)
    svg = svg_chart([Line(xs, [1, 2, math.nan, 4], dash="5 2")], "")
    path = re.search(r'<path d="([^"]*)" clip-path[^>]*var\(--s0', svg)
    assert path[1].count("M") == 2


def test_a_number_beyond_every_axis_leaves_the_others_readable():
    [line] = points(svg_chart([Line([1, 2, 3, 4], [1, 1e308, 3, 2])], "rounds"))
    assert proportional([y for _, y in line], [1, 3, 2])


def test_metrics_are_drawn_against_epochs_rounds_and_bytes():
    html = page_of(
        whole(1),
        whole(
            2,
        ),
        whole(3),
    )
    for name in ("accuracy", "loss", "train-loss"):
        for axis in ("local epochs per participant", "rounds", "bytes of arrays, both ways (kB)"):
            assert f"{name} against {axis}" in captions(html)
    figure = html[: html.index("<figcaption>accuracy against bytes")].rpartition("<figure>")[2]
    server, sites = points(figure)
    # 3, 6 and 9 kB, and the server's accuracy of every round.
    assert proportional([x for x, _ in server], [3, 6, 9])
    assert proportional([y for _, y in server], [0.5, 0.75, 0.875])
    assert len({y for _, y in sites}) == 1


def test_the_rate_of_every_epoch_is_drawn():
    run = Run("run", [whole(1), whole(2)])
    assert run.rates() == ([1, 2, 3, 4], [0.1, 0.05, 0.1, 0.05])
    assert Run("old", [record(1), record(2)]).rates() == ([2, 4], [0.1, 0.1])


def test_bytes_are_those_of_both_ways_up_to_a_round():
    assert Run("run", [whole(1), whole(2), whole(3)]).bytes_moved() == [3000, 6000, 9000]
    assert all(map(math.isnan, Run("run", [record(1), whole(2)]).bytes_moved()))


def test_bytes_that_were_not_counted_are_not_zero():
    html = page_of(record(1, server_metrics={"loss": 1.0}), record(2, server_metrics={"loss": 0.5}))
    assert "loss against bytes of arrays, both ways (B): nothing known" in html
    assert "loss against rounds" in captions(html)
    assert Parsed(html).text.count("not counted") == 2 * 2 + 3


def test_a_table_has_a_row_a_round_with_everything_that_happened():
    html = page_of(
        whole(1, absences=[{"participant": "breda", "reason": "quorum"}]),
        whole(2, stopped="no better accuracy", normalization={"reinitialised": ["leiden"]}),
    )
    rows = [Parsed(row).text for row in html.split("<tr>") if 'data-label="Averaged"' in row]
    assert rows[0] == (
        "1 2 2 from 0.1 to 0.05 0.5 accuracy 0.5 loss 1 2: leiden, utrecht "
        "Restarted: leiden: connection lost Refused: delft: 2 arrays are not finite "
        "Absent: breda: quorum 1,000 2,000 61.2"
    )
    assert "Reinitialised: leiden The run ended: no better accuracy" in rows[1]


def test_the_summary_adds_up(page):
    text = Parsed(page).text
    assert "run 2 4 2 accuracy 0.75 loss 0.5" in text
    assert "accuracy 0.75 in round 2 loss 0.5 in round 2 2 kB 4 kB 60 B 2 min 2 s" in text
    assert "2 restarted 2 refused" in text


def test_curves_of_each_site_and_the_updates_are_drawn(page):
    html = page
    assert {"accuracy", "norm of the update", "cosine to the mean update"} <= set(captions(html))
    figure = html[: html.index("<figcaption>norm of the update")].rpartition("<figure>")[2]
    assert len(points(figure)) == 2


def test_what_sites_share_of_their_training_and_of_their_own_models_is_shown():
    sites = {
        "leiden": {"accuracy": 0.75, "alone-accuracy": 0.5, "alone-epochs": 4},
        "utrecht": {"alone-common-loss": 0.25},
        "delft": {"accuracy": 0.5},
    }
    record_1 = record(1, site_train_metrics={"leiden": {"train-loss": 0.5}})
    record_2 = record(2, site_metrics=sites, site_train_metrics={"leiden": {"train-loss": 0.25}})
    html = page_of(record_1, record_2)
    assert "train-loss" in captions(html)
    text = Parsed(html).text
    assert "leiden accuracy 0.5 0.75 +0.25 2 utrecht common-loss 0.25 stays at the site 2" in text
    assert "Alone or shared" not in page_of(record_1)
    means = record(2, evaluate_metrics={"accuracy": 0.5, "alone-accuracy": 0.25})
    # A mean of the sites' own models is no metric of the shared model.
    assert not any("alone" in caption for caption in captions(page_of(means)))


def test_epsilon_levels_and_configuration_where_they_are_known(page):
    values = {"epsilon": 0.125, "configuration": {"task": "digits"}}
    text = Parsed(page_of(whole(1), whole(2), **values)).text
    assert "run, epsilon 0.125" in text
    assert "Relative change at each T" in text
    assert "task digits" in text
    assert "epsilon" not in Parsed(page).text


def test_several_runs_are_in_the_same_charts():
    runs = [Run("first", [whole(1), whole(2)]), Run("second", [whole(1)])]
    html = report_page(runs)
    figure = html[: html.index("<figcaption>accuracy against rounds")].rpartition("<figure>")[2]
    assert len(points(figure)) == 4
    assert "var(--s0)" in figure
    assert "var(--s1)" in figure
    for number in (0, 9):
        with pytest.raises(ColearnError, match=f"expected 1 to 8 runs, found {number}"):
            report_page([runs[0]] * number)


# What may be in a history -----------------------------------------------------------------------


def test_hostile_texts_stay_texts(tmp_path):
    """Names of participants, reasons, metrics and settings are what others wrote."""
    hostile = whole(1)
    entry = {"participant": HOSTILE, "reason": HOSTILE}
    hostile.participants = [HOSTILE]
    hostile.restarts = hostile.refusals = hostile.absences = hostile.warnings = [entry]
    hostile.server_metrics = {HOSTILE: 1.0}
    hostile.site_metrics = {HOSTILE: {HOSTILE: 1.0}}
    hostile.contributions = {HOSTILE: {"weight": 1.0, "norm": 1.0, "cosine": 1.0}}
    hostile.normalization = {"reinitialised": [HOSTILE], "shared-model": HOSTILE}
    hostile.stopped = HOSTILE
    run = Run(HOSTILE, [hostile], configuration={HOSTILE: HOSTILE})
    parsed = Parsed(save_report([run], tmp_path / "report.html", HOSTILE).read_text())
    allowed = {"html", "head", "meta", "title", "style", "body", "section", "h1", "h2", "h3", "p"}
    allowed |= {"div", "figure", "figcaption", "ul", "li", "table", "thead", "tbody", "tr", "th"}
    allowed |= {"td", "svg", "g", "path", "defs", "use", "text", "clippath", "rect", "tspan"}
    assert parsed.tags <= allowed
    for tag, attributes in parsed.elements:
        assert not any(name.startswith("on") or name == "src" for name in attributes), tag
    assert parsed.text.count(HOSTILE) >= 15


def test_control_characters_and_lone_surrogates_are_spelled_out(tmp_path):
    text = 'x\u202e\ud800\x00"'
    run = Run(text, [record(1, participants=[text])])
    page = save_report([run], tmp_path / "report.html").read_text()
    assert "x\\u202e\\ud800\\x00&quot;" in page
    assert not re.search("[\u202e\x00]", page)


def test_the_page_refers_to_nothing_elsewhere(page):
    html = page
    assert not re.search(r"https?:|//|@import|<script|<link|url\((?!#)", html)
    assert "default-src 'none'" in html
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_every_reference_in_a_page_has_one_meaning(page):
    html = page
    meanings = {}
    for kind, name, rest in re.findall(r'<(\w+) id="([^"]*)"(.*?)</', html, re.DOTALL):
        assert meanings.setdefault(name, (kind, rest)) == (kind, rest)
    referred = re.findall(r'(?:href="|url\()#([^")]*)', html)
    assert set(referred) <= set(re.findall(r'id="([^"]*)"', html))


NUMBERS = st.floats() | st.integers() | st.sampled_from([1e308, -1e308, 10**400, 5e-324])


@settings(max_examples=4, deadline=None)
@example([1e308, -1e308, 10**400], 1e308)
@given(st.lists(NUMBERS, min_size=1, max_size=3), st.floats())
def test_any_numbers_make_a_page(values, change):
    records = [
        record(number, server_metrics={"loss": value}, relative_change=change)
        for number, value in enumerate(values, 1)
    ]
    assert page_of(*records).endswith("</html>\n")


def test_numbers_that_are_not_finite_are_shown_and_not_drawn(tmp_path):
    history = History(tmp_path / "history.jsonl")
    values = [(0.5, 1.0), (math.nan, math.inf), (0.25, 0.5)]
    for number, (change, loss) in enumerate(values, 1):
        history.append(record(number, relative_change=change, server_metrics={"loss": loss}))
    history.append(RoundRecord(4, 1, math.nan, 7, learning_rates=[math.inf], seconds=math.inf))
    [run] = read_runs([tmp_path / "history.jsonl"])
    text = Parsed(report_page([run])).text
    assert "nan loss inf" in text
    assert "loss 0.5 in round 3" in text


# Lines as versions 0.4 to 0.6 wrote them, which have fewer keys.
OLD = {
    "round": 1,
    "local_epochs": 5,
    "learning_rate": 0.01,
    "epochs_done": 5,
    "relative_change": 0.2,
    "bytes_down": 100,
    "bytes_up": 100,
    "participants": ["12", "34"],
    "normalization": {"fresh": ["12"]},
    "seconds": 1.5,
    "train_metrics": {"train-loss": "nan"},
}


def test_histories_of_earlier_versions_are_read(tmp_path):
    later = {**OLD, "round": 2, "epochs_done": 10, "a-key-to-come": [1]}
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (OLD, later)))
    text = Parsed(report_page(read_runs([path]))).text
    assert "Reinitialised: 12" in text
    assert "The histories have no metrics" in text


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"participants": "12"}, "'participants' as RoundRecord has it, found '12'"),
        ({"refusals": ["12"]}, "'refusals'"),
        ({"site_metrics": {"a": 1}}, "'site_metrics'"),
        ({"local_epochs": "five"}, "'local_epochs'"),
        ({"learning_rates": [[]]}, "'learning_rates'"),
        ({"bytes_up": "many"}, "'bytes_up'"),
        ({"normalization": {"fresh": 1}}, "'normalization'"),
        ({"stopped": {}}, "'stopped'"),
        ({"relative_change": 10**400}, "'relative_change'"),
        ({"train_metrics": {"loss": "small"}}, "expected one RoundRecord a line"),
    ],
)
def test_records_of_other_types_are_refused_with_their_field(change, found, tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    path.write_text(json.dumps({**OLD, **change}) + "\n")
    assert main(["report", str(path)]) == 2
    assert found in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "\n", "no record\n", "[1]\n", '{"a": 1}\n'])
def test_a_file_that_is_no_history_is_refused(content, tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    if content is not None:
        path.write_text(content)
    assert main(["report", str(path)]) == 2
    assert capsys.readouterr().err.startswith("flwr-colearn: history")
    assert not (tmp_path / "report.html").exists()


# The command ------------------------------------------------------------------------------------


def written(folder, *rounds):
    history = History(folder / "history.jsonl")
    for number in rounds:
        history.append(whole(number))
    return str(folder / "history.jsonl")


def test_the_command_writes_beside_the_history_and_prints_the_path(tmp_path, capsys):
    assert main(["report", written(tmp_path, 1, 2)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_several_histories_are_named_after_their_folders(tmp_path):
    paths = [written(tmp_path / name, 1) for name in ("paper", "ours")]
    output = tmp_path / "both.html"
    arguments = ["report", *paths, "--output", str(output), "--epsilon", "0.5", "--title", "A & B"]
    assert main(arguments) == 0
    parsed = Parsed(output.read_text())
    assert "A & B" in parsed.text
    assert "ours, epsilon 0.5" in parsed.text
    assert "paper, the server's evaluation" in parsed.text


def test_a_history_is_never_replaced_by_its_report(tmp_path, capsys):
    path = written(tmp_path, 1)
    assert main(["report", path, "--output", path]) == 2
    assert "expected an output beside the histories" in capsys.readouterr().err
    assert len(History.read(path)) == 1


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, capsys):
    path = written(tmp_path, 1)
    assert main(["report", path, "--output", f"{path}/report.html"]) == 2
    assert "report: expected a file that can be written" in capsys.readouterr().err


def test_without_matplotlib_the_error_names_the_extra(tmp_path):
    code = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"
        "from flwr_colearn.reporting.command_line import main\n"
        f"sys.exit(main(['report', {written(tmp_path, 1)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'flwr-colearn[report]'" in done.stderr
