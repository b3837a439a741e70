import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from clients.settings import ParticipantSettings
from clients.tasks import cifar10, digits, registry
from clients.tasks.image_task import ImageTask
from clients.tasks.registry import (
    build_model,
    load_task,
    participant_trainer,
    server_trainer,
    shards,
)
from flwr_colearn import ColearnError

torch.set_num_threads(1)  # small networks: more threads only get in each other's way


@pytest.fixture(autouse=True, scope="module")
def _cpu():
    """Without a GPU, runs repeat themselves bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def weights(settings):
    return torch.cat([p.detach().flatten() for p in build_model(settings).parameters()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ParticipantSettings(task="mnist"), "'task': expected digits or cifar10, found 'mnist'"),
        (ParticipantSettings(model="vgg"), "'model': expected one of cnn for task digits, found"),
        (
            ParticipantSettings(partition="uneven"),
            "'partition': expected iid, dirichlet or classes, found 'uneven'",
        ),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(settings, message):
    with pytest.raises(ColearnError, match=message):
        participant_trainer(settings, 0, 5)


def test_the_seed_alone_decides_the_initial_model():
    first = weights(ParticipantSettings(seed=3))
    torch.manual_seed(99)
    assert torch.equal(weights(ParticipantSettings(seed=3)), first)
    assert not torch.equal(weights(ParticipantSettings(seed=4)), first)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "classes"])
def test_every_partition_deals_all_examples_by_the_settings_seed(partition):
    settings = ParticipantSettings(partition=partition, dirichlet_alpha=1.0, seed=1)
    dealt = shards(settings, 5)
    assert np.array_equal(np.sort(np.concatenate(dealt)), np.arange(1297))
    other = shards(ParticipantSettings(partition=partition, dirichlet_alpha=1.0, seed=2), 5)
    assert not np.array_equal(dealt[0], other[0])


def test_settings_of_the_partition_count():
    labels = load_task(ParticipantSettings()).train_labels.numpy()
    three = shards(ParticipantSettings(partition="classes", classes_each=3), 5)
    assert [len(set(labels[shard])) for shard in three] == [3] * 5
    even = shards(ParticipantSettings(partition="dirichlet", dirichlet_alpha=1e9), 5)
    assert max(len(shard) for shard in even) - min(len(shard) for shard in even) <= 10


def test_fewer_examples_are_the_first_ones():
    dealt = shards(ParticipantSettings(examples=300), 5)
    assert np.array_equal(np.sort(np.concatenate(dealt)), np.arange(300))


def test_a_participants_data_is_its_shard():
    settings = ParticipantSettings(partition="classes")
    trainer = participant_trainer(settings, 3, 5)
    shard = shards(settings, 5)[3]
    for tensor, all_of_it in zip(
        trainer.train_set.tensors, load_task(settings).train_set.tensors, strict=True
    ):
        assert torch.equal(tensor, all_of_it[torch.from_numpy(shard)])
    assert trainer.evaluate()["num-examples"] == len(shard)


def test_the_server_evaluates_on_the_common_test_set():
    outputs, targets = server_trainer(ParticipantSettings()).predict()
    assert torch.equal(targets, digits.load().test_set.tensors[1])
    assert outputs.shape == (500, 10)


def test_settings_reach_the_trainer():
    settings = ParticipantSettings(
        batch_size=7,
        momentum=0.5,
        weight_decay=0.01,
        clip_norm=2.0,
        precision="bfloat16",
        channels_last=True,
        workers=1,
    )
    for trainer in (participant_trainer(settings, 0, 5), server_trainer(settings)):
        group = trainer.optimizer.param_groups[0]
        assert (group["momentum"], group["weight_decay"]) == (0.5, 0.01)
        assert (trainer.batch_size, trainer.clip_norm, trainer.workers) == (7, 2.0, 1)
        assert trainer.precision == "bfloat16"
        assert trainer.memory_format is torch.channels_last
    assert participant_trainer(ParticipantSettings(), 0, 5).clip_norm is None


@pytest.mark.parametrize("augment", [False, True])
def test_augmentation_is_the_tasks_and_only_if_asked_for(augment, monkeypatch):
    images = TensorDataset(
        torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8), torch.arange(40) % 10
    )
    task = ImageTask(
        images,
        images,
        models={"cnn": digits.small_cnn},
        transform=cifar10.normalise,
        augmentation=cifar10.augment,
    )
    monkeypatch.setattr(registry, "load_task", lambda settings: task)
    trainer = participant_trainer(ParticipantSettings(augment=augment, seed=992), 0, 2)
    batch = images.tensors[0][:8]
    plain = cifar10.normalise(batch, training=True)
    assert torch.equal(trainer.transform(batch, True), plain) is not augment
    assert torch.equal(trainer.transform(batch, False), plain)
