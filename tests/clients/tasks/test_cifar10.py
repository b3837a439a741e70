import hashlib
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from clients.tasks import cifar10
from flwr_colearn import ColearnError

needs_data = pytest.mark.skipif(
    not Path(os.environ.get("COLEARN_CIFAR10", ""), "cifar-10-batches-py").is_dir(),
    reason="set COLEARN_CIFAR10 to the folder that holds cifar-10-batches-py",
)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder in the official format, three images a file, and the images [18, 32, 32, 3]."""
    folder = tmp_path / cifar10.FOLDER
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (18, 32, 32, 3), dtype=np.uint8)
    sums = {}
    for index, name in enumerate(cifar10.CHECKSUMS):
        part = images[3 * index : 3 * index + 3]
        # "The first 1024 entries contain the red channel values, the next the green, the final the
        # blue; stored in row-major order" (the data set's own page).
        rows = np.stack([[*i[:, :, 0].flat, *i[:, :, 1].flat, *i[:, :, 2].flat] for i in part])
        content = pickle.dumps({"data": rows, "labels": [index, 1, 2]})
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(cifar10, "CHECKSUMS", sums)
    return tmp_path, images


def test_the_official_files_become_images_and_labels(small):
    folder, images = small
    task = cifar10.load(str(folder))
    np.testing.assert_array_equal(task.train_set.inputs, images[:15])
    np.testing.assert_array_equal(task.test_set.inputs, images[15:])
    assert task.train_set.labels.tolist() == [0, 1, 2, 1, 1, 2, 2, 1, 2, 3, 1, 2, 4, 1, 2]
    assert task.test_set.labels.tolist() == [5, 1, 2]
    assert task.train_set.labels.dtype == np.int64


def test_files_that_are_not_the_official_ones_are_never_unpickled(small, monkeypatch):
    folder, _ = small
    path = folder / cifar10.FOLDER / "data_batch_3"
    path.write_bytes(path.read_bytes() + b"x")
    monkeypatch.setattr(pickle, "loads", lambda content, **options: {}["unpickled"])
    monkeypatch.setitem(cifar10.CHECKSUMS, "data_batch_1", "0")
    with pytest.raises(ColearnError, match=r"data_batch_1: expected CIFAR-10's official file"):
        cifar10.load(str(folder))


def test_a_changed_or_missing_file_is_named(small):
    folder, _ = small
    path = folder / cifar10.FOLDER / "data_batch_3"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ColearnError, match=r"data_batch_3: .*found [0-9a-f]{32}; remove .*again"):
        cifar10.load(str(folder))
    path.unlink()
    with pytest.raises(ColearnError, match=r"data_batch_3: expected a file of CIFAR-10, found"):
        cifar10.load(str(folder))


def test_without_the_folder_torchvision_downloads_it(small, monkeypatch):
    folder, images = small
    asked = []

    def download(data_dir, download):
        asked.append((data_dir, download))
        (folder / cifar10.FOLDER).rename(Path(data_dir) / cifar10.FOLDER)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", download)
    (folder / "elsewhere").mkdir()
    task = cifar10.load(str(folder / "elsewhere"))
    assert asked == [(str(folder / "elsewhere"), True)]
    np.testing.assert_array_equal(task.test_set.inputs, images[15:])


def test_without_folder_and_torchvision_it_is_said_where_the_data_belong(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)  # as if it were not installed
    with pytest.raises(ColearnError, match=r"'data-dir': expected a folder that holds cifar-10"):
        cifar10.load(str(tmp_path))


@needs_data
@pytest.mark.slow
def test_the_real_data_set():
    from torchvision.datasets import CIFAR10

    folder = os.environ["COLEARN_CIFAR10"]
    task = cifar10.load(folder)
    for examples, training in ((task.train_set, True), (task.test_set, False)):
        theirs = CIFAR10(folder, train=training)
        np.testing.assert_array_equal(examples.inputs, theirs.data)
        np.testing.assert_array_equal(examples.labels, theirs.targets)
    # MEAN and STD are those of the training images themselves.
    pixels = task.train_set.inputs.reshape(-1, 3)
    np.testing.assert_allclose(pixels.mean(0) / 255, cifar10.MEAN, atol=1e-4)
    np.testing.assert_allclose(pixels.std(0, dtype=np.float64) / 255, cifar10.STD, atol=1e-4)
