"""Averaging: federated averaging with an exact mean, recovery and a history; a base class."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO, WARNING
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from .._flwr import called_privately
from ..adherence import Adherence
from ..aggregation import (
    RoundMean,
    Weighting,
    aggregated,
    as_weighting,
    average_metrics,
    check_private_weighting,
    echo_of,
    evaluations_of,
    mean_train_loss,
)
from ..best import Best, RunResult
from ..checkpoint import CheckpointFolder, as_folder
from ..compression import Compression
from ..errors import expected
from ..history import History, RoundLog, RoundRecord
from ..loop import EvaluateFn, Resume, run
from ..managed import Managed
from ..normalization import PARTIAL, Normalization, Pooled
from ..policy import DEFAULT_GUARD, DEFAULT_RECOVERY, Guard, Recovery, guard_under
from ..records import Outgoing, number_in
from ..roles import Role, Roles, named_roles
from ..stock import warn_of_private_statistics
from ..traffic import Event
from ..transport import ConnectedGrid, Transport
from .algorithm import Algorithm, Progress, plan_record
from .arguments import number_of, participant_arguments, patience
from .foreign_loop import refuse_in_foreign_loop
from .roster import Roster
from .shared_model import SharedModel

FRACTION = "fraction_train"
LEAST = ("min_train_nodes", "min_available_nodes", "min_evaluate_nodes")
"""FedAvg's arguments that K determines."""

F = TypeVar("F", bound=Callable[..., Any])


def folds(aggregate: F) -> F:
    """Mark an `aggregate_train` that iterates the replies only once, in any order.

    Any other `aggregate_train`, of a subclass, a mixin, a decorator or an instance, gets a list.
    """
    # The function itself, since functools.wraps copies attributes to the function that wraps it.
    aggregate.folds_replies = aggregate  # type: ignore[attr-defined]
    return aggregate


class Averaging(FedAvg, Managed[RoundLog]):
    """Federated averaging of all K participants, with an exact mean, recovery and a history.

    In contrast to ``FedAvg``, the models are summed in float64 and rounded once, statistics of
    normalization layers are pooled, invalid replies are refused with the reason, and participants
    that fail are restarted. The train config defines the local training; a record's local epochs
    and learning rate are those of its ``local-epochs`` and ``learning-rate``.
    `flwr_colearn.CoLearn` sets both.

    Parameters
    ----------
    num_participants : int, optional
        K, the number of distinct participants of every round. It sets FedAvg's `min_train_nodes`,
        `min_available_nodes` and `min_evaluate_nodes`. By default K is `min_train_nodes`.
    weighting : {"weighted", "uniform"}, default "weighted"
        "weighted" for FedAvg's `weighted_by_key` (number of examples), "uniform" for 1/K each.
    roles : mapping or sequence, optional
        The arrays that are weights, batch-norm means and variances, counters; see
        `flwr_colearn.Role`. The default depends on their names.
    names : sequence of str, optional
        The names of the arrays in order, ``list(net.state_dict())``, for a model that is sent
        without names; their roles follow from them.
    history : str, Path or History, optional
        A file for JSON lines, or a `History`. By default the history is in memory only.
    wait_for_participants : float, optional
        The seconds to wait for K nodes to connect before the run ends with an error. By default
        there is no limit, as in FedAvg.
    recovery : Recovery, optional
        The limits of restarts and the policy for lost participants. By default a participant has
        three restarts (none on an `InProcessGrid`), and the run then ends with an error whose
        attribute `result` has the model of the last completed round. With ``None`` failed
        participants are left out, as in Flower.
    checkpoints : str, Path or CheckpointFolder, optional
        The folder in which `start` saves the run after every round. By default there is none.
    compression : Compression, optional
        The codecs of models in messages, by default none. With a codec participants need
        `flwr_colearn.participant_mod`.
    normalization : Normalization, optional
        The scheme for normalization layers where participants' data differ, see
        `flwr_colearn.Normalization`. By default their statistics are pooled.
    participants : sequence of str, optional
        The registered names of the only SuperNodes that receive the model, see
        `flwr_colearn.Transport`; K is their number. By default any K SuperNodes take part.
    guard : Guard, optional
        The bounds of one participant's update, see `flwr_colearn.Guard`; ``None`` for none.
    rotate : bool, default False
        Whether the participants of a round are those that have not trained for longest, where more
        than K are connected. By default the same K train in every round, since participants have
        client state.
    strict : bool, default False
        Whether a reply is refused whose participant states, by its mod, that it trained other local
        epochs than the plan's. By default a warning is logged and recorded.
    algorithm : Algorithm, optional
        The rules for T and the learning rate of every round; by default the train config has them.
    **kwargs
        The arguments of ``flwr.serverapp.strategy.FedAvg``, except `fraction_train`, which must
        stay 1, since all participants train in every round.

    Attributes
    ----------
    history : History
        The records of the rounds so far.
    progress : Progress
        The progress of the run.
    random : random.Random
        The random generator for the choice among spare nodes.

    Raises
    ------
    ColearnError
        If an argument is invalid; during a run, if participants are missing or no model arrived.
        Its `result` then holds the result up to the last completed round.

    Examples
    --------
    >>> strategy = Averaging(num_participants=5)
    >>> strategy.min_train_nodes
    5
    """

    exchanges_steps = False
    """Whether participants exchange gradients after every step, as in `SynchronousSGD`."""

    def __init__(
        self,
        num_participants: int | None = None,
        *,
        weighting: Weighting = "weighted",
        roles: Roles = None,
        names: Sequence[str] | None = None,
        history: str | Path | History | None = None,
        wait_for_participants: float | None = None,
        recovery: Recovery | None = DEFAULT_RECOVERY,
        checkpoints: str | Path | CheckpointFolder | None = None,
        compression: Compression = Compression(),  # noqa: B008  (an immutable value)
        normalization: Normalization = Pooled(),  # noqa: B008
        participants: Sequence[str] | None = None,
        guard: Guard | None = DEFAULT_GUARD,
        rotate: bool = False,
        strict: bool = False,
        algorithm: Algorithm | None = None,
        **kwargs: Any,
    ) -> None:
        self.transport = Transport(
            recovery, normalization, compression, named_roles(names, roles), participants, guard
        )
        # K as the user gave it; without it, K follows the names of a connected grid.
        given = number_of(participants, num_participants)
        self._given = kwargs.get(LEAST[0]) if given is None else given
        self._arguments = kwargs
        # Flower's own default averages a metric that a participant lacks as 0.
        for key in ("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"):
            kwargs[key] = kwargs.get(key) or average_metrics
        super().__init__(**{**kwargs, **participant_arguments(given, kwargs, FRACTION, LEAST)})
        if normalization.all_reduces and not self.exchanges_steps:
            raise expected(
                "normalization",
                "a scheme that is exchanged once a round; layers that compute together need "
                "SynchronousSGD",
                normalization,
            )
        self.weighting = as_weighting(weighting)
        self.checkpoints = as_folder(checkpoints)
        self.algorithm = algorithm
        self.log = RoundLog(history)
        self._adherence = Adherence(strict)
        self.progress = Progress()
        self.random = random.Random()
        self._roster = Roster(
            type(self).__name__, self.random, patience(wait_for_participants), rotate
        )
        self._shared = SharedModel()
        self._outgoing = Outgoing()
        self._mean: RoundMean | None = None
        self._guarded: Mapping[str, Any] | None = None
        self._told: Mapping[str, float] = {}
        self._timeout: float | None = None
        self._grid: ConnectedGrid | None = None
        self._accounted = False
        self._evaluated: ArrayRecord | None = None

    @property
    def num_participants(self) -> int:
        """K, the number of participants of every round."""
        return self.min_train_nodes

    @property
    def history(self) -> History:
        """The records of the rounds so far."""
        return self.log.history

    @property
    def roles(self) -> Mapping[str, Role]:
        """The role of every array in the average; empty before the first round."""
        return self._shared.roles

    @property
    def _features(self) -> Transport:
        """The features of the run's exchanges, with those of a grid that the user has connected."""
        return self.transport if self._grid is None else self._grid.transport

    @property
    def total_epochs(self) -> int | None:
        """The budget of local epochs per participant; None if there is none."""
        return None if self.algorithm is None else self.algorithm.total_epochs

    @property
    def spent(self) -> bool:
        """Whether the budget of local epochs is spent."""
        return self.algorithm is not None and self.algorithm.spent(self.progress)

    @property
    def streams(self) -> bool:  # type: ignore[override]
        """Whether `aggregate_train` takes an iterator: not if anything overrides it."""
        # Of the instance, which may have one of its own.
        function = getattr(self.aggregate_train, "__func__", None)
        return function is not None and getattr(function, "folds_replies", None) is function

    def summary(self) -> None:
        """Log the settings of the strategy."""
        if self.algorithm is not None:
            self.algorithm.log_summary(lambda line: log(INFO, line))
        log(INFO, "\t├──> Participants: %s, weighting: %s", self.num_participants, self.weighting)
        log(INFO, "\t├──> Normalization: %s", self.transport.normalization)
        if not self.transport.compression.is_plain:
            compression = self.transport.compression
            log(INFO, "\t├──> Compression: %s; participants need participant_mod", compression)
        super().summary()

    # Flower's hooks -----------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the train messages to K participants.

        Returns
        -------
        list of Message
            One message for each participant, all with the same content; none if the budget is
            spent.
        """
        self._connect(grid)
        private = self._timeout is None and called_privately()
        if self._timeout is None:
            self._check_foreign_loop(server_round, private)
        # Under a wrapper Flower's own loop runs, which has no hook for the start of a run: a round
        # number that does not grow is that of another run.
        if server_round <= self.progress.round:
            self._clear()
        # In Flower's loop without an evaluation, the last round's record is closed only here.
        self.close(arrays)
        if self.spent:
            return []
        entries, record = self._begin_round(server_round, arrays, config)
        self._shared.send(arrays, self._features)
        if private and server_round == 1 and self._shared.untrained:
            warn_of_private_statistics(self._shared.untrained)
        self._renew_mean(server_round, record.local_epochs)
        members = self._roster.choose(
            grid, self.num_participants, self.min_available_nodes, self._features.recovery
        )
        self._accounted = False
        self.log.open(record)
        reason = "it was not connected when the round began"
        self.log.note_events(
            Event("absence", self._name_of(node), reason) for node in members.missing
        )
        # A copy of the config, since Flower passes the same ConfigRecord to every round.
        content = self._content(arrays, ConfigRecord({**config, **entries}))
        return [Message(content, node, MessageType.TRAIN) for node in members.nodes]

    @folds
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the replies' models to the mean (eq. 2); invalid replies are refused.

        A subclass may leave replies out or change them; the round then is what it passes on.

        Returns
        -------
        ArrayRecord or None
            The average; None if the budget is spent, or a subclass left out all replies.
        MetricRecord or None
            The aggregated metrics.

        Raises
        ------
        ColearnError
            If no model arrived at all, or fewer than the recovery's policy requires.
        """
        if self.spent and not self.log.is_open:
            return None, None
        record = self.log.record
        assert self._mean is not None
        accepted = self._mean.fold(self._in_order(replies), self._name_of)
        self.log.note_events(self._mean.events)
        record.participants = self._mean.participants
        left_out = self._account()
        if left_out and not self._mean.count:
            # As FedAvg without replies: the round has no average, and the model stays.
            log(WARNING, "%s left out the replies of all participants", type(self).__name__)
            return None, None
        average = self._outgoing.record(self._mean.mean())
        record.contributions = self._mean.contributions
        # Sorted by participant, so that the order of arrival does not change the last bits.
        metrics = sorted(accepted, key=itemgetter(0))
        self.progress = self.progress.told(mean_train_loss(metrics))
        train_metrics = aggregated(self.train_metrics_aggr_fn, metrics, self.weighted_by_key)
        self.log.note(train_metrics=train_metrics)
        return average, train_metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the evaluate messages to connected participants."""
        self._evaluated = arrays
        nodes = sorted(grid.get_node_ids())
        # The number of nodes is FedAvg's, but the server does not wait for more to connect: an
        # evaluation is not worth a delay of the training.
        wanted = max(int(len(nodes) * self.fraction_evaluate), self.min_evaluate_nodes)
        if not self.log.is_open or self.fraction_evaluate == 0.0 or not nodes:
            return []
        chosen = nodes if wanted >= len(nodes) else self.random.sample(nodes, wanted)
        content = self._content(arrays, ConfigRecord({**config, "server-round": server_round}))
        return [Message(content, node, MessageType.EVALUATE) for node in chosen]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate the participants' evaluation metrics, without failed or malformed replies.

        Under a wrapper that runs Flower's own loop, such as differential privacy, this is the last
        hook of a round, so the round's record is closed here.
        """
        named = evaluations_of(replies, self.weighted_by_key, self._name_of)
        metrics = aggregated(self.evaluate_metrics_aggr_fn, named, self.weighted_by_key)
        self.log.note(evaluate_metrics=metrics)
        if self._timeout is None and self._evaluated is not None:
            if self._grid is not None:
                self.log.note_evaluation(self._grid.take())
            self.close(self._evaluated)
        return metrics

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int | None = None,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
        resume: Resume = "never",
        best: Best | None = None,
    ) -> RunResult:
        """Run the strategy for `num_rounds`, or until the budget of local epochs is spent.

        Parameters
        ----------
        grid : Grid
            Connects to the participants.
        initial_arrays : ArrayRecord
            w^0, by preference with names (``ArrayRecord(model.state_dict())``).
        num_rounds : int, optional
            The number of rounds; by default 3, as in Flower, or without limit if there is a budget.
        timeout : float, default 3600
            The seconds that one attempt of one participant may take. The limit grows with T, by
            the measured time of a local epoch, of which more than twice that of the first round
            does not count, and the log contains a warning then.
        train_config, evaluate_config : ConfigRecord, optional
            Further config entries for the participants; the plan's keys are added to the former.
        evaluate_fn : callable, optional
            ``(round, arrays) -> MetricRecord | None``: the server's own evaluation, called with
            round 0 before the first one.
        resume : {"never", "auto"}, default "never"
            "auto" resumes from the newest checkpoint, in the round that was under way when the
            server ended, with the same plan; without a checkpoint a new run starts.

        best : Best, optional
            The metric by which the best shared model is kept beside the last, and the patience
            after which the run ends early. By default there is no best model.

        Returns
        -------
        RunResult
            Flower's ``Result``: the final model and the metrics of every round, by round number;
            also the best model, and the reason if the run ended early.

        Raises
        ------
        ColearnError
            If fewer than K nodes connect in time, a participant is lost, a round produces no model,
            the checkpoints are damaged or of another configuration, or there are some although
            `resume` is "never". ``error.result`` holds the result up to then.
        """
        budget = self.total_epochs is not None
        return run(
            self,
            grid,
            initial_arrays,
            num_rounds if num_rounds is not None or budget else 3,
            timeout,
            train_config,
            evaluate_config,
            evaluate_fn,
            resume=resume,
            best=best,
        )

    # The interface of Managed -------------------------------------------------------------------

    def begin(
        self,
        grid: ConnectedGrid,
        timeout: float,
        num_rounds: int | None,
        save: Callable[[int], None],
    ) -> None:
        """Begin a run in `flwr_colearn.run`, and reset the state of an earlier one."""
        # A timeout that is set marks a run in this package's loop, and not in Flower's.
        self._timeout = timeout
        self._connect(grid)
        self._clear()

    def end(self) -> None:
        """End a run in `flwr_colearn.run`."""
        self._timeout = self._grid = None

    def check_reply(self, sent: Message, reply: Message) -> None:
        """Raise a ColearnError unless `reply` is a usable answer to the train message `sent`."""
        assert self._mean is not None
        self._mean.check(sent, reply)

    def measure(self, arrays: ArrayRecord) -> None:
        """Measure the relative change of the shared model."""
        if self.log.is_open:
            self._account_for_own()
            self._change(arrays)

    def close(self, arrays: ArrayRecord) -> None:
        """Complete the record of the round under way, if any; `arrays` is the shared model."""
        if self.log.is_open:
            self.log.close(self._change(arrays))

    def configuration(self) -> dict[str, str]:
        """Return the settings that a resumed run must have in common with the saved one."""
        return {
            **({} if self.algorithm is None else self.algorithm.configuration()),
            "weighting": self.weighting,
            "number of participants": str(self.num_participants),
        }

    def strategy_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the strategy's state in types of JSON, and no arrays."""
        # A resumed run has no mean before its first training, and may be saved before that.
        updates = None if self._mean is None else self._mean.updates
        state = {
            "progress": self.progress.to_json(),
            "random": self.random.getstate(),
            "nodes": self._roster.nodes,
            "examples": self._told if self._mean is None else self._mean.examples.state(),
            "guard": self._guarded if updates is None else updates.state(),
            **self._shared.state(),
        }
        return state, {}

    def restore_strategy_state(self, state: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
        """Restore the state that `strategy_state` returned."""
        self.progress = Progress.from_json(state["progress"])
        self._roster.nodes = [int(node) for node in state["nodes"]]
        version, numbers, gauss = state["random"]
        self.random.setstate((version, tuple(numbers), gauss))
        if self.progress.round:
            self._shared.restore(state)
        self._guarded, self._told = state.get("guard"), state.get("examples", {})

    # Steps --------------------------------------------------------------------------------------

    def _connect(self, grid: Grid) -> None:
        """Set the grid; if it has named participants, K is their number."""
        self._grid = grid if isinstance(grid, ConnectedGrid) else None
        names = None if self._grid is None else self._grid.participants
        if names is not None:
            k = number_of(names, self._given)
            for name, value in participant_arguments(k, self._arguments, FRACTION, LEAST).items():
                setattr(self, name, value)

    def _check_foreign_loop(self, server_round: int, private: bool) -> None:
        """Check what a loop outside `flwr_colearn.run`, a wrapper's or a subclass's, must not have.

        Raises
        ------
        ColearnError
            If the strategy has a feature that such a loop does not use.
        """
        total = self.total_epochs
        connected = None if self._grid is None else self._grid.transport
        refuse_in_foreign_loop(self.transport, connected, total, self.checkpoints, private)
        if private:
            check_private_weighting(self.weighting)
            if connected is not None:
                connected.check_privacy()
        if self._grid is not None:
            self._grid.check_by(self.check_reply)
        elif server_round == 1 and self.transport.recovery is not None:
            log(
                WARNING,
                "%s: this loop's grid has no restarts: grid = strategy.transport.connect(grid) "
                "before the first round",
                type(self).__name__,
            )

    def _begin_round(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> tuple[dict[str, Any], RoundRecord]:
        """Return the round's entries of the train config, and the round's record."""
        if self.algorithm is None:
            epochs, rate = (
                int(number_in(config, "local-epochs")),
                number_in(config, "learning-rate"),
            )
            seen = self.progress.seen.then(epochs)
            self.progress = self.progress.started(server_round, seen, epochs)
            entries: dict[str, Any] = {"server-round": server_round}
            record = RoundRecord(server_round, epochs, rate, self.progress.epochs_done)
        else:
            change = self._change(arrays) if self.progress.round else None
            plan, self.progress = self.algorithm.next_plan(server_round, self.progress, change)
            entries, record = plan.to_config(), plan_record(plan, self.progress)
            # A step of an exchange of gradients is no training of its own.
            self._adherence.renew(None if self.exchanges_steps else plan)
        self.time_limit = self.progress.time_limit(self._timeout, record.local_epochs)
        if self.time_limit is not None:
            entries["time-limit"] = self.time_limit
        log(
            INFO,
            "configure_train: %s participants train %s local epochs, learning rate %s",
            self.num_participants,
            record.local_epochs,
            record.rates,
        )
        scheme = self._features.normalization
        if not scheme.travels_whole:
            record.normalization = {"scheme": scheme.name, "reinitialised": []}
        if scheme.is_local:
            record.normalization["shared-model"] = PARTIAL
        return entries, record

    def _change(self, arrays: ArrayRecord) -> float | None:
        """Return the relative change of the last round, or of the one under way."""
        # Without a mean the run was resumed after the aggregation, and the change was restored.
        # A subclass with an aggregation of its own adds nothing to the mean.
        averaged = self._mean is None or self._mean.count > 0 or self._shared.differs(arrays)
        return self._shared.change(arrays, averaged)

    def _renew_mean(self, server_round: int, epochs: int) -> None:
        if self._mean is None:
            private = called_privately()
            self._mean = RoundMean(
                self._shared.arrays,
                self._shared.roles,
                self.weighting,
                self.num_participants,
                self.weighted_by_key,
                self._outgoing.empty,
                self._shared.variances,
                rounded=not self._features.compression.keeps_signs,
                guard=guard_under(self._features.applied_guard, private=private),
                gradients=self.exchanges_steps,
                # Its noise is calibrated for K participants, of which none may be left out.
                refuses=not private,
                admits=self._check_plan,
            )
            self._mean.examples.restore(self._told)
            if self._mean.updates is not None and self._guarded is not None:
                self._mean.updates.restore(self._guarded)
        self._mean.renew(server_round, self._shared.arrays, epochs)

    def _account(self) -> list[str]:
        """Record the round's traffic and events, and check that enough participants replied.

        Returns
        -------
        list of str
            The participants whose replies a subclass left out, which are not lost.
        """
        if self._grid is None:
            self._note_adherence({})
        if self._grid is None or self._accounted:
            return []
        assert self._mean is not None
        self._accounted = True
        traffic = self._grid.take()
        self.log.note_traffic(traffic)
        # Before the traffic's refusals are added, after which the participant was restarted.
        lost = {event.participant for event in self._mean.events if event.kind == "refusal"}
        lost |= {event.participant for event in traffic.events if event.kind == "absence"}
        self._mean.note(traffic.events)
        self._roster.renew(self._grid.node_ids, traffic.gone)
        if epochs := self.log.record.local_epochs:
            self.progress = self.progress.timed(traffic.seconds, epochs)
        self._note_adherence(traffic.durations)
        left_out = set(traffic.names.values()) - lost - set(self._mean.participants)
        # Without an override every reply that arrived is in the mean or refused.
        if self.streams:
            left_out = set()
        required = self._grid.transport.required(self.num_participants)
        self._mean.require(required - len(left_out))
        reason = f"aggregate_train of {type(self).__name__} passed no reply of it on"
        self.log.note_events(Event("absence", name, reason) for name in sorted(left_out))
        return sorted(left_out)

    def _account_for_own(self) -> None:
        """Record the traffic of a round whose aggregation is a subclass's own, without `super`."""
        if self._grid is None or self._accounted or self._mean is None:
            return
        self._accounted = True
        traffic = self._grid.take()
        self.log.note_traffic(traffic)
        absent = {event.participant for event in traffic.events if event.kind == "absence"}
        self.log.record.participants = sorted(set(traffic.names.values()) - absent)
        self._note_adherence(traffic.durations)
        self._roster.renew(self._grid.node_ids)

    def _check_plan(self, reply: Message) -> None:
        """Raise a ColearnError for a reply of other epochs than the plan's, if this is strict."""
        self._adherence.check(self._name_of(reply.metadata.src_node_id), echo_of(reply))

    def _note_adherence(self, seconds: Mapping[str, float]) -> None:
        """Record a warning for the participants that do not follow the plan."""
        participants = self.log.record.participants
        self.log.note_events(self._adherence.events(participants, seconds))

    def _in_order(self, replies: Iterable[Message]) -> Iterable[Message]:
        """Return replies sorted by participant if a sum's last bit depends on it (float64)."""
        assert self._mean is not None
        # Otherwise replies are processed in the order of arrival, one model in memory at a time.
        if not self._mean.order_matters:
            return replies
        # By name, since the node may change with a restart.
        if self._grid is not None:
            return self._grid.in_order(replies)
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def _name_of(self, node_id: int) -> str:
        return str(node_id) if self._grid is None else self._grid.name_of(node_id)

    def _content(self, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        return RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})

    def _clear(self) -> None:
        """Reset the state of an earlier run."""
        self.progress, self._mean, self._guarded, self._told = Progress(), None, None, {}
        self._roster.clear()
        self._shared.clear()
        self._adherence.clear()
        self.log.clear()
