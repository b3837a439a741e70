"""The participants' metrics: which replies count, and their aggregation."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import WARNING
from typing import Any, TypeGuard

from flwr.app import Message, MetricRecord, RecordDict
from flwr.common import log

from ..errors import ColearnError
from .replies import examples_of

Aggregate = Callable[[list[RecordDict], str], MetricRecord]

Named = tuple[str, RecordDict]
"""A participant, and the content of its reply with exactly one MetricRecord."""

TRAIN_LOSS = ("train-loss", "train_loss")
"""The names of the metric of the training loss: this package's, and that of Flower's examples."""

_MOST_NAMED = 20  # a participant may send any number of metrics, and each is a line of the log


def evaluations_of(
    replies: Iterable[Message], weighted_by_key: str, name_of: Callable[[int], str]
) -> list[Named]:
    """Return the participants and contents of the well-formed evaluate replies.

    The log has a warning for each of the others.
    """
    contents = []
    for reply in replies:
        name = name_of(reply.metadata.src_node_id)
        try:
            examples_of(reply, weighted_by_key)
        except ColearnError as error:
            log(WARNING, "CoLearn: evaluation of participant %s left out: %s", name, error)
        else:
            contents.append((name, reply.content))
    return contents


def aggregated(
    aggregate: Aggregate, named: Sequence[Named], weighted_by_key: str
) -> MetricRecord | None:
    """Return the aggregated metrics; None if there are none, or if they do not fit together.

    An error in this does not end the round, since the model is valid. The log has a warning for a
    metric that some participants lack.
    """
    if not named:
        return None
    try:
        _warn_of_gaps({name: _metrics_of(content) for name, content in named})
        return aggregate([content for _, content in named], weighted_by_key)
    except Exception:  # a user's function, and metrics that participants chose
        log(WARNING, "CoLearn: the metrics could not be aggregated", exc_info=True)
        return None


def average_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Return the means of the participants' metrics, each over the participants that have it.

    In contrast to ``aggregate_metricrecords``, the default of Flower's strategies, a participant
    that lacks a metric does not count as one whose metric is 0, and NaN or infinity of one
    participant does not become the mean of all. Where all participants have a metric as a finite
    number, both functions return the same bits.

    Parameters
    ----------
    contents : list of RecordDict
        The participants' replies, each with one MetricRecord.
    weighted_by_key : str
        The metric that is the weight of a participant. It is not averaged.

    Returns
    -------
    MetricRecord
        The means. A metric whose values do not fit together (a number and a list, or lists of
        different lengths) is left out. A metric that no participant has as a finite number is NaN.

    Examples
    --------
    >>> replies = [{"num-examples": 1, "auc": 0.5}, {"num-examples": 3}]
    >>> contents = [RecordDict({"metrics": MetricRecord(reply)}) for reply in replies]
    >>> average_metrics(contents, "num-examples")["auc"]
    0.5
    """
    means = MetricRecord()
    records = [_metrics_of(content) for content in contents]
    for key in _names(records):
        if key == weighted_by_key:
            continue
        having = [record for record in records if key in record]
        values, weights = [r[key] for r in having], [r[weighted_by_key] for r in having]
        if all(isinstance(value, int | float) for value in values):
            means[key] = _mean(values, weights)
        elif len({len(v) if isinstance(v, list) else -1 for v in values}) == 1:
            means[key] = [_mean(each, weights) for each in zip(*values, strict=True)]
        else:
            log(WARNING, "CoLearn: metric %.80r has no mean: its values have several forms", key)
    return means


def mean_train_loss(named: Iterable[Named]) -> float | None:
    """Return the plain mean of the training losses that participants report; None without any."""
    return mean_loss(_metrics_of(content) for _, content in named)


def mean_loss(sites: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the mean over participants of their finite training losses; None without any.

    Every participant counts the same, as in eq. 2 of Mi et al. (2020), and has its loss under one
    of the names in `TRAIN_LOSS`.

    Examples
    --------
    >>> mean_loss([{"train-loss": 1.0}, {"train_loss": 3.0}, {"train-loss": math.nan}, {}])
    2.0
    """
    losses = [next((site[key] for key in TRAIN_LOSS if key in site), None) for site in sites]
    finite = [float(each) for each in losses if _is_number(each) and math.isfinite(each)]
    mean = sum(finite) / len(finite) if finite else math.nan
    return mean if math.isfinite(mean) else None  # a sum of large losses may overflow


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite_only(values: Iterable[Any], *others: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return the tuples of several sequences in which the first value is a finite number."""
    return [each for each in zip(values, *others, strict=True) if math.isfinite(each[0])]


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the weighted mean of the finite values, in the order of FedAvg's operations."""
    finite = finite_only(values, weights)
    if not finite:
        return math.nan
    total = sum(weight for _, weight in finite)
    mean = 0.0
    for value, weight in finite:
        mean += value * (weight / total)
    return mean


def _warn_of_gaps(sites: Mapping[str, Mapping[str, Any]]) -> None:
    """Log which participants lack a metric that another has, or have it as NaN or infinity."""
    for key in _names(sites.values())[:_MOST_NAMED]:
        lacking = [name for name, metrics in sites.items() if not _has_finite(metrics.get(key))]
        if lacking:
            log(
                WARNING,
                "CoLearn: metric %.80r: expected a finite number from each of %s participants, "
                "found none from %s; the default mean is that of the others",
                key,
                len(sites),
                ", ".join(lacking),
            )


def _has_finite(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(each, int | float) and math.isfinite(each) for each in values)


def _names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of all metrics, in the order of their first occurrence."""
    return list(dict.fromkeys(key for record in records for key in record))


def _metrics_of(content: RecordDict) -> Mapping[str, Any]:
    return next(iter(content.metric_records.values()))
