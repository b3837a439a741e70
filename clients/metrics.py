"""Metrics of tasks for which accuracy over the whole evaluation set is not enough."""

from collections.abc import Callable

import numpy as np
from scipy.special import ndtri  # scipy.stats takes a second to import

from clients.trainer import NDArray, accuracy
from flwr_colearn import ColearnError


def audio_tagging(outputs: NDArray, targets: NDArray) -> dict[str, float]:
    """Return AudioSet's three metrics, from logits [N, C] and targets [N, C] of 0 or 1.

    Returns
    -------
    dict
        ``map``: mean over the classes with positives of the average precision. ``auc``: mean over
        the classes with positives and negatives of the area under the ROC curve. ``d-prime``:
        ``sqrt(2)`` times the inverse normal distribution function at ``auc``. A metric is NaN if
        it is undefined for every class.

    Raises
    ------
    ColearnError
        If an output is not finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    _check_finite(outputs)
    # Small evaluation sets lack some of the 527 classes. Average precision is undefined without
    # positives, the ROC curve without positives or without negatives.
    positives = targets.sum(axis=0)
    some = positives > 0
    both = some & (positives < len(targets))
    mean_precision = _mean_over(some, average_precision_score, outputs, targets)
    area = _mean_over(both, roc_auc_score, outputs, targets)
    return {"map": mean_precision, "auc": area, "d-prime": float(np.sqrt(2) * ndtri(area))}


def _check_finite(outputs: NDArray) -> None:
    if not np.isfinite(outputs).all():
        raise ColearnError(
            "outputs: expected finite numbers, found others; if the model has diverged, lower "
            "'learning-rate' or set 'clip-norm' in the run config"
        )


def _mean_over(
    classes: NDArray, score: Callable[..., float], outputs: NDArray, targets: NDArray
) -> float:
    if not classes.any():
        return float("nan")
    pairs = zip(targets.T[classes], outputs.T[classes], strict=True)
    return float(np.mean([score(target, output) for target, output in pairs]))


def mean_roc_auc(outputs: NDArray, targets: NDArray) -> dict[str, float]:
    """Return the mean over labels of the area under the ROC curve, ``roc-auc``, in [0, 1].

    Parameters
    ----------
    outputs : array, [N, labels]
        Scores in any units that rise with the probability of a label.
    targets : array, [N, labels]
        The labels, 0 or 1.

    Returns
    -------
    dict
        ``roc-auc``, and ``labels-evaluated``: the number of labels in the mean. Labels that all or
        none of the examples have are left out; with none left, ``roc-auc`` is NaN.

    Raises
    ------
    ColearnError
        If an output is not finite.
    """
    from sklearn.metrics import roc_auc_score

    _check_finite(outputs)
    evaluated = np.flatnonzero(targets.min(axis=0) != targets.max(axis=0))
    areas = [roc_auc_score(targets[:, label], outputs[:, label]) for label in evaluated]
    mean = float(np.mean(areas)) if areas else float("nan")
    return {"roc-auc": mean, "labels-evaluated": float(len(areas))}


def validation_and_test(
    outputs: NDArray, targets: NDArray, *, validation: int, test: int
) -> dict[str, float]:
    """Return the accuracies on an evaluation set that is a validation set followed by a test set.

    Parameters
    ----------
    outputs, targets : array, [validation + test, classes] and [validation + test]
        The logits and the classes.
    validation, test : int
        The number of examples in each part.

    Returns
    -------
    dict
        ``accuracy`` on the test set, and ``validation-accuracy``.

    Raises
    ------
    ColearnError
        If the number of examples is not the sum of the two parts.
    """
    if len(targets) != validation + test:
        raise ColearnError(
            f"metrics: expected {validation} validation and {test} test examples, found "
            f"{len(targets)}; other data is evaluated by Task.own_objective"
        )
    return {
        "accuracy": accuracy(outputs[validation:], targets[validation:]),
        "validation-accuracy": accuracy(outputs[:validation], targets[:validation]),
    }
