"""DynamicAveraging: learners keep their models, and speak only when it pays."""

import math
import random
import secrets
import time
from collections.abc import Callable, Iterable
from logging import INFO
from pathlib import Path
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from ..checkpoint import Checkpoint, CheckpointFolder, check_same_configuration, describe_arrays
from ..compression.codecs import Wire
from ..errors import ColearnError, expected, real_number, whole_number
from ..records import data_bytes, to_record, view
from ..recovery.grid import Quorum, Recovery
from ..recovery.membership import wait_for_nodes
from ..roles import NDArray, Roles, assign_roles
from .coordinator import Coordinator, Pending, Reference
from .operators import Absolute, Dynamic, Operator, Relative
from .record import DynamicHistory, DynamicRecord

MEAN = "mean of all learners"

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class ModelAveraging(Strategy):
    """Averaging of models that stay with their learners, under any operator.

    One round of Flower is b mini-batches of every learner. The learners keep model and reference
    between rounds; the operator alone decides when models travel, and whose. A participant
    decorates its training function with `flwr_colearn.learner`.

    What to do when you see it in the log:

    * *Averaging: learner ... begins anew*: its SuperNode was restarted, or it was away during a
      full synchronisation. It goes on from the reference; what it had learned since is gone. Give
      every SuperNode a ``state-dir`` of its own.
    * *Recovery: restart of participant ...*: it failed or its reply was refused, for the reason
      given, and is asked again in the same round.

    Parameters
    ----------
    operator : Operator
        ``Dynamic``, ``Periodic``, ``Continuous``, ``FractionAveraging``, ``Never`` or ``Serial``
        of `flwr_colearn.operators`.
    num_learners : int
        m. Every round has exactly so many.
    roles : mapping or sequence, optional
        Which arrays are weights, batch-norm means and variances, counters; see
        `flwr_colearn.Role`. Only weights count in the distance; statistics are pooled.
    history : str, Path or DynamicHistory, optional
        Where the rounds are recorded: a file for JSON lines. By default in memory.
    evaluate_mean_every : int, optional
        Every so many rounds all models are fetched, so that the mean of all learners can be
        evaluated; what that moves is recorded apart. By default the server's evaluation sees the
        reference between full synchronisations, and the record says so.
    wait_for_participants : float, optional
        Seconds to wait for m nodes to connect; by default without limit.
    recovery : Recovery, optional
        How learners that fail are restarted. ``None`` leaves them out of the round.
    checkpoints : str, Path or CheckpointFolder, optional
        Where the run is saved after every round. By default nowhere.
    wire : Wire, optional
        Compression of the models on their way; by default none. Learners then need
        `flwr_colearn.wire_mod`.
    seed : int, optional
        Of the random choices among learners.

    Attributes
    ----------
    history : DynamicHistory
        The rounds so far.

    Raises
    ------
    ColearnError
        If an argument is not what it should be; during a run, if learners are missing or lost. Its
        `result` then holds what was reached.
    """

    def __init__(
        self,
        operator: Operator,
        num_learners: int,
        *,
        roles: Roles = None,
        history: str | Path | DynamicHistory | None = None,
        evaluate_mean_every: int | None = None,
        wait_for_participants: float | None = None,
        recovery: Recovery | None = Recovery(),  # noqa: B008  (an immutable value)
        checkpoints: str | Path | CheckpointFolder | None = None,
        wire: Wire = Wire(),  # noqa: B008  (an immutable value)
        seed: int | None = None,
    ) -> None:
        if not isinstance(operator, Operator):
            raise expected("operator", "one of flwr_colearn.operators", operator)
        operator.check_learners(num_learners)
        if evaluate_mean_every is not None:
            whole_number("evaluate_mean_every", evaluate_mean_every, least=1)
        if wait_for_participants is not None:
            real_number("wait_for_participants", wait_for_participants, least=0.0)
        if not isinstance(wire, Wire):
            raise expected("wire", "a Wire, such as Wire(up=Int8(), down=Float16())", wire)
        self.operator = operator
        self.num_learners = num_learners
        self.roles = roles
        self.history = history if isinstance(history, DynamicHistory) else DynamicHistory(history)
        self.evaluate_mean_every = evaluate_mean_every
        self.wait_for_participants = (
            math.inf if wait_for_participants is None else float(wait_for_participants)
        )
        self.recovery = recovery
        self.checkpoints = (
            CheckpointFolder(checkpoints) if isinstance(checkpoints, str | Path) else checkpoints
        )
        self.wire = wire
        self.seed = seed
        self._coordinator: Coordinator | None = None
        self._grid: Grid | None = None
        self._last_round = 0

    def summary(self) -> None:
        """Log the settings of the strategy."""
        log(INFO, "\t├──> Operator: %s", self.operator)
        log(INFO, "\t├──> Learners: %s", self.num_learners)
        if not self.wire.plain:
            log(INFO, "\t├──> Wire: %s; learners need wire_mod", self.wire)
        log(INFO, "\t└──> Mean evaluated every: %s", self.evaluate_mean_every or "last round only")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every learner for b mini-batches, and for its model if it is beyond the bound."""
        coordinator = self._running
        before = coordinator.nodes
        nodes = self._choose_nodes(grid, before)
        messages = coordinator.open(server_round, nodes, config)
        coordinator.record.absences = [
            {"participant": coordinator.name(node), "reason": "not connected"}
            for node in before
            if node not in nodes and len(nodes) < self.num_learners
        ]
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Synchronise as the operator asks, by further messages where it needs them.

        Returns
        -------
        arrays : ArrayRecord
            The mean of all learners where the server has it in this round, else the reference.
        metrics : MetricRecord
            ``num-examples`` and, where learners report it, mean ``loss``.
        """
        coordinator = self._running
        coordinator.balance(replies)
        if coordinator.pending is not None:
            # Before anybody's model is replaced: a resumed run distributes it again.
            self._save(server_round)
            coordinator.distribute()
        return self._evaluable(server_round), self._metrics()

    def _metrics(self) -> MetricRecord:
        record = self._running.record
        metrics = MetricRecord({"num-examples": record.examples})
        if record.loss is not None:
            metrics["loss"] = record.loss / record.examples
        return metrics

    def _evaluable(self, server_round: int) -> ArrayRecord:
        """Return the model to evaluate, and label it: the mean where it is to be had."""
        coordinator, record = self._running, self._running.record
        if record.synchronised == "full":
            record.evaluated = MEAN
        elif server_round == self._last_round or (
            self.evaluate_mean_every and server_round % self.evaluate_mean_every == 0
        ):
            record.evaluated = MEAN
            return coordinator.collect()
        else:
            record.evaluated = f"reference of round {coordinator.reference.round}"
        return coordinator.reference.record

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return nothing: online learning is judged by its loss, measured while training."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing, see `configure_evaluate`."""
        return None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
        resume: Literal["never", "auto"] = "never",
    ) -> Result:
        """Run model averaging for `num_rounds` rounds of b mini-batches.

        Parameters
        ----------
        grid : Grid
            Connects to the learners.
        initial_arrays : ArrayRecord
            The common model from which all start, and the first reference.
        num_rounds : int, default 3
            Of `check_every` mini-batches each.
        timeout : float, default 3600
            Seconds that one attempt of one learner may take.
        train_config : ConfigRecord, optional
            Further entries for the learners.
        evaluate_config : ConfigRecord, optional
            Not used: learners report the loss of their training.
        evaluate_fn : callable, optional
            ``(round, arrays) -> MetricRecord | None``: the server's own evaluation, of the mean of
            all learners or of the reference, as each round's record says.
        resume : {"never", "auto"}, default "never"
            "auto" goes on after the newest checkpoint. Learners that kept their state go on with
            it; the others begin anew from the reference.

        Returns
        -------
        Result
            ``arrays`` is the mean of all learners after the last round.

        Raises
        ------
        ColearnError
            If fewer than m nodes connect in time, a learner is lost, or the checkpoints are damaged
            or of another configuration, or there are some although `resume` is "never".
        """
        self._last_round = whole_number("num_rounds", num_rounds, least=1)
        result = Result(arrays=initial_arrays)
        started = time.time()
        log(INFO, "Starting %s strategy:", type(self).__name__)
        log(INFO, "\t├── Number of rounds: %s", num_rounds)
        log(INFO, "\t├── ArrayRecord (%.2f MB)", data_bytes(initial_arrays) / 1024**2)
        self.summary()
        try:
            done = self._begin(result, timeout, resume)
            self._grid = self._running.connect(grid, self.recovery)
            if self._running.pending is not None:
                self._running.distribute()
                result.arrays = self._evaluable(done)
                self._close(done, result, evaluate_fn)
            elif not done:
                self._evaluate(0, result, evaluate_fn)
                self._save(0)
            for server_round in range(done + 1, num_rounds + 1):
                log(INFO, "")
                log(INFO, "[ROUND %s/%s]", server_round, num_rounds)
                self._train(server_round, result, train_config or ConfigRecord())
                self._close(server_round, result, evaluate_fn)
        except ColearnError as error:
            error.result = result
            raise
        finally:
            self._coordinator = self._grid = None
        log(INFO, "")
        log(INFO, "Strategy execution finished in %.2fs", time.time() - started)
        return result

    @property
    def _running(self) -> Coordinator:
        if self._coordinator is None:
            raise ColearnError(
                f"{type(self).__name__}: expected to run in its own start(), found another loop; "
                "wrappers such as differential privacy need every model in every round"
            )
        return self._coordinator

    def _train(self, server_round: int, result: Result, config: ConfigRecord) -> None:
        assert self._grid is not None
        messages = list(self.configure_train(server_round, result.arrays, config, self._grid))
        replies = self._grid.send_and_receive(messages, timeout=self._running.reply_within)
        result.arrays, metrics = self.aggregate_train(server_round, replies)
        result.train_metrics_clientapp[server_round] = metrics

    def _close(self, server_round: int, result: Result, evaluate_fn: EvaluateFn | None) -> None:
        """End a round whose average has reached everybody."""
        self._evaluate(server_round, result, evaluate_fn)
        record, before = self._running.close(), self.history.cumulative_loss
        if record.loss is not None and before is not None:
            record.cumulative_loss = before + record.loss
        record.cumulative_bytes = self.history.bytes_with(record)
        self.history.append(record)
        self._save(server_round)

    def _evaluate(self, server_round: int, result: Result, evaluate_fn: EvaluateFn | None) -> None:
        metrics = None if evaluate_fn is None else evaluate_fn(server_round, result.arrays)
        if metrics is None:
            return
        result.evaluate_metrics_serverapp[server_round] = metrics
        label = MEAN
        if server_round:
            self._running.record.server_metrics = dict(metrics)
            label = self._running.record.evaluated
        log(INFO, "Evaluation of the %s: %s", label, dict(metrics))

    def _choose_nodes(self, grid: Grid, before: list[int]) -> list[int]:
        """Return m connected nodes, those of the last round in their places."""
        policy = self.recovery.policy if self.recovery is not None else None
        patience = self.wait_for_participants
        if isinstance(policy, Quorum) and self.recovery is not None:
            patience = min(patience, self.recovery.patience)
        try:
            connected = wait_for_nodes(grid, self.num_learners, patience)
        except ColearnError:
            connected = sorted(set(grid.get_node_ids()))
            if not isinstance(policy, Quorum) or len(connected) < policy.least:
                raise
        others = [node for node in connected if node not in before]
        kept = [node for node in before if node in connected]
        return kept + others[: self.num_learners - len(kept)]

    # Beginning, saving, resuming ----------------------------------------------------------------

    def _begin(self, result: Result, timeout: float, resume: str) -> int:
        """Prepare a fresh or resumed run; return the last completed round."""
        if resume not in ("never", "auto"):
            raise expected("resume", "'never' or 'auto'", resume)
        arrays = view(result.arrays)
        roles = assign_roles(arrays, self.roles)
        if not self.wire.plain:
            result.arrays = to_record(dict(self.wire.arriving(arrays)))
        saved = None if self.checkpoints is None else self.checkpoints.latest()
        self._coordinator = Coordinator(
            self.operator,
            Reference(result.arrays, 0, roles),
            session=secrets.token_hex(8),
            random=random.Random(self.seed),
            wire=self.wire,
            timeout=None if math.isinf(timeout) else float(timeout),
        )
        self.history.clear()
        if saved is None:
            return 0
        if resume == "never":
            raise ColearnError(
                f"checkpoints: expected none, since resume='never', found round {saved.round}; "
                "pass resume='auto' or use another folder"
            )
        try:
            self._restore(saved)
        except (KeyError, TypeError, ValueError) as error:
            raise ColearnError(
                "checkpoint: expected one of this version of flwr-colearn's model averaging, found "
                f"{type(error).__name__}: {error}; use another folder"
            ) from error
        result.arrays = self._running.reference.record
        log(INFO, "%s: resumed after round %s", type(self).__name__, saved.round)
        return saved.round

    def _restore(self, saved: Checkpoint) -> None:
        coordinator, state = self._running, saved.state
        parts: dict[str, dict[str, NDArray]] = {"reference": {}, "pending": {}}
        for key, array in saved.arrays.items():
            part, _, name = key.partition("/")
            parts[part][name] = array
        reference = to_record(parts["reference"])
        roles = coordinator.reference.roles
        coordinator.reference = Reference(reference, state["reference-round"], roles)
        check_same_configuration(state["configuration"], self._configuration())
        coordinator.session = state["session"]
        coordinator.violations = state["violations"]
        coordinator.nodes = [int(node) for node in state["nodes"]]
        version, numbers, gauss = state["random"]
        coordinator.random.setstate((version, tuple(numbers), gauss))
        self.history.restore(DynamicRecord.from_json(line) for line in state["history"])
        if "pending" in state:
            members = [int(node) for node in state["pending"]]
            record = to_record(parts["pending"]) if parts["pending"] else reference
            coordinator.pending = Pending(members, record)
            coordinator.present = [int(node) for node in state["present"]]
            coordinator.record = DynamicRecord.from_json(state["record"])

    def _save(self, server_round: int) -> None:
        if self.checkpoints is None:
            return
        coordinator, pending = self._running, self._running.pending
        reference = coordinator.reference
        state: dict[str, Any] = {
            "configuration": self._configuration(),
            "reference-round": reference.round,
            "session": coordinator.session,
            "violations": coordinator.violations,
            "nodes": coordinator.nodes,
            "random": coordinator.random.getstate(),
            "history": [record.to_json() for record in self.history],
        }
        arrays = {f"reference/{name}": array for name, array in reference.arrays.items()}
        if pending is not None:
            state["pending"], state["present"] = pending.members, coordinator.present
            state["record"] = coordinator.record.to_json()
            if pending.record is not reference.record:
                average = view(pending.record)
                arrays |= {f"pending/{name}": array for name, array in average.items()}
        self.checkpoints.save(Checkpoint(server_round, arrays, state))

    def _configuration(self) -> dict[str, str]:
        """Return what must be the same for a run to be resumed."""
        configuration = {
            "operator": str(self.operator),
            "number of learners": str(self.num_learners),
            "model": describe_arrays(self._running.reference.arrays),
        }
        # What learners hold as reference was rounded by it.
        return configuration if self.wire.plain else {**configuration, "wire": str(self.wire)}


class DynamicAveraging(ModelAveraging):
    """Dynamic model averaging: traffic where models diverge, silence where they agree.

    Every learner trains on its own stream. After each `check_every` mini-batches it compares its
    model with the reference r that all had at the last full synchronisation, and sends it only if
    |f_i - r|^2 > Delta. As long as nobody does, the models' mean squared distance to their mean is
    at most Delta; when somebody does, as few models are averaged as bring the mean back within
    Delta of r (Kamp et al., 2018). See `ModelAveraging` for the other arguments.

    Parameters
    ----------
    threshold : float, Absolute or Relative
        Delta, a squared distance over the trainable arrays; ``Relative(0.01)`` takes a fraction of
        |r|^2. Read ``largest_distance`` in the history of a short run to choose it.
    check_every : int, default 1
        b.
    num_learners : int
        m.
    **kwargs
        As for `ModelAveraging`.

    Examples
    --------
    >>> strategy = DynamicAveraging(threshold=Relative(0.01), check_every=10, num_learners=5)
    >>> strategy.operator
    Dynamic(threshold=Relative(fraction=0.01), check_every=10)
    """

    def __init__(
        self,
        threshold: float | Absolute | Relative,
        check_every: int = 1,
        *,
        num_learners: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(Dynamic(threshold, check_every), num_learners, **kwargs)
