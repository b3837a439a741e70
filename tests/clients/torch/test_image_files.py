import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as reference

from clients.data import Examples
from clients.settings import ParticipantSettings
from clients.tasks import imagefolder
from clients.tasks.registry import load_task, participant_trainer, server_trainer
from clients.torch.image_files import ImageFiles, image_files
from clients.torch.parallel import ParallelTrainer
from clients.torch.trainer import TorchTrainer
from clients.torch.transforms import normalise_imagenet
from flwr_colearn import ColearnError

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

needs_data = pytest.mark.skipif(
    not Path(os.environ.get("COLEARN_DATA", ""), "tiny-imagenet-20").is_dir(),
    reason="set COLEARN_DATA to the folder that holds tiny-imagenet-20",
)


@pytest.fixture(autouse=True, scope="module")
def _cpu():
    """Without a GPU, runs repeat themselves bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Twelve images of 48x64 pixels whose red grows downwards and green to the right."""
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for index in range(12):
        rows, columns = np.mgrid[0:48, 0:64]
        pixels = np.stack([5 * rows, 3 * columns, np.full_like(rows, 20 * index)], axis=-1)
        paths.append(folder / f"{index}.png")
        Image.fromarray(pixels.astype(np.uint8)).save(paths[-1])
    return Examples(np.array([str(path) for path in paths]), np.arange(12) % 3)


def together(dataset):
    return torch.stack([dataset[index][0] for index in range(len(dataset))])


def test_plain_images_are_resized_and_cropped_in_the_centre(examples):
    for size, shorter in ((28, 32), (42, 48)):  # 7/8, as 224 is of 256
        image, label = ImageFiles(examples, size)[7]
        assert (image.dtype, image.shape, label) == (torch.uint8, (3, size, size), 1)
        resized = Image.open(examples.inputs[7]).resize((shorter * 64 // 48, shorter), 2)
        expected = reference.center_crop(reference.pil_to_tensor(resized), [size, size])
        assert torch.equal(image, expected)


def test_images_are_plain_until_they_are_seeded_and_augmented_after(examples):
    plain = together(ImageFiles(examples, 32))
    asked = ImageFiles(examples, 32, augment=True)
    assert torch.equal(together(asked), plain)
    assert torch.equal(together(ImageFiles(examples, 32).seeded(1)), plain)
    augmented = together(asked.seeded(1))
    assert torch.equal(augmented, together(asked.seeded(1)))
    changed = (augmented != together(asked.seeded(2))).flatten(1).any(1)
    assert changed.sum() >= 11


def test_augmentation_crops_at_other_scales_and_ratios_and_mirrors_half(examples):
    repeated = Examples(np.repeat(examples.inputs[:1], 300), np.zeros(300, np.int64))
    images = together(ImageFiles(repeated, 32, augment=True).seeded(0)).float()
    # The slopes of red and green say how many rows and columns of the original were taken.
    heights = (images[:, 0, -1] - images[:, 0, 0]).mean(1) / 5 / 31 * 32
    widths = (images[:, 1, :, -1] - images[:, 1, :, 0]).mean(1) / 3 / 31 * 32
    assert 110 < int((widths < 0).sum()) < 190  # mirrored; five standard deviations
    ratios, areas = widths.abs() / heights, widths.abs() * heights / (48 * 64)
    assert 0.7 < ratios.min() < 0.85
    assert 1.2 < ratios.max() < 1.45
    assert 0.06 < areas.min() < 0.15
    assert 0.8 < areas.max() < 1.05


def test_drawing_an_image_leaves_torchs_random_state_alone(examples):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    ImageFiles(examples, 32, augment=True).seeded(1)[0]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_other_colour_modes_have_three_channels(mode, tmp_path):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new("RGB", (40, 40), (204, 204, 204)).convert(mode).save(path)
    image, _ = ImageFiles(Examples(np.array([str(path)]), np.zeros(1, np.int64)), 32)[0]
    assert image.shape == (3, 32, 32)
    assert (image.float() - 204).abs().max() <= 6


def test_normalisation_by_hand():
    batch = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    batch[1, 0, 2, 3], batch[0, 2, 1, 1] = 255, 51
    for training in (True, False):
        result = normalise_imagenet(batch, training)
        assert float(result[1, 0, 2, 3]) == pytest.approx((1 - 0.485) / 0.229)
        assert float(result[0, 2, 1, 1]) == pytest.approx((0.2 - 0.406) / 0.225)
        assert float(result[0, 1, 0, 0]) == pytest.approx(-0.456 / 0.224)


# In training


def linear_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))


def trainer_of(examples, workers=0, augment=True):
    model = linear_model()
    files = ImageFiles(examples, 16, augment)
    return TorchTrainer(
        model, files, files, batch_size=5, transform=normalise_imagenet, workers=workers
    )


def after_two_epochs(trainer):
    for seed in (1, 2):
        trainer.train_epoch(0.01, seed)
    return trainer.get_weights()["1.weight"]


def test_the_seed_decides_the_weights_whatever_the_number_of_workers(examples):
    alone, helped = trainer_of(examples), trainer_of(examples, workers=2)
    start = alone.get_weights()
    expected = after_two_epochs(alone)
    torch.manual_seed(77)
    np.testing.assert_array_equal(after_two_epochs(helped), expected)
    np.testing.assert_array_equal(helped.predict()[0], alone.predict()[0])
    alone.set_weights(start)
    np.testing.assert_array_equal(after_two_epochs(alone), expected)
    assert not np.array_equal(after_two_epochs(trainer_of(examples, augment=False)), expected)


def test_synchronous_steps_are_augmented_by_their_seed_too(examples):
    def gradient(seed, workers=0):
        trainer = trainer_of(examples, workers)
        torch.manual_seed(np.random.default_rng().integers(1000))
        return trainer.gradients(["1.weight"], step=2, seed=seed)[0]["1.weight"]

    np.testing.assert_array_equal(gradient(5), gradient(5, workers=1))
    assert not np.array_equal(gradient(5), gradient(6))


def test_recalibration_and_evaluation_see_plain_images(examples, monkeypatch):
    seeds = []
    read = ImageFiles._tensor
    monkeypatch.setattr(
        ImageFiles, "_tensor", lambda self, *args: seeds.append(self.seed) or read(self, *args)
    )
    trainer = trainer_of(examples)
    trainer.evaluate()
    trainer.recalibrated()
    assert set(seeds) == {None}
    trainer.train_epoch(0.01, 8)
    assert seeds[-12:] == [8] * 12


def test_a_site_with_two_devices_augments_as_one_device_does(examples):
    files = ImageFiles(examples, 16, augment=True)
    two = ParallelTrainer(
        linear_model(),
        files,
        files,
        devices=["cpu", "cpu"],
        batch_size=6,
        transform=normalise_imagenet,
        workers=1,
    )
    one = trainer_of(examples)
    one.batch_size = 6
    for trainer in (one, two):
        trainer.train_epoch(0.01, 1)
    weights = (trainer.get_weights()["1.weight"] for trainer in (one, two))
    np.testing.assert_allclose(*weights, rtol=1e-4, atol=1e-5)


# From the settings


@pytest.fixture
def root(tmp_path, examples):
    """Two classes of six training and three validation images in ImageNet's layout."""
    for index, path in enumerate(examples.inputs):
        target = tmp_path / ("train" if index % 3 else "val") / "ab"[index % 2] / Path(path).name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    return tmp_path


def test_settings_reach_the_data(root):
    settings = ParticipantSettings(
        task="imagefolder", data_dir=str(root), augment=True, image_size=40, workers=1
    )
    for trainer in (participant_trainer(settings, 0, 2), server_trainer(settings)):
        assert trainer.train_set.size == trainer.test_set.size == 40
        assert trainer.train_set.augment
        assert trainer.workers == 1
        assert trainer.transform is normalise_imagenet
    outputs, targets = server_trainer(settings).predict()
    assert outputs.shape == (4, 2)
    assert np.array_equal(targets, load_task(settings).test_set.labels)
    metrics = participant_trainer(settings, 0, 2).evaluate()
    assert metrics.keys() == {"num-examples", "loss", "accuracy", "top-5"}
    assert metrics["top-5"] == 1


def test_the_image_size_is_224_unless_it_is_set(examples):
    assert image_files(examples, ParticipantSettings()).size == imagefolder.IMAGE_SIZE == 224
    with pytest.raises(ColearnError, match="'image-size': expected a whole number of at least 0"):
        image_files(examples, ParticipantSettings(image_size=-1))


def test_a_task_whose_images_have_a_size_refuses_another():
    with pytest.raises(ColearnError, match=r"'image-size': expected 0, .*'digits'.* found 64"):
        server_trainer(ParticipantSettings(image_size=64))


def test_the_files_travel_to_other_processes(examples):
    copied = pickle.loads(pickle.dumps(ImageFiles(examples, 32, augment=True).seeded(3)))
    original = ImageFiles(examples, 32, augment=True).seeded(3)
    assert torch.equal(copied[2][0], original[2][0])


@needs_data
def test_a_compact_network_learns_two_classes_of_real_images(tmp_path):
    for part in ("train", "val"):
        folder = Path(os.environ["COLEARN_DATA"], "tiny-imagenet-20", part).absolute()
        for name in ("n04146614", "n09246464"):  # school bus, cliff
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / part / name).symlink_to(folder / name)
    settings = ParticipantSettings(
        task="imagefolder", data_dir=str(tmp_path), examples=500, image_size=32, augment=True
    )
    trainer, evaluator = participant_trainer(settings, 0, 1), server_trainer(settings)
    for seed in range(6):
        trainer.train_epoch(0.02, seed)
    evaluator.set_weights(trainer.get_weights())
    assert evaluator.evaluate()["accuracy"] > 0.75  # chance is 0.5
