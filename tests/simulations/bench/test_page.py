"""The page of measured figures is what the JSON files say."""

import json

import pytest

from flwr_colearn import ColearnError
from simulations.bench import page


def measured(benchmark="aggregation", version="1.2", **tables):
    machine = {"processor": "X", "cores": 2, "load before": 0.1}
    versions = {"flwr-colearn": version}
    return {"benchmark": benchmark, "machine": machine, "versions": versions, **tables}


def rows(**ratios):
    return [{"participants": int(k[1:]), "ratio": ratio} for k, ratio in ratios.items()]


def test_a_ratio_is_stated_as_its_range_over_the_measurements_of_a_version():
    both = [measured(rows=rows(k5=0.5, k20=0.25)), measured(rows=rows(k5=0.35))]
    older = measured(version="1.1", rows=rows(k5=0.9))
    found = page.ranges(page.SECTIONS["aggregation"], [*both, older])
    assert [tuple(row.values()) for row in found] == [
        ("1.2", 5, "0.35 to 0.5", "-", 2),
        ("1.2", 20, "0.25", "-", 1),
        ("1.1", 5, "0.9", "-", 1),
    ]


def test_a_page_has_every_measurement_with_its_machine_and_versions():
    text = page.page_of({"a": measured(rows=rows(k5=0.5)), "b": measured(rows=rows(k5=0.35))})
    assert "## Aggregation" in text
    assert "## Peers" not in text
    assert "| 0.35 to 0.5 |" in " ".join(text.split())
    for name, ratio in (("a", "0.5"), ("b", "0.35")):
        own = " ".join(text.partition(f"### {name}\n")[2].partition("###")[0].split())
        assert own.startswith("processor: X; cores: 2; load before: 0.1; flwr-colearn: 1.2")
        assert own.endswith(f"| 5 | {ratio} |")


def test_every_ratio_is_at_the_top_as_the_range_of_its_newest_version():
    found = page.headline(
        {
            "a": measured(version="1.9", rows=rows(k5=0.9, k20=0.8)),
            "b": measured(version="1.10", rows=rows(k5=0.5)),
            "c": measured(version="1.10", rows=rows(k5=0.35)),
            "d": measured("peers", version="2.0", rows=[{"side": "x", "users/s": 3}]),
        }
    )
    assert [tuple(row.values()) for row in found] == [
        ("aggregation", "participants 5", "ratio", "0.35 to 0.5", "1.10", 2),
        ("aggregation", "participants 20", "ratio", "0.8", "1.9", 1),
    ]
    text = page.page_of({"b": measured(rows=rows(k5=0.5))})
    assert text.index("participants 5") < text.index("## Aggregation")


def test_targets_that_were_not_reached_are_in_no_range():
    cells = {"task": "digits", "target %": 98.5, "way": "FedAvg", "rounds": 3}
    runs = [measured("communication", rows=[{**cells, "MB": mb}]) for mb in ("not reached", 2.5)]
    [row] = page.ranges(page.SECTIONS["communication"], runs)
    assert (row["MB"], row["rounds"]) == ("2.5", "3")


@pytest.mark.parametrize(
    "content", [{"rows": []}, {"benchmark": "scale", "machine": {}}, measured("speed")]
)
def test_a_file_that_is_no_measurement_is_refused(content, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ColearnError, match=r"x\.json: expected 'benchmark' to be one of aggreg"):
        page.read(tmp_path)


def test_the_committed_page_is_that_of_the_committed_files():
    assert page.PAGE.read_text() == page.page_of(page.read(page.RESULTS))
