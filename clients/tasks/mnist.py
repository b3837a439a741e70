"""The task MNIST: 60,000 training and 10,000 test images of digits, 28x28 grey pixels."""

from functools import cache
from pathlib import Path

import numpy as np

from clients.data import Examples, Task
from clients.settings import ParticipantSettings
from clients.tasks.image_arrays import bytes_of, no_images, read_images
from clients.trainer import NDArray
from flwr_colearn import ColearnError

MEAN, STD = 0.1307, 0.3081
SHAPE = (28, 28, 1)


@cache
def load(data_dir: str) -> Task:
    """Return the task, images [28, 28, 1] of zero mean and unit variance, float32.

    Parameters
    ----------
    data_dir : str
        The folder that holds ``MNIST/raw``; if it does not, torchvision downloads the files.

    Raises
    ------
    ColearnError
        If a file is missing from the folder, or damaged.
    """
    from torchvision.datasets import MNIST

    folder = Path(data_dir) / "MNIST" / "raw"
    # Only an absent folder is downloaded: in one that exists, a missing file is an error.
    present = folder.is_dir()
    try:
        parts = [MNIST(data_dir, train, download=not present) for train in (True, False)]
    except (RuntimeError, AssertionError, ValueError, KeyError, IndexError) as error:
        raise ColearnError(
            f"{folder}: expected the four files of MNIST, unpacked, found {error!r}; remove the "
            "folder to have them downloaded again"
        ) from None
    train, test = map(_examples, parts)
    return Task(train, test)


def definition(settings: ParticipantSettings) -> Task:
    """Return the task without data."""
    return Task(no_images(SHAPE, np.float32))


def read(settings: ParticipantSettings, folder: Path, part: str) -> Examples | None:
    """Return a site's own images: ``PART.npz`` with x [N, 28, 28] of uint8, or MNIST's own files.

    Raises
    ------
    ColearnError
        If a file is damaged or of another shape.
    """
    if (folder / "MNIST" / "raw").is_dir():
        task = load(str(folder))
        return task.train_set if part == "train" else task.test_set
    examples = read_images(folder, part, SHAPE)
    if examples is None:
        return None
    pixels = bytes_of(examples, folder / f"{part}.npz").inputs
    return Examples(_standardised(pixels), examples.labels)


def _examples(images: object) -> Examples:
    # The whole array at once; the data set's own items are PIL images, one by one.
    pixels = images.data.numpy()[..., None]  # type: ignore[attr-defined]
    return Examples(_standardised(pixels), images.targets.numpy())  # type: ignore[attr-defined]


def _standardised(pixels: NDArray) -> NDArray:
    scaled = pixels.astype(np.float32) / np.float32(255)
    return (scaled - np.float32(MEAN)) / np.float32(STD)
