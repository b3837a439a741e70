"""Which strategies work with K copies of the average in place of K models."""

from collections.abc import Iterable
from logging import WARNING

from flwr.common import log
from flwr.serverapp.strategy import Strategy

from .._flwr import is_private
from ..errors import expected

NOT_MEANS = {
    "Bulyan": "compares the models of single participants",
    "Krum": "compares the models of single participants",
    "MultiKrum": "compares the models of single participants",
    "FedMedian": "needs the models of single participants for a median",
    "FedTrimmedAvg": "needs the models of single participants for a trimmed mean",
    "QFedAvg": "needs the loss and the update of each participant",
    "FedXgbBagging": "appends trees, which have no sum",
    "FedXgbCyclic": "passes on trees, which have no sum",
    "SynchronousSGD": "exchanges gradients",
    "DynamicAveraging": "asks single learners for their models",
    "ModelAveraging": "asks single learners for their models",
}
"""Strategies that need more than the average, and the reasons, by the names of their classes."""


def check_strategies(strategies: Iterable[Strategy]) -> None:
    """Raise a ColearnError for a strategy whose aggregate is no mean of models.

    Parameters
    ----------
    strategies : iterable of Strategy
        The strategy and those that it wraps.
    """
    for strategy in strategies:
        if is_private(strategy):
            raise expected(
                "strategy under secure aggregation",
                "none of Flower's differential privacy wrappers, which clip and measure the noise "
                "for the updates of single participants",
                type(strategy).__name__,
            )
        for kind in type(strategy).__mro__:
            if kind.__name__ in NOT_MEANS and _is_known(kind):
                raise expected(
                    "strategy under secure aggregation",
                    "one whose aggregate is a mean, such as CoLearn or FedAvg",
                    f"{type(strategy).__name__}, which {NOT_MEANS[kind.__name__]}",
                )
        _warn_of_own(strategy)


def _warn_of_own(strategy: Strategy) -> None:
    """Log a warning if the strategy aggregates by a function that is not known."""
    defining = next(k for k in type(strategy).__mro__ if "aggregate_train" in vars(k))
    if not _is_known(defining):
        log(
            WARNING,
            "Secure aggregation: %s.aggregate_train receives the average from every participant, "
            "with %s 1, and not their models; this is right where it computes a mean",
            defining.__name__,
            getattr(strategy, "weighted_by_key", "num-examples"),
        )


def _is_known(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("flwr", "flwr_colearn")
