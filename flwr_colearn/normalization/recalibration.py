"""The exchange of `Recalibrated`: participants compute statistics under the averaged weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from ..aggregation import RunningMean, Weighting, read_reply
from ..errors import ColearnError
from ..records import to_record, view
from ..roles import Role
from ..traffic import Event
from .messages import RECALIBRATE


@dataclass(frozen=True)
class Keys:
    """A strategy's names for the records of its messages and the number of examples."""

    arrays: str = "arrays"
    config: str = "config"
    examples: str = "num-examples"


@dataclass(frozen=True)
class Recalibration:
    """One exchange of statistics after a round.

    Attributes
    ----------
    arrays : ArrayRecord
        The average.
    roles : mapping
        The role of every array.
    weighting : {"uniform", "weighted"}
        The weights n_k of the participants.
    keys : Keys
        The names of records in the strategy's messages.
    """

    arrays: ArrayRecord
    roles: Mapping[str, Role]
    weighting: Weighting = "uniform"
    keys: Keys = field(default_factory=Keys)

    def messages(
        self, nodes: Iterable[int], config: Mapping[str, int | float | str]
    ) -> list[Message]:
        """Return the messages that request the statistics.

        Parameters
        ----------
        nodes : iterable of int
            The nodes of the participants.
        config : mapping
            ``server-round``, and ``time-limit`` if there is one.
        """
        content = RecordDict(
            {self.keys.arrays: self.arrays, self.keys.config: ConfigRecord({**config})}
        )
        return [Message(content, node_id, RECALIBRATE) for node_id in nodes]

    def pooled(
        self, replies: Iterable[Message], names: Mapping[int, str]
    ) -> tuple[ArrayRecord, list[Event]]:
        """Return the average with the statistics in the replies, pooled.

        Parameters
        ----------
        replies : iterable of Message
            The replies; the last bits of pooled statistics depend on their order.
        names : mapping
            The names of participants by node id.

        Returns
        -------
        arrays : ArrayRecord
            The new average; the old one if no reply was valid.
        events : list of Event
            The refusals.
        """
        model, events = dict(view(self.arrays)), []
        kinds = (Role.MEAN, Role.VARIANCE)
        mine = {name: array for name, array in model.items() if self.roles[name] in kinds}
        mean = RunningMean(mine, {name: self.roles[name] for name in mine})
        for reply in replies:
            node_id = reply.metadata.src_node_id
            try:
                arrays, examples = read_reply(reply, self.keys.examples)
                # Only means and variances; all other arrays stay as averaged.
                theirs = {name: arrays[name] for name in mine if name in arrays}
                mean.add(theirs, 1 if self.weighting == "uniform" else examples)
            except ColearnError as error:
                name = names.get(node_id, str(node_id))
                events.append(Event("refusal", name, str(error)))
        if not mean.count:
            return self.arrays, events
        return to_record({**model, **mean.mean()}), events
