"""The task of images in ImageNet's folder layout, DATA_DIR/{train,val}/CLASS/*.JPEG."""

from functools import cache
from logging import WARNING
from pathlib import Path

import numpy as np
from flwr.common import log

from clients.data import Examples, Task
from clients.objective import Objective
from clients.settings import ParticipantSettings
from clients.tasks.image_scan import unreadable_images
from clients.tasks.own_data import agreed_classes, numbered_classes
from clients.trainer import NDArray, accuracy
from flwr_colearn import ColearnError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
IMAGE_SIZE = 224
"""The default height and width in pixels."""

PARTS = ("train", "val")
_NAMED = 5  # the most files to list in the log


def top_metrics(outputs: NDArray, targets: NDArray) -> dict[str, float]:
    """Return ``accuracy`` and ``top-5``, the share whose class is among the five largest outputs.

    With up to five classes ``top-5`` is 1.
    """
    # A stable sort, so that ties rank the same on every platform.
    largest = np.argsort(-outputs, axis=1, kind="stable")[:, :5]
    top5 = float((largest == targets[:, None]).any(axis=1).mean())
    return {"accuracy": accuracy(outputs, targets), "top-5": top5}


@cache
def load(data_dir: str, classes: tuple[str, ...] = ()) -> Task:
    """Return the task: paths of images as inputs, numbers of their class folders as labels.

    Images are read while training. Here every file is read once, to leave out those that are not
    images; ``DATA_DIR/colearn-scan.json`` caches the result (see `clients.tasks.image_scan`).

    Parameters
    ----------
    data_dir : str
        The folder that holds ``train`` and ``val``, each with one folder a class. Files in folders
        within these count too.
    classes : tuple of str
        The classes in the order of their numbers; by default the folders' names, sorted.

    Raises
    ------
    ColearnError
        If a part is missing, has no image, or its classes are not those of the other part.
    """
    root = Path(data_dir)
    classes = classes or tuple(_common_classes(root))
    samples = {part: _samples(root / part, classes) for part in PARTS}
    paths = [path for part in PARTS for path, _ in samples[part]]
    bad = unreadable_images(root, paths)
    if bad:
        _report(root, bad, len(paths))
    train, val = (_examples(root / part, samples[part], bad) for part in PARTS)
    # A fixed random order: as listed, the files are sorted by class.
    order = np.random.default_rng(0).permutation(len(train))
    return Task(
        train.take(order), val, Objective(top_metrics), model_options={"num_classes": len(classes)}
    )


def definition(settings: ParticipantSettings) -> Task:
    """Return the task without data, with the classes that the run config names.

    Raises
    ------
    ColearnError
        If it names none.
    """
    none = Examples(np.empty(0, str), np.empty(0, np.int64))
    number = len(agreed_classes(settings))
    return Task(none, objective=Objective(top_metrics), model_options={"num_classes": number})


def read(settings: ParticipantSettings, folder: Path, part: str) -> Examples | None:
    """Return a site's own images; None if the folder has no such part.

    Training images are ``train/CLASS/*``, or ``CLASS/*`` if there is no folder ``train``; test
    images are ``test/CLASS/*`` or ``val/CLASS/*``.

    Raises
    ------
    ColearnError
        If a class is not one of the run config's, or no image is readable.
    """
    names = ("train", ".") if part == "train" else ("test", "val")
    place = next((folder / name for name in names if (folder / name).is_dir()), None)
    if place is None:
        return None
    samples = _samples(place, agreed_classes(settings))
    bad = unreadable_images(folder, [path for path, _ in samples])
    if bad:
        _report(folder, bad, len(samples))
    return _examples(place, samples, bad)


def _common_classes(root: Path) -> list[str]:
    """Return the names of the class folders, which both parts must have."""
    # A label is a folder's number, so differing folders would give the parts different classes.
    train, val = (_classes(root / part) for part in PARTS)
    if train != val:
        only = [sorted(set(train) - set(val)), sorted(set(val) - set(train))]
        raise ColearnError(
            f"{root}: expected the same class folders in train and val, found only in train: "
            f"{_named(only[0])}; only in val: {_named(only[1])}"
        )
    return train


def _classes(folder: Path) -> list[str]:
    from torchvision.datasets.folder import find_classes

    try:
        names: list[str] = find_classes(str(folder))[0]
    except FileNotFoundError as error:
        raise ColearnError(
            f"run config 'data-dir': expected a folder that holds train and val, each with a "
            f"folder for every class, found in {folder.parent}: {error}"
        ) from error
    return names


def _samples(folder: Path, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """Return (path, class) of every file; the scan, not the file name, decides which are images."""
    from torchvision.datasets.folder import make_dataset

    numbers = numbered_classes(_folders_with_files(folder), classes, folder)
    # A class without a folder is a class that this site lacks.
    return list(make_dataset(folder, numbers, is_valid_file=lambda path: True, allow_empty=True))


def _folders_with_files(folder: Path) -> set[str]:
    """Return the names of the folders with files in them, without hidden ones and the test sets."""
    return {
        place.name
        for place in folder.iterdir()
        if place.is_dir()
        and not place.name.startswith((".", "_"))
        and place.name not in ("test", "val")
        and any(path.is_file() for path in place.rglob("*"))
    }


def _report(root: Path, bad: dict[str, str], total: int) -> None:
    found = [f"{Path(path).relative_to(root)} ({reason})" for path, reason in bad.items()]
    log(
        WARNING,
        "%s: %d of %d files are not readable images and are left out: %s",
        root,
        len(bad),
        total,
        _named(found),
    )


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more if names else "none"


def _examples(folder: Path, samples: list[tuple[str, int]], bad: dict[str, str]) -> Examples:
    good = [(path, label) for path, label in samples if path not in bad]
    if not good:
        raise ColearnError(f"{folder}: expected images in its class folders, found none readable")
    paths, labels = zip(*good, strict=True)
    return Examples(np.array(paths), np.array(labels, dtype=np.int64))
