"""What a site trains on and what it holds out of its own data, and the line about it in its log."""

from dataclasses import replace
from logging import INFO
from pathlib import Path
from typing import Any

import numpy as np
from flwr.common import log

from clients.data import Task, take
from clients.settings import ParticipantSettings
from clients.trainer import NDArray
from flwr_colearn import ColearnError


def with_held_out(task: Task, settings: ParticipantSettings, folder: Path) -> Task:
    """Return a task whose test set is part of its training set if it has no test set.

    The held-out examples are drawn by the settings' seed, so they are the same in every round and
    after a restart. With `held_out` 0 the site evaluates on its training examples. The site's log
    has the numbers of examples.

    Parameters
    ----------
    task : Task
        The site's examples.
    settings : ParticipantSettings
        `held_out`, `examples` and `seed`.
    folder : Path
        The site's folder, for the log.

    Raises
    ------
    ColearnError
        If the share is not in [0, 1), or nothing is left to train on.
    """
    share, found = settings.held_out, len(task.train_set)
    if not 0 <= share < 1:
        raise ColearnError(f"run config 'held-out': expected at least 0 and below 1, found {share}")
    order = np.random.default_rng(settings.seed).permutation(found)
    has_test = len(task.test_set) > 0
    number = 0 if has_test or share == 0 else max(1, round(share * found))
    chosen = order[number:][: settings.examples or None]
    if not len(chosen):
        raise ColearnError(
            f"{folder}: expected at least two training examples, of which one is held out, found "
            f"{found}; give the site a test set, or set run config 'held-out' to 0"
        )
    train = take(task.train_set, np.sort(chosen))
    test = take(task.train_set, np.sort(order[:number])) if number else train
    task = replace(task, train_set=train, test_set=task.test_set if has_test else test)
    tested = "to test on" if has_test else "held out"
    log(
        INFO,
        "%s training examples%s in %s, %s %s",
        len(train),
        _classes(train),
        folder,
        len(task.test_set) if has_test or number else "none",
        tested,
    )
    return task


def _classes(examples: Any) -> str:
    labels = getattr(examples, "labels", None)
    if labels is None or labels.ndim > 1:
        return ""
    return f" in {len(np.unique(labels))} classes"


def class_counts(task: Task, settings: ParticipantSettings) -> dict[str, int]:
    """Return the number of a site's training examples of each class, for the metrics of a reply.

    The keys are ``examples:CLASS``, with the class's name of the run config's `classes`, else its
    number. A class without examples at the site has no key.

    Raises
    ------
    ColearnError
        If the examples have no class each.
    """
    labels = getattr(task.train_set, "labels", None)
    if labels is None or labels.ndim > 1:
        raise ColearnError(
            f"node config 'class-counts': expected a task with one class for each example, found "
            f"{settings.task!r}; leave the key out"
        )
    numbers, counts = np.unique(labels, return_counts=True)
    names = settings.class_names or range(int(numbers.max()) + 1)
    return {f"examples:{names[n]}": int(c) for n, c in zip(numbers, counts, strict=True)}


def numbered_classes(found: set[str], classes: tuple[str, ...], folder: Path) -> dict[str, int]:
    """Return the number of each agreed class; a site may lack some, but have no other.

    Parameters
    ----------
    found : set of str
        The classes of a site's examples.
    classes : tuple of str
        The classes that the sites agreed on, in the order of their numbers.
    folder : Path
        The folder of the examples, for the error message.

    Raises
    ------
    ColearnError
        If a class is not one of those agreed.
    """
    # Numbers by a site's own classes would differ between sites: the same outputs of the shared
    # model would stand for different classes, and no shape would show it.
    if unknown := sorted(found - set(classes)):
        raise ColearnError(
            f"{folder}: expected the classes {', '.join(classes)} of the run config's 'classes', "
            f"found others: {', '.join(unknown)}"
        )
    return {name: number for number, name in enumerate(classes)}


def agreed_classes(settings: ParticipantSettings) -> tuple[str, ...]:
    """Return the classes of the run config.

    Raises
    ------
    ColearnError
        If the run config has none.
    """
    if not settings.class_names:
        raise ColearnError(
            f"run config 'classes': expected the names of all classes for task {settings.task!r}, "
            "the same for every site, since the names of a site's folders do not say which numbers "
            "the other sites give them; found none. For example --run-config "
            "'classes=\"benign,malignant\"'"
        )
    return settings.class_names


def check_labels(labels: NDArray, number: int, path: Path) -> None:
    """Raise a ColearnError unless class labels [N] are whole numbers from 0 to below `number`."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ColearnError(
            f"{path}: expected y [N] of whole numbers, found {list(labels.shape)} of {labels.dtype}"
        )
    if len(labels) and not (labels.min() >= 0 and labels.max() < number):
        raise ColearnError(
            f"{path}: expected classes from 0 to {number - 1}, found {labels.min()} to "
            f"{labels.max()}"
        )
