"""How models of several labels an example are judged."""

import numpy as np

from clients.data import NDArray
from flwr_colearn import ColearnError


def mean_roc_auc(outputs: NDArray, targets: NDArray) -> dict[str, float]:
    """Return the mean over labels of the area under the ROC curve, ``roc-auc``, in [0, 1].

    Parameters
    ----------
    outputs : array, [N, labels]
        Scores in any units that rise with the probability of a label.
    targets : array, [N, labels]
        0 or 1.

    Returns
    -------
    dict
        ``roc-auc``, and ``labels-judged``: of how many labels it is the mean. Those that all or
        none of the examples have are left out; with none left, ``roc-auc`` is not a number.

    Raises
    ------
    ColearnError
        If an output is not finite.
    """
    from sklearn.metrics import roc_auc_score

    if not np.isfinite(outputs).all():
        raise ColearnError(
            "outputs: expected finite numbers, found others; if the model has diverged, lower "
            "'learning-rate' or set 'clip-norm' in the run config"
        )
    judged = np.flatnonzero(targets.min(axis=0) != targets.max(axis=0))
    areas = [roc_auc_score(targets[:, label], outputs[:, label]) for label in judged]
    mean = float(np.mean(areas)) if areas else float("nan")
    return {"roc-auc": mean, "labels-judged": float(len(areas))}
