"""A newcomer's task and model, as docs/own-data.md has them, in a package that is installed."""

import csv
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from clients.app import app, forget_trainers
from clients.settings import ParticipantSettings
from clients.tasks import registry
from flwr_colearn import ColearnError, History, InProcessGrid
from simulations import server_app
from simulations.settings import RunSettings

torch.set_num_threads(1)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own-data.md"
TORCH, KERAS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
FINDINGS = ("clear", "effusion", "nodule")


@pytest.fixture
def hospital(tmp_path, monkeypatch):
    """A package `hospital` on the path, with the page's modules."""
    package = tmp_path / "site-packages" / "hospital"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "xray.py").write_text(TORCH)
    (package / "xray_keras.py").write_text(KERAS)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    yield package
    forget_trainers()
    for name in [name for name in sys.modules if name.partition(".")[0] == "hospital"]:
        del sys.modules[name]


def xrays(n, seed):
    """Images [N, 16, 16] of 16 bits; a finding is a bright quarter."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    x = rng.integers(0, 30000, (n, 16, 16))
    for image, label in zip(x, y, strict=True):
        if label:
            image[:8, 8 * (label - 1) : 8 * label] += 30000
    return x.astype(np.uint16), y


def as_files(folder, n, seed):
    folder.mkdir()
    x, y = xrays(n, seed)
    rows = [(f"{i}.npy", FINDINGS[label]) for i, label in enumerate(y)]
    for (name, _), image in zip(rows, x, strict=True):
        np.save(folder / name, image)
    with (folder / "findings.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "finding"), *rows])


def as_arrays(folder, n, seed):
    folder.mkdir()
    x, y = xrays(n, seed)
    np.savez(folder / "train.npz", x=(x / 65535).astype(np.float32)[..., None], y=y)


def run(tmp_path, write, **config):
    config = {
        **ParticipantSettings().to_config(),
        **RunSettings(num_participants=2, total_epochs=20, learning_rate=0.1).to_config(),
        **{key.replace("_", "-"): value for key, value in config.items()},
        "output-dir": str(tmp_path / "out"),
    }
    grid = InProcessGrid(app, 2, run_config=config)
    for node, n in ((1, 60), (2, 40)):
        write(tmp_path / f"site-{node}", n, seed=node)
        grid.contexts[node].node_config = {
            "data-dir": str(tmp_path / f"site-{node}"),
            "name": f"site-{node}",
        }
    server_app.main(grid, Context(1, 0, {}, RecordDict(), config))
    return History.read(tmp_path / "out" / "history.jsonl").records


@pytest.mark.parametrize(
    ("framework", "module", "write"),
    [
        ("torch", "xray", as_files),
        pytest.param("keras", "xray_keras", as_arrays, marks=pytest.mark.slow),
    ],
)
def test_the_pages_task_and_model_train(hospital, tmp_path, framework, module, write):
    *_, last = run(
        tmp_path,
        write,
        framework=framework,
        task=f"hospital.{module}:task",
        model=f"hospital.{module}:net",
        batch_size=8,
        momentum=0.0,
    )
    assert last.evaluate_metrics["accuracy"] > 0.8  # chance is a third
    assert [site["num-examples"] for site in last.site_metrics.values()] == [6, 4]


def test_the_example_is_of_some_sixty_lines():
    assert len(TORCH.splitlines()) <= 65


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("", "absent.module:task", "found no module 'absent'; install its package on the server"),
        ("", "hospital.absent:task", "found no module 'hospital.absent'"),
        ("", "hospital.mine:task", "expected a function 'task' in hospital.mine, found None"),
        ("task = 3", "hospital.mine:task", "expected a function 'task' in hospital.mine, found 3"),
        (
            "def task(settings): return [1]",
            "hospital.mine:task",
            r"hospital.mine:task\(settings\) to return a clients.data.Task, .*found list",
        ),
    ],
)
def test_what_the_task_must_be_is_said(hospital, source, name, message):
    (hospital / "mine.py").write_text(source)
    with pytest.raises(ColearnError, match=message):
        registry.load_task(ParticipantSettings(task=name, data_dir="/srv"))


def test_a_module_that_the_users_own_module_lacks_is_named_as_it_is(hospital):
    (hospital / "mine.py").write_text("import pydicom_that_is_not_there")
    with pytest.raises(ModuleNotFoundError, match="pydicom_that_is_not_there"):
        registry.load_task(ParticipantSettings(task="hospital.mine:task"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", r"'model': expected a function of an installed package, 'package.module:function'"),
        ("hospital.xray:CLASSES", "expected a function 'CLASSES'"),
        ("hospital.mine:net", r"to return a torch.nn.modules.module.Module, found str"),
        ("resnet", "'model': expected package.module:function for task hospital.xray:task"),
    ],
)
def test_what_the_model_must_be_is_said(hospital, model, message):
    (hospital / "mine.py").write_text("def net(num_classes): return 'net'")
    settings = ParticipantSettings(task="hospital.xray:task", model=model)
    with pytest.raises(ColearnError, match=message):
        registry.server_trainer(settings, registry.server_task(settings))


@pytest.mark.slow
def test_keras_needs_arrays(hospital, tmp_path):
    as_files(tmp_path / "site", 6, 0)
    settings = ParticipantSettings(
        framework="keras",
        task="hospital.xray:task",
        model="hospital.xray_keras:net",
        data_dir=str(tmp_path / "site"),
    )
    with pytest.raises(ColearnError, match=r"expected clients.data.Examples with framework"):
        registry.site_trainer(settings)


def test_a_model_of_ones_own_for_a_task_of_this_repository(hospital):
    (hospital / "mine.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))"
    )
    settings = ParticipantSettings(model="hospital.mine:net")
    weights = registry.participant_trainer(settings, 0, 5).get_weights()
    assert {name: array.shape for name, array in weights.items()} == {
        "1.weight": (10, 64),
        "1.bias": (10,),
    }


def test_a_simulation_divides_the_users_data_set(hospital, tmp_path):
    as_files(tmp_path / "all", 9, 0)
    settings = ParticipantSettings(
        task="hospital.xray:task", model="hospital.xray:net", data_dir=str(tmp_path / "all")
    )
    sizes = [len(registry.participant_trainer(settings, k, 2).train_set) for k in (0, 1)]
    assert sorted(sizes) == [4, 5]
    settings = ParticipantSettings(
        task="hospital.xray:task", data_dir=str(tmp_path / "all"), partition="dirichlet"
    )
    with pytest.raises(ColearnError, match=r"expected 'iid' for task hospital.xray:task"):
        registry.shards(settings, 2)
