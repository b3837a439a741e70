"""Aggregation: the check of replies, the mean of models, pooled statistics, distances, SGD."""

from .distance import relative_change, squared_distance, squared_norm, trainable
from .examples import ToldExamples
from .kept import check_kept, without_mean
from .mean import Empty, RunningMean, empty_array
from .metrics import (
    Named,
    aggregated,
    average_metrics,
    evaluations_of,
    mean_loss,
    mean_train_loss,
)
from .replies import (
    ADD_THE_MOD,
    ASK,
    ECHO,
    arrays_of,
    cannot_evaluate,
    check_echo,
    check_train_reply,
    echo_of,
    examples_of,
    failure_of,
    metrics_of,
    read_reply,
)
from .round import RoundMean, Weighting, as_weighting, check_private_weighting
from .sgd import SGD
from .shares import bounded_weights, lowered_weights
from .spectral import spectral_vectors
from .updates import Update, Updates, contributions
from .validation import (
    check_initial,
    check_model,
    check_structure,
    check_variances,
    check_weights,
    is_negative,
)

__all__ = [
    "ADD_THE_MOD",
    "ASK",
    "ECHO",
    "SGD",
    "Empty",
    "Named",
    "RoundMean",
    "RunningMean",
    "ToldExamples",
    "Update",
    "Updates",
    "Weighting",
    "aggregated",
    "arrays_of",
    "as_weighting",
    "average_metrics",
    "bounded_weights",
    "cannot_evaluate",
    "check_echo",
    "check_initial",
    "check_kept",
    "check_model",
    "check_private_weighting",
    "check_structure",
    "check_train_reply",
    "check_variances",
    "check_weights",
    "contributions",
    "echo_of",
    "empty_array",
    "evaluations_of",
    "examples_of",
    "failure_of",
    "is_negative",
    "lowered_weights",
    "mean_loss",
    "mean_train_loss",
    "metrics_of",
    "read_reply",
    "relative_change",
    "spectral_vectors",
    "squared_distance",
    "squared_norm",
    "trainable",
    "without_mean",
]
