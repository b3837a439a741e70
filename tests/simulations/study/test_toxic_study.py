import csv
import json
import logging

import numpy as np
import pytest
import torch

from clients.settings import ParticipantSettings
from clients.tasks import toxic
from clients.tasks.registry import server_trainer
from simulations.server_app import to_record
from simulations.study import __main__ as study

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

ARMS = ["clr-ile", "vanilla-elr", "ensemble"]
CONFIG = """
task = "toxic"
model = "bigru-small"
data-dir = "{}"
num-participants = 3
initial-epochs = 1
total-epochs = 2
learning-rate = 0.5
batch-size = 16
"""


@pytest.fixture(autouse=True)
def _log_level():
    """``main`` quietens Flower's log for good."""
    before = logging.getLogger("flwr").level
    yield
    logging.getLogger("flwr").setLevel(before)


@pytest.fixture
def config(tmp_path):
    """A run on 300 comments whose every label is given away by one word."""
    rng = np.random.default_rng(0)
    labels = (rng.random((300, 6)) < 0.3).astype(int)
    filler = rng.integers(0, 20, (300, 6))
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "comment_text", *toxic.LABELS])
        for index, (row, words) in enumerate(zip(labels, filler, strict=True)):
            told = [f"sign{label}" for label in np.flatnonzero(row)]
            writer.writerow([index, "\n".join([*told, *(f"w{w}," for w in words)]), *row])
    path = tmp_path / "quick.toml"
    path.write_text(CONFIG.format(tmp_path))
    return path


def test_the_arms_learn_and_are_judged_by_roc_auc(config, tmp_path):
    output = tmp_path / "results"
    study.main([str(config), "--seeds", "1", "--arms", *ARMS, "--output", str(output)])
    units = {u["arm"]: u for u in json.loads((output / "results.json").read_text())}
    assert list(units) == ARMS
    for unit in units.values():
        assert unit["epochs"] == [1, 2]
        assert all(0.0 <= area <= 1.0 for area in unit["metrics"]["roc-auc"])
    assert units["vanilla-elr"]["metrics"]["roc-auc"][-1] > 0.6  # chance is 0.5
    model = to_record(
        server_trainer(
            ParticipantSettings(task="toxic", model="bigru-small", data_dir=str(tmp_path))
        )
    )
    size = sum(len(array.data) for array in model.values())
    assert units["clr-ile"]["bytes"] == 2 * 2 * 3 * size


def test_vectors_from_a_file_do_not_travel(config, tmp_path):
    words = [*(f"sign{label}" for label in range(6)), *(f"w{word}" for word in range(20)), ","]
    rng = np.random.default_rng(0)
    lines = [f"{word} " + " ".join(map(str, rng.standard_normal(30))) for word in words]
    (tmp_path / "some.vec").write_text(f"{len(words)} 30\n" + "\n".join(lines) + "\n")
    config.write_text(config.read_text() + f'vectors = "{tmp_path / "some.vec"}"\n')
    output = tmp_path / "results"
    study.main([str(config), "--seeds", "1", "--arms", "clr-ile", "--output", str(output)])
    (unit,) = json.loads((output / "results.json").read_text())
    # Only the GRU's and the linear layer's parameters, twice for each of 3 participants.
    parameters = 2 * 3 * (30 * 32 + 32 * 32 + 2 * 32) + 4 * 32 * 6 + 6
    moved = unit["bytes"] / (2 * 2 * 3)
    assert 4 * parameters <= moved < 4 * parameters + 10 * 200  # and npy headers of 10 arrays
