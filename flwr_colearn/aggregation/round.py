"""Folding: the replies of one round on their way into the mean."""

from collections.abc import Callable, Iterable

from flwr.app import Message, MessageType, RecordDict

from ..compression.codecs import Broadcast, Float32
from ..errors import ColearnError
from ..records import data_bytes
from ..roles import Arrays
from ..strategies.algorithm import CoLearningRule
from .replies import (
    arrays_of,
    check_train_reply,
    checked_model,
    examples_of,
    metrics_of,
    model_of,
)


class Folding:
    """Checks and reads the replies of one round, and folds their models into the rule's mean.

    Parameters
    ----------
    rule : CoLearningRule
        Its round is open.
    broadcast : Broadcast
        What the replies answer.
    weighted_by_key : str
        The metric that says how many examples a participant has.
    name_of : callable
        ``node id -> name`` of a participant.
    """

    def __init__(
        self,
        rule: CoLearningRule,
        broadcast: Broadcast,
        weighted_by_key: str,
        name_of: Callable[[int], str],
    ) -> None:
        self.rule = rule
        self.broadcast = broadcast
        self.weighted_by_key = weighted_by_key
        self.name_of = name_of
        self._checked: tuple[Message, Arrays] | None = None

    def check(self, sent: Message, reply: Message) -> None:
        """Check a reply for the RecoveringGrid, and keep its model until it is folded.

        Raises
        ------
        ColearnError
            If the reply is not a usable answer to `sent`.
        """
        if sent.metadata.message_type != MessageType.TRAIN:
            check_train_reply(sent, reply, self.weighted_by_key)
            return
        model = checked_model(sent, reply, self.weighted_by_key, self.broadcast, self.rule.check)
        self._checked = reply, model

    def fold(self, replies: Iterable[Message]) -> list[tuple[str, RecordDict]]:
        """Add the replies' models to the mean; return participants and metrics of those that fit.

        A list holds all models anyway, so they are folded at once. Compressed ones would all have
        to be decoded for that.
        """
        if isinstance(replies, list) and isinstance(self.broadcast.up, Float32):
            read = [(reply, model) for reply in replies if (model := self._read(reply)) is not None]
            fits = self.rule.fold_all([model[:4] for _, model in read])
            pairs = zip(read, fits, strict=True)
            return [(model[0], metrics_of(reply)) for (reply, model), fit in pairs if fit]
        # Not a loop, whose variable would hold a reply while the next one arrives.
        return [each for each in map(self._fold, replies) if each is not None]

    def _fold(self, reply: Message) -> tuple[str, RecordDict] | None:
        """Add one reply's model to the mean; return the participant and its metrics, if it fits."""
        model = self._read(reply)
        if model is None or not self.rule.fold(*model):
            return None
        return model[0], metrics_of(reply)

    def _read(self, reply: Message) -> tuple[str, Arrays, float, int, bool] | None:
        """Return participant, model, examples, bytes, and whether the model was checked.

        None if the reply holds no model: it is refused.
        """
        name = self.name_of(reply.metadata.src_node_id)
        known, self._checked = self._checked, None
        checked = known is not None and known[0] is reply
        try:
            examples = examples_of(reply, self.weighted_by_key)
            size = data_bytes(arrays_of(reply))
            model = known[1] if known is not None and checked else model_of(reply, self.broadcast)
        except ColearnError as error:
            self.rule.refuse(name, str(error))
            return None
        return name, model, examples, size, checked
