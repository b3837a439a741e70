import csv
import itertools
import json
import logging
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score

from clients.settings import ParticipantSettings
from clients.tasks import digits
from clients.tasks.registry import participant_trainer, server_trainer
from clients.torch.tasks import tensors_of
from clients.torch.trainer import TorchTrainer
from clients.trainer import derive_seed, follow
from flwr_colearn import ColearnError, CyclicalRate, LocalPlan
from flwr_colearn.reporting import calibration_of
from simulations.arms import ARMS
from simulations.server_app import to_record
from simulations.settings import RunSettings
from simulations.study import __main__ as study
from simulations.study.arguments import seeds
from simulations.study.comparison import rows
from simulations.study.training import ArmUnit, run_unit, train_averaged

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

QUICK = """
task = "digits"
examples = 150
num-participants = 3
initial-epochs = 2
total-epochs = 3
learning-rate = 0.05
"""
PARTICIPANTS = ParticipantSettings(examples=150)
SETTINGS = RunSettings(num_participants=3, initial_epochs=2, total_epochs=3)


@pytest.fixture(autouse=True, scope="module")
def _cpu():
    """Without a GPU, runs repeat themselves bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(autouse=True, scope="module")
def _log_level():
    """``main`` quietens Flower's log for good."""
    before = logging.getLogger("flwr").level
    yield
    logging.getLogger("flwr").setLevel(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All arms on the digits, four local epochs."""
    output = tmp_path_factory.mktemp("study")
    study.main(["digits", "--seeds", "1", "--total-epochs", "4", "--output", str(output)])
    return output


@pytest.fixture(scope="module")
def units(folder):
    return {unit["arm"]: unit for unit in json.loads((folder / "results.json").read_text())}


@pytest.fixture
def quick(tmp_path):
    """A config of a run that takes a moment, and a folder for its results."""
    path = tmp_path / "quick.toml"
    path.write_text(QUICK)
    return path, tmp_path / "results"


def run_quick(quick, *options):
    path, output = quick
    seeds = () if "--seeds" in options else ("--seeds", "1")
    study.main([str(path), *seeds, "--output", str(output), *options])
    return json.loads((output / "results.json").read_text())


# The seven arms


def test_all_seven_arms_are_run_and_written(folder, units):
    assert list(units) == list(ARMS)
    for arm, unit in units.items():
        assert json.loads((folder / "units" / f"{arm}-0.json").read_text()) == unit
    with (folder / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["arm"] for row in table] == [arm.title for arm in ARMS.values()]
    assert [row["accuracy %"] for row in table] == [
        f"{100 * unit['metrics']['accuracy'][-1]:.2f}" for unit in units.values()
    ]
    markdown = (folder / "table.md").read_text()
    assert all(value in markdown for row in table for value in row.values())
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_all_arms_have_the_same_local_epochs_and_learn(units):
    for unit in units.values():
        assert unit["epochs"][-1] == 4
        assert len(unit["epochs"]) == len(unit["metrics"]["accuracy"])
        assert unit["metrics"]["accuracy"][-1] > 0.5  # chance is 0.1
        assert unit["seconds"] > 0
        assert unit["config"]["total-epochs"] == 4


def test_bytes_and_rounds_are_those_of_the_models_exchanged(units):
    model = sum(
        len(array.data) for array in to_record(server_trainer(ParticipantSettings())).values()
    )
    for arm in ("clr-ile", "clr-fle", "elr-ile", "elr-fle"):
        assert units[arm]["rounds"] == len(units[arm]["epochs"])
        assert units[arm]["bytes"] == units[arm]["rounds"] * 2 * 5 * model
    assert units["clr-fle"]["epochs"] == units["elr-fle"]["epochs"] == [1, 2, 3, 4]
    for arm in ("vanilla-elr", "vanilla-clr", "ensemble"):
        assert (units[arm]["rounds"], units[arm]["bytes"]) == (0, 0)


def test_arms_differ_in_what_they_are_named_after_only(units):
    # The first round of both epoch rules is the same, and the rates differ from it onwards.
    first = {arm: unit["metrics"]["accuracy"][0] for arm, unit in units.items()}
    assert first["clr-ile"] == first["clr-fle"]
    assert first["elr-ile"] == first["elr-fle"]
    assert units["clr-fle"]["metrics"]["accuracy"] != units["elr-fle"]["metrics"]["accuracy"]


def test_a_study_with_an_early_end_is_refused(quick):
    path, output = quick
    path.write_text(QUICK + 'best-metric = "accuracy"\nstop-patience = 2\n')
    with pytest.raises(ColearnError, match=r"'stop-patience' 0 in a study.*found 2"):
        study.main([str(path), "--seeds", "1", "--output", str(output)])


def test_t_grows_where_the_arm_says_so(quick):
    quick[0].write_text(QUICK.replace("initial-epochs = 2", "initial-epochs = 1\nepsilon = 1e9"))
    units = {unit["arm"]: unit for unit in run_quick(quick)}
    for arm in ("clr-ile", "elr-ile", "vanilla-clr"):
        assert (units[arm]["epochs"], units[arm]["doublings"]) == ([1, 3], [1])
    for arm in ("clr-fle", "elr-fle", "vanilla-elr", "ensemble"):
        assert (units[arm]["epochs"], units[arm]["doublings"]) == ([1, 2, 3], [])


def test_vanilla_with_the_exponential_rate_is_one_uninterrupted_training(units):
    trainer = participant_trainer(ParticipantSettings(), 0, 1)
    evaluator = server_trainer(ParticipantSettings())
    assert len(trainer.train_set) == 1297
    accuracies = []
    for epoch in range(1, 5):
        trainer.train_epoch(0.05 * 0.25 ** (epoch / 4), derive_seed(derive_seed(0, 0), epoch))
        evaluator.set_weights(trainer.get_weights())
        accuracies.append(evaluator.evaluate()["accuracy"])
    assert units["vanilla-elr"]["metrics"] == {"accuracy": accuracies}
    assert units["vanilla-elr"]["examples"] == 4 * 1297


def test_vanilla_with_the_cyclical_rate_is_co_learning_of_one_participant_with_all_data():
    settings = replace(SETTINGS, epsilon=1e9)  # T: 2, and the 1 that is left of 4
    history = train_averaged("vanilla-clr", ARMS["vanilla-clr"], PARTICIPANTS, settings)
    trainer = participant_trainer(PARTICIPANTS, 0, 1)
    for plan in (
        LocalPlan.of(CyclicalRate(0.05, 0.25), 1, 2),
        LocalPlan.of(CyclicalRate(0.05, 0.25), 2, 1, 2),
    ):
        trainer.set_weights(trainer.get_weights())  # each round starts with a new optimizer
        follow(plan, trainer, derive_seed(0, 0))
    evaluator = server_trainer(PARTICIPANTS)
    evaluator.set_weights(trainer.get_weights())
    assert history.epochs_path == [2, 1]
    assert history.records[-1].server_metrics == evaluator.evaluate()


def test_participants_in_processes_train_the_same_models():
    one, two = (
        train_averaged("clr-ile", ARMS["clr-ile"], PARTICIPANTS, SETTINGS, processes=processes)
        for processes in (1, 2)
    )
    assert [record.server_metrics for record in two] == [record.server_metrics for record in one]
    assert two.bytes_total == one.bytes_total


def test_the_ensemble_is_the_mean_of_the_probabilities_of_models_trained_alone():
    test_set = digits.load().test_set
    inputs, targets = tensors_of(test_set).tensors
    trainers = [participant_trainer(PARTICIPANTS, k, 3) for k in range(3)]
    by_hand = {}
    for epoch in (1, 2, 3):
        rate = 0.05 * 0.25 ** (epoch / 3)
        for k, trainer in enumerate(trainers):
            trainer.train_epoch(rate, derive_seed(derive_seed(0, k), epoch))
        with torch.no_grad():
            models = [trainer.model.eval() for trainer in trainers]
            probabilities = sum(torch.exp(m(inputs).log_softmax(1)).numpy() for m in models) / 3
        by_hand[epoch] = accuracy_score(targets, probabilities.argmax(1))
    unit = run_unit("ensemble", PARTICIPANTS, SETTINGS)
    assert unit.epochs == [2, 3]
    assert unit.values == [by_hand[2], by_hand[3]]


# Running it again


def test_a_second_run_repeats_nothing_and_restores_what_is_missing(quick):
    arms = ["--arms", "clr-ile", "elr-fle", "ensemble"]
    first = run_quick(quick, *arms)
    folder = quick[1] / "units"
    for unit in first[:2]:  # if they were run again, they would not take so long
        path = folder / f"{unit['arm']}-0.json"
        path.write_text(json.dumps({**unit, "seconds": 12345.0}))
    (folder / "ensemble-0.json").unlink()
    again = run_quick(quick, *arms)
    assert [unit["seconds"] for unit in again[:2]] == [12345.0] * 2
    assert again[2]["seconds"] != 12345.0
    without_time = [[{**unit, "seconds": 0} for unit in units] for units in (first, again)]
    assert without_time[0] == without_time[1]


def test_results_of_another_config_are_never_mixed_in(quick):
    run_quick(quick, "--arms", "clr-fle")
    with pytest.raises(ColearnError, match=r"clr-fle-0.json: .*another total-epochs; use another"):
        run_quick(quick, "--arms", "clr-fle", "--total-epochs", "2")
    quick[0].write_text(QUICK + "momentum = 0.5\n")
    with pytest.raises(ColearnError, match="another momentum;"):
        run_quick(quick, "--arms", "clr-fle")


def test_a_setting_that_did_not_exist_at_the_time_had_its_default(quick):
    [unit] = run_quick(quick, "--arms", "clr-fle")
    path = quick[1] / "units" / "clr-fle-0.json"
    del unit["config"]["clip-norm"]
    path.write_text(json.dumps({**unit, "seconds": 12345.0}))
    [again] = run_quick(quick, "--arms", "clr-fle")
    assert again["seconds"] == 12345.0
    quick[0].write_text(QUICK + "clip-norm = 1.0\n")
    with pytest.raises(ColearnError, match="another clip-norm;"):
        run_quick(quick, "--arms", "clr-fle")


@pytest.mark.parametrize("arm", ["clr-ile", "vanilla-elr", "vanilla-clr", "ensemble"])
def test_an_interrupted_unit_goes_on_and_ends_as_if_it_had_not_been(quick, arm, monkeypatch):
    quick[0].write_text(QUICK.replace("total-epochs = 3", "total-epochs = 6"))
    [whole] = run_quick(quick, "--arms", arm)
    (quick[1] / "units" / f"{arm}-0.json").unlink()
    train, calls = TorchTrainer.train_epoch, []

    def interrupted(self, learning_rate, seed):
        calls.append(learning_rate)
        if len(calls) == interrupt_at:
            raise KeyboardInterrupt
        return train(self, learning_rate, seed)

    monkeypatch.setattr(TorchTrainer, "train_epoch", interrupted)
    participants = 1 if arm.startswith("vanilla") else 3
    interrupt_at = 4 * participants + 1  # in the third round
    with pytest.raises(KeyboardInterrupt):
        run_quick(quick, "--arms", arm)
    [unit] = run_quick(quick, "--arms", arm)
    unit_without, whole_without = ({**u, "seconds": 0, "round_seconds": 0} for u in (unit, whole))
    assert unit_without == whole_without
    assert len(calls) == 1 + 6 * participants  # two rounds were not trained again
    assert [path.name for path in (quick[1] / "units").iterdir()] == [f"{arm}-0.json"]


def test_units_that_keep_state_begin_anew_and_end_as_if_uninterrupted(quick, monkeypatch):
    arms = ("--arms", "clr-ile", "--compression-up", "int8")
    [whole] = run_quick(quick, *arms)
    (quick[1] / "units" / "clr-ile-0.json").unlink()
    train, calls = TorchTrainer.train_epoch, []

    def interrupted(self, learning_rate, seed):
        calls.append(learning_rate)
        if len(calls) == 2 * 3 + 1:  # in the second round
            raise KeyboardInterrupt
        return train(self, learning_rate, seed)

    monkeypatch.setattr(TorchTrainer, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_quick(quick, *arms)
    [unit] = run_quick(quick, *arms)
    assert unit["metrics"] == whole["metrics"]
    assert len(calls) == 7 + 9


def test_units_of_other_data_are_never_mixed_in(quick):
    run_quick(quick, "--arms", "clr-fle")
    path = quick[1] / "units" / "clr-fle-0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": "other"}))
    with pytest.raises(ColearnError, match="found other data in clr-fle, seed 0; elr-fle, seed 0"):
        run_quick(quick, "--arms", "clr-fle", "elr-fle")


@pytest.mark.parametrize("content", ["{", "[]", '{"arm": "clr-fle"}'])
def test_a_damaged_unit_is_named(quick, content):
    run_quick(quick, "--arms", "clr-fle", "--total-epochs", "1")
    path = quick[1] / "units" / "clr-fle-0.json"
    path.write_text(content)
    with pytest.raises(ColearnError, match=r"clr-fle-0.json: expected a ArmUnit as JSON"):
        run_quick(quick, "--arms", "clr-fle", "--total-epochs", "1")


def test_vanilla_has_all_the_data_whatever_the_partition_and_is_sent_nowhere(quick):
    quick[0].write_text(QUICK + 'partition = "classes"\n')
    arms = ("--arms", "vanilla-elr", "vanilla-clr")
    skewed = run_quick(quick, *arms)
    quick[0].write_text(QUICK)
    other = quick[1].with_name("other")
    study.main([str(quick[0]), "--seeds", "1", "--output", str(other), *arms,
                "--compression-up", "int8"])  # fmt: skip
    plain = json.loads((other / "results.json").read_text())
    assert [unit["metrics"] for unit in skewed] == [unit["metrics"] for unit in plain]


@pytest.mark.parametrize("words", [("--seeds", "0"), ("--seeds", "3:3")])
def test_no_seeds_are_refused(quick, words):
    with pytest.raises(SystemExit):
        run_quick(quick, *words)


def test_seeds_can_be_shared_between_machines(quick):
    assert seeds("3") == range(3)
    units = run_quick(quick, "--arms", "clr-fle", "--seeds", "4:6", "--total-epochs", "1")
    assert [unit["seed"] for unit in units] == [4, 5]


def test_calibration_prints_the_relative_changes_of_rounds_with_t_fixed(quick, capsys):
    quick[0].write_text(QUICK.replace("initial-epochs = 2", "initial-epochs = 1"))
    study.main([str(quick[0]), "--calibrate", "3", "--output", str(quick[1])])
    printed = capsys.readouterr().out
    settings = replace(SETTINGS, initial_epochs=1)
    history = train_averaged("clr-fle", ARMS["clr-fle"], PARTICIPANTS, settings)
    assert printed == f"{calibration_of(history)}\n"
    changes = [record.relative_change for record in history]
    # T=1 grows after the first of the three rounds whose change is at most epsilon.
    assert f"{max(changes):.4g} or more" in printed
    assert f"0 to below {min(changes):.4g}" in printed
    assert not quick[1].exists()


def test_every_seed_is_a_unit_of_its_own(quick):
    units = run_quick(quick, "--arms", "clr-fle", "--seeds", "2")
    assert [(unit["arm"], unit["seed"]) for unit in units] == [("clr-fle", 0), ("clr-fle", 1)]
    assert units[0]["metrics"]["accuracy"] != units[1]["metrics"]["accuracy"]
    assert [unit["config"]["seed"] for unit in units] == [0, 1]


def test_the_command_line_overrides_the_config(quick):
    [unit] = run_quick(quick, "--arms", "clr-fle", "--examples", "90", "--total-epochs", "1")
    assert (unit["config"]["examples"], unit["epochs"]) == (90, [1])


def test_compression_is_an_override_and_saves_bytes(quick):
    [plain] = run_quick(quick, "--arms", "clr-fle", "--total-epochs", "1")
    quick[1].joinpath("units", "clr-fle-0.json").unlink()
    ways = ("--compression-up", "int8", "--compression-down", "float16")
    [unit] = run_quick(quick, "--arms", "clr-fle", "--total-epochs", "1", *ways)
    assert unit["config"]["compression-up"] == "int8"
    assert unit["bytes"] < 0.45 * plain["bytes"]


def test_a_config_with_an_unknown_key_is_refused(quick):
    quick[0].write_text(QUICK + "epsilom = 0.1\n")
    with pytest.raises(ColearnError, match="found 'epsilom'"):
        run_quick(quick)


def test_an_unknown_task_is_refused(tmp_path):
    with pytest.raises(ColearnError, match="expected a readable TOML file"):
        study.main(["imagenet", "--output", str(tmp_path)])


# A machine that only trains

WITHOUT = """
import sys
for name in ("ray", "tensorflow", "sklearn", "scipy", "matplotlib", "tabulate", "timm", "h5py"):
    sys.modules[name] = None
from simulations.study import __main__ as study
study.main(sys.argv[1:])
"""


def test_training_needs_flwr_numpy_and_torch_only(tmp_path):
    for part, label in itertools.product(("train", "val"), ("cat", "dog")):
        folder = tmp_path / "data" / part / label
        folder.mkdir(parents=True)
        for index in range(4):
            pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    config = tmp_path / "config.toml"
    config.write_text(
        f'task = "imagefolder"\nimage-size = 16\ndata-dir = "{tmp_path}/data"\n'
        "num-participants = 2\nbatch-size = 4\ntotal-epochs = 1\n"
    )
    words = [config, "--seeds", "1", "--arms", "clr-ile", "ensemble", "--output", tmp_path / "out"]
    command = [sys.executable, "-c", WITHOUT, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "No table or no picture" in done.stdout
    written = sorted(path.name for path in (tmp_path / "out" / "units").iterdir())
    assert written == ["clr-ile-0.json", "ensemble-0.json"]


# The table


def unit_of(arm, seed, accuracy, seconds):
    metrics = {"top-5": [0.5, 1.0], "accuracy": [0.1, accuracy]}
    cost = {"rounds": 2, "bytes": 3_000_000, "model_bytes": 400, "round_seconds": [3.0, 5.0]}
    return ArmUnit(
        arm,
        seed,
        [10, 20],
        metrics,
        "accuracy",
        [10],
        **cost,
        examples=600,
        seconds=seconds,
        config={},
        data="",
    )


def test_the_table_by_hand():
    units = [
        unit_of("clr-ile", 0, 0.90, 10.0),
        unit_of("ensemble", 0, 0.50, 7.0),
        unit_of("clr-ile", 1, 0.94, 12.0),
    ]
    assert list(rows(units)) == [
        {
            "arm": "CLR+ILE (co-learning)",
            "accuracy %": "92.00",
            "spread": "2.83",  # the sample's standard deviation: 4 / sqrt(2)
            "rounds": "2.0",
            "MB up+down": "3.0",
            "local epochs": 20,
            "seeds": 2,
            "seconds": "11.0",
            "examples/s": "55",  # 600 in 10 s, 600 in 12 s
        },
        {
            "arm": "ensemble (ELR)",
            "accuracy %": "50.00",
            "spread": "",
            "rounds": "2.0",
            "MB up+down": "3.0",
            "local epochs": 20,
            "seeds": 1,
            "seconds": "7.0",
            "examples/s": "86",
        },
    ]
