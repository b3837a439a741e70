import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import flwr_colearn

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flwr_colearn"

FRAMEWORKS = {"torch", "torchvision", "sklearn", "tensorflow", "keras", "matplotlib", "tabulate"}
REPOSITORY = {"clients", "simulations", "tests"}  # all that the wheel does not have


def without(names):
    """Return the beginning of a script that cannot import these, as if they were not installed."""
    return f"""
import sys

BLOCKED = {names!r}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


WITHOUT_FRAMEWORKS = without(FRAMEWORKS)

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


TORCH_APP = """
import json
import numpy as np
import flwr_colearn
before = {"torch", "tensorflow", "keras"} & set(sys.modules)
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr_colearn import CoLearn, GroupNorm, InProcessGrid, Recalibrated, participant_mod
from flwr_colearn.torch import convert, normalised, recalibrate, roles

app = ClientApp(mods=[participant_mod])

def new_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).double()

def data(context):
    k = context.node_config["partition-id"]
    return torch.from_numpy(np.random.default_rng(k).normal(k, k + 1, (40, 2)))

@app.train()
def train(message, context):
    model = new_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    with normalised(model, message.content["config"]), torch.no_grad():
        model[0].weight += context.node_config["partition-id"]
    metrics = MetricRecord({"num-examples": 40})
    arrays = ArrayRecord(model.state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

@recalibrate(app)
def model_and_batches(context):
    return new_model(), data(context).split(10)

strategy = CoLearn(
    3,
    local_epochs=1,
    learning_rate=0.1,
    fraction_evaluate=0.0,
    normalization=Recalibrated(),
    roles=roles(new_model()),
)
result = strategy.start(InProcessGrid(app, 3), ArrayRecord(new_model().state_dict()), num_rounds=1)
print(json.dumps({
    "files": [flwr_colearn.__file__, sys.modules["flwr_colearn.torch"].__file__],
    "before": sorted(before),
    "repository": sorted(BLOCKED & set(sys.modules)),
    "converted": str(convert(new_model(), GroupNorm(3))[1]),
    "arrays": {name: array.numpy().tolist() for name, array in result.arrays.items()},
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


def test_a_users_torch_app_runs_from_the_wheel_without_the_repository(wheel, tmp_path):
    if find_spec("torch") is None:
        pytest.skip("torch is not installed")
    wheel.extractall(tmp_path / "site")
    script = without(REPOSITORY) + f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
    output = json.loads(run_python(script + TORCH_APP, "-I", cwd=tmp_path).splitlines()[-1])
    assert all(Path(file).is_relative_to(tmp_path / "site") for file in output["files"])
    assert output["before"] == output["repository"] == []
    assert output["converted"].startswith("GroupNorm(3, 3")
    arrays = {name: np.array(array) for name, array in output["arrays"].items()}
    x = np.concatenate([np.random.default_rng(k).normal(k, k + 1, (40, 2)) for k in range(3)])
    reached = x @ arrays["0.weight"].T + arrays["0.bias"]
    np.testing.assert_allclose(arrays["1.running_mean"], reached.mean(0), rtol=1e-9)
    np.testing.assert_allclose(arrays["1.running_var"], reached.var(0), rtol=1e-9)


@pytest.mark.parametrize(
    ("package", "missing", "extra"),
    [
        ("torch", "torch", "torch"),
        ("keras", "keras", "tensorflow"),
        ("keras", "tensorflow", "tensorflow"),
    ],
)
def test_without_its_framework_a_package_names_the_extra(package, missing, extra, tmp_path):
    if package == "keras" and missing != "keras" and find_spec("keras") is None:
        pytest.skip("keras is not installed")
    script = f"""
try:
    import flwr_colearn.{package}
except ImportError as error:
    from flwr_colearn import ColearnError
    assert isinstance(error, ColearnError)
    print(error)
"""
    output = run_python(without({missing}) + script, cwd=tmp_path)
    expected = f"flwr_colearn.{package}: expected the framework to be installed, found no module "
    assert output.splitlines()[-1] == (
        f"{expected}'{missing}'; pip install 'flwr-colearn[{extra}]'"
    )


def test_keras_with_another_backend_is_refused(tmp_path):
    if find_spec("tensorflow") is None or find_spec("torch") is None:
        pytest.skip("tensorflow and torch, the other backend, are not installed")
    done = subprocess.run(
        [sys.executable, "-c", "import flwr_colearn.keras"],
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": "torch", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "expected the backend tensorflow, found torch; set" in done.stderr


def test_every_public_name_exists():
    assert sorted(flwr_colearn.__all__) == flwr_colearn.__all__
    for name in flwr_colearn.__all__:
        assert hasattr(flwr_colearn, name), name
