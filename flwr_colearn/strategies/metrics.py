"""The participants' metrics: which replies count, and their aggregation."""

from collections.abc import Callable, Iterable
from logging import WARNING

from flwr.app import Message, MetricRecord, RecordDict
from flwr.common import log

from ..aggregation import examples_of
from ..errors import ColearnError

Aggregate = Callable[[list[RecordDict], str], MetricRecord]


def evaluations_of(replies: Iterable[Message], weighted_by_key: str) -> list[RecordDict]:
    """Return the contents of the well-formed evaluate replies; the log names the others."""
    contents = []
    for reply in replies:
        try:
            examples_of(reply, weighted_by_key)
        except ColearnError as error:
            node = reply.metadata.src_node_id
            log(WARNING, "CoLearn: evaluation of node %s left out: %s", node, error)
        else:
            contents.append(reply.content)
    return contents


def aggregated(
    aggregate: Aggregate, contents: list[RecordDict], weighted_by_key: str
) -> MetricRecord | None:
    """Return the aggregated metrics; None if there are none, or if they do not fit together.

    An error in this does not end the round, since the model is valid.
    """
    if not contents:
        return None
    try:
        return aggregate(contents, weighted_by_key)
    except Exception:  # a user's function, and metrics that participants chose
        log(WARNING, "CoLearn: the metrics could not be aggregated", exc_info=True)
        return None
