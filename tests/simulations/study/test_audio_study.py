"""The audio configs through the study runner, on generated data."""

import json
import logging

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from simulations.settings import CONF, read_config
from simulations.study import __main__ as study

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

ARMS = ["clr-ile", "vanilla-elr"]
AUDIOSET = ["average", "max", "attention", "multi-attention"]


@pytest.fixture(autouse=True, scope="module")
def _log_level():
    """``main`` quietens Flower's log for good."""
    before = logging.getLogger("flwr").level
    yield
    logging.getLogger("flwr").setLevel(before)


def run(config, data, output, epochs=1):
    arguments = ["--seeds", "1", "--arms", *ARMS, "--total-epochs", str(epochs)]
    study.main([config, *arguments, "--data-dir", str(data), "--output", str(output)])
    units = json.loads((output / "results.json").read_text())
    assert [unit["arm"] for unit in units] == ARMS
    return units


def test_speech_learns_two_tones(tmp_path):
    time = np.arange(16000) / 16000
    generator = np.random.default_rng(0)
    for word, frequency in (("high", 3000), ("low", 400)):
        folder = tmp_path / "SpeechCommands" / word
        folder.mkdir(parents=True)
        for index in range(60):
            pitch = frequency * generator.uniform(0.9, 1.1)
            samples = 5000 * np.sin(2 * np.pi * pitch * time) + generator.normal(0, 500, 16000)
            path = folder / f"{index:08x}_nohash_0.wav"
            wavfile.write(path, 16000, samples.astype(np.int16))
    shared, vanilla = run("speech-cpu", tmp_path, tmp_path / "results", epochs=8)
    assert shared["headline"] == "accuracy"
    assert shared["metrics"].keys() >= {"accuracy", "validation-accuracy"}
    # The participants' 19 clips are one step an epoch: too few to ask for more than that it runs.
    assert vanilla["metrics"]["accuracy"][-1] > 0.9
    assert vanilla["metrics"]["validation-accuracy"][-1] > 0.9


@pytest.mark.parametrize("head", AUDIOSET)
def test_audioset_trains_with_every_head(tmp_path, head):
    generator = np.random.default_rng(0)
    for part, n in (("train", 20), ("eval", 8)):
        y = generator.random((n, 3)) < 0.5
        y[:2] = [[True] * 3, [False] * 3]
        x = generator.normal(size=(n, 240, 64)).astype(np.float32)
        np.savez(tmp_path / f"{part}.npz", x=x, y=y)
    for unit in run(f"audioset-{head}", tmp_path, tmp_path / "results"):
        assert unit["headline"] == "map"
        assert {"map", "auc", "d-prime"} <= unit["metrics"].keys()
        assert 0 < unit["metrics"]["map"][-1] <= 1
        assert unit["config"]["model"] == f"crnn-{head}"


@pytest.mark.parametrize("name", [f"audioset-{head}" for head in AUDIOSET])
def test_the_audioset_configs_have_the_papers_values(name):
    config = read_config(CONF / f"{name}.toml")
    paper = {"num-participants": 5, "batch-size": 128, "learning-rate": 0.01, "decay": 0.25}
    assert {key: config[key] for key in paper} == paper
    assert config["model"] == name.replace("audioset", "crnn")
