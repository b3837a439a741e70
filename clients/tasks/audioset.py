"""The task AudioSet: ten-second clips with any of 527 tags, as log-mel features.

The features are prepared beforehand: the folder holds ``train.h5`` and ``eval.h5``, or
``train.npz`` and ``eval.npz``, each with

* ``x`` [N, 240, 64], float16 or float32: log-mel features, frames x mel bins;
* ``y`` [N, classes], bool or integers 0 and 1: the tags.

Other arrays, such as ``video_id_list``, are ignored. The names are those of the files of Kong et
al. (2018); the ``x`` of those files are embeddings [N, 10, 128], which these networks do not take.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cache
from logging import WARNING
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from flwr.common import log
from tqdm import tqdm

from clients.data import Examples, Task
from clients.metrics import audio_tagging
from clients.objective import Objective
from clients.settings import ParticipantSettings
from clients.trainer import NDArray
from flwr_colearn import ColearnError

SHAPE = (240, 64)
"""The shape of a clip: frames and mel bins."""
CLASSES = 527
"""The number of AudioSet's tags."""
OBJECTIVE = Objective(audio_tagging, headline="map", multi_label=True)
ROWS = 1024
"""The number of rows that are read at a time."""


@cache
def load(data_dir: str) -> Task:
    """Return the task, inputs as float32 [240, 64], 60 KiB a clip in memory.

    Clips whose features are not finite are left out; the log lists them.

    Parameters
    ----------
    data_dir : str
        The folder of the two files that the module describes.

    Raises
    ------
    ColearnError
        If a file is missing or not as the module describes, or the two differ in their classes.
    """
    train, test = (_read(_path(Path(data_dir), part)) for part in ("train", "eval"))
    classes = train.labels.shape[1]
    if test.labels.shape[1] != classes:
        raise ColearnError(
            f"run config 'data-dir': expected as many columns of y in both files of {data_dir!r}, "
            f"found {classes} in train and {test.labels.shape[1]} in eval"
        )
    if not test.labels.any():
        raise ColearnError(
            f"run config 'data-dir': expected tags in y of the eval file of {data_dir!r}, found "
            "none: no metric can be computed"
        )
    # A fixed order, so that the first N examples are the same random subset at every site.
    order = np.random.default_rng(0).permutation(len(train))
    return Task(train.take(order), test, OBJECTIVE, {"num_classes": classes})


def definition(settings: ParticipantSettings) -> Task:
    """Return the task without data; its tags are AudioSet's 527, or those of `classes`."""
    number = len(settings.class_names) or CLASSES
    none = Examples(np.empty((0, *SHAPE), np.float32), np.empty((0, number), np.float32))
    return Task(none, objective=OBJECTIVE, model_options={"num_classes": number})


def read(settings: ParticipantSettings, folder: Path, part: str) -> Examples | None:
    """Return a site's own clips, of ``train`` or of ``eval``; None if there is no such file.

    Raises
    ------
    ColearnError
        If the file is not as the module describes, or has another number of tags than the run.
    """
    path = _found(folder, "train" if part == "train" else "eval")
    if path is None:
        return None
    examples, number = _read(path), len(settings.class_names) or CLASSES
    if examples.labels.shape[1] != number:
        raise ColearnError(
            f"{path}: expected {number} columns of y, one for each tag of the run (its 'classes', "
            f"else AudioSet's {CLASSES}), found {examples.labels.shape[1]}"
        )
    return examples


def _found(folder: Path, part: str) -> Path | None:
    paths = (folder / f"{part}.{suffix}" for suffix in ("h5", "npz"))
    return next(filter(Path.is_file, paths), None)


def _path(folder: Path, part: str) -> Path:
    path = _found(folder, part)
    if path is not None:
        return path
    raise ColearnError(
        f"run config 'data-dir': expected a folder that holds {part}.h5 or {part}.npz with x "
        f"[N, 240, 64] and y [N, classes], found neither in {str(folder)!r}"
    )


def _read(path: Path) -> Examples:
    """Return a file's clips without those whose features are not finite."""
    try:
        with _opened(path) as arrays:
            missing = [name for name in ("x", "y") if name not in arrays]
            if missing:
                raise ColearnError(
                    f"{path}: expected arrays x and y, found no {' and '.join(missing)} among "
                    f"{', '.join(arrays) or 'none'}"
                )
            return _checked(path, arrays["x"], arrays["y"][:])
    except (OSError, EOFError, ValueError, BadZipFile) as error:
        raise ColearnError(f"{path}: expected a readable file, found {error}") from error


def _opened(path: Path) -> AbstractContextManager[Mapping[str, Any]]:
    if path.suffix == ".npz":
        return np.load(path, allow_pickle=False)  # type: ignore[no-any-return]
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ColearnError(
            f"{path}: expected h5py to be installed to read it, found no module 'h5py'; "
            "pip install 'flwr-colearn[study]', or use npz files"
        ) from error
    return h5py.File(path, "r")  # type: ignore[no-any-return]


def _checked(path: Path, x: Any, y: NDArray) -> Examples:
    """Return examples of features `x`, an array or an HDF5 data set, and tags `y`."""
    if x.dtype not in (np.float16, np.float32) or tuple(x.shape[1:]) != SHAPE or not len(x):
        raise ColearnError(
            f"{path}: expected x [N, 240, 64] of float16 or float32, found "
            f"{list(x.shape)} of {x.dtype}"
        )
    if y.ndim != 2 or len(y) != len(x) or not (y.size and np.isin(y, (0, 1)).all()):
        raise ColearnError(
            f"{path}: expected y [{len(x)}, classes] of 0 and 1, found {list(y.shape)} of "
            f"{y.dtype}, values {np.unique(y)[:5].tolist()}"
        )
    # By parts: reading an HDF5 data set whole would hold its float16 copy beside the float32 one.
    inputs = np.empty(x.shape, np.float32)
    # disable=None: tqdm shows no bar unless stderr is a terminal.
    for start in tqdm(range(0, len(x), ROWS), desc=path.name, disable=None, leave=False):
        inputs[start : start + ROWS] = x[start : start + ROWS]
    finite = np.array([np.isfinite(row).all() for row in inputs])
    examples = Examples(inputs, y.astype(np.float32))
    if finite.all():
        return examples
    bad = np.flatnonzero(~finite).tolist()
    message = "%s: %d of %d rows are left out, their x is not finite: %s"
    log(WARNING, message, path, len(bad), len(x), ", ".join(map(str, bad)))
    if not finite.any():
        raise ColearnError(f"{path}: expected rows of finite x, found none")
    return examples.take(np.flatnonzero(finite))
