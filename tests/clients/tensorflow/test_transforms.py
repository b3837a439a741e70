"""The TensorFlow transforms against torchvision's and PyTorch's."""

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as reference

from clients.tensorflow import transforms
from clients.tensorflow.setup import tf
from clients.torch import transforms as torch_transforms

SEED = tf.constant([3, 4], tf.int64)


def images(n, channels=3, size=32):
    """Random uint8 images [N, H, W, C], all different and none symmetric."""
    generator = np.random.default_rng(0)
    return generator.integers(1, 256, (n, size, size, channels), dtype=np.uint8)


def as_torch(batch):
    return torch.from_numpy(np.asarray(batch)).permute(0, 3, 1, 2)


def test_normalise_is_pytorchs():
    batch = images(4)
    ours = transforms.normalise(batch, True, SEED)
    theirs = torch_transforms.normalise(as_torch(batch), True).permute(0, 2, 3, 1)
    assert ours.dtype == tf.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_every_crop_is_torchvisions_crop_at_some_offset_and_all_offsets_occur():
    batch = images(2000, channels=1, size=8)
    cropped = as_torch(transforms.random_crop(tf.constant(batch), 4, SEED))
    padded = reference.pad(as_torch(batch), [4] * 4)
    crops = [reference.crop(padded, top, left, 8, 8) for top in range(9) for left in range(9)]
    matches = torch.stack([(crop == cropped).flatten(1).all(1) for crop in crops])
    assert torch.all(matches.sum(0) == 1)  # each image is exactly one of the 81 crops
    found = matches.sum(1)  # how often each offset was drawn, 24.7 expected
    assert found.min() > 0
    assert found.max() < 75


def test_flip_mirrors_whole_images_about_every_second():
    batch = images(1000, size=4)
    flipped = transforms.random_flip(tf.constant(batch), SEED).numpy()
    kept = (flipped == batch).all((1, 2, 3))
    mirrored = (flipped == batch[:, :, ::-1]).all((1, 2, 3))
    assert np.all(kept ^ mirrored)
    assert 420 < mirrored.sum() < 580  # five standard deviations


def test_training_images_are_normalised_cropped_and_flipped_independently():
    batch = images(600, size=8)
    augmented = as_torch(transforms.augment(tf.constant(batch), True, SEED))
    plain = as_torch(transforms.normalise(batch, True, SEED))
    padded = reference.pad(plain, [4] * 4)
    crops = [reference.crop(padded, top, left, 8, 8) for top in range(9) for left in range(9)]
    both = [*crops, *(reference.hflip(crop) for crop in crops)]
    matches = torch.stack([(each == augmented).flatten(1).all(1) for each in both])
    assert torch.all(matches.sum(0) == 1)
    mirrored, top, left = np.unravel_index(matches.int().argmax(0).numpy(), (2, 9, 9))
    for offset in (top, left):
        assert abs(np.corrcoef(offset, mirrored)[0, 1]) < 0.15  # 3.7 standard deviations
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.15


def test_augmentation_follows_the_seed():
    batch = tf.constant(images(8))
    first, again, other = (
        transforms.augment(batch, True, tf.constant([seed, 0], tf.int64)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("seed", [0, 1])
def test_evaluation_is_never_augmented(seed):
    batch = images(16)
    seeds = tf.constant([seed, 0], tf.int64)
    expected = transforms.normalise(batch, False, SEED)
    np.testing.assert_array_equal(transforms.augment(batch, False, seeds), expected)
    assert not np.array_equal(transforms.augment(batch, True, seeds), expected)
