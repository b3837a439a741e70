"""DynamicAveraging: a strategy in which learners exchange models only when they diverge."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO
from pathlib import Path
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ..best import Best, RunResult
from ..checkpoint import CheckpointFolder, as_folder
from ..compression import Compression
from ..errors import ColearnError, expected, real_number, whole_number
from ..loop import EvaluateFn, Resume, run
from ..managed import Managed
from ..policy import DEFAULT_GUARD, DEFAULT_RECOVERY, Guard, Recovery, attempt_limit
from ..records import to_record, view
from ..recovery import choose_members
from ..roles import NDArray, Role, Roles, assign_roles
from ..traffic import Event
from ..transport import ConnectedGrid, Transport
from .coordinator import Coordinator, Pending, Reference
from .operators import Dynamic, Operator
from .record import DynamicHistory, DynamicLog, DynamicRecord
from .thresholds import Absolute, Calibrated, Relative

MEAN = "mean of all learners"


class ModelAveraging(Strategy, Managed[DynamicLog]):
    """Averaging of models that stay with their learners, with any operator.

    One round of Flower is b mini-batches of every learner. The learners keep model and reference
    between rounds, and the operator decides when which learners send their models. A participant
    decorates its training function with `flwr_colearn.learner`.

    Messages in the log, and what to do:

    * *Averaging: learner ... is reinitialised*: its SuperNode was restarted, or was not connected
      during a full synchronisation. The learner continues from the reference, without its training
      since then. Configure a ``state-dir`` of its own for every SuperNode.
    * *Recovery: restart of participant ...*: the learner failed or its reply was refused, for the
      reason given, and the message is sent again in the same round. Nothing needs to be done.

    Parameters
    ----------
    operator : Operator
        ``Dynamic``, ``Periodic``, ``Continuous``, ``FractionAveraging``, ``Never`` or ``Serial``
        of `flwr_colearn.dynamic`.
    num_learners : int, optional
        m, the number of learners in every round; not needed with `participants`.
    roles : mapping or sequence, optional
        The arrays that are weights, batch-norm means and variances, counters; see
        `flwr_colearn.Role`. The distance is computed over weights only; statistics are pooled.
    history : str, Path or DynamicHistory, optional
        A file for JSON lines, or a history. By default the history is in memory only.
    evaluate_mean_every : int, optional
        The number of rounds from one evaluation of the mean of all learners to the next. All models
        are fetched for it, and their traffic is recorded separately. By default the server
        evaluates the reference between full synchronisations, as stated in the record.
    wait_for_participants : float, optional
        The seconds to wait for m nodes to connect; by default without limit.
    recovery : Recovery, optional
        The restarts of learners that fail. With ``None`` they are left out of the round.
    checkpoints : str, Path or CheckpointFolder, optional
        The folder in which the run is saved after every round. By default there is none.
    compression : Compression, optional
        The codecs of models in messages, by default none. With a codec learners need
        `flwr_colearn.participant_mod`.
    participants : sequence of str, optional
        The registered names of the only SuperNodes that are learners, see
        `flwr_colearn.Transport`; m is their number. By default any m SuperNodes are.
    guard : Guard, optional
        The bounds of the distance of one learner's model to the reference, see
        `flwr_colearn.Guard`: mini-batches since the reference take the place of local epochs.
        ``None`` for none.
    seed : int, default 0
        The seed of the random choices among learners, so that a run can be repeated. With ``None``
        every run chooses differently.

    Attributes
    ----------
    history : DynamicHistory
        The records of the rounds so far.

    Raises
    ------
    ColearnError
        If an argument is invalid; during a run, if learners are missing or lost. Its `result` then
        holds the result up to the last completed round.
    """

    def __init__(
        self,
        operator: Operator,
        num_learners: int | None = None,
        *,
        roles: Roles = None,
        history: str | Path | DynamicHistory | None = None,
        evaluate_mean_every: int | None = None,
        wait_for_participants: float | None = None,
        recovery: Recovery | None = DEFAULT_RECOVERY,
        checkpoints: str | Path | CheckpointFolder | None = None,
        compression: Compression = Compression(),  # noqa: B008  (an immutable value)
        participants: Sequence[str] | None = None,
        guard: Guard | None = DEFAULT_GUARD,
        seed: int | None = 0,
    ) -> None:
        if not isinstance(operator, Operator):
            raise expected("operator", "one of flwr_colearn.dynamic", operator)
        self.transport = Transport(
            recovery,
            compression=compression,
            roles=roles,
            participants=participants,
            guard=guard,
        )
        num_learners = self._number_of(participants, num_learners)
        operator.check_learners(num_learners)
        if evaluate_mean_every is not None:
            whole_number("evaluate_mean_every", evaluate_mean_every, least=1)
        if wait_for_participants is not None:
            real_number("wait_for_participants", wait_for_participants, least=0.0)
        self.operator = operator
        self.num_learners = num_learners
        self.log = DynamicLog(history)
        self.evaluate_mean_every = evaluate_mean_every
        self.wait_for_participants = (
            float("inf") if wait_for_participants is None else float(wait_for_participants)
        )
        self.checkpoints = as_folder(checkpoints)
        self.seed = seed
        self._coordinator: Coordinator | None = None
        self._grid: ConnectedGrid | None = None
        self._timeout: float | None = None
        self._save: Callable[[int], None] | None = None
        self._last_round: int | None = None

    @staticmethod
    def _number_of(participants: Sequence[str] | None, num_learners: int | None) -> int:
        """Return m: the number of the named participants, else the argument."""
        named = num_learners if participants is None else len(participants)
        if num_learners not in (None, named):
            raise expected("num_learners", f"{named}, the number of `participants`", num_learners)
        return whole_number("num_learners", named, least=1)

    @property
    def history(self) -> DynamicHistory:
        """The records of the rounds so far."""
        return self.log.history

    @property
    def _features(self) -> Transport:
        """The features of the run's exchanges, with those of a grid that the user has connected."""
        return self.transport if self._grid is None else self._grid.transport

    def summary(self) -> None:
        """Log the settings of the strategy."""
        log(INFO, "\t├──> Operator: %s", self.operator)
        log(INFO, "\t├──> Learners: %s", self.num_learners)
        if not self.transport.compression.is_plain:
            compression = self.transport.compression
            log(INFO, "\t├──> Compression: %s; learners need participant_mod", compression)
        log(INFO, "\t└──> Mean evaluated every: %s", self.evaluate_mean_every or "last round only")

    def round(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: ConnectedGrid
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Let every learner train b mini-batches, and synchronise by the rule of the operator.

        Returns
        -------
        arrays : ArrayRecord
            The mean of all learners if the server has it in this round, else the reference.
        metrics : MetricRecord
            ``num-examples`` and, if learners report it, the mean ``loss``.
        """
        coordinator = self._connected(arrays, grid)
        # A run that was resumed within this round has trained already.
        if coordinator.pending is None:
            self._train(coordinator, server_round, config, grid)
        if coordinator.pending is not None:
            # Saved before any learner's model is replaced: a resumed run distributes it again. A
            # run that resumed before the training would compute another average.
            assert self._save is not None
            self._save(server_round)
            coordinator.distribute()
        return self._evaluable(coordinator, server_round), self._metrics()

    def _train(
        self, coordinator: Coordinator, server_round: int, config: ConfigRecord, grid: Grid
    ) -> None:
        members = choose_members(
            grid,
            self.num_learners,
            coordinator.nodes,
            coordinator.random,
            self._features.recovery,
            self.wait_for_participants,
            absent=coordinator.absent,
        )
        coordinator.absent = self.num_learners - len(members.nodes)
        coordinator.train(server_round, members.nodes, config)
        self.log.note_events(
            Event("absence", coordinator.grid.name_of(node), "not connected")
            for node in members.missing
        )

    def _connected(self, arrays: ArrayRecord, grid: ConnectedGrid) -> Coordinator:
        """Return the coordinator of the run, which is created in the first round."""
        if self._coordinator is None:
            # The reference is the initial model as learners decode it, so that both are equal.
            roles = assign_roles(view(arrays), self._features.roles)
            received = self._features.compression.received(view(arrays))
            reference = Reference(to_record(dict(received)), 0, roles)
            self._coordinator = self._new_coordinator(reference)
        self._coordinator.connect(grid)
        return self._coordinator

    def _new_coordinator(self, reference: Reference) -> Coordinator:
        assert self._timeout is not None
        return Coordinator(
            self.operator,
            reference,
            random.Random(self.seed),
            self.log,
            compression=self._features.compression,
            timeout=attempt_limit(self._timeout),
            guard=self._features.guard,
        )

    def _metrics(self) -> MetricRecord:
        return MetricRecord(self.log.record.train_metrics)

    def _evaluable(self, coordinator: Coordinator, server_round: int) -> ArrayRecord:
        """Return the model to evaluate, and state in the record which one it is."""
        record = self.log.record
        # After a full synchronisation all learners have the reference, which is their mean.
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

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Raise a ColearnError, since a round of model averaging is more than one exchange."""
        raise self._foreign_loop()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Raise a ColearnError, see `configure_train`."""
        raise self._foreign_loop()

    def _foreign_loop(self) -> ColearnError:
        return ColearnError(
            f"{type(self).__name__}: expected to run in its own start() or in flwr_colearn.run, "
            "found another loop; wrappers such as differential privacy need every model in every "
            "round"
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return no messages: online learning is evaluated by its loss during the training."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return None, see `configure_evaluate`."""
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
        resume: Resume = "never",
        best: Best | None = None,
    ) -> RunResult:
        """Run model averaging for `num_rounds` rounds of b mini-batches.

        Parameters
        ----------
        grid : Grid
            Connects to the learners.
        initial_arrays : ArrayRecord
            The initial model of all learners, which is the first reference.
        num_rounds : int, default 3
            The number of rounds, each of `check_every` mini-batches.
        timeout : float, default 3600
            The seconds that one attempt of one learner may take.
        train_config : ConfigRecord, optional
            Further config entries for the learners.
        evaluate_config : ConfigRecord, optional
            Not used, since learners report the loss of their training.
        evaluate_fn : callable, optional
            ``(round, arrays) -> MetricRecord | None``: the server's own evaluation, of the mean of
            all learners or of the reference, as stated in each round's record.
        resume : {"never", "auto"}, default "never"
            "auto" resumes from the newest checkpoint. Learners that have their state continue with
            it, and the others are reinitialised from the reference.

        best : Best, optional
            The metric by which the best evaluated model is kept beside the last, and the patience
            after which the run ends early. By default there is no best model.

        Returns
        -------
        RunResult
            ``arrays`` is the mean of all learners after the last round; after an early end it is
            the model that the last record's ``evaluated`` names.

        Raises
        ------
        ColearnError
            If fewer than m nodes connect in time, a learner is lost, or the checkpoints are damaged
            or of another configuration, or there are some although `resume` is "never".
        """
        whole_number("num_rounds", num_rounds, least=1)
        return run(
            self,
            grid,
            initial_arrays,
            num_rounds,
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
        """Begin a run, and reset the state of an earlier one."""
        if not grid.transport.normalization.travels_whole:
            raise expected(
                f"normalization of {type(self).__name__}",
                "Pooled(), since learners keep their models, statistics included",
                grid.transport.normalization,
            )
        if grid.participants is not None:
            self._number_of(grid.participants, self.num_learners)
        self._grid, self._timeout, self._last_round, self._save = grid, timeout, num_rounds, save
        self._coordinator = None
        self.log.record = DynamicRecord(0, 0)
        self.log.history.clear()

    def end(self) -> None:
        """End a run, after its last round or an error."""
        self._coordinator = self._grid = self._save = None

    def check_reply(self, sent: Message, reply: Message) -> None:
        """Raise a ColearnError unless `reply` is a usable answer to `sent`."""
        assert self._coordinator is not None
        self._coordinator.check(sent, reply)

    def close(self, arrays: ArrayRecord) -> None:
        """Complete the record of the round under way."""
        self.log.close()

    def configuration(self) -> dict[str, str]:
        """Return the settings that a resumed run must have in common with the saved one."""
        return {
            "operator": str(self.operator),
            "number of learners": str(self.num_learners),
        }

    def strategy_state(self) -> tuple[dict[str, Any], dict[str, NDArray]]:
        """Return the strategy's state between rounds: a part in types of JSON, and arrays."""
        coordinator = self._coordinator
        if coordinator is None:
            return {}, {}
        reference, pending = coordinator.reference, coordinator.pending
        state: dict[str, Any] = {
            "reference-round": reference.round,
            "violations": coordinator.violations,
            "measured": coordinator.measured,
            "nodes": coordinator.nodes,
            "random": coordinator.random.getstate(),
        }
        if coordinator.updates is not None:
            state["guard"] = coordinator.updates.state()
        arrays = {f"reference/{name}": array for name, array in reference.arrays.items()}
        if pending is not None:
            state["pending"], state["present"] = pending.members, coordinator.present
            state["record"] = self.log.record.to_json()
            # The average of a full synchronisation is the reference, which is saved once.
            if pending.record is not reference.record:
                average = view(pending.record)
                arrays |= {f"pending/{name}": array for name, array in average.items()}
        return state, arrays

    def restore_strategy_state(
        self, state: Mapping[str, Any], arrays: Mapping[str, NDArray]
    ) -> None:
        """Restore the state that `strategy_state` returned."""
        if not state:
            return
        parts: dict[str, dict[str, NDArray]] = {"reference": {}, "pending": {}}
        for key, array in arrays.items():
            part, _, name = key.partition("/")
            parts[part][name] = array
        reference = to_record(parts["reference"])
        roles: dict[str, Role] = assign_roles(view(reference), self._features.roles)
        coordinator = self._new_coordinator(Reference(reference, state["reference-round"], roles))
        coordinator.violations = state["violations"]
        # A checkpoint of version 0.6 is of an operator that measures nothing.
        coordinator.measured = list(state.get("measured", ()))
        coordinator.nodes = [int(node) for node in state["nodes"]]
        version, numbers, gauss = state["random"]
        coordinator.random.setstate((version, tuple(numbers), gauss))
        if coordinator.updates is not None and "guard" in state:
            coordinator.updates.restore(state["guard"])
        if "pending" in state:
            members = [int(node) for node in state["pending"]]
            record = to_record(parts["pending"]) if parts["pending"] else reference
            coordinator.pending = Pending(members, record)
            coordinator.present = [int(node) for node in state["present"]]
            self.log.open(DynamicRecord.from_json(state["record"]))
        self._coordinator = coordinator


class DynamicAveraging(ModelAveraging):
    """Dynamic model averaging: learners send their models only when these diverge.

    Every learner trains on its own stream. After each `check_every` mini-batches it compares its
    model with the reference r, the common model after the last full synchronisation, and sends it
    only if |f_i - r|^2 > Delta. As long as no learner sends a model, the mean squared distance of
    the models to their mean is at most Delta. Otherwise models are averaged, one group after the
    other, until their mean is within Delta of r (Kamp et al., 2018). See `ModelAveraging` for the
    other arguments.

    Parameters
    ----------
    threshold : float, Absolute, Relative, Calibrated or "auto"
        Delta, a squared distance over the trainable arrays; ``Relative(0.01)`` is a fraction of
        |r|^2. "auto" is ``Calibrated()``: the first checks synchronise fully and measure how far
        the learners move, and Delta is a multiple of that.
    check_every : int, default 1
        b, the number of mini-batches in a round.
    num_learners : int, optional
        m, the number of learners; not needed with `participants`.
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
        threshold: float | Absolute | Relative | Calibrated | Literal["auto"],
        check_every: int = 1,
        *,
        num_learners: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(Dynamic(threshold, check_every), num_learners, **kwargs)
