"""The default task: scikit-learn's 1,797 handwritten digits of 8x8 grey pixels."""

from functools import cache
from pathlib import Path

import numpy as np

from clients.data import Examples, Task
from clients.settings import ParticipantSettings
from clients.tasks.image_arrays import no_images, read_images
from clients.trainer import NDArray
from flwr_colearn import ColearnError

SHAPE = (8, 8, 1)

TEST_EXAMPLES = 500


@cache
def load() -> Task:
    """Return 1,297 training and 500 test images [8, 8, 1] in [0, 1], float32, in a fixed split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    inputs = _scaled(images.reshape(-1, *SHAPE))
    train_x, test_x, train_y, test_y = train_test_split(
        inputs, labels.astype(np.int64), test_size=TEST_EXAMPLES, stratify=labels, random_state=0
    )
    return Task(Examples(train_x, train_y), Examples(test_x, test_y))


def definition(settings: ParticipantSettings) -> Task:
    """Return the task without data."""
    return Task(no_images(SHAPE, np.float32))


def read(settings: ParticipantSettings, folder: Path, part: str) -> Examples | None:
    """Return a site's own images in ``PART.npz``, with pixels from 0 to 16 as in scikit-learn.

    Pixels of a floating-point type that are at most 1 are taken as scaled already.

    Raises
    ------
    ColearnError
        If the file is damaged, or of another shape or range.
    """
    examples = read_images(folder, part, SHAPE)
    if examples is None:
        return None
    pixels = examples.inputs
    if not len(pixels) or not (pixels.min() >= 0 and pixels.max() <= 16):
        raise ColearnError(f"{folder / part}.npz: expected pixels from 0 to 16, found others")
    scaled = pixels.dtype.kind == "f" and pixels.max() <= 1
    return Examples(pixels.astype(np.float32) if scaled else _scaled(pixels), examples.labels)


def _scaled(pixels: NDArray) -> NDArray:
    # Pixels are whole numbers from 0 to 16.
    return (pixels / 16.0).astype(np.float32)
