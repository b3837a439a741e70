"""A site's own small images: ``train.npz`` and, if there is a test set, ``test.npz``."""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from clients.data import Examples
from clients.tasks.own_data import check_labels
from flwr_colearn import ColearnError


def read_images(
    folder: Path, part: str, shape: tuple[int, int, int], classes: int = 10
) -> Examples | None:
    """Return a part of a site's own images; None if the folder has no such file.

    Parameters
    ----------
    folder : Path
        The site's folder. ``PART.npz`` in it has ``x`` [N, height, width, channels], or
        [N, height, width] if there is one channel, and ``y`` [N], the classes from 0.
    part : str
        "train" or "test".
    shape : tuple of int
        The height, width and channels of the task's images.
    classes : int, default 10
        The number of classes.

    Raises
    ------
    ColearnError
        If the file cannot be read, or is not as described.
    """
    path = folder / f"{part}.npz"
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = file["x"], file["y"]
    except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
        raise ColearnError(f"{path}: expected arrays x and y, found {error}") from error
    if x.ndim == 3 and shape[2] == 1:
        x = x[..., None]
    if x.shape[1:] != shape or len(x) != len(y):
        raise ColearnError(
            f"{path}: expected x [N, {', '.join(map(str, shape))}] and y [N], found "
            f"{list(x.shape)} and {list(y.shape)}"
        )
    check_labels(y, classes, path)
    return Examples(x, y.astype(np.int64))


def bytes_of(examples: Examples, path: Path) -> Examples:
    """Return the examples, whose pixels must be bytes.

    Raises
    ------
    ColearnError
        If they have another type.
    """
    if examples.inputs.dtype != np.uint8:
        raise ColearnError(f"{path}: expected x of uint8, found {examples.inputs.dtype}")
    return examples


def no_images(shape: tuple[int, int, int], dtype: type) -> Examples:
    """Return a data set of no images of a shape, which a task without data has."""
    return Examples(np.empty((0, *shape), dtype), np.empty(0, np.int64))
