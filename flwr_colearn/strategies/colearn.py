"""CoLearn, the strategy for Flower's Message API."""

import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from logging import INFO, WARNING
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common import DEFAULT_TTL, log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from ..aggregation.replies import examples_of
from ..aggregation.round import Folding
from ..checkpoint import CheckpointFolder
from ..compression.codecs import Broadcast, Float32, Wire
from ..errors import ColearnError, expected, real_number, whole_number
from ..history import History
from ..loop import Loop
from ..normalization.grid import NormalizationGrid
from ..normalization.recalibration import recalibrate
from ..normalization.schemes import PARTIAL, Average, Normalization, Pooled
from ..records import Outgoing, data_bytes, view
from ..recovery.grid import Event, Quorum, RecoveringGrid, Recovery
from ..recovery.membership import participant_arguments, wait_for_nodes
from ..roles import Arrays, Roles
from ..schedules import EpochRule, LearningRate
from .algorithm import CoLearningRule, Weighting


class CoLearn(FedAvg):
    """Co-learning: a drop-in for FedAvg that trains in few, long rounds (Mi et al., 2020).

    Every round all K participants start from the shared model and train T local epochs, at a
    learning rate that decays within the round (eq. 3) and restarts with the next; the shared model
    becomes the plain mean of theirs (eq. 2); T doubles whenever it moved by no more than epsilon
    (eq. 4). The participants learn T and the rate from the train config::

        from flwr_colearn import LocalPlan

        @app.train()
        def train(message, context):
            ...
            for epoch in LocalPlan.from_config(message.content["config"]):
                train_one_epoch(model, data, lr=epoch.learning_rate)

    What to do when you see it in the log:

    * *Recovery: restart of participant ...*: it failed or its reply was refused, for the reason
      given, and trains again in the same round.
    * *an attempt may take ... instead of timeout*: rounds have outgrown `timeout`; raise it, or
      bound T with ``IncreasingEpochs(maximum=...)``.
    * *Waiting for participants*: fewer than K nodes are connected; start the missing ones.
    * The relative change, in every round's record, is what `IncreasingEpochs.epsilon` is compared
      with: choose epsilon from it.

    Parameters
    ----------
    num_participants : int, optional
        K. Sets FedAvg's `min_train_nodes`, `min_available_nodes` and `min_evaluate_nodes`; every
        round has exactly K distinct participants. By default K is `min_train_nodes`.
    local_epochs : int or EpochRule
        T: ``IncreasingEpochs`` (ILE), ``FixedEpochs``, or a number for the latter.
    learning_rate : float or LearningRate
        ``CyclicalRate`` (CLR), ``ExponentialRate`` (ELR), ``ConstantRate``, or a number for the
        latter.
    total_epochs : int, optional
        Budget: the run ends when every participant has done so many local epochs, the last
        round's T being cut to fit.
    weighting : {"uniform", "weighted"}, default "uniform"
        1/K each as in eq. 2, or by FedAvg's `weighted_by_key` (number of examples).
    roles : mapping or sequence, optional
        Which arrays are weights, batch-norm means and variances, counters; see
        `flwr_colearn.Role`. By default their names decide.
    history : str, Path or History, optional
        Where the rounds are recorded: a file for JSON lines, or a `History`. By default in memory.
    wait_for_participants : float, optional
        Seconds to wait for K nodes to connect before the run ends with an error. By default
        without limit, as FedAvg does.
    recovery : Recovery, optional
        How `start` restarts participants that fail, and what it does when one is lost; by default
        three restarts, then the run ends with the model of the last completed round. ``None``
        leaves failed participants out, as Flower does.
    checkpoints : str, Path or CheckpointFolder, optional
        Where `start` saves the run after every round. By default nowhere.
    wire : Wire, optional
        Compression of the models on their way; by default none. Participants then need
        `flwr_colearn.wire_mod`.
    normalization : Normalization, optional
        What becomes of normalization layers where participants' data are unlike: see
        `flwr_colearn.Normalization`. By default their statistics are pooled.
    **kwargs
        The arguments of ``flwr.serverapp.strategy.FedAvg``, except `fraction_train`, which must
        stay 1: nobody is left out of a round.

    Attributes
    ----------
    history : History
        The rounds so far.
    rule : CoLearningRule
        The co-learning rule itself, and what it remembers.
    time_limit : float or None
        Seconds that an attempt of the round under way may take, in the loop of `start`.
    last_nodes : list of int
        The nodes of the last round's participants, who come first in the next.
    random : random.Random
        Chooses among spare nodes.

    Raises
    ------
    ColearnError
        If an argument is not what it should be; during a run, if participants are missing or no
        model arrived. Its `result` then holds what was reached.

    Examples
    --------
    >>> from flwr_colearn import CyclicalRate, IncreasingEpochs
    >>> strategy = CoLearn(
    ...     num_participants=5,
    ...     local_epochs=IncreasingEpochs(5, epsilon=0.01),
    ...     learning_rate=CyclicalRate(0.01),
    ... )
    >>> strategy.min_train_nodes
    5
    """

    exchanges_steps = False
    """Whether participants exchange after every step: a subclass may say so."""

    def __init__(
        self,
        num_participants: int | None = None,
        *,
        local_epochs: int | EpochRule,
        learning_rate: float | LearningRate,
        total_epochs: int | None = None,
        weighting: Weighting = "uniform",
        roles: Roles = None,
        history: str | Path | History | None = None,
        wait_for_participants: float | None = None,
        recovery: Recovery | None = Recovery(),  # noqa: B008  (an immutable value)
        checkpoints: str | Path | CheckpointFolder | None = None,
        wire: Wire = Wire(),  # noqa: B008  (an immutable value)
        normalization: Normalization = Pooled(),  # noqa: B008
        **kwargs: Any,
    ) -> None:
        nodes = participant_arguments(
            num_participants,
            kwargs,
            fraction="fraction_train",
            least=("min_train_nodes", "min_available_nodes", "min_evaluate_nodes"),
        )
        super().__init__(**{**kwargs, **nodes})
        self.num_participants = self.min_train_nodes
        self.wait_for_participants = (
            math.inf
            if wait_for_participants is None
            else real_number("wait_for_participants", wait_for_participants, least=0.0)
        )
        self._outgoing = Outgoing()
        self.rule = CoLearningRule(
            local_epochs,
            learning_rate,
            weighting,
            total_epochs,
            roles,
            history,
            normalization,
            self._outgoing.empty,
            self.num_participants,
        )
        self.normalization = normalization
        if normalization.side_by_side and not self.exchanges_steps:
            raise expected(
                "normalization",
                "a scheme that is exchanged once a round; layers that compute together need "
                "SynchronousSGD",
                normalization,
            )
        if not isinstance(wire, Wire):
            raise expected("wire", "a Wire, such as Wire(up=Int8(), down=Float16())", wire)
        if not wire.plain and self._own_loop_normalization is not None:
            raise expected(
                f"wire with normalization {normalization.name}",
                "Wire(), since what such a scheme leaves out or adds travels uncompressed",
                str(wire),
            )
        self._roles = roles
        self._normalizing: NormalizationGrid | None = None
        self.recovery = recovery
        self.checkpoints = (
            checkpoints
            if checkpoints is None or isinstance(checkpoints, CheckpointFolder)
            else CheckpointFolder(checkpoints)
        )
        self.wire = wire
        self.random = random.Random()
        self.time_limit: float | None = None
        self._folding: Folding | None = None
        self._model_bytes = 0
        self._grid: Grid | None = None
        self._loop: Loop | None = None
        self._viewed: tuple[ArrayRecord, Arrays] | None = None
        self.last_nodes: list[int] = []
        self._missing: list[int] = []
        self._evaluated: ArrayRecord | None = None

    @property
    def history(self) -> History:
        """The rounds so far."""
        return self.rule.history

    def summary(self) -> None:
        """Log the settings of the strategy."""
        self.rule.log_summary(lambda line: log(INFO, line))
        log(INFO, "\t├──> Participants: %s", self.num_participants)
        if not self.wire.plain:
            log(INFO, "\t├──> Wire: %s; participants need wire_mod", self.wire)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Decide T (eq. 4) from the arrays received, and ask K participants to train.

        Returns
        -------
        list of Message
            One for each participant, all with the same content; none when the budget is spent.
        """
        self._refuse_foreign_loop()
        self._grid = grid
        plan = self.rule.open(server_round, self.view_of(arrays))
        if plan is None:
            return []
        self._warn_of_foreign_loop(server_round)
        self.time_limit = None
        if self._loop is not None:
            self.time_limit = self._loop.time_limit(plan.local_epochs)
        plan = replace(plan, time_limit=self.time_limit)
        log(
            INFO,
            "configure_train: %s participants train %s local epochs from learning rate %g",
            self.num_participants,
            plan.local_epochs,
            plan.learning_rate,
        )
        self.last_nodes = self._choose_nodes(grid)
        broadcast = self.wire.broadcast(arrays, server_round)
        self._folding = Folding(self.rule, broadcast, self.weighted_by_key, self._name_of)
        self._model_bytes = data_bytes(broadcast.arrays)
        self.rule.sent_down(self._model_bytes * len(self.last_nodes))
        # A copy: Flower hands the same ConfigRecord to every round.
        train_config = ConfigRecord({**config, **plan.to_config()})
        content = self._content(broadcast, train_config)
        return [
            Message(
                content=content,
                message_type=MessageType.TRAIN,
                dst_node_id=node_id,
                # The reply, too, must arrive while the message lives.
                ttl=max(float(DEFAULT_TTL), 2.0 * (plan.time_limit or 0.0)),
            )
            for node_id in self.last_nodes
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies into the mean (eq. 2), refusing those that do not fit.

        Raises
        ------
        ColearnError
            If no model arrived at all.
        """
        if not self.rule.under_way:
            return None, None
        assert self._folding is not None
        folded = self._folding.fold(self._in_order(replies))
        if isinstance(self._grid, RecoveringGrid):
            self._note_recovery(self._grid)
        average = self._outgoing.record(self.rule.average())
        self._note_traffic()
        # By participant: the same bits in whatever order the replies arrived.
        metrics = [content for _, content in sorted(folded, key=itemgetter(0))]
        train_metrics = self._aggregate_metrics(self.train_metrics_aggr_fn, metrics)
        self.rule.note(train_metrics=train_metrics)
        return average, train_metrics

    def recalibrate(
        self, server_round: int, arrays: ArrayRecord, grid: Grid, timeout: float
    ) -> ArrayRecord:
        """Return the average with statistics that participants computed under it.

        Whoever fails is restarted like a participant that trains; one that is refused is left out,
        and if nobody is left the statistics stay as they are.
        """
        result = recalibrate(
            grid,
            self.last_nodes,
            server_round,
            arrays,
            self.rule.roles,
            self.rule.weight,
            timeout,
            (self.arrayrecord_key, self.configrecord_key, self.weighted_by_key),
        )
        if isinstance(grid, RecoveringGrid):
            self.rule.note_recovery(grid.take_events())
        for node_id, reason in result.refusals:
            self.rule.refuse(self._name_of(node_id), reason)
        self.rule.note_normalization(result.bytes_down, result.bytes_up)
        self._note_traffic()
        return result.arrays

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask participants that are connected to evaluate the shared model."""
        self._evaluated = arrays
        nodes = sorted(grid.get_node_ids())
        # As many as FedAvg asks for, but of those who are there: nobody is waited for.
        wanted = max(int(len(nodes) * self.fraction_evaluate), self.min_evaluate_nodes)
        if not self.rule.under_way or self.fraction_evaluate == 0.0 or not nodes:
            return []
        chosen = nodes if wanted >= len(nodes) else self.random.sample(nodes, wanted)
        record = ConfigRecord({**config, "server-round": server_round})
        content = self._content(self.wire.broadcast(arrays, server_round), record)
        return [
            Message(content=content, message_type=MessageType.EVALUATE, dst_node_id=node_id)
            for node_id in chosen
        ]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate the participants' evaluation metrics; failed or malformed replies are left out.

        Under a wrapper that runs Flower's own loop, such as differential privacy, this is the
        last hook of a round, so the round's record is closed here.
        """
        contents = [reply.content for reply in replies if self._evaluation_ok(reply)]
        metrics = self._aggregate_metrics(self.evaluate_metrics_aggr_fn, contents)
        self.rule.note(evaluate_metrics=metrics)
        if self._loop is None and self._evaluated is not None:
            self.rule.close(self.view_of(self._evaluated))
        return metrics

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int | None = None,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        resume: Literal["never", "auto"] = "never",
    ) -> Result:
        """Run co-learning; ends after `num_rounds` or when the budget of local epochs is spent.

        Parameters
        ----------
        grid : Grid
            Connects to the participants.
        initial_arrays : ArrayRecord
            w^0, by preference with names (``ArrayRecord(model.state_dict())``).
        num_rounds : int, optional
            By default 3, as in Flower, or without limit where `total_epochs` is given.
        timeout : float, default 3600
            Seconds that one attempt of one participant may take. It grows with T, from the time
            that a local epoch was seen to take, and the log says so.
        train_config, evaluate_config : ConfigRecord, optional
            Further entries for the participants; the plan's keys are added to the former.
        evaluate_fn : callable, optional
            ``(round, arrays) -> MetricRecord | None``: the server's own evaluation, called with
            round 0 before the first one.
        resume : {"never", "auto"}, default "never"
            "auto" goes on from the newest checkpoint, in the round that was under way when the
            server ended, with the plan that it would have had; without a checkpoint it begins.

        Returns
        -------
        Result
            The final model and the metrics of every round, by round number.

        Raises
        ------
        ColearnError
            If fewer than K nodes connect in time, a participant is lost, a round brings no model,
            the checkpoints are damaged or of another configuration, or there are some although
            `resume` is "never". ``error.result`` holds what was reached.
        """
        if num_rounds is not None:
            whole_number("num_rounds", num_rounds, least=1)
        elif self.rule.total_epochs is None:
            num_rounds = 3
        result = Result(arrays=initial_arrays)
        self._loop = Loop(
            self,
            self._recovering(grid),
            result,
            timeout,
            train_config or ConfigRecord(),
            evaluate_config or ConfigRecord(),
            evaluate_fn,
        )
        started = time.time()
        try:
            self._loop.run(num_rounds, resume)
        except ColearnError as error:
            error.result = result
            raise
        finally:
            self._loop.log_recovery()
            self._loop = None
        log(INFO, "")
        log(INFO, "Strategy execution finished in %.2fs", time.time() - started)
        return result

    def configuration(self) -> dict[str, str]:
        """Return what must be the same for a run to be resumed."""
        participants = {"number of participants": str(self.num_participants)}
        return {**self.rule.configuration(), **participants}

    def extra_arrays(self) -> Arrays:
        """Return the arrays besides the model that a resumed run needs; they are checkpointed."""
        return {}

    def restore_extra(self, arrays: Arrays) -> None:
        """Go on with what `extra_arrays` returned after the round that is resumed."""

    def _choose_nodes(self, grid: Grid) -> list[int]:
        """Return K connected nodes, those of the last round first."""
        wanted = max(self.min_available_nodes, self.num_participants)
        try:
            nodes = wait_for_nodes(grid, wanted, self._patience())
        except ColearnError:
            nodes = sorted(set(grid.get_node_ids()))
            policy = self.recovery.policy if self.recovery is not None else None
            if not isinstance(policy, Quorum) or len(nodes) < policy.least:
                raise
            log(WARNING, "Quorum: %s of %s participants are connected", len(nodes), wanted)
        stayed = [node for node in self.last_nodes if node in nodes]
        others = sorted(set(nodes) - set(stayed))
        free = self.num_participants - len(stayed)
        chosen = stayed + (others if len(others) <= free else self.random.sample(others, free))
        left = [node for node in self.last_nodes if node not in nodes]
        self._missing = left[: self.num_participants - len(chosen)]
        self.rule.note_recovery(
            Event(
                "absence",
                grid.name_of(node) if isinstance(grid, RecoveringGrid) else str(node),
                "it was not connected when the round began",
            )
            for node in self._missing
        )
        return chosen

    def _patience(self) -> float:
        """Return the seconds to wait for participants before a round."""
        if self.recovery is not None and isinstance(self.recovery.policy, Quorum):
            return min(self.wait_for_participants, self.recovery.patience)
        return self.wait_for_participants

    def _recovering(self, grid: Grid) -> Grid:
        """Return a grid that restarts participants, unless the recovery is None."""
        if isinstance(grid, RecoveringGrid):
            inner = self._normalized(grid.grid)
            if inner is grid.grid:
                return grid
            return RecoveringGrid(inner, grid.recovery, grid.check)
        if self.recovery is None:
            return self._normalized(grid)
        return RecoveringGrid(self._normalized(grid), self.recovery, self._check)

    def _normalized(self, grid: Grid) -> Grid:
        """Return a grid that sends what the normalization scheme lets travel."""
        self._normalizing = None
        if self._own_loop_normalization is None:
            return grid  # the whole model travels, and participants need not know
        self._normalizing = NormalizationGrid(grid, self.normalization, self._roles)
        return self._normalizing

    def _note_traffic(self) -> None:
        """Record what the scheme saved, and who lost what it had kept."""
        if self._normalizing is None:
            return
        traffic = self._normalizing.take_traffic()
        self.rule.note_normalization(
            -traffic.saved_down,
            -traffic.saved_up,
            [self._name_of(node) for node in traffic.fresh],
            PARTIAL if self.normalization.is_local else "",
        )

    def _name_of(self, node_id: int) -> str:
        grid = self._grid
        return grid.name_of(node_id) if isinstance(grid, RecoveringGrid) else str(node_id)

    def _content(self, broadcast: Broadcast, config: ConfigRecord) -> RecordDict:
        """Return what the messages of one broadcast hold."""
        return RecordDict(
            {
                self.arrayrecord_key: broadcast.arrays,
                self.configrecord_key: config,
                **broadcast.records,
            }
        )

    def _refuse_foreign_loop(self) -> None:
        """Raise for what only our own loop can do."""
        if self._loop is not None:
            return
        for name, value in (
            ("total_epochs", self.rule.total_epochs),
            ("checkpoints", self.checkpoints),
            ("normalization", self._own_loop_normalization),
        ):
            if value is not None:
                raise expected(
                    f"{name} under a wrapper such as differential privacy",
                    "None, since the wrapper runs Flower's loop, which has no budget and would "
                    "save averages without its noise, and exchanges whole models; use num_rounds",
                    value,
                )
        if not isinstance(self.wire.up, Float32):
            raise expected(
                "wire under a wrapper such as differential privacy",
                "up=Float32(), since the wrapper counts on the norm to which updates were clipped, "
                "which rounding changes",
                str(self.wire),
            )

    def _warn_of_foreign_loop(self, server_round: int) -> None:
        untrained = self.rule.untrained
        if self._loop is None and server_round == 1 and untrained:
            log(
                WARNING,
                "CoLearn: the model holds batch-norm statistics or counters (%s, %s in all). A "
                "differential privacy wrapper takes them for weights: its noise makes variances "
                "negative, and counters drown the update's norm or end the run. Use a model "
                "without batch norm, or do not send them.",
                untrained[0],
                len(untrained),
            )

    @property
    def _own_loop_normalization(self) -> Normalization | None:
        """The scheme, if it needs our own loop."""
        return None if isinstance(self.normalization, Average | Pooled) else self.normalization

    def _check(self, sent: Message, reply: Message) -> None:
        """Check a reply for the RecoveringGrid, which lasts longer than a round's folding."""
        assert self._folding is not None
        self._folding.check(sent, reply)

    def _note_recovery(self, grid: RecoveringGrid) -> None:
        """Take over what the grid had to do in this round."""
        self.rule.note_recovery(grid.take_events())
        self.rule.note_seconds(grid.seconds)
        self.rule.sent_down(self._model_bytes * (grid.sent - len(self.last_nodes)))
        self.last_nodes = grid.node_ids + self._missing
        self.rule.require(grid.required(self.num_participants))

    def _evaluation_ok(self, reply: Message) -> bool:
        try:
            examples_of(reply, self.weighted_by_key)
        except ColearnError as error:
            log(
                WARNING,
                "CoLearn: evaluation of node %s left out: %s",
                reply.metadata.src_node_id,
                error,
            )
            return False
        return True

    def _aggregate_metrics(
        self, aggregate: Callable[[list[RecordDict], str], MetricRecord], contents: list[RecordDict]
    ) -> MetricRecord | None:
        """Aggregate metrics; metrics that do not fit together never cost the trained model."""
        if not contents:
            return None
        try:
            return aggregate(contents, self.weighted_by_key)
        except Exception:  # a user's function over participants' input: anything may happen
            log(WARNING, "CoLearn: the metrics could not be aggregated", exc_info=True)
            return None

    def _in_order(self, replies: Iterable[Message]) -> Iterable[Message]:
        """Sort by participant where the sum's last bit depends on the order: float64 models."""
        if not self.rule.order_matters:
            return replies
        if isinstance(self._grid, RecoveringGrid):  # by name: a restart may change the node
            return self._grid.in_order(replies)
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def view_of(self, arrays: ArrayRecord) -> Arrays:
        """Return views of a record, the same ones for the same record."""
        if self._viewed is None or self._viewed[0] is not arrays:
            self._viewed = arrays, view(arrays)
        return self._viewed[1]
