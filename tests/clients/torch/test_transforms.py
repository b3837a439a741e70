import pytest
import torch
from torchvision.transforms import functional as reference

from clients.torch.transforms import augment, normalise, random_crop, random_flip


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
