"""The task CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in colour."""

import hashlib
import pickle
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from clients.data import Examples, Task
from clients.settings import ParticipantSettings
from clients.tasks.image_arrays import bytes_of, no_images, read_images
from flwr_colearn import ColearnError

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

SHAPE = (32, 32, 3)

FOLDER = "cifar-10-batches-py"
CHECKSUMS = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
"""The MD5 checksums of the files of the official distribution."""


@cache
def load(data_dir: str) -> Task:
    """Return the task, images as uint8 [32, 32, 3].

    Parameters
    ----------
    data_dir : str
        The folder that holds ``cifar-10-batches-py``; if it does not, torchvision, where it is
        installed, downloads it there.

    Raises
    ------
    ColearnError
        If the files are absent and cannot be downloaded, or are not the official ones.
    """
    folder = Path(data_dir) / FOLDER
    if not folder.is_dir():
        _download(data_dir)
    *training, test = CHECKSUMS
    return Task(_read(folder, training), _read(folder, [test]))


def definition(settings: ParticipantSettings) -> Task:
    """Return the task without data."""
    return Task(no_images(SHAPE, np.uint8))


def read(settings: ParticipantSettings, folder: Path, part: str) -> Examples | None:
    """Return a site's own images: ``PART.npz``, x [N, 32, 32, 3] of uint8, or the official files.

    Raises
    ------
    ColearnError
        If a file is damaged, of another shape, or not the official one.
    """
    if (folder / FOLDER).is_dir():
        task = load(str(folder))
        return task.train_set if part == "train" else task.test_set
    examples = read_images(folder, part, SHAPE)
    return None if examples is None else bytes_of(examples, folder / f"{part}.npz")


def _download(data_dir: str) -> None:
    try:
        from torchvision.datasets import CIFAR10
    except ModuleNotFoundError:
        raise ColearnError(
            f"run config 'data-dir': expected a folder that holds {FOLDER}, found none in "
            f"{data_dir!r}; unpack cifar-10-python.tar.gz there (torchvision would download it, "
            "but is not installed)"
        ) from None
    CIFAR10(data_dir, download=True)


def _read(folder: Path, names: Sequence[str]) -> Examples:
    batches = [_unpickle(folder / name) for name in names]
    inputs = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([batch["labels"] for batch in batches]).astype(np.int64)
    # The files have the channels first; images in memory have them last in all tasks.
    return Examples(np.ascontiguousarray(inputs.transpose(0, 2, 3, 1)), labels)


def _unpickle(path: Path) -> dict:  # type: ignore[type-arg]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ColearnError(f"{path}: expected a file of CIFAR-10, found {error}") from error
    # Unpickling can run any code, so the checksum is compared before.
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != CHECKSUMS[path.name]:
        raise ColearnError(
            f"{path}: expected CIFAR-10's official file (MD5 {CHECKSUMS[path.name]}), found "
            f"{found}; remove {path.parent} and get it again"
        )
    return pickle.loads(content, encoding="latin1")  # type: ignore[no-any-return]
