"""Dynamic averaging through ``flwr run``: the learners' state lives in Flower's simulation."""

import os
import runpy
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from flwr_colearn import DynamicHistory, InProcessGrid
from simulations.launch.simulation import run_app

ROOT = Path(__file__).resolve().parents[3]
APP = ROOT / "tests" / "e2e" / "online_app"
CONFIG = {"learners": 2, "rounds": 8, "threshold": 0.3, "compression": "float32"}


def in_process(folder):
    """The same app without servers; return its model and history."""
    folder.mkdir()
    client = runpy.run_path(str(APP / "online_app" / "client_app.py"))["app"]
    server = runpy.run_path(str(APP / "online_app" / "server_app.py"))
    config = {**CONFIG, "output-dir": str(folder)}
    context = Context(1, 0, {}, RecordDict(), config)
    server["main"](InProcessGrid(client, 2, run_config=config), context)
    return np.load(folder / "model.npy"), DynamicHistory.read(folder / "history.jsonl")


def comparable(history):
    """What is the same whichever node has which partition."""
    return [
        (
            sorted(record.reporters),
            sorted(record.fetched),
            record.synchronised,
            record.violations,
            record.evaluated,
            record.moved,
        )
        for record in history
    ]


def test_a_simulation_does_what_the_same_app_does_in_process(tmp_path, monkeypatch):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    output = tmp_path / "output"
    output.mkdir()
    options = {**CONFIG, "output-dir": str(output)}
    run_app(APP, 2, options, tmp_path / "home", timeout=400)
    model, history = in_process(tmp_path / "in-process")
    assert {record.synchronised for record in history} == {"none", "full"}
    np.testing.assert_allclose(np.load(output / "model.npy"), model, rtol=1e-5)
    run = DynamicHistory.read(output / "history.jsonl")
    assert comparable(run) == comparable(history)
    assert [record.lost for record in run] == [[]] * 8
    assert run.cumulative_loss == pytest.approx(history.cumulative_loss, rel=1e-5)
