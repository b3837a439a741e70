"""Every command and snippet of docs/report.md, executed as it is printed."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import flwr_colearn
from flwr_colearn import CheckpointFolder, DynamicHistory, DynamicRecord, History, RoundRecord
from flwr_colearn.checkpoint import Checkpoint

ROOT = Path(flwr_colearn.__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "report.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.strip().splitlines()
]
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
OWN = [line for line in COMMANDS if line.startswith("flwr-colearn ")]
SCRIPT = f"""#!{sys.executable}
import sys
from flwr_colearn.reporting.command_line import main
sys.exit(main())
"""
MODEL = """import keras

def net():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with the files that the page speaks of."""
    for name in ("history.jsonl", "paper/history.jsonl", "ours/history.jsonl"):
        history = History(tmp_path / name)
        for n in (1, 2, 3):
            metrics = {"accuracy": 0.25 * n, "loss": 1 / n}
            history.append(RoundRecord(n, 2, 0.1, 2 * n, 0.5 / n, server_metrics=metrics))
    DynamicHistory(tmp_path / "dynamic" / "history.jsonl").append(
        DynamicRecord(1, 10, server_metrics={"accuracy": 0.5}, synchronised="full")
    )
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    arrays = {"dense/kernel": np.zeros((3, 2), np.float32), "dense/bias": np.ones(2, np.float32)}
    for n in (12, 13):
        checkpoints.save(Checkpoint(n, arrays, {}))
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "models.py").write_text(MODEL)
    script = tmp_path / "bin" / "flwr-colearn"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    script.chmod(0o700)
    return tmp_path


def executed(folder, command):
    """What a command prints, as a shell in the folder runs it."""
    done = run(folder, command)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run(folder, command):
    search = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": search, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    return subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )


def test_the_page_has_the_commands_of_every_kind():
    found = [shlex.split(command) for command in OWN]
    assert {arguments[1] for arguments in found} == {"report", "calibrate", "checkpoints"}
    assert {"verify", "export"} <= {word for arguments in found for word in arguments}


@pytest.mark.slow
@pytest.mark.parametrize("command", OWN)
def test_a_command_does_what_the_page_says(command, folder):
    arguments = shlex.split(command)[1:]
    if command.endswith(".models:net"):
        pytest.importorskip("keras")
    if "safetensors" in command:
        pytest.importorskip("safetensors")
    printed = executed(folder, command)
    if arguments[0] == "report":
        name = arguments[arguments.index("--output") + 1] if "--output" in arguments else ""
        page = (folder / (name or "report.html")).read_text()
        assert Path(printed).name == (name or "report.html")
        assert "accuracy against rounds" in page
        assert ("epsilon 0.05" in page) == ("--epsilon" in arguments)
        assert ("mini-batches per learner" in page) == ("dynamic/history.jsonl" in arguments)
    elif arguments[0] == "calibrate":
        assert ("epsilon" in printed) or json.loads(printed)
    elif "export" in arguments:
        assert (folder / arguments[arguments.index("export") + 1]).stat().st_size
        assert ("(round 12)" in printed) == ("--round" in arguments)
    else:
        assert len(printed.splitlines()) >= 3  # the header, and two checkpoints


def test_the_extras_that_the_page_installs_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"pip install 'flwr-colearn\[([\w,]+)\]'", TEXT)
    assert named
    assert set(",".join(named).split(",")) <= set(project["optional-dependencies"])


def test_the_snippets_run(folder, monkeypatch):
    pytest.importorskip("tensorboardX")

    logged = []

    class Tracker:
        def log_metrics(self, metrics, step):
            logged.append((metrics["server_metrics/accuracy"], step))

    monkeypatch.setitem(sys.modules, "mlflow", Tracker())
    monkeypatch.chdir(folder)

    class Strategy:
        history = History.read("history.jsonl")

    names = {"strategy": Strategy}
    for snippet in SNIPPETS:
        exec(compile(snippet, "docs/report.md", "exec"), names)
    assert "epsilon 0.05" in Path("report.html").read_text()
    names["MLflow"]().write(Strategy.history.records[1])
    assert logged == [(0.5, 2)]


# The command line, besides what the page shows ---------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("", 2, "usage: flwr-colearn"),
        ("draw history.jsonl", 2, "invalid choice: 'draw'"),
        ("report", 2, "HISTORY"),
        ("report missing.jsonl", 2, "flwr-colearn: history"),
        ("report history.jsonl --output history.jsonl", 2, "beside the histories"),
        ("report history.jsonl --epsilon much", 2, "invalid float value"),
        ("calibrate dynamic/history.jsonl", 2, "flwr-colearn: history"),
        ("checkpoints nowhere", 2, "flwr-colearn:"),
        ("checkpoints checkpoints export model.gguf", 2, ".safetensors"),
        ("checkpoints checkpoints export model.npz --round 99", 2, "99"),
    ],
)
def test_what_cannot_be_done_is_said_on_stderr(arguments, status, said, folder):
    done = run(folder, f"flwr-colearn {arguments}")
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_damage_has_a_status_of_its_own_and_json_is_for_scripts(folder):
    [file] = (folder / "checkpoints").glob("round-000012-*.npz")
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(bytes(data))
    done = run(folder, "flwr-colearn checkpoints checkpoints verify --json")
    assert done.returncode == 1
    assert [each["sound"] for each in json.loads(done.stdout)] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["", "report", "calibrate", "checkpoints"])
def test_every_command_explains_itself(command, folder):
    printed = executed(folder, f"flwr-colearn {command} --help")
    assert printed.startswith(f"usage: flwr-colearn {command}".strip())
