import itertools
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from clients.tasks import speech
from clients.torch.streams import Interleaved
from flwr_colearn import Calibrated, ColearnError, Relative
from flwr_colearn.dynamic import Balance, Dynamic, FractionAveraging, Never, Periodic, Serial
from simulations.study import __main__ as study
from simulations.study import dynamic
from simulations.study.dynamic import STUDIES, Probing, run_unit, write_report
from simulations.study.dynamic_operators import FullOnViolation, operator_named
from simulations.study.dynamic_tasks import Setting, build_model, build_streams, held_out

DATA = os.environ.get("COLEARN_DATA", "")
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
        ("dynamic-1%@10", Dynamic(Relative(0.01), 10)),
        ("dynamic-auto@10", Dynamic(Calibrated(), 10)),
        ("dynamic-2x@10", Dynamic(Calibrated(2.0), 10)),
        ("full-3%", FullOnViolation(Relative(0.03), 1)),
        ("none", Never()),
        ("serial", Serial(10)),
    ],
)
def test_operators_have_names(name, operator):
    assert operator_named(name, 10) == operator


@pytest.mark.parametrize(
    "name", ["periodic", "periodic-x", "dynamic-", "hourly-1", "nones", "dynamic-x"]
)
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


@pytest.mark.parametrize("name", ["dynamic-0.01", "serial"])
def test_learners_in_processes_learn_the_same(name):
    setting = replace(QUICK, steps=32)  # long enough for a measurement on held-out examples
    one, two = (
        replace(run_unit(name, setting, "", processes), seconds=0.0) for processes in (1, 2)
    )
    assert one.held_out is not None
    assert two == one


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


def test_one_violation_fetches_all_models_without_balancing():
    operator = operator_named("full-0.5@4", 3)
    assert operator == FullOnViolation(0.5, 4)
    # Balancing would fetch nobody: the violators' mean is on the reference.
    balance = Balance(4, [2], 0, 1.0, lambda: 0.0, Random(0))
    assert list(operator.further(balance)) == [[0, 1, 3]]
    assert list(operator.further(Balance(4, [], 0, 1.0, lambda: 9.0, Random(0)))) == []
    unit = run_unit("full-0.01", QUICK, "")
    m = QUICK.learners
    assert unit.models % (2 * m) == m  # the first models, and then full synchronisations only
    assert unit.models > m


def test_labels_change_half_way_and_test_data_with_them():
    setting = Setting("mnist", learners=2, steps=100, batch_size=4, learning_rate=0.1, drifts=1)
    assert setting.drift_times == (50,)
    assert replace(setting, drifts=3).drift_times == (25, 50, 75)
    assert replace(setting, drifts=0).drift_times == ()


def test_models_are_measured_before_the_step_at_the_same_steps_for_all_operators():
    seen, losses = [], []
    stream = Probing(build_streams(QUICK, "")[0], lambda step: seen.append(step) or 0.25, losses)
    for index in range(120):
        inputs, _ = stream.batch(index)
        torch.testing.assert_close(inputs, stream.stream.batch(index)[0])
    assert seen == [25, 75]
    assert losses == [0.25, 0.25]


def test_held_out_loss_is_that_of_the_learners_models():
    """Without training, the loss at every measurement is that of the initial model."""
    setting = replace(QUICK, steps=60, learning_rate=0.0)
    units = [run_unit(name, setting, "") for name in ("none", "periodic-4", "serial")]
    assert len({unit.held_out for unit in units}) == 1
    torch.manual_seed(setting.seed)
    inputs, targets = held_out(setting, "", 25)
    outputs = build_model(setting)(inputs[:500])
    wanted = torch.nn.functional.cross_entropy(outputs, targets[:500])
    assert units[0].held_out == pytest.approx(float(wanted.detach()), abs=1e-4)
    assert run_unit("none", QUICK, "").held_out is None


def test_a_table_has_means_and_standard_errors(tmp_path):
    units = [run_unit("none", replace(QUICK, seed=seed), "") for seed in (0, 1, 2)]
    faked = [replace(u, losses=[x]) for u, x in zip(units, (10.0, 20.0, 30.0), strict=True)]
    table = write_report([replace(u, steps=[1], bytes=[1]) for u in faked], QUICK, tmp_path, "t")
    assert "| 20 ± 6 " in table  # 10 / sqrt(3)


def test_differences_are_paired_by_seed(tmp_path):
    """Losses that differ by 2 and 4 whatever the seed adds: 3 less, with a standard error of 1."""
    units = []
    for seed, base, gain in ((0, 10.0, 2.0), (1, 90.0, 4.0)):
        for name, loss in (("none", base), ("periodic-8", base - gain)):
            unit = run_unit("none", replace(QUICK, steps=8, seed=seed), "")
            units.append(replace(unit, operator=name, losses=[loss], steps=[8], bytes=[1]))
    table = write_report(units, QUICK, tmp_path, "t")
    assert "| 3 ± 1 " in table
    assert "| 0 ± 0 " in table


@pytest.mark.skipif(
    not Path(DATA, "SpeechCommands").is_dir(),
    reason="set COLEARN_DATA to the folder that holds SpeechCommands",
)
@pytest.mark.parametrize("by_speaker", [False, True])
def test_learners_share_speakers_unless_dealt_by_speaker(by_speaker):
    names = speech.training_speakers(DATA, "speaker")
    speakers = {}
    for name, clip in zip(names, speech.load(DATA, "speaker").train_set.inputs, strict=True):
        speakers.setdefault(clip.tobytes(), set()).add(name)
    setting = replace(STUDIES["speech"].setting, by_speaker=by_speaker)
    streams = build_streams(setting, DATA)
    # A few clips of the data set occur twice, under two names.
    own = [
        set.union(*(who for x in each.stream.inputs if len(who := speakers[_bytes(x)]) == 1))
        for each in streams
    ]
    shared = [bool(a & b) for a, b in itertools.combinations(own, 2)]
    assert any(shared) != by_speaker
    sizes = [len(each.stream.targets) for each in streams]
    assert max(sizes) - min(sizes) < 40
    assert all(each.stream.targets.max() == 9 for each in streams)


def _bytes(clip):
    return clip[0, :, :, None].numpy().tobytes()
