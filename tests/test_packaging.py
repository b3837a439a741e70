import json
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import flwr_colearn

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flwr_colearn"

# Put before a script: the frameworks cannot be imported, as if they were not installed.
WITHOUT_FRAMEWORKS = """
import sys

BLOCKED = {"torch", "torchvision", "sklearn", "tensorflow", "keras", "matplotlib", "tabulate"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""

NUMPY_ONLY_APP = """
import json
import numpy as np
import flwr_colearn
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr_colearn import CoLearn, CyclicalRate, IncreasingEpochs, InProcessGrid, LocalPlan, legacy

app = ClientApp()

@app.train()
def train(message, context):
    w = message.content["arrays"]["w"].numpy()
    optimum = context.node_config["partition-id"]
    for epoch in LocalPlan.from_config(message.content["config"]):
        w = w - epoch.learning_rate * (w - optimum)
    metrics = MetricRecord({"num-examples": 1})
    arrays = ArrayRecord({"w": Array(w)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

strategy = CoLearn(
    5,
    local_epochs=IncreasingEpochs(5, epsilon=0.01),
    learning_rate=CyclicalRate(0.5),
    fraction_evaluate=0.0,
)
initial = ArrayRecord({"w": Array(np.zeros(3))})
result = strategy.start(InProcessGrid(app, 5), initial, num_rounds=8)
print(json.dumps({
    "file": flwr_colearn.__file__,
    "w": result.arrays["w"].numpy().tolist(),
    "epochs": strategy.history.epochs_path,
    "frameworks": sorted(BLOCKED & set(sys.modules)),
}))
"""


def run_python(script, *arguments, cwd):
    done = subprocess.run(
        [sys.executable, *arguments, "-c", textwrap.dedent(script)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel built from a copy of the repository's package."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("flwr_colearn", "clients", "simulations", "tests"):
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "out", "."],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=300,
    )
    [path] = (source / "out").glob("*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel):
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert set(names) == {*modules, "flwr_colearn/py.typed"}


def test_the_wheel_holds_the_licence(wheel):
    [name] = [name for name in wheel.namelist() if name.endswith("/LICENSE")]
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_names_the_licence_as_an_spdx_expression(wheel):
    assert metadata(wheel)["License-Expression"] == "Apache-2.0"


def test_the_wheel_has_the_packages_version(wheel):
    assert metadata(wheel)["Version"] == flwr_colearn.__version__


def test_the_wheel_needs_flower_and_numpy_only_and_pins_no_upper_version(wheel):
    required = [line for line in metadata(wheel).get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line).group() for line in required} == {"flwr", "numpy"}
    assert not any("<" in line or "==" in line for line in required)


def test_importing_the_package_brings_no_framework(tmp_path):
    script = """
        import json, sys
        import flwr_colearn, flwr_colearn.legacy
        print(json.dumps(sorted(sys.modules)))
    """
    imported = {name.partition(".")[0] for name in json.loads(run_python(script, cwd=tmp_path))}
    assert "flwr_colearn" in imported
    assert not imported & {"torch", "tensorflow", "keras", "sklearn", "matplotlib"}


def test_a_numpy_app_runs_from_the_wheel_where_no_framework_is_installed(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    script = WITHOUT_FRAMEWORKS + f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
    output = json.loads(run_python(script + NUMPY_ONLY_APP, "-I", cwd=tmp_path).splitlines()[-1])
    assert Path(output["file"]).is_relative_to(tmp_path / "site")
    assert output["frameworks"] == []
    assert output["w"] == pytest.approx([2, 2, 2], rel=1e-3)  # the mean of the optima 0 .. 4
    assert output["epochs"][0] == 5
    assert output["epochs"][-1] > 5


def test_every_public_name_exists():
    assert sorted(flwr_colearn.__all__) == flwr_colearn.__all__
    for name in flwr_colearn.__all__:
        assert hasattr(flwr_colearn, name), name
