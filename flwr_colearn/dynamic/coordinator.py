"""Coordinator: the server's part of model averaging, one exchange of models per round."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from logging import INFO, WARNING
from random import Random

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common import log

from ..aggregation import (
    RunningMean,
    Update,
    Updates,
    arrays_of,
    check_echo,
    contributions,
    squared_distance,
    squared_norm,
    trainable,
)
from ..compression import AGREEMENT, AVERAGE_OF, LOCAL_REFERENCE, Compression
from ..errors import ColearnError
from ..policy import Guard, reply_within, timed
from ..records import fingerprint, into_record, is_unchanged, records_of, view
from ..roles import Arrays, Role
from ..traffic import Event
from ..transport import ConnectedGrid
from .balancing import Balance
from .messages import ARRAYS, CONFIG, Action, Ask, Report, checksum, metrics_of, report_of
from .operators import Operator
from .record import DynamicLog, DynamicRecord


@dataclass(frozen=True)
class Reference:
    """r, the model of all learners after the last full synchronisation.

    Attributes
    ----------
    record : ArrayRecord
        The model.
    round : int
        The round of that synchronisation; 0 for the initial model.
    roles : dict
        The roles by array name; distances are computed over trainable arrays only.
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
        """The checksum by which a learner verifies that its reference has the same bits."""
        return checksum(self.arrays)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The names of the arrays that are not part of distances."""
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
    """An average that has been computed and may not have reached all its members yet."""

    members: list[int]
    record: ArrayRecord


@dataclass(frozen=True)
class _Answer:
    report: Report
    has_model: bool
    metrics: dict[str, float]


@dataclass
class Coordinator:
    """Lets learners train, and averages the models that the operator requires.

    Attributes
    ----------
    operator : Operator
        The operator, which decides which learners send models.
    reference : Reference
        r.
    random : random.Random
        The random generator for choices among learners.
    log : DynamicLog
        The log with the record of the round under way.
    violations : int
        v, the violations since the last full synchronisation.
    compression : Compression
        The codecs. Reference and averages are stored as learners decode them.
    timeout : float or None
        The time limit of one attempt of one learner, in seconds.
    nodes : list of int
        The nodes of the round's learners, after any replacement.
    present : list of int
        The nodes that replied in this round.
    pending : Pending or None
        The average that is to be distributed.
    absent : int
        The number of learners that a quorum has waited for in vain, and that are not back.
    guard : Guard or None
        The bounds of a model's distance to the reference, in the place of an update's norm.
    measured : list of float
        The mean over the learners of |f_i - r|^2 at each of the operator's calibration checks.
    updates : Updates or None
        The distances of models that were received, with the guard's state.
    """

    operator: Operator
    reference: Reference
    random: Random
    log: DynamicLog
    violations: int = 0
    compression: Compression = field(default_factory=Compression)
    timeout: float | None = None
    nodes: list[int] = field(default_factory=list)
    present: list[int] = field(default_factory=list)
    pending: Pending | None = None
    absent: int = 0
    guard: Guard | None = None
    measured: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._in_use = self.operator
        self._mean = self._new_mean()
        self.updates: Updates | None = None
        if self.guard is not None:
            self.updates = Updates(self.guard, self._mean.weights)
            # A run that is resumed within a round may collect models before it opens another.
            self.updates.renew(self.reference.arrays)
        self._measured: dict[int, Update] = {}
        self._weights: dict[str, float] = {}
        self._grid: ConnectedGrid | None = None
        self._bounds: dict[int, float] = {}
        self._config = ConfigRecord()
        self._collecting = False
        self._checked: list[bytes] = []

    @property
    def record(self) -> DynamicRecord:
        """The record of the round under way."""
        return self.log.record

    @property
    def grid(self) -> ConnectedGrid:
        """The grid, which connects to the learners."""
        assert self._grid is not None
        return self._grid

    def connect(self, grid: ConnectedGrid) -> None:
        """Set the grid for all messages."""
        self._grid = grid
        grid.refer_to(self.reference.arrays)

    def train(self, server_round: int, nodes: Sequence[int], config: ConfigRecord) -> None:
        """Let learners train, and fetch the models that the operator requires for an average.

        Train messages contain arrays in the first round only: the common initial model, which is
        the first reference. After the call `pending` is the average to distribute, if there is one.
        The mean of a full synchronisation is the new reference already.

        Raises
        ------
        ColearnError
            If no learner replied.
        """
        self._open(server_round, nodes, config)
        anew = self.reference.record if server_round == 1 else None
        answers = self._ask([self._train_question(node, anew) for node in nodes])
        answers = self._begin_anew(answers)
        self.present = [node for node in self.nodes if node in answers]
        if not self.present:
            raise self._nobody()
        self._note_training(answers)
        members = [node for node in self.present if answers[node].has_model]
        self.record.reporters = self._names(members)
        members += self._augment(members)
        if members:
            self._settle(members, full=set(members) >= set(self.present))
        self._account()

    def distribute(self) -> None:
        """Send the pending average to its members; a second call has no further effect."""
        if self.pending is None:
            return
        members, record = self.pending.members, self.pending.record
        full = self.record.synchronised == "full"
        self._ask([self._question("set", node, record, anew=full) for node in members])
        self.pending = None
        self._account()

    def collect(self) -> ArrayRecord:
        """Return the mean of all learners' models with equal weights.

        Raises
        ------
        ColearnError
            If no learner sent its model.
        """
        # A new mean: that of the round's synchronisation has only some of the models.
        self._mean = self._new_mean()
        self._collecting = True
        try:
            nodes = self.present
            self._ask([self._question("fetch", node) for node in nodes], weigh=lambda report: 1)
        finally:
            self._collecting = False
        self.log.note_collection(self.grid.take())
        return into_record(self._mean.mean())

    def check(self, sent: Message, reply: Message) -> None:
        """Raise a ColearnError for an invalid reply; recovery then sends the message again."""
        check_echo(sent, reply)
        report = report_of(reply)
        metrics_of(reply)
        if model := records_of(reply.content, ArrayRecord).get(ARRAYS):
            self._check(reply.metadata.src_node_id, view(model), report.examples)
            self._checked = fingerprint(model)

    def _check(self, node: int, model: Arrays, weight: float) -> None:
        """Raise a ColearnError for a model that cannot be added, or beyond the guard's bound."""
        if self.updates is None:
            self._mean.check(model, weight)
        else:
            self._measured[node] = self.updates.admitted(model, self._mean, weight)

    # Steps of a round ---------------------------------------------------------------------------

    def _open(self, server_round: int, nodes: Sequence[int], config: ConfigRecord) -> None:
        b = self.operator.check_every
        self.nodes, self.present, self._config = list(nodes), [], config
        self._in_use = self.operator.calibrated(self.measured)
        bounds = self._in_use.bounds(len(nodes), self.reference.square, self.random)
        self._bounds = dict(zip(nodes, bounds, strict=True))
        self.log.open(DynamicRecord(server_round, server_round * b, delta=min(bounds)))
        self._mean = self._new_mean()
        self._measured, self._weights = {}, {}
        if self.updates is not None:
            # A model moves away from the reference until the next full synchronisation.
            self.updates.renew(self.reference.arrays, server_round - self.reference.round)

    def _new_mean(self) -> RunningMean:
        return RunningMean(
            self.reference.arrays,
            self.reference.roles,
            models=max(len(self.nodes), 1),
            rounded=not self.compression.keeps_signs,
        )

    def _begin_anew(self, answers: dict[int, _Answer]) -> dict[int, _Answer]:
        """Reinitialise learners without usable state with model and reference, and let them train.

        Returns
        -------
        dict
            The answers of all learners that have trained, by node.
        """
        lost = [node for node in self.nodes if node in answers and answers[node].report.lost]
        if not lost:
            return answers
        for node in lost:
            name, reason = self.grid.name_of(node), answers[node].report.lost
            self.record.lost.append({"participant": name, "reason": reason})
            log(WARNING, "Averaging: learner %s is reinitialised: %s", name, reason)
        # The others have replied already, and count for a quorum.
        self.present = [node for node in self.nodes if node in answers]
        again = self._ask([self._train_question(node, self.reference.record) for node in lost])
        merged = {**answers, **again}
        return {node: answer for node, answer in merged.items() if not answer.report.lost}

    def _note_training(self, answers: dict[int, _Answer]) -> None:
        record = self.record
        distances = [answer.report.distance for answer in answers.values()]
        record.largest_distance = max(distances)
        self._calibrate(distances)
        losses: list[tuple[float, float]] = []
        for node, answer in answers.items():
            examples, loss = answer.metrics.get("num-examples", 0), answer.metrics.get("loss")
            record.examples += examples
            if loss is not None and math.isfinite(loss):
                losses.append((examples, examples * loss))
            elif loss is not None:
                name = self.grid.name_of(node)
                log(WARNING, "Averaging: loss of learner %s left out: found %s", name, loss)
        record.loss = self._whole_loss(losses, len(answers))

    def _calibrate(self, distances: list[float]) -> None:
        """Keep the mean distance of a calibration check, and log the operator after the last."""
        checks = self.operator.calibration_checks
        if len(self.measured) == checks:
            return
        # Summed exactly, so that the order of replies does not matter.
        self.measured.append(math.fsum(distances) / len(distances))
        if len(self.measured) == checks:
            calibrated = self.operator.calibrated(self.measured)
            log(INFO, "Averaging: calibrated in %s checks: %s", checks, calibrated)

    def _whole_loss(self, losses: list[tuple[float, float]], learners: int) -> float | None:
        """Return the sum of the loss over all examples, from (examples, loss) of each learner.

        Learners without a loss count with the mean loss of the others, so that the sum remains
        comparable with those of other rounds.
        """
        known = sum(examples for examples, _ in losses)
        if not known:
            return None
        total = _sum_of(loss for _, loss in losses)
        if total is None or len(losses) == learners:
            return total
        log(WARNING, "Averaging: expected the loss of %s learners, found %s", learners, len(losses))
        return total * (self.record.examples / known)

    def _nobody(self) -> ColearnError:
        """Return the error of a round in which no learner trained, with the reasons known."""
        self._account()
        record = self.record
        # The last one of a learner, which is the one that it was given up for.
        reasons = {
            entry["participant"]: entry["reason"]
            for entry in (*record.lost, *record.refusals, *record.absences)
        }
        spelled = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        return ColearnError(
            f"round {record.round}: expected replies from {len(self.nodes)} learners, found none: "
            + (spelled or "no learner said why; see the logs of their SuperNodes")
        )

    def _augment(self, reporters: Sequence[int]) -> list[int]:
        """Fetch further models while the operator requires them; return the nodes that sent one."""
        # The distance is that of the mean as learners will decode it.
        balance = Balance(
            learners=len(self.present),
            reporters=[self.present.index(node) for node in reporters],
            violations=self.violations,
            reference_square=self.reference.square,
            distance=lambda: self.reference.distance(self.compression.received(self._mean.mean())),
            random=self.random,
        )
        came: list[int] = []
        for group in self._in_use.further(balance):
            answers = self._ask([self._question("fetch", self.present[index]) for index in group])
            came += [node for node, answer in answers.items() if answer.has_model]
            self.record.groups.append(len(group))
        self.record.fetched = self._names(came)
        self.violations = self.record.violations = balance.violations
        return came

    def _settle(self, members: list[int], full: bool) -> None:
        """Make the mean pending; if all learners are members, it is the new reference."""
        record = into_record(dict(self.compression.received(self._mean.mean())))
        self.pending = Pending(members, record)
        self.record.synchronised = "full" if full else "partial"
        self.record.contributions = contributions(self._weights, self.updates)
        if full:
            self.reference = Reference(record, self.record.round, self.reference.roles)
            self.grid.refer_to(self.reference.arrays)

    def _account(self) -> None:
        traffic = self.grid.take()
        self.absent += traffic.gone
        self.log.note_traffic(traffic)

    # Messages and replies -----------------------------------------------------------------------

    def _train_question(self, node: int, anew: ArrayRecord | None) -> Message:
        b = self.operator.check_every
        ask = Ask(
            self.grid.session,
            self.record.round,
            self.reference.round,
            mini_batches=b,
            batches_done=self.record.mini_batches - b,
            bound=self._bounds[node],
            left_out=() if anew is None else self.reference.left_out,
            reference_check=self._reference_check,
        )
        config = ConfigRecord({**self._config, **ask.to_config()})
        return self._message(node, config, anew, average_of=self.reference.round)

    def _question(
        self, action: Action, node: int, arrays: ArrayRecord | None = None, anew: bool = False
    ) -> Message:
        ask = Ask(
            self.grid.session,
            self.record.round,
            self.reference.round if anew or action == "fetch" else None,
            action,
            left_out=self.reference.left_out if anew else (),
            reference_check=self._reference_check if action == "fetch" else None,
        )
        return self._message(node, ask.to_config(), arrays, average_of=self.record.round)

    def _message(
        self, node: int, config: ConfigRecord, arrays: ArrayRecord | None, average_of: int
    ) -> Message:
        content = RecordDict({CONFIG: ConfigRecord({**config, **timed(self.timeout)})})
        if arrays is not None:
            content[ARRAYS] = arrays
        if not self.compression.is_plain:
            said: dict[str, str | int] = {LOCAL_REFERENCE: 1, "session": self.grid.session}
            # Without a round the participant stores no rounding error: no average of collected
            # models is sent back that could lack it.
            if not self._collecting:
                said["round"] = self.record.round
            if arrays is not None:
                said[AVERAGE_OF] = average_of
            content[AGREEMENT] = ConfigRecord({**said})
        return Message(content, node, MessageType.TRAIN)

    @property
    def _reference_check(self) -> int | None:
        return self.reference.checksum if self.compression.up.differential else None

    def _ask(
        self,
        questions: list[Message],
        weigh: Callable[[Report], float] = lambda report: report.examples,
    ) -> dict[int, _Answer]:
        """Send messages, add the models in replies to the mean, and return the answers by node."""
        asked = [question.metadata.dst_node_id for question in questions]
        self.grid.note_elsewhere(len(set(self.present) - set(asked)))
        replies = self.grid.stream(questions, timeout=reply_within(self.timeout))
        answers: dict[int, _Answer] = {}
        for reply in self._in_order(replies):
            node = reply.metadata.src_node_id
            try:
                answers[node] = self._fold(questions[0], reply, weigh)
            # Without recovery no layer has checked the reply; an invalid one is left out here.
            except ColearnError as error:
                name = self.grid.name_of(node)
                self.log.note_events([Event("refusal", name, str(error))])
                log(WARNING, "Averaging: reply of node %s refused: %s", node, error)
        self._follow(asked)
        return answers

    def _fold(self, sent: Message, reply: Message, weigh: Callable[[Report], float]) -> _Answer:
        check_echo(sent, reply)
        report = report_of(reply)
        has_model = ARRAYS in records_of(reply.content, ArrayRecord)
        if has_model:
            model = arrays_of(reply)
            # The fingerprint shows that `check` has seen the same arrays; it is read only once.
            checked, self._checked = self._checked, []
            self._add(reply.metadata.src_node_id, model, weigh(report), checked)
        return _Answer(report, has_model, metrics_of(reply))

    def _add(self, node: int, model: ArrayRecord, weight: float, checked: list[bytes]) -> None:
        """Add a model to the mean."""
        if not is_unchanged(model, checked):
            self._check(node, view(model), weight)
        self._mean.add_checked(view(model), weight)
        # The mean of all learners, for an evaluation, is not the one that the record describes.
        if self._collecting:
            return
        name = self.grid.name_of(node)
        self._weights[name] = weight
        if self.updates is not None and node in self._measured:
            self.updates.accept(name, self._measured[node])

    def _follow(self, asked: Sequence[int]) -> None:
        """Replace the ids of nodes that another node replaced during recovery."""
        moved = dict(zip(asked, self.grid.node_ids, strict=True))
        self.nodes = [moved.get(node, node) for node in self.nodes]
        self.present = [moved.get(node, node) for node in self.present]
        self._bounds = {moved.get(node, node): bound for node, bound in self._bounds.items()}

    def _in_order(self, replies: Iterable[Message]) -> Iterable[Message]:
        """Return replies sorted by learner if the mean's last bit depends on it (float64)."""
        return self.grid.in_order(replies) if self.reference.float64 else replies

    def _names(self, nodes: Iterable[int]) -> list[str]:
        return [self.grid.name_of(node) for node in nodes]


def _sum_of(losses: Iterable[float]) -> float | None:
    """Return the sum of the losses; None if it is beyond float64."""
    try:
        # fsum is exact, so that the order of replies does not matter.
        total = math.fsum(losses)
    # An overflow between the summands, or infinities of both signs.
    except (OverflowError, ValueError):
        return None
    return total if math.isfinite(total) else None
