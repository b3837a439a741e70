import json
import logging
from dataclasses import replace

import pytest
import torch

from clients.torch.streams import Interleaved
from flwr_colearn import ColearnError
from flwr_colearn.dynamic import Dynamic, FractionAveraging, Never, Periodic, Serial
from simulations.study import __main__ as study
from simulations.study import dynamic
from simulations.study.dynamic import STUDIES, Setting, build_streams, operator_named, run_unit

QUICK = Setting("drift", learners=3, steps=16, batch_size=4, learning_rate=0.1, drifts=1)


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    """``main`` quietens Flower's log for good."""
    before = logging.getLogger("flwr").level
    yield
    logging.getLogger("flwr").setLevel(before)


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("periodic-4", Periodic(4)),
        ("fedavg-0.3", FractionAveraging(0.3, 8)),
        ("fedavg-0.3@2", FractionAveraging(0.3, 2)),
        ("dynamic-0.5", Dynamic(0.5)),
        ("dynamic-0.5@8", Dynamic(0.5, 8)),
        ("none", Never()),
        ("serial", Serial(10)),
    ],
)
def test_operators_have_names(name, operator):
    assert operator_named(name, 10) == operator


@pytest.mark.parametrize("name", ["periodic", "periodic-x", "dynamic-", "hourly-1", "nones"])
def test_unknown_operators_are_refused(name):
    with pytest.raises(ColearnError, match="expected periodic-B"):
        operator_named(name, 10)


def test_every_study_names_operators_that_exist():
    for each in STUDIES.values():
        for name in each.operators:
            operator_named(name, each.setting.learners)


@pytest.fixture(scope="module")
def units():
    names = ("periodic-1", "periodic-8", "dynamic-0.01", "dynamic-inf", "none", "serial")
    return {name: run_unit(name, QUICK, "") for name in names}


def test_all_operators_see_the_same_number_of_steps(units):
    for unit in units.values():
        assert unit.steps[-1] == QUICK.steps
        assert len(unit.steps) == len(unit.losses) == len(unit.bytes)
        assert all(a < b for a, b in zip(unit.losses, unit.losses[1:], strict=False))


def test_the_first_step_costs_all_of_them_the_same(units):
    """All start from one model on the same mini-batches."""
    firsts = [units[name].losses[0] for name in ("periodic-1", "dynamic-0.01", "none")]
    assert firsts[0] == firsts[1] == firsts[2]


def test_models_moved_are_those_of_the_operator(units):
    m, rounds = QUICK.learners, QUICK.steps
    assert units["periodic-1"].models == m + 2 * m * rounds
    assert units["periodic-8"].models == m + 2 * m * rounds // 8
    assert units["none"].models == units["dynamic-inf"].models == m
    assert units["serial"].models == 1
    assert units["dynamic-inf"].losses == units["none"].losses


def test_serial_learning_sees_what_all_learners_see():
    streams = build_streams(QUICK, "")
    both = Interleaved(tuple(streams))
    for k in range(QUICK.learners):
        torch.testing.assert_close(both.batch(2 * QUICK.learners + k), streams[k].batch(2))


def test_a_study_writes_results_as_it_goes_and_skips_them_later(tmp_path, capsys, monkeypatch):
    arguments = ["dynamic", "drift", "--steps", "8", "--learners", "2", "--output", str(tmp_path)]
    arguments += ["--operators", "periodic-8", "dynamic-0.1", "serial", "--seeds", "2"]
    study.main(arguments)
    files = sorted(path.name for path in (tmp_path / "units").iterdir())
    assert files == [f"{name}-{s}.json" for name in
                     ("dynamic-0.1", "periodic-8", "serial") for s in (0, 1)]  # fmt: skip
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "periodic-8",
        "dynamic-0.1",
        "serial",
    ]
    assert (tmp_path / "tradeoff.png").stat().st_size > 5000
    assert (tmp_path / "over-time.png").stat().st_size > 5000

    def never(*args):
        raise AssertionError("a unit ran again")

    monkeypatch.setattr(dynamic, "run_unit", never)
    study.main(arguments)
    with pytest.raises(ColearnError, match="use another --output"):
        study.main([*arguments, "--learning-rate", "0.5"])


def test_a_unit_is_the_same_whenever_it_runs(units):
    again = run_unit("dynamic-0.01", QUICK, "")
    assert replace(again, seconds=0.0) == replace(units["dynamic-0.01"], seconds=0.0)
    json.dumps(again.config)
