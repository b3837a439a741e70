"""The repository's app under secure aggregation: the accuracy of the plain mean."""

import json

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from clients.app import app as client_app
from clients.settings import ParticipantSettings
from flwr_colearn import ColearnError, History, InProcessGrid
from simulations import server_app
from simulations.settings import RunSettings

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

K = 5
POINTS = 0.3


@pytest.fixture(autouse=True, scope="module")
def _cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def run(output, seed, **overrides):
    config = {
        **ParticipantSettings(seed=seed, devices="cpu").to_config(),
        # Fixed epochs: a change near epsilon may fall on either side of it by its last digits.
        **RunSettings(num_participants=K, total_epochs=20, arm="clr-fle").to_config(),
        "output-dir": str(output),
        **overrides,
    }
    grid = InProcessGrid(client_app, K, run_config=config)
    server_app.main(grid, Context(1, 0, {}, RecordDict(), config))
    summary = json.loads((output / "summary.json").read_text())
    return summary, History.read(output / "history.jsonl")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_reach_the_accuracy_of_the_plain_mean(seed, tmp_path):
    plain, _ = run(tmp_path / "plain", seed)
    secure, history = run(tmp_path / "secure", seed, **{"secure-aggregation": True})
    assert all(record.secure["participants"] == K for record in history)
    assert plain["accuracy"] > 0.9
    print("accuracy, plain and secure", plain["accuracy"], secure["accuracy"])
    assert abs(secure["accuracy"] - plain["accuracy"]) <= POINTS / 100
    one, other = (dict(np.load(tmp_path / name / "model.npz")) for name in ("plain", "secure"))
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_compression_upwards_is_refused_before_anybody_trains(tmp_path):
    codec = {"secure-aggregation": True, "compression-up": "int8"}
    with pytest.raises(ColearnError, match="compression under secure aggregation"):
        run(tmp_path, 0, **codec)
