import os
import struct
from pathlib import Path

import numpy as np
import pytest

from clients.tasks import mnist
from clients.torch.tasks import tensors_of
from flwr_colearn import ColearnError

REAL = Path(os.environ.get("COLEARN_DATA", "/nowhere"))
needs_data = pytest.mark.skipif(
    not (REAL / "MNIST").is_dir(), reason="set COLEARN_DATA to the folder that holds MNIST"
)
RNG = np.random.default_rng(0)
IMAGES = {
    part: RNG.integers(0, 256, (n, 28, 28), np.uint8) for part, n in (("train", 7), ("t10k", 3))
}
LABELS = {"train": [5, 0, 4, 1, 9, 2, 1], "t10k": [7, 2, 1]}


def idx(array):
    """The format as its authors describe it: two zeros, 8 for bytes, the rank, the sizes, data."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def small(tmp_path):
    """A folder laid out as torchvision's."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, images in IMAGES.items():
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.array(LABELS[part], np.uint8)))
    return tmp_path


def test_the_files_become_images_and_labels(small):
    task = mnist.load(str(small))
    for examples, part in ((task.train_set, "train"), (task.test_set, "t10k")):
        wanted = (IMAGES[part][..., None] / 255 - 0.1307) / 0.3081
        assert (examples.inputs.dtype, examples.labels.dtype) == (np.float32, np.int64)
        np.testing.assert_allclose(examples.inputs, wanted, rtol=1e-6, atol=1e-6)
        assert examples.labels.tolist() == LABELS[part]
    inputs, targets = tensors_of(task.train_set).tensors
    assert tuple(inputs.shape) == (7, 1, 28, 28)
    assert targets.tolist() == LABELS["train"]


def test_it_is_read_once(small):
    assert mnist.load(str(small)) is mnist.load(str(small))


@pytest.mark.parametrize("damage", ["missing", "truncated", "of another format", "empty"])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_missing_or_damaged_file_is_an_error_of_ours(small, damage, name):
    path = small / "MNIST" / "raw" / name
    content = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(content[:-1])
        case "of another format":
            path.write_bytes(b"\x1f\x8b\x08\x08" + content[4:])  # as gzip begins
        case "empty":
            path.write_bytes(b"")
    with pytest.raises(ColearnError, match=r"MNIST/raw: expected the four files of MNIST"):
        mnist.load(str(small))


def test_images_without_labels_are_refused(small):
    path = small / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(idx(np.zeros(6, np.uint8)))
    with pytest.raises(ColearnError, match="expected a label for each of 7 inputs, found 6"):
        mnist.load(str(small))


def test_without_the_folder_torchvision_downloads_it(small, tmp_path_factory, monkeypatch):
    asked = []

    def download(self):
        asked.append(self.root)
        if not Path(self.raw_folder).exists():
            (small / "MNIST").rename(Path(self.root) / "MNIST")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", download)
    folder = str(tmp_path_factory.mktemp("elsewhere"))
    task = mnist.load(folder)
    assert set(asked) == {folder}
    assert task.test_set.labels.tolist() == LABELS["t10k"]


@needs_data
def test_the_real_data_set():
    task = mnist.load(str(REAL))
    assert task.train_set.inputs.shape == (60_000, 28, 28, 1)
    assert task.test_set.inputs.shape == (10_000, 28, 28, 1)
    # Published for the data set: how often each digit is there, and how its labels begin.
    assert np.bincount(task.train_set.labels).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert task.train_set.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert task.test_set.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    # MEAN and STD are those of the training images themselves.
    assert task.train_set.inputs.mean(dtype=np.float64) == pytest.approx(0, abs=1e-3)
    assert task.train_set.inputs.std(dtype=np.float64) == pytest.approx(1, abs=1e-3)
