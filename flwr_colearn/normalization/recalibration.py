"""The exchange of `Recalibrated`: statistics that participants computed under the average."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from ..aggregation.mean import RunningMean
from ..aggregation.replies import arrays_of, examples_of
from ..errors import ColearnError
from ..records import data_bytes, to_record, view
from ..recovery.grid import RecoveringGrid
from ..roles import Role
from .grid import RECALIBRATE


@dataclass
class Recalibration:
    """What an exchange brought.

    Attributes
    ----------
    arrays : ArrayRecord
        The average with the new statistics; as it was, if nobody's were usable.
    bytes_down, bytes_up : int
        Of whole models; what `NormalizationGrid` left out is in its traffic.
    refusals : list of (int, str)
        Nodes whose statistics were left out, and why.
    """

    arrays: ArrayRecord
    bytes_down: int = 0
    bytes_up: int = 0
    refusals: list[tuple[int, str]] = field(default_factory=list)


def recalibrate(
    grid: Grid,
    nodes: Iterable[int],
    server_round: int,
    arrays: ArrayRecord,
    roles: Mapping[str, Role],
    weight: Callable[[float], float],
    timeout: float,
    keys: tuple[str, str, str] = ("arrays", "config", "num-examples"),
) -> Recalibration:
    """Ask participants for the statistics of their data under the average, and pool them.

    Parameters
    ----------
    grid : Grid
        One with a `NormalizationGrid`.
    nodes : iterable of int
        Whom to ask; those who are not connected are left out.
    server_round : int
        For the participants' log.
    arrays : ArrayRecord
        The average.
    roles : mapping
        Of its arrays.
    weight : callable
        n_k from a participant's number of examples.
    timeout : float
        Seconds for one attempt of one participant.
    keys : tuple of str
        Of the arrays, the config and the number of examples, as the strategy names them.
    """
    arrays_key, config_key, examples_key = keys
    config = ConfigRecord({"server-round": server_round})
    content = RecordDict({arrays_key: arrays, config_key: config})
    connected = set(grid.get_node_ids())
    messages = [
        Message(content=content, message_type=RECALIBRATE, dst_node_id=node_id)
        for node_id in nodes
        if node_id in connected
    ]
    replies = grid.send_and_receive(messages, timeout=timeout)
    sent = len(messages)
    if isinstance(grid, RecoveringGrid):
        replies, sent = grid.in_order(replies), grid.sent
    model = dict(view(arrays))
    names = [name for name in model if roles[name] in (Role.MEAN, Role.VARIANCE)]
    mean = RunningMean({n: model[n] for n in names}, {n: roles[n] for n in names})
    result = Recalibration(arrays, bytes_down=data_bytes(arrays) * sent)
    for reply in replies:
        try:
            examples = examples_of(reply, examples_key)
            record = arrays_of(reply)
            result.bytes_up += data_bytes(record)
            theirs = view(record)
            mean.add({n: theirs[n] for n in names if n in theirs}, weight(examples))
        except ColearnError as error:
            result.refusals.append((reply.metadata.src_node_id, str(error)))
    if mean.count:
        result.arrays = to_record({**model, **mean.mean()})
    return result
