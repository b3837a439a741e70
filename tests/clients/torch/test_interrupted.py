"""A round of TorchTrainer that is interrupted goes on after its last finished epoch."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from clients.torch.trainer import TorchTrainer
from clients.trainer import follow
from tests.clients.interrupted import EPOCHS, attempt, check, plan, same
from tests.clients.torch.networks import small_convnet

torch.set_num_threads(1)  # small networks: more threads only get in each other's way


def network(seed=0):
    return small_convnet(seed, dropout=0.5)


def jitter(inputs, training):
    return inputs + 0.1 * torch.randn_like(inputs) if training else inputs


def make(kind=TorchTrainer, model=network, **options):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(50) % 3
    images = torch.randn(50, 3, 6, 6, generator=generator) + 2 * labels.view(-1, 1, 1, 1)
    arguments = {"batch_size": 16, "device": "cpu", "transform": jitter, **options}
    return kind(model(seed=9), TensorDataset(images, labels), **arguments)


MODEL = make(model=lambda seed: network()).get_weights()


class WithAdam(TorchTrainer):
    def _new_optimizer(self):
        return torch.optim.Adam(self.model.parameters())


class Overflowing(nn.CrossEntropyLoss):
    """A loss whose scaled gradients overflow float16 at first, so that the scale decreases."""

    def forward(self, outputs, targets):
        return 8 * super().forward(outputs, targets)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9, "weight_decay": 0.01},
        {"momentum": 0.0},
        {"kind": WithAdam},
        {"precision": "float16", "clip_norm": 1.0, "loss": Overflowing()},
        {"precision": "bfloat16"},
        {"model": lambda seed: network(seed).bfloat16(), "transform": lambda x, _: x.bfloat16()},
    ],
    ids=["SGD", "no momentum", "Adam", "float16", "bfloat16", "bfloat16 model"],
)
def test_an_interrupted_round_has_the_bits_of_an_uninterrupted_one(options, tmp_path):
    check(lambda: make(**options), MODEL, tmp_path)


def test_the_loss_scale_of_the_tests_above_changes_in_the_round():
    trainer = make(precision="float16", loss=Overflowing())
    before = trainer.get_loss_scale()["scale"] if trainer.get_loss_scale() else None
    follow(plan(), trainer, 7)
    assert before is not None
    assert trainer.get_loss_scale()["scale"] < before


OTHERS = {
    "model": {"model": {**MODEL, "5.bias": MODEL["5.bias"] + np.float32(1e-6)}},
    "session": {"plan": plan(session="t")},
    "round": {"plan": plan(round=3)},
    "number of epochs": {"plan": plan(local_epochs=EPOCHS + 1)},
    "epochs before": {"plan": plan(epochs_done=4)},
    "seed": {"seed": 8},
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_round_begins_from_its_start(other, tmp_path):
    changed = {"model": MODEL, "plan": plan(), **OTHERS[other]}
    attempt(make, MODEL, tmp_path, at=4)
    weights, _, trained = attempt(make, folder=tmp_path, **changed)
    assert trained == changed["plan"].local_epochs
    assert same(weights, attempt(make, folder=None, **changed)[0])


def test_the_state_of_a_finished_round_is_removed_when_the_next_one_begins(tmp_path):
    attempt(make, MODEL, tmp_path)
    [first] = tmp_path.iterdir()
    assert first.stat().st_mode & 0o777 == 0o600
    attempt(make, MODEL, tmp_path, plan=plan(round=3, local_epochs=1))
    assert not list(tmp_path.iterdir())


def test_a_reply_that_is_lost_costs_the_last_epoch_only(tmp_path):
    expected, metrics, _ = attempt(make, MODEL, tmp_path)
    weights, found, trained = attempt(make, MODEL, tmp_path)
    assert (trained, found) == (1, metrics)
    assert same(weights, expected)


def test_without_a_folder_nothing_is_saved_and_every_epoch_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attempt(make, MODEL, None, at=4)
    assert attempt(make, MODEL, None)[2] == EPOCHS
    assert not list(tmp_path.iterdir())


def test_a_state_that_the_trainer_refuses_begins_the_round_from_its_start(tmp_path, flower_log):
    class Strict(TorchTrainer):
        def set_optimizer_state(self, state):
            if state:
                raise KeyError("exp_avg")
            super().set_optimizer_state(state)

    attempt(make, MODEL, tmp_path, at=4)
    # The weights are loaded before it raises, and have to be those of the server again.
    weights, _, trained = attempt(lambda: make(Strict), MODEL, tmp_path)
    assert trained == EPOCHS
    assert "the state of an earlier attempt could not be loaded: KeyError" in flower_log.text
    assert same(weights, attempt(make, MODEL, None)[0])


@pytest.mark.parametrize("at", [0, 0.01, 0.5, 0.99, 1])
@pytest.mark.parametrize("damage", ["a bit", "cut off"])
def test_a_damaged_file_begins_the_round_from_its_start_with_a_warning(
    at, damage, tmp_path, flower_log
):
    attempt(make, MODEL, tmp_path, at=4)
    [file] = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    place = int(at * (len(data) - 1))
    if damage == "a bit":
        data[place] ^= 1
    file.write_bytes(data if damage == "a bit" else data[:place])
    weights, _, trained = attempt(make, MODEL, tmp_path)
    assert trained == EPOCHS
    assert "the round begins from its start" in flower_log.text
    assert same(weights, attempt(make, MODEL, None)[0])


def test_a_folder_that_cannot_be_written_costs_no_training(tmp_path, flower_log):
    blocked = tmp_path / "file"
    blocked.write_text("")
    weights, _, trained = attempt(make, MODEL, blocked / "folder")
    assert trained == EPOCHS
    assert "a restart begins with an earlier epoch" in flower_log.text
    assert same(weights, attempt(make, MODEL, None)[0])
