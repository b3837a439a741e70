import csv
import itertools
import json
import tomllib
from dataclasses import asdict, replace

import pytest

from flwr_colearn import ColearnError
from simulations.arms import ARMS
from simulations.settings import CONF, read_config
from simulations.study import paper
from simulations.study.arguments import settings_of
from simulations.study.paper import Column, Exhibit, Row, exhibits, ours, table_of, write_page
from simulations.study.training import ArmUnit
from simulations.study.units import unit_config

UNIT = ArmUnit(
    arm="clr-ile",
    seed=0,
    epochs=[5, 10, 20],
    metrics={"accuracy": [0.5, 0.6, 0.9134], "top-5": [0.9, 0.95, 0.99]},
    headline="accuracy",
    doublings=[10],
    rounds=3,
    bytes=3000,
    model_bytes=2**20 * 13 // 4,
    round_seconds=[60.0, 120.0, 240.0],
    examples=100,
    seconds=420.0,
    config={},
    data="",
)


def write(results, config, unit):
    """Write a unit as if the config's run had ended with it."""
    participants, settings = settings_of(read_config(CONF / f"{config}.toml"), config)
    unit = replace(unit, config=unit_config(replace(participants, seed=unit.seed), settings))
    path = results / config / "units" / f"{unit.arm}-{unit.seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(unit)))
    return path


# The committed results


@pytest.mark.parametrize("config", paper.configs_in(paper.RESULTS))
def test_committed_units_are_those_of_their_run_config(config):
    assert paper.read_results(config, paper.RESULTS)


# The descriptions


def test_the_paper_has_six_tables_and_figure_two():
    assert list(exhibits()) == ["figure-2", *(f"table-{number}" for number in range(1, 7))]


@pytest.mark.parametrize("exhibit", exhibits().values(), ids=lambda each: each.name)
def test_every_description_names_configs_arms_and_one_figure_of_the_paper_a_column(exhibit):
    for row in exhibit.rows:
        settings_of(read_config(CONF / f"{row.config}.toml"), row.config)
        assert len(row.paper) in (0, len(exhibit.columns))
    assert set(exhibit.arms) <= set(ARMS)


@pytest.mark.parametrize(
    ("name", "model", "printed"),
    [
        ("table-1", "Inception-V4", [60, 168]),
        ("table-2", "ResNet-152", [92.64, "", 85.4, 93.51]),
        ("table-3", "ResNet-V2-101", [75.66, 92.28, 75.85, 92.39]),
        ("table-4", "Capsule", [98.32, 98.75]),
        ("table-6", "CRNN, max pooling", [0.292, 0.292, 0.960, 0.959, 2.471, 2.456]),
    ],
)
def test_the_papers_figures_are_those_of_the_paper(name, model, printed):
    [row] = [row for row in exhibits()[name].rows if row.model == model]
    assert row.paper == printed


def test_the_learning_rate_and_batch_size_of_the_papers_networks_are_the_papers():
    for exhibit in exhibits().values():
        for row in exhibit.rows:
            if row.paper and row.config.startswith(("cifar10-", "imagenet-")):
                config = tomllib.loads((CONF / f"{row.config}.toml").read_text())
                assert (config["learning-rate"], config["decay"]) == (0.01, 0.25)
                assert config["batch-size"] == (256 if "imagenet" in row.config else 32)


# Cells


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        (Column("", "clr-ile", "accuracy"), "91.34 (1 seed)"),
        (Column("", "clr-ile", "accuracy", scale=1), "0.913 (1 seed)"),
        (Column("", "clr-ile", "top-5"), "99.00 (1 seed)"),
        (Column("", "clr-ile", "interval"), "1.50 (1 seed)"),  # 60 and 120 s; then T was doubled
        (Column("", "clr-ile", "volume"), "3.25 (1 seed)"),
        (Column("", "ensemble", "accuracy"), "not run"),
    ],
)
def test_cells_by_hand(column, shown):
    assert ours(column, [UNIT]) == shown


def test_cells_are_means_with_the_sample_s_standard_deviation():
    other = replace(UNIT, seed=1, metrics={"accuracy": [0.5, 0.6, 0.9334]})
    assert ours(Column("", "clr-ile", "accuracy"), [UNIT, other]) == "92.34 ± 1.41 (2 seeds)"


def test_an_interval_that_a_run_did_not_measure_is_said_to_be():
    interval = Column("", "clr-ile", "interval")
    assert ours(interval, [replace(UNIT, round_seconds=[])]) == "not measured"


def test_a_table_has_the_papers_figures_beside_ours(tmp_path):
    exhibit = Exhibit(
        "table-9",
        "Ours and theirs",
        "",
        [Row("DenseNet-40", "cifar10-densenet40", [91.4, ""]), Row("small", "cifar10-cpu")],
        [Column("co-learning", "clr-ile", "accuracy"), Column("ensemble", "ensemble", "accuracy")],
        ["clr-ile", "ensemble"],
    )
    write(tmp_path, "cifar10-cpu", UNIT)
    assert table_of(exhibit, tmp_path) == [
        {
            "model": "DenseNet-40",
            "co-learning: paper": "91.4",
            "co-learning: ours": "not run",
            "ensemble: ours": "not run",
            "local epochs": "",
        },
        {
            "model": "small",
            "co-learning: paper": "",
            "co-learning: ours": "91.34 (1 seed)",
            "ensemble: ours": "not run",
            "local epochs": "20",
        },
    ]


# The page


def test_a_page_without_a_single_run_shows_the_paper_and_not_run(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    page = write_page(results).read_text()
    assert page.count("not run  ") >= 6 + 60  # claims, and cells
    for figure in ("91.43", "98.75", "2.621", "93.51"):
        assert figure in page
    assert "seed)" not in page
    assert (results / "figure-2.svg").exists()


def test_the_page_is_made_of_the_result_files_and_always_the_same(tmp_path):
    results = tmp_path / "results"
    for arm, seed in itertools.product(ARMS, range(2)):
        metrics = {"accuracy": [0.5, 0.6, 0.8 + seed / 100]}
        write(results, "cifar10-cpu", replace(UNIT, arm=arm, seed=seed, metrics=metrics))
    page = write_page(results).read_text()
    assert "80.50 ± 0.71 (2 seeds)" in page
    assert "CLR+ILE against CLR+FLE +0.00 (± 0.71)" in page
    with (results / "table-2.csv").open() as file:
        table = list(csv.DictReader(file))
    assert table[-1]["ensemble: ours"] == "80.50 ± 0.71 (2 seeds)"
    assert table[0]["ensemble: paper"] == "80.39"
    files = {path.name: path.read_bytes() for path in results.iterdir() if path.is_file()}
    assert write_page(results).read_text() == page
    assert {p.name: p.read_bytes() for p in results.iterdir() if p.is_file()} == files


def test_results_of_a_config_that_has_changed_are_refused(tmp_path):
    path = write(tmp_path, "cifar10-cpu", UNIT)
    content = json.loads(path.read_text())
    content["config"]["momentum"] = 0.123
    path.write_text(json.dumps(content))
    with pytest.raises(ColearnError, match="another momentum"):
        paper.read_results("cifar10-cpu", tmp_path)


# The command


def test_a_command_runs_what_is_missing_and_writes_the_page(tmp_path, monkeypatch, capsys):
    asked = []

    def run_study(arms, seeds, participants, settings, output, processes):
        told = (participants.model, participants.data_dir, output, processes)
        asked.append((list(arms), list(seeds), *told))

    monkeypatch.setattr(paper, "run_study", run_study)
    results = tmp_path / "results"
    results.mkdir()
    words = ["table-2", "--models", "DenseNet-40", "--seeds", "2", "--arms", "clr-ile", "clr-fle"]
    paper.main([*words, "--results", str(results), "--data-dir", "/data", "--processes", "3"])
    output = results / "cifar10-densenet40"
    assert asked == [(["clr-ile"], [0, 1], "densenet40", "/data", output, 3)]
    assert str(tmp_path / "results.md") in capsys.readouterr().out
    paper.main(["page", "--results", str(results)])
    assert len(asked) == 1
    with pytest.raises(ColearnError, match=r"expected some of .*'VGG-19'.*found \['VGG'\]"):
        paper.main(["table-2", "--models", "VGG", "--results", str(results)])
