"""SecureGrid: the layer under which the server receives the sum of models and no model."""

import itertools
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from logging import WARNING
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from .._flwr import calling_strategy, copied
from ..errors import ColearnError, expected
from ..grids import WrappingGrid
from ..policy import Quorum, Recovery
from ..records import (
    config_of,
    fingerprint,
    is_unchanged,
    kind_of,
    number_in,
    records_of,
    to_record,
    view,
)
from ..roles import Arrays, Role
from ..traffic import Event
from .layout import Layout
from .masks import Attempt
from .messages import SECURE, TRAIN, check_trained, list_in, request_of
from .ranges import Ranges
from .settings import SecureAggregation
from .stages import Stages, TooFewError, Total, Trained
from .strategies import check_strategies


@dataclass(frozen=True)
class Surroundings:
    """What the layer needs of the others, which it does not know.

    Attributes
    ----------
    recovery : Recovery or None
        The policy for participants that are lost.
    described : callable
        ``(model, round) -> (roles, absent)``: the roles of the arrays, and the names of those that
        participants do not return.
    received : callable
        ``model -> model``: the model as participants decode it.
    name_of : callable
        ``node id -> name``.
    nodes : callable
        ``() -> node ids`` of the last training's participants, in the order of its messages.
    seconds : callable
        ``() -> float``: the duration of the last training's longest successful attempt.
    """

    recovery: Recovery | None
    described: Callable[[Arrays, int], tuple[Mapping[str, Role], list[str]]]
    received: Callable[[Arrays], Arrays]
    name_of: Callable[[int], str]
    nodes: Callable[[], Iterable[int]]
    seconds: Callable[[], float]


@dataclass
class _Round:
    """What is the same in all attempts of a round."""

    messages: list[Message]
    key: str
    model: Arrays
    layout: Layout
    session: str
    number: int
    training: str


class SecureGrid(WrappingGrid):
    """A Grid around any Grid whose train replies all carry the average of the models.

    A training is sent through the inner layers, with restarts. Participants keep their models, and
    reply with metrics and public keys. Then `Stages` sums the models under masks. The strategy gets
    one reply of every participant in the sum; each has the average as its model and 1 as its number
    of examples. While nothing was unmasked, an attempt with too few participants is repeated with
    new keys: those that still have their trained model do not train again.

    Parameters
    ----------
    grid : Grid
        The inner grid.
    secure : SecureAggregation
        The settings.
    surroundings : Surroundings
        The other layers.

    Attributes
    ----------
    ranges : Ranges
        The ranges of the next round's updates and weights.
    weighted : bool
        Whether the mean is weighted by numbers of examples; by default as in ``FedAvg``.
    weighted_by_key : str
        The name of the metric with the number of examples.
    seconds : float
        The duration of the longest successful training of the last round.
    """

    def __init__(self, grid: Grid, secure: SecureAggregation, surroundings: Surroundings) -> None:
        super().__init__(grid)
        self.secure = secure
        self.ranges = Ranges(secure)
        self.weighted, self.weighted_by_key = True, "num-examples"
        self.seconds = 0.0
        self._around = surroundings
        self._checked = False
        self._events: list[Event] = []
        self._account: dict[str, Any] = {}

    def serve(self, strategies: Iterable[Strategy], weighted: bool) -> None:
        """Set the strategy that receives the averages.

        Raises
        ------
        ColearnError
            If its aggregate is no mean of models.
        """
        chain = list(strategies)
        check_strategies(chain)
        self.weighted, self._checked = weighted, True
        self.weighted_by_key = str(getattr(chain[-1], "weighted_by_key", "num-examples"))

    def take_events(self) -> list[Event]:
        """Return the dropouts since the last call."""
        events, self._events = self._events, []
        return events

    def take_account(self) -> dict[str, Any]:
        """Return the figures of the last round, for its record; empty if there was none."""
        account, self._account = self._account, {}
        return account

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages other than trainings, whose replies would have models without masks.

        Raises
        ------
        ColearnError
            If one is a training.
        """
        batch = list(messages)
        if any(map(_has_training, batch)):
            raise ColearnError(
                "secure aggregation: expected trainings in send_and_receive, which takes more than "
                "one exchange, found them in push_messages"
            )
        return self.grid.push_messages(batch)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the replies; those of a training carry the average.

        Raises
        ------
        ColearnError
            If there are fewer than 3 participants, too few are left at the end, or the strategy
            needs single models.
        """
        batch = list(messages)
        if not any(map(_has_training, batch)):
            return self.grid.send_and_receive(batch, timeout=timeout)
        if not self._checked:
            self._check_caller()
        return self._average(self._begin(batch), timeout)

    def _check_caller(self) -> None:
        """Check the strategy of Flower's own loop, which tells a layer nothing of itself."""
        strategy, self._checked = calling_strategy(), True
        if strategy is not None:
            chain = [strategy]
            while isinstance(inner := getattr(chain[-1], "strategy", None), Strategy):
                chain.append(inner)
            self.serve(chain, getattr(chain[-1], "weighting", "weighted") == "weighted")

    # A round ------------------------------------------------------------------------------------

    def _begin(self, batch: list[Message]) -> _Round:
        """Return the round of these messages."""
        self.secure.threshold_of(len(batch))
        self.seconds = 0.0
        config = config_of(batch[0].content)
        if "server-round" not in config:
            raise expected("train message", "a config with 'server-round'", dict(config))
        key, record = _model_of(batch)
        number, model = int(number_in(config, "server-round")), view(record)
        roles, absent = self._around.described(model, number)
        most, bits = self.ranges.largest_weight(self.weighted)
        clipping = self.ranges.clipping
        layout = Layout.of(model, roles, absent, len(batch), clipping, most, bits)
        # Another training of the same round, after a restart of the server, has another id.
        training = secrets.token_hex(8)
        session = str(config.get("session", ""))
        return _Round(batch, key, model, layout, session, number, training)

    def _average(self, job: _Round, timeout: float | None) -> list[Message]:
        """Return the replies with the average, after as many attempts as it takes."""
        recovery = self._around.recovery
        for number in itertools.count():
            replies = self._trained(job, number, timeout)
            stages = self._stages(job, number, replies)
            try:
                total = stages.total(job.layout, job.model, _metrics_of(replies))
            except ColearnError as error:
                # Once shares were asked for, another sum could tell a single model.
                repeats = isinstance(error, TooFewError) and _may_repeat(recovery, number)
                if not repeats or recovery is None:
                    self._note("absence", stages)
                    raise
                self._note("restart", stages, "; the round is repeated with new keys")
                time.sleep(recovery.pause_before(number))
                continue
            self._note("absence", stages)
            return self._replies(job, number, total, replies)
        raise AssertionError("the loop above has no end")

    def _trained(self, job: _Round, number: int, timeout: float | None) -> list[Message]:
        """Return the replies to the training that have keys, in the order of names."""
        request = request_of(
            TRAIN,
            Attempt(job.session, job.number, number),
            {
                "training": job.training,
                "weighted": self.weighted,
                "examples-key": self.weighted_by_key,
                "masked-metrics": self.secure.masked_metrics,
                "seed": self.secure.seed,
                **job.layout.to_config(),
            },
        )
        # A node that was replaced by another one in the attempt before is asked no more.
        nodes = list(self._around.nodes()) if number else []
        nodes = nodes or [message.metadata.dst_node_id for message in job.messages]
        messages = [
            copied(message, RecordDict({**message.content, SECURE: request}), node)
            for message, node in zip(job.messages, nodes, strict=True)
        ]
        arrived = list(self.grid.send_and_receive(messages, timeout=timeout))
        # A repeated attempt is quick where participants have kept their models.
        self.seconds = max(self.seconds, self._around.seconds())
        sent = {message.metadata.message_id: message for message in messages}
        replies = [reply for reply in arrived if self._is_trained(sent, messages[0], reply)]
        return sorted(replies, key=self._name_of)

    def _is_trained(self, sent: Mapping[str, Message], any_sent: Message, reply: Message) -> bool:
        """Return whether a reply has keys; without recovery this is the only check."""
        try:
            check_trained(any_sent, reply)
        except ColearnError as error:
            # Flower's error for a node that is gone does not come from that node.
            message = sent.get(reply.metadata.reply_to_message_id)
            node = reply.metadata.src_node_id if message is None else message.metadata.dst_node_id
            log(WARNING, "Secure aggregation: node %s is left out: %s", node, error)
            self._events.append(Event("absence", str(node), str(error)))
            return False
        return True

    def _stages(self, job: _Round, number: int, replies: list[Message]) -> Stages:
        """Return the stages of the participants that have trained."""
        answers = [records_of(reply.content, ConfigRecord)[SECURE] for reply in replies]
        members = [
            Trained(reply.metadata.src_node_id, self._name_of(reply), *answer["keys"])  # type: ignore[misc]
            for reply, answer in zip(replies, answers, strict=True)
        ]
        threshold = self.secure.threshold_of(len(members))
        recovery = self._around.recovery
        least = recovery.policy.least if recovery and isinstance(recovery.policy, Quorum) else 0
        attempt = Attempt(job.session, job.number, number)
        return Stages(
            self.grid, attempt, members, threshold, max(threshold, least), self.secure.timeout
        )

    def _note(self, kind: Literal["absence", "restart"], stages: Stages, then: str = "") -> None:
        """Record the participants that dropped out."""
        for index, reason in stages.dropouts.items():
            member = stages.members[index]
            self._events.append(
                Event(kind, str(member.node_id), f"secure aggregation: {reason}{then}")
            )

    # The replies --------------------------------------------------------------------------------

    def _replies(
        self, job: _Round, number: int, total: Total, replies: list[Message]
    ) -> list[Message]:
        """Return the replies of the participants in the sum, with the average in each."""
        received = self._around.received(job.model)
        mean, largest = job.layout.decode(received, total.words, total.weight)
        self._account = {
            "participants": len(total.survivors),
            "attempts": number + 1,
            "clipping-range": job.layout.clipping_range,
            "clipped": total.clipped,
            "weight": total.weight,
        }
        self.ranges.update(largest, total.clipped, total.weight)
        if total.clipped:
            text = "Secure aggregation: %s elements beyond the clipping range of %g were clipped"
            log(WARNING, text, total.clipped, job.layout.clipping_range)
        record = to_record({name: mean.get(name, array) for name, array in job.model.items()})
        metrics = job.layout.decode_metrics(_metrics_of(replies), total.metrics)
        averaged = [replies[index] for index in total.survivors]
        for reply in averaged:
            del reply.content[SECURE]
            # A record for each, since strategies change the arrays of one reply.
            reply.content[job.key] = ArrayRecord({**record})
            for own in records_of(reply.content, MetricRecord).values():
                own.update({**metrics, self.weighted_by_key: 1})
        return averaged

    def _name_of(self, reply: Message) -> str:
        return self._around.name_of(reply.metadata.src_node_id)


def _may_repeat(recovery: Recovery | None, number: int) -> bool:
    if recovery is None:
        return False
    return recovery.restarts_for_ever or number < recovery.max_restarts


def _metrics_of(replies: list[Message]) -> list[str]:
    """Return the names of the metrics that any participant has and that are masked, sorted."""
    answers = [records_of(reply.content, ConfigRecord)[SECURE] for reply in replies]
    return sorted({name for answer in answers for name in list_in(answer, "metrics", str)})


def _has_training(message: Message) -> bool:
    """Return whether the reply to a message would have a participant's model.

    Raises
    ------
    ColearnError
        If it is a training of another type than Flower's own, whose reply this layer cannot read.
    """
    if not message.has_content() or kind_of(message) != MessageType.TRAIN:
        return False
    if not records_of(message.content, ArrayRecord):
        return False
    if message.metadata.message_type != MessageType.TRAIN:
        raise expected(
            "type of a message with a model under secure aggregation",
            f"'{MessageType.TRAIN}'",
            message.metadata.message_type,
        )
    return True


def _model_of(batch: list[Message]) -> tuple[str, ArrayRecord]:
    """Return the model of all messages of a round, and its key.

    Raises
    ------
    ColearnError
        If a message has another model, since the participants' updates are summed.
    """
    models = [records_of(message.content, ArrayRecord) for message in batch]
    [(key, record), *more] = models[0].items()
    known = fingerprint(record)
    if more or any(list(m) != [key] or not is_unchanged(m[key], known) for m in models):
        raise ColearnError(
            "train messages under secure aggregation: expected one model, the same for all "
            "participants, found several"
        )
    return key, record
