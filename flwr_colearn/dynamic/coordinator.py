"""Coordinator: one opportunity to exchange models after the other, over a Grid."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from logging import WARNING
from random import Random

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from ..aggregation.mean import RunningMean, trainable
from ..aggregation.replies import arrays_of, echo_of
from ..compression.codecs import WIRE, Wire, check_agreed
from ..errors import ColearnError
from ..grids.metering import MeteredGrid, Transfers
from ..loop import REPORT_WITHIN
from ..records import into_record, records_of, view
from ..recovery.grid import RecoveringGrid, Recovery
from ..roles import Arrays, Role
from .balancing import Balance, squared_distance, squared_norm
from .messages import (
    ARRAYS,
    CONFIG,
    FETCH,
    METRICS,
    SET,
    TRAIN,
    Ask,
    Report,
    checksum,
    report_of,
)
from .operators import Operator
from .record import DynamicRecord

_LISTS = {"restart": "restarts", "refusal": "refusals", "absence": "absences"}


@dataclass(frozen=True)
class Reference:
    """r, the model that all learners had after the last full synchronisation.

    Attributes
    ----------
    record : ArrayRecord
        Its arrays.
    round : int
        Of that synchronisation; 0 for the initial model.
    roles : dict
        By array name; only trainable arrays count in distances.
    """

    record: ArrayRecord
    round: int
    roles: dict[str, Role]
    arrays: Arrays = field(init=False)
    square: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrays", view(self.record))
        object.__setattr__(self, "square", squared_norm(trainable(self.arrays, self.roles)))

    @cached_property
    def checksum(self) -> int:
        """By which a learner knows whether its own is this one to the last bit."""
        return checksum(self.arrays)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the arrays that do not count in distances."""
        return tuple(name for name in self.arrays if self.roles[name] is not Role.TRAINABLE)

    @property
    def float64(self) -> bool:
        """Whether the last bit of a mean depends on the order of its models."""
        return any(array.dtype == np.float64 for array in self.arrays.values())

    def distance(self, arrays: Arrays) -> float:
        """Return |arrays - r|^2."""
        return squared_distance(trainable(arrays, self.roles), self.arrays)


@dataclass(frozen=True)
class Pending:
    """An average that is decided but not yet known to have reached its members."""

    members: list[int]
    record: ArrayRecord


@dataclass(frozen=True)
class _Answer:
    report: Report
    has_model: bool
    metrics: dict[str, float]


@dataclass
class Coordinator:
    """Asks learners to train, and synchronises those whom the operator names.

    Attributes
    ----------
    operator : Operator
        Decides who sends models.
    reference : Reference
        r.
    session : str
        Of this training.
    random : random.Random
        For choices among learners.
    violations : int
        v.
    wire : Wire
        How models travel. Reference and averages are held as learners decode them.
    timeout : float or None
        Seconds that one attempt of one learner may take.
    nodes : list of int
        Of the round's learners, after any replacement.
    present : list of int
        Those of them that took part.
    pending : Pending or None
        What is to be distributed.
    record : DynamicRecord
        Of the round under way.
    """

    operator: Operator
    reference: Reference
    session: str
    random: Random
    violations: int = 0
    wire: Wire = field(default_factory=Wire)
    timeout: float | None = None
    nodes: list[int] = field(default_factory=list)
    present: list[int] = field(default_factory=list)
    pending: Pending | None = None
    record: DynamicRecord = field(default_factory=lambda: DynamicRecord(0, 0))

    def __post_init__(self) -> None:
        self._opened = time.monotonic()
        self._bounds: dict[int, float] = {}
        self._config = ConfigRecord()
        self._collecting = False

    def connect(self, grid: Grid, recovery: Recovery | None) -> Grid:
        """Return a grid around `grid` that counts, checks and restarts."""
        inner, recovery = (
            (grid.grid, grid.recovery) if isinstance(grid, RecoveringGrid) else (grid, recovery)
        )
        self._meter = MeteredGrid(inner)
        self._grid: Grid = (
            self._meter
            if recovery is None
            else RecoveringGrid(self._meter, recovery, lambda sent, reply: self._check(reply))
        )
        return self._grid

    def open(self, server_round: int, nodes: Sequence[int], config: ConfigRecord) -> list[Message]:
        """Begin a round; return the questions to its learners.

        Arrays travel in the first round only: the common model, which is the first reference.
        """
        b = self.operator.check_every
        self.nodes, self._config = list(nodes), config
        bounds = self.operator.bounds(len(nodes), self.reference.square, self.random)
        self._bounds = dict(zip(nodes, bounds, strict=True))
        self.record = DynamicRecord(server_round, server_round * b, delta=min(bounds))
        self._mean = self._new_mean()
        self._opened = time.monotonic()
        self._meter.take()
        anew = self._travelling(self.reference.record) if server_round == 1 else None
        return [self._train_question(node, anew) for node in nodes]

    def balance(self, replies: Iterable[Message]) -> None:
        """Take the learners' replies, and fetch what the operator needs for an average.

        Afterwards `pending` is what is to be distributed, if anything; a full synchronisation's
        mean is the reference already.

        Raises
        ------
        ColearnError
            If nobody replied.
        """
        answers = self._begin_anew(self._receive(replies, self.nodes))
        self.present = [node for node in self.nodes if node in answers]
        if not self.present:
            raise ColearnError(
                f"round {self.record.round}: expected replies from {len(self.nodes)} learners, "
                "found none; their logs say why"
            )
        self._note_training(answers)
        members = [node for node in self.present if answers[node].has_model]
        self.record.reporters = self._names(members)
        members += self._augment(members)
        if members:
            self._settle(members, full=set(members) >= set(self.present))
        self._take_moved()

    def distribute(self) -> None:
        """Send the pending average to its members; to do so twice changes nothing."""
        if self.pending is None:
            return
        members, record = self.pending.members, self._travelling(self.pending.record)
        full = self.record.synchronised == "full"
        self._ask([self._question(SET, node, record, anew=full) for node in members])
        self.pending = None
        self._take_moved()

    def collect(self) -> ArrayRecord:
        """Return the mean of all learners' models, each counting the same.

        Raises
        ------
        ColearnError
            If no learner sent its model.
        """
        self._mean = self._new_mean()
        self._collecting = True
        self._ask([self._question(FETCH, node) for node in self.present], weigh=lambda report: 1)
        self._collecting = False
        self.record.collected = asdict(self._meter.take())
        return into_record(self._mean.mean())

    def close(self) -> DynamicRecord:
        """End the round; return its record."""
        self.record.seconds = time.monotonic() - self._opened
        return self.record

    def name(self, node: int) -> str:
        """Return a learner's name where known, else its node id."""
        return self._grid.name_of(node) if isinstance(self._grid, RecoveringGrid) else str(node)

    @property
    def reply_within(self) -> float | None:
        """Seconds to wait for a reply: Flower takes some to notice that a process has ended."""
        return None if self.timeout is None else self.timeout + REPORT_WITHIN

    def _new_mean(self) -> RunningMean:
        return RunningMean(
            self.reference.arrays, self.reference.roles, models=max(len(self.nodes), 1)
        )

    # Steps of a round ---------------------------------------------------------------------------

    def _begin_anew(self, answers: dict[int, _Answer]) -> dict[int, _Answer]:
        """Give model and reference to learners that have no usable state, and let them train."""
        lost = [node for node in self.nodes if node in answers and answers[node].report.lost]
        if not lost:
            return answers
        for node in lost:
            name, reason = self.name(node), answers[node].report.lost
            self.record.lost.append({"participant": name, "reason": reason})
            log(WARNING, "Averaging: learner %s begins anew: %s", name, reason)
        anew = self._travelling(self.reference.record)
        again = self._ask([self._train_question(node, anew) for node in lost])
        merged = {**answers, **again}
        return {node: answer for node, answer in merged.items() if not answer.report.lost}

    def _note_training(self, answers: dict[int, _Answer]) -> None:
        record = self.record
        record.largest_distance = max(answer.report.distance for answer in answers.values())
        losses = []
        for answer in answers.values():
            examples = answer.metrics.get("num-examples", 0)
            record.examples += examples
            losses.append(examples * answer.metrics.get("loss", math.nan))
        total = math.fsum(losses)
        record.loss = None if math.isnan(total) else total

    def _augment(self, reporters: Sequence[int]) -> list[int]:
        """Fetch further models as long as the operator needs them; return whose came."""
        balance = Balance(
            learners=len(self.present),
            reporters=[self.present.index(node) for node in reporters],
            violations=self.violations,
            reference_square=self.reference.square,
            distance=lambda: self.reference.distance(self.wire.arriving(self._mean.mean())),
            random=self.random,
        )
        came: list[int] = []
        for group in self.operator.further(balance):
            answers = self._ask([self._question(FETCH, self.present[index]) for index in group])
            came += [node for node, answer in answers.items() if answer.has_model]
            self.record.groups.append(len(group))
        self.record.fetched = self._names(came)
        self.violations = self.record.violations = balance.violations
        return came

    def _settle(self, members: list[int], full: bool) -> None:
        """Make the members' mean pending; where they are all, it is the new reference."""
        record = into_record(dict(self.wire.arriving(self._mean.mean())))
        self.pending = Pending(members, record)
        self.record.synchronised = "full" if full else "partial"
        if full:
            self.reference = Reference(record, self.record.round, self.reference.roles)

    def _take_moved(self) -> None:
        moved = Transfers(**self.record.moved) + self._meter.take()
        self.record.moved = asdict(moved)

    # Questions and answers ----------------------------------------------------------------------

    def _travelling(self, record: ArrayRecord) -> ArrayRecord:
        return self.wire.down.encode(record)[0]

    def _train_question(self, node: int, anew: ArrayRecord | None) -> Message:
        b = self.operator.check_every
        ask = Ask(
            self.session,
            self.record.round,
            self.reference.round,
            mini_batches=b,
            batches_done=self.record.mini_batches - b,
            bound=self._bounds[node],
            left_out=() if anew is None else self.reference.left_out,
            reference_check=self._reference_check,
        )
        config = ConfigRecord({**self._config, **ask.to_config()})
        if self.timeout is not None:
            config["time-limit"] = self.timeout
        return self._message(TRAIN, node, config, anew)

    def _question(
        self, kind: str, node: int, arrays: ArrayRecord | None = None, anew: bool = False
    ) -> Message:
        ask = Ask(
            self.session,
            self.record.round,
            self.reference.round if anew or kind == FETCH else None,
            left_out=self.reference.left_out if anew else (),
            reference_check=self._reference_check if kind == FETCH else None,
        )
        return self._message(kind, node, ask.to_config(), arrays)

    def _message(
        self, kind: str, node: int, config: ConfigRecord, arrays: ArrayRecord | None
    ) -> Message:
        content = RecordDict({CONFIG: config})
        if self._request:
            content[WIRE] = ConfigRecord({**self._request})
        if arrays is not None:
            content[ARRAYS] = arrays
        return Message(content=content, message_type=kind, dst_node_id=node)

    @property
    def _request(self) -> dict[str, str | int]:
        """What learners are to know of the wire; the round where an average follows."""
        if self._collecting:
            return self.wire.request(session=self.session)
        return self.wire.request(session=self.session, round=self.record.round)

    @property
    def _reference_check(self) -> int | None:
        return self.reference.checksum if self.wire.up.differential else None

    def _ask(
        self,
        questions: list[Message],
        weigh: Callable[[Report], float] = lambda report: report.examples,
    ) -> dict[int, _Answer]:
        nodes = [question.metadata.dst_node_id for question in questions]
        replies = self._grid.send_and_receive(questions, timeout=self.reply_within)
        return self._receive(replies, nodes, weigh)

    def _receive(
        self,
        replies: Iterable[Message],
        asked: Sequence[int],
        weigh: Callable[[Report], float] = lambda report: report.examples,
    ) -> dict[int, _Answer]:
        """Fold the models in replies into the mean as they come; return the answers by node."""
        answers: dict[int, _Answer] = {}
        for reply in self._in_order(replies):
            node = reply.metadata.src_node_id
            try:
                answers[node] = self._fold(reply, weigh)
            except ColearnError as error:
                self.record.refusals.append({"participant": self.name(node), "reason": str(error)})
                log(WARNING, "Averaging: reply of node %s refused: %s", node, error)
        self._follow(asked)
        return answers

    def _fold(self, reply: Message, weigh: Callable[[Report], float]) -> _Answer:
        report = report_of(reply)
        model = self._model_in(reply)
        if model is not None:
            self._mean.add(model, weigh(report))
        metrics = dict(records_of(reply.content, MetricRecord).get(METRICS, {}))
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        return _Answer(report, model is not None, numbers)

    def _model_in(self, reply: Message) -> Arrays | None:
        """Return the model that a reply brings, decoded, or None if it brings none."""
        if self._request:
            check_agreed(records_of(reply.content, ConfigRecord).get(WIRE), self._request)
        if ARRAYS not in records_of(reply.content, ArrayRecord):
            return None
        return self.wire.up.decode(arrays_of(reply), self.reference.arrays)

    def _check(self, reply: Message) -> None:
        """Raise a ColearnError for a reply that is no good; recovery then asks again."""
        report = report_of(reply)
        echoed = echo_of(reply).get("server-round", self.record.round)
        if echoed != self.record.round:
            raise ColearnError(
                f"round echoed in the reply: expected {self.record.round}, found {echoed!r}"
            )
        model = self._model_in(reply)
        if model is not None:
            self._mean.check(model, report.examples)

    def _follow(self, asked: Sequence[int]) -> None:
        """Take over from the recovering grid who took whose place, and what happened."""
        if not isinstance(self._grid, RecoveringGrid):
            return
        moved = dict(zip(asked, self._grid.node_ids, strict=True))
        self.nodes = [moved.get(node, node) for node in self.nodes]
        self.present = [moved.get(node, node) for node in self.present]
        self._bounds = {moved.get(node, node): bound for node, bound in self._bounds.items()}
        for event in self._grid.take_events():
            entry = {"participant": event.participant, "reason": event.reason}
            getattr(self.record, _LISTS[event.kind]).append(entry)

    def _in_order(self, replies: Iterable[Message]) -> Iterable[Message]:
        """Sort by learner where the mean's last bit depends on the order: float64 models."""
        if not self.reference.float64:
            return replies
        return sorted(replies, key=lambda reply: self.name(reply.metadata.src_node_id))

    def _names(self, nodes: Iterable[int]) -> list[str]:
        return [self.name(node) for node in nodes]
