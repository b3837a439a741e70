import shutil

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as reference

from clients.data import Examples, Task
from clients.settings import ParticipantSettings
from clients.tasks import digits
from clients.tasks.registry import load_task, participant_trainer, server_trainer, shards
from clients.torch.tasks import (
    KITS,
    augment,
    build_model,
    normalise,
    random_crop,
    random_flip,
    tensors_of,
)

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


def images(n, channels=3, size=32):
    """Random uint8 images, all different and none symmetric."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


def test_normalise_by_hand():
    batch = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    batch[0, 0, 0, 0], batch[0, 1, 2, 3], batch[1, 2, 31, 31] = 255, 51, 102
    result = normalise(batch, training=True)
    assert result.dtype == torch.float32
    assert float(result[0, 0, 0, 0]) == pytest.approx((1.0 - 0.4914) / 0.2470)
    assert float(result[0, 1, 2, 3]) == pytest.approx((0.2 - 0.4822) / 0.2435)
    assert float(result[1, 2, 31, 31]) == pytest.approx((0.4 - 0.4465) / 0.2616)
    assert float(result[1, 0, 5, 5]) == pytest.approx(-0.4914 / 0.2470)


def test_every_crop_is_torchvisions_crop_at_some_offset_and_all_offsets_occur():
    torch.manual_seed(0)
    batch = images(2000, channels=1, size=8)
    padded = reference.pad(batch, [4] * 4)
    cropped = random_crop(batch, padding=4)
    crops = [reference.crop(padded, top, left, 8, 8) for top in range(9) for left in range(9)]
    matches = torch.stack([(crop == cropped).flatten(1).all(1) for crop in crops])
    assert torch.all(matches.sum(0) == 1)  # each image is exactly one of the 81 crops
    found = matches.sum(1)  # how often each offset was drawn, 24.7 expected
    assert found.min() > 0
    assert found.max() < 75


def test_all_channels_of_an_image_move_together():
    torch.manual_seed(0)
    one = images(50, channels=1, size=8)
    cropped = random_crop(one.expand(-1, 3, -1, -1), padding=4)
    assert torch.equal(cropped[:, 0], cropped[:, 1])
    assert torch.equal(cropped[:, 0], cropped[:, 2])


def test_flip_mirrors_whole_images_about_every_second():
    torch.manual_seed(0)
    batch = images(1000, size=4)
    flipped = random_flip(batch)
    kept = (flipped == batch).flatten(1).all(1)
    mirrored = (flipped == reference.hflip(batch)).flatten(1).all(1)
    assert torch.all(kept ^ mirrored)
    assert 420 < int(mirrored.sum()) < 580  # five standard deviations


def test_training_images_are_normalised_then_cropped_and_flipped():
    torch.manual_seed(0)
    batch = images(20)
    augmented = augment(batch, training=True)
    padded = reference.pad(normalise(batch, training=True), [4] * 4)
    for index in range(20):
        crops = padded[index].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
        both = torch.stack([crops, crops.flip(-1)])  # [2, 9, 9, 3, 32, 32]
        assert (both == augmented[index]).flatten(3).all(3).sum() == 1
    assert not torch.equal(augmented, normalise(batch, training=True))


def test_augmentation_follows_torchs_seed():
    batch = images(8)
    torch.manual_seed(1)
    first, other = (augment(batch, training=True) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(augment(batch, training=True), first)
    assert not torch.equal(other, first)


def test_evaluation_is_never_augmented():
    batch = images(64)
    expected = normalise(batch, training=False)
    for seed in range(5):
        torch.manual_seed(seed)
        assert torch.equal(augment(batch, training=False), expected)


# Trainers


def test_the_models_of_each_task():
    assert {task: list(each.models) for task, each in KITS.items()} == {
        "digits": ["cnn"],
        "mnist": ["cnn"],
        "cifar10": [
            "resnet8",
            "densenet40",
            "vgg19",
            "resnet152",
            "inception_v4",
            "inception_resnet_v2",
        ],
        "imagefolder": ["resnet8", "vgg19", "inception_v4", "resnetv2_101"],
        "toxic": ["bigru", "capsule", "bigru-small"],
        "speech": ["cnn-trad-fpool3", "cnn-small"],
        "audioset": ["crnn-average", "crnn-max", "crnn-attention", "crnn-multi-attention"],
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
