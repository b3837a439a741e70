"""StockMetrics: the participants' metrics on their way through a strategy of Flower."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from ._flwr import aggregate_metricrecords
from .aggregation import Named, aggregated, average_metrics, evaluations_of, metrics_of
from .records import records_of

Kind = Literal["train", "evaluate"]


class StockMetrics:
    """One aggregation of metrics by a strategy outside this package.

    Flower's strategies raise an error, which ends the run, if one participant has a metric that
    another lacks, calls a record by another name, or sends an evaluation without a number of
    examples. So the strategy gets the metrics that all participants have, under the same names of
    records, and no evaluation that is not well-formed. Where it aggregates
    metrics by Flower's default function, which makes one NaN the federation's, the result is that
    of `average_metrics` over all metrics. A strategy with an aggregation of its own class, outside
    Flower, gets all replies as they are.

    Parameters
    ----------
    strategy : Strategy
        The strategy, without the wrappers around it.
    kind : {"train", "evaluate"}
        The aggregation.
    weighted_by_key : str
        The metric that is the weight of a participant.
    name_of : callable
        ``(node_id) -> str``: the name of a participant.
    """

    def __init__(
        self, strategy: Strategy, kind: Kind, weighted_by_key: str, name_of: Callable[[int], str]
    ) -> None:
        self._key, self._name_of, self._kind = weighted_by_key, name_of, kind
        # The class that defines the method, which may be a base class.
        method = getattr(type(strategy), f"aggregate_{kind}")
        self._is_flowers = method.__module__.startswith("flwr.")
        function = getattr(strategy, f"{kind}_metrics_aggr_fn", None)
        self._is_default = self._is_flowers and function is aggregate_metricrecords
        self._named: list[Named] = []

    def given(self, replies: Iterable[Message]) -> list[Message]:
        """Return the replies for the strategy; their metrics are changed in place."""
        arrived = list(replies)
        if not self._is_flowers:
            return arrived
        if self._kind == "evaluate":
            named = evaluations_of(arrived, self._key, self._name_of)
            whole = {id(content) for _, content in named}
            arrived = [r for r in arrived if r.has_error() or id(r.content) in whole]
        good = [reply for reply in arrived if reply.has_content()]
        # Copies, since the records in the replies are replaced below.
        self._named = [(self._name_of(r.metadata.src_node_id), metrics_of(r)) for r in good]
        common = self._common()
        for reply in good:
            self._fit(reply.content, good[0].content, common)
        return arrived

    def _fit(self, content: RecordDict, first: RecordDict, common: set[str]) -> None:
        """Give a reply the same names of records as the first reply, and only common metrics."""
        for name, metrics in list(records_of(content, MetricRecord).items()):
            if len(common) < len(metrics):
                kept = {key: value for key, value in metrics.items() if key in common}
                content[name] = MetricRecord(kept)
        kinds: tuple[Any, ...] = (ArrayRecord, MetricRecord)
        for kind in kinds:
            mine, theirs = records_of(content, kind), records_of(first, kind)
            if len(mine) == len(theirs) == 1 and mine.keys() != theirs.keys():
                content[next(iter(theirs))] = content.pop(next(iter(mine)))

    def result(self, own: MetricRecord | None) -> MetricRecord | None:
        """Return the aggregated metrics in place of the strategy's own."""
        if not self._is_default or own is None:
            return own
        means = aggregated(average_metrics, self._named, self._key)
        return MetricRecord({**own, **(means or {})})

    def _common(self) -> set[str]:
        """Return the names of the metrics that all participants have, and that fit together."""
        sites: list[dict[str, Any]] = [
            {
                key: value
                for record in content.metric_records.values()
                for key, value in record.items()
            }
            for _, content in self._named
        ]
        if not sites:
            return set()
        shared = set.intersection(*map(set, sites))
        # A function of the user's own may well aggregate lists of different lengths.
        if not self._is_default:
            return shared
        return {key for key in shared if len({_form(site[key]) for site in sites}) == 1}


def _form(value: object) -> int:
    """Return a list's length, and -1 for a number."""
    return len(value) if isinstance(value, list) else -1
