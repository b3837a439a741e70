import shutil

import numpy as np
import pytest
import torch

from clients.data import Examples, Task
from clients.settings import ParticipantSettings
from clients.tasks import digits
from clients.tasks.registry import load_task, participant_trainer, server_trainer, shards
from clients.torch.tasks import KITS, build_model, tensors_of
from clients.torch.transforms import augment, normalise

torch.set_num_threads(1)  # small networks: more threads only get in each other's way


@pytest.fixture(autouse=True, scope="module")
def _cpu():
    """Without a GPU, runs repeat themselves bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def weights(settings):
    return torch.cat(
        [p.detach().flatten() for p in build_model(settings, load_task(settings)).parameters()]
    )


def test_the_models_of_each_task():
    assert {task: list(each.models) for task, each in KITS.items()} == {
        "digits": ["cnn"],
        "mnist": ["cnn"],
        "cifar10": [
            "resnet8",
            "resnet8-half",
            "densenet40",
            "vgg19",
            "resnet152",
            "inception_v4",
            "inception_resnet_v2",
        ],
        "imagefolder": ["resnet8", "resnet8-half", "vgg19", "inception_v4", "resnetv2_101"],
        "toxic": ["bigru", "capsule", "bigru-small", "word-mean"],
        "speech": ["cnn-trad-fpool3", "cnn-small"],
        "audioset": ["crnn-average", "crnn-max", "crnn-attention", "crnn-multi-attention"],
        "package.module:function": [],
    }


def test_the_seed_alone_decides_the_initial_model():
    first = weights(ParticipantSettings(seed=3))
    torch.manual_seed(99)
    assert torch.equal(weights(ParticipantSettings(seed=3)), first)
    assert not torch.equal(weights(ParticipantSettings(seed=4)), first)


def test_images_become_channels_first():
    inputs = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    images, labels = tensors_of(Examples(inputs, np.array([7, 8]))).tensors
    assert images.shape == (2, 5, 3, 4)
    assert images.is_contiguous()
    assert int(images[1, 4, 2, 3]) == inputs[1, 2, 3, 4]
    assert labels.tolist() == [7, 8]


def test_a_participants_data_is_its_shard():
    settings = ParticipantSettings(partition="classes")
    trainer = participant_trainer(settings, 3, 5)
    shard = shards(settings, 5)[3]
    images, labels = trainer.train_set.tensors
    examples = load_task(settings).train_set
    np.testing.assert_array_equal(images[:, 0], examples.inputs[shard][..., 0])
    np.testing.assert_array_equal(labels, examples.labels[shard])
    assert trainer.evaluate()["num-examples"] == len(shard)


def test_the_server_evaluates_on_the_common_test_set():
    outputs, targets = server_trainer(ParticipantSettings()).predict()
    assert np.array_equal(targets, digits.load().test_set.labels)
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
        assert trainer.channels_last
    assert participant_trainer(ParticipantSettings(), 0, 5).clip_norm is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_trains_as_without_and_has_the_same_names():
    plain, compiled = (
        participant_trainer(ParticipantSettings(examples=160, jit_compile=flag), 0, 5)
        for flag in (False, True)
    )
    assert compiled.network is not compiled.model
    for trainer in (plain, compiled):
        trainer.train_epoch(0.05, seed=1)
    expected, found = plain.get_weights(), compiled.get_weights()
    assert list(expected) == list(found)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "transform"),
    [
        (ParticipantSettings(task="cifar10"), normalise),
        (ParticipantSettings(task="cifar10", augment=True), augment),
    ],
)
def test_augmentation_is_the_tasks_and_only_if_asked_for(settings, transform):
    from clients.torch import tasks

    data = Examples(np.zeros((4, 32, 32, 3), np.uint8), np.arange(4))
    for build in (tasks.participant_trainer, tasks.server_trainer):
        assert build(settings, Task(data, data)).transform is transform
