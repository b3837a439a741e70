"""The function run: a loop for any Flower strategy, with recovery, history and checkpoints."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from logging import INFO, WARNING
from pathlib import Path
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ._flwr import config_to_str, copied, is_private
from .aggregation import cannot_evaluate, check_initial, check_private_weighting
from .best import Best, BestSoFar, RunResult
from .checkpoint import (
    Checkpoint,
    CheckpointFolder,
    as_folder,
    check_same_configuration,
    describe_arrays,
    describe_roles,
)
from .errors import ColearnError, expected, whole_number
from .history import History, RoundLog, plain_means
from .managed import Managed
from .normalization import PARTIAL, Keys, Recalibration
from .policy import attempt_limit, reply_within, timed
from .records import cast_record, data_bytes, records_of, to_record, types_of, view
from .roles import Arrays, assign_roles
from .stock import Stock
from .strategy_state import ForgottenAttributes, chain_of, restore_state, save_state
from .transport import ConnectedGrid, Transport

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
Resume = Literal["never", "auto"]


def run(
    strategy: Strategy,
    grid: Grid,
    initial_arrays: ArrayRecord,
    num_rounds: int | None = 3,
    timeout: float = 3600,
    train_config: ConfigRecord | None = None,
    evaluate_config: ConfigRecord | None = None,
    evaluate_fn: EvaluateFn | None = None,
    transport: Transport | None = None,
    checkpoints: str | Path | CheckpointFolder | None = None,
    history: str | Path | History | None = None,
    resume: Resume = "never",
    best: Best | None = None,
) -> RunResult:
    """Run any Flower strategy by its hooks, with recovery, a history, checkpoints and resume.

    Participants that fail are restarted in the same round, every round is recorded, and with
    checkpoints a server that was killed resumes the interrupted round. Arrays that the strategy
    returns are cast to the types of the initial ones; integers are rounded. For strategies outside
    this package the statistics of normalization layers are pooled (see `flwr_colearn.stock.Stock`),
    and the replies are a list in the order of the participants' names.

    A checkpoint holds the strategy's own state if the strategy has the methods
    ``strategy_state() -> (json, arrays)`` and ``restore_strategy_state(json, arrays)``, or if it is
    one of Flower's. A warning names the other attributes that change.

    Parameters
    ----------
    strategy : Strategy
        Any: FedAvg, FedProx, FedAdam, FedAdagrad, FedYogi, FedAvgM, FedMedian, FedTrimmedAvg, Krum,
        QFedAvg, one of Flower's privacy wrappers, a subclass of your own, or one of this package.
    grid : Grid
        Connects to the participants.
    initial_arrays : ArrayRecord
        The initial model, by preference with names (``ArrayRecord(model.state_dict())``).
    num_rounds : int or None, default 3
        The number of rounds; ``None`` runs until the strategy's budget is spent.
    timeout : float, default 3600
        The seconds that one attempt of one participant may take.
    train_config, evaluate_config : ConfigRecord, optional
        Further config entries for the participants.
    evaluate_fn : callable, optional
        ``(round, arrays) -> MetricRecord | None``: the server's own evaluation, called with round 0
        before the first one.
    transport : Transport, optional
        The features of the exchanges; by default the strategy's, or ``Transport()``.
    checkpoints : str, Path or CheckpointFolder, optional
        The folder in which the run is saved after every round; by default the strategy's, or none.
    history : str, Path or History, optional
        The history of the rounds; by default the strategy's, or one in memory.
    resume : {"never", "auto"}, default "never"
        "auto" resumes from the newest checkpoint; without a checkpoint a new run starts.
    best : Best, optional
        The metric by which the best shared model is kept beside the last, and the patience after
        which the run ends early. By default there is no best model.

    Returns
    -------
    RunResult
        Flower's ``Result``: the final model and the metrics of every round, by round number; also
        the best model, and the reason if the run ended early.

    Raises
    ------
    ColearnError
        If a participant is lost, a round produces no model, the checkpoints are damaged or of
        another configuration, or there are some although `resume` is "never". ``error.result``
        holds the result up to then, and the error's text says so; that is true of an exception of
        the strategy or `evaluate_fn` too. A round's average is saved before its evaluation, so
        that a resumed run evaluates it and does not train it again.

    Examples
    --------
    ::

        from flwr.serverapp.strategy import FedAdam

        result = run(
            FedAdam(eta=0.01),
            grid,
            ArrayRecord(model.state_dict()),
            num_rounds=20,
            transport=Transport(compression=Compression(up=Int8(), down=Float16())),
            checkpoints="/var/lib/flower/checkpoints",
            history="/var/lib/flower/history.jsonl",
            resume="auto",
        )
    """
    if num_rounds is not None:
        whole_number("num_rounds", num_rounds, least=1)
    check_initial(view(initial_arrays))
    manager = _manager_of(strategy, history)
    own = manager.transport if transport is None else manager.transport.combined(transport)
    connected = own.connect(grid, manager.check_reply, initial_arrays)
    connected.serve(chain_of(strategy), manager.weighting == "weighted")
    if any(map(is_private, chain_of(strategy))):
        connected.transport.check_privacy()
        if not isinstance(manager, Stock):  # which warns, since other strategies weigh as they like
            check_private_weighting(manager.weighting)
    return _Run(
        strategy,
        manager,
        connected,
        RunResult(arrays=initial_arrays),
        num_rounds,
        timeout,
        train_config or ConfigRecord(),
        evaluate_config or ConfigRecord(),
        evaluate_fn,
        as_folder(checkpoints) or manager.checkpoints,
        BestSoFar(best),
    ).to_the_end(resume)


def _manager_of(strategy: Strategy, history: str | Path | History | None) -> Managed[Any]:
    """Return the strategy itself if it is one of this package, wrapped or not; else a `Stock`."""
    # Flower's privacy wrappers hold the strategy that they wrap, whose log and state are needed.
    innermost = list(chain_of(strategy))[-1]
    if not isinstance(innermost, Managed):
        return Stock(strategy, RoundLog(history))
    if history is not None:
        innermost.log = type(innermost.log)(history)
    return innermost


@dataclass
class _Run:
    """One run of a strategy.

    Attributes
    ----------
    strategy : Strategy
        The strategy whose hooks are called.
    manager : Managed
        The strategy, the one that it wraps, or the `Stock` of one outside this package.
    grid : ConnectedGrid
        Connects to the participants.
    result : RunResult
        The result so far; at first the initial model.
    num_rounds : int or None
        The last round; None for the end of the budget.
    timeout : float
        The least time limit of one attempt of one participant, in seconds.
    train_config, evaluate_config : ConfigRecord
        Further config entries for the participants.
    evaluate_fn : callable or None
        The server's own evaluation.
    checkpoints : CheckpointFolder or None
        The folder in which the run is saved.
    best : BestSoFar
        The best model so far.
    """

    strategy: Strategy
    manager: Managed[Any]
    grid: ConnectedGrid
    result: RunResult
    num_rounds: int | None
    timeout: float
    train_config: ConfigRecord
    evaluate_config: ConfigRecord
    evaluate_fn: EvaluateFn | None
    checkpoints: CheckpointFolder | None
    best: BestSoFar

    def __post_init__(self) -> None:
        self._types = types_of(self.result.arrays)
        # The last round whose average is in the result.
        self._averaged = 0
        self._cannot_evaluate: set[int] = set()
        self._unsaved = ForgottenAttributes(self.strategy)
        self._cleanup = ExitStack()

    def to_the_end(self, resume: Resume) -> RunResult:
        """Run to the last round, or until the budget is spent."""
        started = time.time()
        try:
            self._rounds(self._begin(resume))
        except Exception as error:
            self._keep_result(error)
            raise
        finally:
            # The events are most useful after an error, so they are logged then too.
            self._log_events()
            self.best.warn_at_the_end()
            self.manager.end()
            self._cleanup.close()
        log(INFO, "")
        log(INFO, "Strategy execution finished in %.2fs", time.time() - started)
        return self.result

    def _keep_result(self, error: Exception) -> None:
        """Give an error the result up to the last completed round, and say where it is."""
        # Not of our errors only: an `evaluate_fn` may raise any, and the model is there.
        with suppress(AttributeError):
            error.result = self.result  # type: ignore[attr-defined]
        if not self._averaged:
            return
        where = (
            f"The model of round {self._averaged} is not lost: it is error.result.arrays in "
            "`except ColearnError as error:` around the call"
        )
        if self.checkpoints is not None:
            where += f", and in {self.checkpoints.path.absolute()}, where resume='auto' goes on"
        if isinstance(error, ColearnError):
            error.remedy = where
        else:
            error.add_note(where.replace("ColearnError", type(error).__name__))

    def _rounds(self, done: int) -> None:
        while self._goes_on(done):
            done += 1
            total = f"/{self.num_rounds}" if self.num_rounds else ""
            log(INFO, "")
            log(INFO, "[ROUND %s%s]", done, total)
            self._round(done)

    def _goes_on(self, done: int) -> bool:
        """Return whether there is a round after those that are done."""
        return self._has_rounds(done) and not self.best.reason

    def _has_rounds(self, done: int) -> bool:
        """Return whether a round is left that an early end of the run would leave out."""
        return (self.num_rounds is None or done < self.num_rounds) and not self.manager.spent

    def _round(self, server_round: int) -> None:
        # A strategy whose round is not one exchange of models, such as DynamicAveraging, has a
        # method `round`, which takes the place of Flower's hooks for training.
        own = getattr(self.strategy, "round", None)
        # A copy of the config, since strategies add entries such as the round to it.
        arrays, metrics = (own or self._train)(
            server_round, self.result.arrays, ConfigRecord({**self.train_config}), self.grid
        )
        if arrays is not None:
            self.result.arrays = cast_record(arrays, self._types)
            self._averaged = server_round
        if metrics is not None:
            log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
            self.result.train_metrics_clientapp[server_round] = metrics
        self.manager.measure(self.result.arrays)
        # An evaluation that raises, or a server that is killed in it, costs no training.
        self._save(server_round, complete=False, averaged=True)
        self._finish(server_round)

    def _finish(self, server_round: int) -> None:
        """Evaluate the average of a round, and complete the round."""
        # The record is closed after both evaluations, whose metrics it holds, and the checkpoint
        # is saved after that, so that it holds the record.
        self._evaluate(server_round)
        self._evaluate_on_server(server_round)
        self._compare(server_round)
        self.manager.close(self.result.arrays)
        self._save(server_round)
        self._unsaved.warn()

    # Training and evaluation --------------------------------------------------------------------

    def _train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: ConnectedGrid
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Train a round by Flower's hooks."""
        manager = self.manager
        manager.open(server_round, arrays, config)
        if isinstance(manager, Stock):
            arrays = manager.floats_of(arrays)
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        # Flower's strategies sample nodes in random order, which must not decide the order of sums.
        if isinstance(manager, Stock):
            messages.sort(key=lambda message: message.metadata.dst_node_id)
        messages = self._same_nodes(server_round, messages)
        within = reply_within(manager.time_limit)
        # A wrapper around the strategy may read the replies more than once, so it gets a list.
        if manager.streams and isinstance(self.strategy, Managed):
            replies: Iterable[Message] = grid.stream(messages, timeout=within)
        else:
            replies = list(grid.send_and_receive(messages, timeout=within))
        average, metrics = self._aggregated(server_round, replies)
        if average is not None and self.grid.transport.normalization.due(server_round):
            average = self._recalibrated(server_round, average, within)
        return average, metrics

    def _aggregated(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the strategy's aggregate of the replies."""
        if not isinstance(self.manager, Stock):
            return self.strategy.aggregate_train(server_round, replies)
        # Before the strategy's aggregation, which may change the replies.
        replies = self.manager.admitted(list(replies), self.grid.name_of)
        good = [reply for reply in replies if reply.has_content()]
        names = [self.grid.name_of(reply.metadata.src_node_id) for reply in good]
        self.manager.fix_examples(good, self.grid.name_of)
        self.manager.bound_shares(good, self.grid.name_of)
        self.manager.note_contributions(good, self.grid.name_of)
        arrived = self.manager.arrived(good)
        self.manager.give_floats(good)
        treatment = self.manager.metrics("train", self.grid.name_of)
        average, own = self.strategy.aggregate_train(server_round, treatment.given(replies))
        metrics = treatment.result(own)
        self.manager.log.note_traffic(self.grid.take())
        self.manager.note_training(names, metrics)
        if average is not None:
            statistics = self.manager.statistics_of(arrived)
            average = self.manager.with_statistics(average, statistics)
        return average, metrics

    def _same_nodes(self, server_round: int, messages: list[Message]) -> list[Message]:
        """Return the messages, in a resumed round addressed to the nodes of the interrupted one.

        A strategy may choose nodes at random, and only the nodes of the interrupted round have
        started this training. The nodes are therefore saved before the messages are sent.
        """
        if self.checkpoints is None or not messages:
            return messages
        connected = set(self.grid.get_node_ids())
        before = [n for n in self.checkpoints.noted_nodes(server_round) if n in connected]
        nodes = [message.metadata.dst_node_id for message in messages]
        if len(before) == len(nodes) and set(before) != set(nodes):
            log(INFO, "Run: round %s resumes with the nodes of its first attempt", server_round)
            pairs = zip(messages, before, strict=True)
            messages, nodes = [copied(m, m.content, node) for m, node in pairs], before
        self.checkpoints.note_nodes(server_round, nodes)
        return messages

    def _recalibrated(
        self, server_round: int, average: ArrayRecord, within: float | None
    ) -> ArrayRecord:
        """Return the average with statistics that the participants computed under it.

        A participant that fails, or whose reply is refused, is restarted as in training, and then
        the policy applies. Without recovery a refused reply is left out, and without any accepted
        reply the statistics stay unchanged.
        """
        # Flower's strategies take the keys of records as arguments, and the ClientApp expects them.
        keys = Keys(
            *(
                getattr(self.strategy, name, default)
                for name, default in (
                    ("arrayrecord_key", "arrays"),
                    ("configrecord_key", "config"),
                    ("weighted_by_key", "num-examples"),
                )
            )
        )
        exchange = Recalibration(average, self.manager.roles, self.manager.weighting, keys)
        # A node that has left since the training would only use up the time limit.
        connected = set(self.grid.get_node_ids())
        nodes = [node for node in self.grid.node_ids if node in connected]
        limit = timed(self.manager.time_limit)
        messages = exchange.messages(nodes, {"server-round": server_round, **limit})
        replies = self.grid.send_and_receive(messages, timeout=within)
        traffic = self.grid.take()
        arrays, refusals = exchange.pooled(replies, traffic.names)
        traffic.events.extend(refusals)
        self.manager.log.note_traffic(traffic)
        return arrays

    def _evaluate(self, server_round: int) -> None:
        # The limit is that of a training before it grows with T: an evaluation has no epochs.
        limit = attempt_limit(self.timeout)
        config = ConfigRecord({**timed(limit), **self.evaluate_config})
        messages = list(
            self.strategy.configure_evaluate(server_round, self.result.arrays, config, self.grid)
        )
        messages = [m for m in messages if m.metadata.dst_node_id not in self._cannot_evaluate]
        replies = list(self.grid.send_and_receive(messages, timeout=reply_within(limit)))
        self._note_who_cannot_evaluate(replies)
        sites = self._metrics_by_site(replies)
        self.manager.log.note(site_metrics=sites, site_means=plain_means(sites.values()))
        metrics = self._aggregated_metrics(server_round, replies)
        self.manager.log.note_evaluation(self.grid.take())
        if metrics is not None:
            log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
            self.manager.log.note(evaluate_metrics=metrics)
            self.result.evaluate_metrics_clientapp[server_round] = metrics

    def _note_who_cannot_evaluate(self, replies: Iterable[Message]) -> None:
        """Log which participants have no function for evaluation; they are not asked again."""
        nodes = {reply.metadata.src_node_id for reply in replies if cannot_evaluate(reply)}
        if nodes and not self._cannot_evaluate:
            log(
                WARNING,
                "Run: participants %s have no @app.evaluate, and are not asked to evaluate again; "
                "fraction_evaluate=0 of the strategy asks nobody",
                ", ".join(sorted(map(self.grid.name_of, nodes))),
            )
        self._cannot_evaluate |= nodes

    def _aggregated_metrics(self, server_round: int, replies: list[Message]) -> MetricRecord | None:
        if not isinstance(self.manager, Stock):
            return self.strategy.aggregate_evaluate(server_round, replies)
        treatment = self.manager.metrics("evaluate", self.grid.name_of)
        own = self.strategy.aggregate_evaluate(server_round, treatment.given(replies))
        return treatment.result(own)

    def _metrics_by_site(self, replies: Iterable[Message]) -> dict[str, dict[str, Any]]:
        return {
            self.grid.name_of(reply.metadata.src_node_id): dict(metrics)
            for reply in replies
            if reply.has_content()
            for metrics in records_of(reply.content, MetricRecord).values()
        }

    def _evaluate_on_server(self, server_round: int) -> None:
        if self.evaluate_fn is None:
            return
        metrics = self.evaluate_fn(server_round, self.result.arrays)
        log(INFO, "Global evaluation")
        log(INFO, "\t└──> MetricRecord: %s", metrics)
        if metrics is not None:
            self.result.evaluate_metrics_serverapp[server_round] = metrics
            self.manager.log.note(server_metrics=metrics)
        if self.grid.transport.normalization.is_local:
            log(WARNING, "The shared model is %s", PARTIAL)

    def _compare(self, server_round: int) -> None:
        """Compare the evaluated model with the best one, and record an early end of the run."""
        self.best.observe(
            server_round,
            self.result.arrays,
            self.result.evaluate_metrics_serverapp.get(server_round),
            self.result.evaluate_metrics_clientapp.get(server_round),
        )
        self._note_best(server_round)
        if self.result.stopped:
            log(INFO, "Run: stopped early after round %s: %s", server_round, self.result.stopped)
            self.manager.log.note_stop(self.result.stopped)

    def _note_best(self, done: int) -> None:
        self.result.best = self.best.model
        self.result.stopped = self.best.reason if self._has_rounds(done) else ""

    # Beginning, saving, resuming ----------------------------------------------------------------

    def _begin(self, resume: Resume) -> int:
        """Prepare a new or resumed run; return the number of its last completed round."""
        if resume not in ("never", "auto"):
            raise expected("resume", "'never' or 'auto'", resume)
        # Before the checkpoint is restored, since `begin` resets the state of an earlier run.
        self.manager.begin(self.grid, self.timeout, self.num_rounds, self._save_unfinished)
        self.grid.expect(self.num_rounds, self.manager.total_epochs)
        self._log_start()
        folder, done = self.checkpoints, 0
        if folder is not None:
            folder.open()
            self._cleanup.callback(folder.close)
        saved = None if folder is None else folder.latest()
        if saved is None and resume == "auto":
            log(
                WARNING,
                "Run: nothing to resume, so a new run begins: %s",
                f"no checkpoint in {folder.path.absolute()}" if folder else "no `checkpoints`",
            )
        if folder is not None and saved is not None:
            if resume == "never":
                raise ColearnError(
                    f"checkpoints: expected none, since resume='never', found round {saved.round} "
                    f"in {folder.path}; pass resume='auto' or use another folder"
                )
            done = self._restore(saved)
            self._note_best(done)
            log(INFO, "%s: resumed after round %s", type(self.strategy).__name__, done)
            if saved.state["averaged"] is not None:
                log(INFO, "Run: round %s is averaged, and its evaluation is left", saved.round)
                self._finish(saved.round)
                done = saved.round
            elif not self._goes_on(done):
                self._log_nothing_left(folder)
        # Before the first message, so that a file that cannot be written costs no training. It has
        # no effect in a resumed run, whose history is restored.
        self.manager.log.history.begin()
        # Round 0 is saved too: a run that is killed in round 1 resumes with the same session.
        if not done:
            self._evaluate_on_server(0)
            self._compare(0)
            self._save(0)
        return done

    def _log_nothing_left(self, folder: CheckpointFolder) -> None:
        why, remedy = "is complete", "raise their number or the budget"
        if self.result.stopped:
            why, remedy = f"stopped early: {self.result.stopped}", "raise the patience of Best"
        log(
            WARNING,
            "Run: nothing is left to train, since the run in %s %s; for a new run use another "
            "folder, for more rounds %s",
            folder.path.absolute(),
            why,
            remedy,
        )

    def _restore(self, saved: Checkpoint) -> int:
        """Restore the run from a checkpoint; return the number of its last completed round."""
        try:
            self._restore_state(saved)
            # A checkpoint from the middle of a round: the same round is called again.
            return saved.round if saved.state["complete"] else saved.round - 1
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ColearnError(
                "checkpoint: expected one of this version of flwr-colearn, found "
                f"{type(error).__name__}: {error}; use another folder"
            ) from error

    def _restore_state(self, saved: Checkpoint) -> None:
        state, history = saved.state, self.manager.log.history
        # A run whose budget is spent may be given a larger one, as it may be given more rounds.
        check_same_configuration(
            state["configuration"], self._configuration(), may_grow=("total epochs",)
        )
        # Participants keep their state by session, so a resumed run must have the same.
        self.grid.session = str(state["session"])
        self.grid.restore_names(state.get("participants", {}))
        self.result.arrays = to_record(dict(saved.arrays))
        whole = state["complete"] or state["averaged"] is not None
        self._averaged = saved.round if whole else saved.round - 1
        assert self.checkpoints is not None
        copies = [history.path] if history.path is not None else []
        history.restore(self.checkpoints.records(saved, copies))
        restore_state(self.strategy, (state["strategy"], dict(saved.extra)))
        self.manager.restore_own_state(state["own"])
        self.best.restore(state.get("best"), saved.extra)
        self.grid.restore_feature_state(state.get("features", {}))
        records = list(history)
        if state["averaged"] is not None:
            self.manager.log.reopen(state["averaged"])
            records.append(history.kind.from_json(state["averaged"]))
        # The records hold all metrics of the Result, which are therefore not saved twice.
        for record in records:
            for name, by_round in (
                ("train_metrics", self.result.train_metrics_clientapp),
                ("evaluate_metrics", self.result.evaluate_metrics_clientapp),
                ("server_metrics", self.result.evaluate_metrics_serverapp),
            ):
                if metrics := getattr(record, name, None):
                    by_round[record.round] = MetricRecord(metrics)

    def _save_unfinished(self, server_round: int) -> None:
        """Save the run in the middle of a round; a resumed run completes this round."""
        self._save(server_round, complete=False)

    def _save(self, server_round: int, complete: bool = True, averaged: bool = False) -> None:
        if self.checkpoints is None:
            return
        strategy, arrays = save_state(self.strategy)
        state: dict[str, Any] = {
            "configuration": self._configuration(),
            "session": self.grid.session,
            "participants": self.grid.reported_names(),
            "complete": complete,
            # The record of a round whose evaluation is left.
            "averaged": self.manager.log.unfinished if averaged else None,
            "strategy": strategy,
            "own": self.manager.own_state(),
            "best": self.best.state(),
            "features": self.grid.feature_state(),
        }
        shared = view(self.result.arrays)
        lines = self.manager.log.history.lines
        extra = {**arrays, **self.best.arrays()}
        self.checkpoints.save(Checkpoint(server_round, shared, state, extra), lines)

    def _configuration(self) -> dict[str, str]:
        """Return the settings that a resumed run must have in common with the saved one."""
        arrays, transport = view(self.result.arrays), self.grid.transport
        return {
            "normalization": str(transport.normalization),
            "compression": str(transport.compression),
            **({"secure aggregation": str(transport.secure)} if transport.secure else {}),
            "model": describe_arrays(arrays),
            "roles": self._described_roles(arrays),
            **self.manager.configuration(),
        }

    def _described_roles(self, arrays: Arrays) -> str:
        try:
            return describe_roles(assign_roles(arrays, self.grid.transport.roles, quiet=True))
        # Roles of another model: that difference is named, and the first round names the role.
        except ColearnError:
            return "not those of this model"

    # The log ------------------------------------------------------------------------------------

    def _log_start(self) -> None:
        log(INFO, "Starting %s strategy:", type(self.strategy).__name__)
        log(INFO, "\t├── Number of rounds: %s", self.num_rounds or "until the budget is spent")
        log(INFO, "\t├── ArrayRecord (%.2f MB)", data_bytes(self.result.arrays) / 1024**2)
        config = config_to_str(self.train_config) if self.train_config else "(empty!)"
        log(INFO, "\t├── ConfigRecord (train): %s", config)
        # Absolute: the working directory of a ServerApp is that of the SuperLink's first start.
        for name, at in (("Checkpoints", self.checkpoints), ("History", self.manager.log.history)):
            if at is not None and at.path is not None:
                log(INFO, "\t├── %s: %s", name, at.path.absolute())
        self.strategy.summary()

    def _log_events(self) -> None:
        """Log the numbers of restarts, refusals and absences of the run, by participant."""
        for kind in ("restarts", "refusals", "absences"):
            entries = [
                entry for record in self.manager.log.history for entry in getattr(record, kind)
            ]
            if entries:
                counts = Counter(entry["participant"] for entry in entries)
                log(INFO, "Run: %s %s (%s)", len(entries), kind, dict(counts))
