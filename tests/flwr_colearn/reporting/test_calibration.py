"""The command flwr-colearn calibrate: levels, and the T that each epsilon gives, by hand."""

import json
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from flwr_colearn import ColearnError, History, RoundRecord
from flwr_colearn.reporting import calibration_of
from flwr_colearn.reporting.command_line import main

# T=2 falls to 0.25 and stays there, T=4 falls still; the budget cuts the last round to T=1.
RUN = [
    *[(2, change) for change in (1.0, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25)],
    *[(4, change) for change in (0.75, 0.5, 0.375)],
    (1, 0.0625),
]


def history_of(run, path=None, losses=()):
    history = History(path)
    for number, (epochs, change) in enumerate(run, 1):
        loss = losses[number - 1] if losses else None
        metrics = {} if loss is None else {"train-loss": loss}
        history.append(
            RoundRecord(number, epochs, 0.1, 0, relative_change=change, train_metrics=metrics)
        )
    return history


def paths_of(run):
    return {
        (path.least, path.below): ", ".join(map(str, path.stages))
        for path in calibration_of(history_of(run)).paths
    }


def test_the_level_of_each_t():
    levels = calibration_of(history_of(RUN)).levels
    assert [(each.local_epochs, each.rounds, each.first) for each in levels] == [
        (2, 8, 1.0),
        (4, 3, 0.75),
    ]
    assert [each.last for each in levels] == [0.25, (0.75 + 0.5 + 0.375) / 3]
    assert [each.settled for each in levels] == [True, False]


def test_the_path_of_every_epsilon():
    assert paths_of(RUN) == {
        (0.0, 0.25): "2 stays",
        (0.25, 0.375): "2 x3, 4 x3 or more",
        (0.375, 0.5): "2 x3, 4 x3, 8 (not in this run)",
        (0.5, 0.75): "2 x2, 4 x2, 8 (not in this run)",
        (0.75, 1.0): "2 x2, 4 x1, 8 (not in this run)",
        (1.0, None): "2 x1, 4 x1, 8 (not in this run)",
    }


@pytest.mark.parametrize("epsilon", [0.01, 0.04, 0.06, 0.11])
def test_the_run_s_own_epsilon_gives_the_run_s_own_path(epsilon):
    """Against eq. 4 applied to a made-up model: T holds 0.03 sqrt(T), after a fall."""
    run, epochs, rounds_at = [], 1, 0
    for _ in range(30):
        change = 0.03 * epochs**0.5 * (1 + 0.5**rounds_at)
        run.append((epochs, change))
        rounds_at += 1
        if change <= epsilon:
            epochs, rounds_at = 2 * epochs, 0
    path = next(
        path
        for path in calibration_of(history_of(run)).paths
        if path.least <= epsilon and (path.below is None or epsilon < path.below)
    )
    assert [t for s in path.stages for t in [s.local_epochs] * s.rounds] == [t for t, _ in run]


def test_the_plateau_rule():
    """Twice three rounds at .25 from round 3 on: T=2 doubles after round 8."""
    text = ", ".join(map(str, calibration_of(history_of(RUN)).plateau))
    assert text == "2 x8, 4 x3 or more"
    losses = [2.0] * len(RUN)
    waiting = calibration_of(history_of(RUN, losses=losses)).plateau
    assert ", ".join(map(str, waiting)) == "2 stays"


def test_rounds_without_a_change_and_changes_that_are_not_finite():
    run = [(2, None), (2, 0.5), (2, float("nan")), (2, float("inf")), (2, 0.25), (4, None)]
    calibration = calibration_of(history_of(run))
    assert [(each.rounds, each.last) for each in calibration.levels] == [(2, 0.375)]
    assert paths_of(run) == {
        (0.0, 0.25): "2 x4 or more",
        (0.25, 0.5): "2 x4, 4 (not in this run)",
        (0.5, None): "2 x1, 4 (not in this run)",
    }
    json.dumps(calibration.to_json(), allow_nan=False)


def test_a_history_without_changes_is_refused():
    with pytest.raises(ColearnError, match="at least one round with a relative change, found none"):
        calibration_of(history_of([(2, None)]))


# The command ------------------------------------------------------------------------------------


def test_the_tables(tmp_path, capsys):
    history_of(RUN, tmp_path / "history.jsonl")
    assert main(["calibrate", str(tmp_path / "history.jsonl")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2  8       1      0.25            level" in lines
    assert "4  3       0.75   0.5417          not level yet" in lines
    assert "0 to below 0.25      2 stays" in lines
    assert "1 or more            2 x1, 4 x1, 8 (not in this run)" in lines
    assert lines[-1].endswith("needs no epsilon: 2 x8, 4 x3 or more")


def test_json(tmp_path, capsys):
    history_of(RUN, tmp_path / "history.jsonl")
    assert main(["calibrate", "--json", str(tmp_path / "history.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["paths"][0] == {
        "least": 0.0,
        "below": 0.25,
        "stages": [{"local_epochs": 2, "rounds": 8, "end": "stays"}],
    }
    assert found["levels"][1]["local_epochs"] == 4


@pytest.mark.parametrize("content", [None, "", "no record\n", '{"a": 1}\n'])
def test_a_file_that_is_no_history_is_refused(content, tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    if content is not None:
        path.write_text(content)
    assert main(["calibrate", str(path)]) == 2
    assert capsys.readouterr().err.startswith("flwr-colearn: history: expected")


def test_it_runs_without_any_framework(tmp_path):
    history_of(RUN, tmp_path / "history.jsonl")
    code = (
        "import sys\n"
        "for name in ('torch', 'tensorflow', 'keras', 'matplotlib', 'tabulate'):\n"
        "    sys.modules[name] = None\n"
        "from flwr_colearn.reporting.command_line import main\n"
        f"sys.exit(main(['calibrate', {str(tmp_path / 'history.jsonl')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 stays" in done.stdout


def test_the_script_of_the_package_is_this_command():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["flwr-colearn"].split(":")
    assert getattr(import_module(module), function) is main
