"""CoLearn for projects on Flower's legacy API: ``ServerAppComponents`` and ``NumPyClient``."""

import math
from collections.abc import Sequence
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.common import (
    Code,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    MetricsAggregationFn,
    Parameters,
    Scalar,
    log,
)
from flwr.server import ClientManager
from flwr.server.strategy import FedAvg
from flwr.serverapp.strategy import Result

from ._flwr import ClientProxy
from .adherence import Adherence
from .aggregation import (
    RoundMean,
    Update,
    Weighting,
    as_weighting,
    check_initial,
    mean_loss,
    relative_change,
    trainable,
)
from .epoch_rules import EpochRule
from .errors import ColearnError, expected
from .history import History, RoundLog
from .legacy_fits import Fits, size_of
from .policy import DEFAULT_RECOVERY, Guard, Recovery
from .records import Outgoing, to_record, view_bytes
from .recovery import recovery_on
from .roles import Arrays, Role, Roles, assign_roles, named_roles
from .schedules import LearningRate, RateFunction
from .strategies import Progress, algorithm_of, participant_arguments, plan_record
from .traffic import Directions, Event, RoundTraffic

Metrics = list[tuple[int, dict[str, Scalar]]]
FitFailure = tuple[ClientProxy, FitRes] | BaseException
EvaluateFailure = tuple[ClientProxy, EvaluateRes] | BaseException


class CoLearn(FedAvg):
    """The strategy of `flwr_colearn.CoLearn` for the legacy API; the plan goes in the fit config.

    A participant reads it in ``NumPyClient.fit``::

        from flwr_colearn import LocalPlan

        def fit(self, parameters, config):
            ...
            for epoch in LocalPlan.from_config(config):
                train_one_epoch(self.model, self.data, lr=epoch.learning_rate)

    The arrays of legacy parameters have no names, so batch-norm statistics are pooled only with
    ``names=list(net.state_dict())``, or if `roles` lists a role for every array. Flower's legacy
    server always runs ``ServerConfig.num_rounds`` rounds: once `total_epochs` is spent, the
    remaining rounds send nothing and change nothing.

    Parameters
    ----------
    num_participants : int, optional
        K; by default `min_fit_clients`.
    local_epochs, learning_rate, total_epochs, local_steps, weighting, roles, names, history
        As for `flwr_colearn.CoLearn`.
    recovery : Recovery, optional
        As for `flwr_colearn.CoLearn`, within the limits of the legacy API: a participant that
        failed is asked again through the same ``ClientProxy``, before `aggregate_fit` is called. A
        subclass whose `aggregate_fit` drops or changes results therefore gets all of them, and
        those that it drops are not asked for again. Under Flower's workflows, which send messages
        past the proxies, there are no restarts. A participant whose SuperNode reconnects with
        another node id is not recognised, `patience` is not used, and there are no deadlines,
        checkpoints or resume, and no compression. For SecAgg+ there is
        `flwr_colearn.secagg.CoLearn`.
    guard : Guard, optional
        The bounds of one participant's update, see `flwr_colearn.Guard`; ``None`` for none.
    **kwargs
        The arguments of ``flwr.server.strategy.FedAvg``, except `fraction_fit`, which must stay 1.

    Attributes
    ----------
    history : History
        The records of the rounds so far.

    Raises
    ------
    ColearnError
        If an argument is invalid; during a run, if no model arrived.
    """

    def __init__(
        self,
        num_participants: int | None = None,
        *,
        local_epochs: int | EpochRule,
        learning_rate: float | LearningRate | RateFunction,
        total_epochs: int | None = None,
        local_steps: int | None = None,
        weighting: Weighting = "uniform",
        roles: Roles = None,
        names: Sequence[str] | None = None,
        history: str | Path | History | None = None,
        recovery: Recovery | None = DEFAULT_RECOVERY,
        guard: Guard | None = Guard(),  # noqa: B008
        **kwargs: Any,
    ) -> None:
        if "compression" in kwargs:
            raise expected(
                "compression",
                "none, since the legacy API knows one serialisation for all arrays of a model; "
                "flwr_colearn.CoLearn compresses",
                str(kwargs["compression"]),
            )
        clients = participant_arguments(
            num_participants,
            kwargs,
            fraction="fraction_fit",
            least=("min_fit_clients", "min_available_clients", "min_evaluate_clients"),
        )
        super().__init__(**{**kwargs, **clients})
        self._outgoing = Outgoing()
        self._algorithm = algorithm_of(local_epochs, learning_rate, total_epochs, local_steps)
        self._weighting = as_weighting(weighting)
        self._given_roles = named_roles(names, roles)
        self._log = RoundLog(history)
        self._adherence = Adherence()
        self._progress = Progress()
        self._roles: dict[str, Role] = {}
        self._mean: RoundMean | None = None
        self._sent: Arrays = {}
        self._change: float | None = None
        self.recovery = recovery
        self.guard = guard
        self._shared: Parameters | None = None
        self._asked: list[str] = []
        self._fits: Fits | None = None
        # The participants whose results were refused in `aggregate_fit`, with the reasons.
        self._refused: dict[str, str] = {}
        self._aggregated, self._connected = False, 0
        # The updates of the results that `check_result` has accepted.
        self._updates: dict[str, Update | None] = {}
        self._algorithm.log_summary(lambda line: log(INFO, line))

    def __repr__(self) -> str:
        """Return the strategy's name and its two rules."""
        return f"CoLearn({self._algorithm.local_epochs}, {self._algorithm.learning_rate})"

    @property
    def history(self) -> History:
        """The records of the rounds so far."""
        return self._log.history

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Decide T (eq. 4) from the parameters received, and ask K participants to train."""
        arrays = _named(parameters)
        # Flower's legacy API has no hook for the start of a run: a round number that does not grow
        # shows that this strategy object is used for a second one.
        if server_round <= self._progress.round:
            self._clear()
        # The last record is still open where Flower evaluated nothing after it, and eq. 4 below
        # needs the relative change that `_close` computes.
        self._close(arrays)
        if self._algorithm.spent(self._progress):
            return []
        plan, self._progress = self._algorithm.next_plan(server_round, self._progress, self._change)
        self._adherence.renew(plan)
        self._begin_mean(server_round, arrays)
        config: dict[str, Scalar] = {}
        if self.on_fit_config_fn is not None:
            config.update(self.on_fit_config_fn(server_round))
        config.update(plan.to_fit_config())
        clients = client_manager.sample(
            num_clients=self.min_fit_clients, min_num_clients=self.min_available_clients
        )
        self._say_who_trains(client_manager.num_available())
        self._log.open(plan_record(plan, self._progress))
        self._count(down=size_of(parameters) * len(clients))
        self._asked = [client.cid for client in clients]
        self._fits, self._updates, self._refused, self._aggregated = None, {}, {}, False
        # With `accept_failures=False` the first failure ends the run.
        if self.recovery is not None and self.accept_failures:
            grid = getattr(next(iter(clients), None), "grid", None)
            self._fits = Fits(recovery_on(grid, self.recovery), self._check_result)
            clients = [self._fits.around(client) for client in clients]
        return [(client, FitIns(parameters, config)) for client in clients]

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[FitFailure],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Add the results to the mean (eq. 2); invalid results are refused.

        Raises
        ------
        ColearnError
            If no model arrived at all, a participant is lost (see `recovery`), or one failed and
            `accept_failures` is False. ``error.result`` holds the model of the last completed
            round.
        """
        try:
            return self._average_of(server_round, results, failures)
        except ColearnError as error:
            self._keep_model(error)
            raise

    def _average_of(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[FitFailure],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        # SecAgg+'s workflow gives every result one and the same Parameters object, the average.
        if len({id(result.parameters) for _, result in results}) < len(results):
            raise ColearnError(
                "results: expected each participant's own parameters, found one average for all, "
                "as SecAgg+ makes it; use flwr_colearn.secagg.CoLearn"
            )
        if failures and not self.accept_failures:
            raise ColearnError(
                f"round {server_round}: expected no failures (accept_failures=False), "
                f"found {len(failures)}"
            )
        mean, self._aggregated = self._round_mean, True
        metrics = self._fold_all(results)
        self._progress = self._progress.told(mean_loss(each for _, each in metrics))
        # Before the refusals of `Fits` are added, after which the participant was restarted.
        self._refused = {e.participant: e.reason for e in mean.events if e.kind == "refusal"}
        self._note_absences(failures)
        self._log.note_events(mean.events)
        self._log.record.participants = mean.participants
        self._note_adherence()
        self._require(failures)
        if not (mean.count or failures or self._lost):
            # As FedAvg without results: the round has no average, and the model stays.
            log(WARNING, "%s left out the results of all participants", type(self).__name__)
            return None, {}
        # The mean was computed in the bytes of these records, so nothing is copied here.
        record = self._outgoing.record(mean.mean())
        self._log.record.contributions = mean.contributions
        average = Parameters([array.data for array in record.values()], "numpy.ndarray")
        aggregated: dict[str, Scalar] = {}
        if self.fit_metrics_aggregation_fn is not None:
            aggregated = _called(self.fit_metrics_aggregation_fn, metrics)
        self._log.note(train_metrics=aggregated)
        return average, aggregated

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Evaluate the shared model on the server, if the strategy has an `evaluate_fn`."""
        outcome = super().evaluate(server_round, parameters)
        if outcome is not None:
            self._log.note(server_metrics={"loss": outcome[0], **outcome[1]})
        return outcome

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Ask participants to evaluate the shared model, as FedAvg does."""
        self._shared = parameters
        if not self._log.is_open and self._algorithm.spent(self._progress):
            return []
        instructions = super().configure_evaluate(server_round, parameters, client_manager)
        if not instructions:  # then Flower does not call aggregate_evaluate
            self._close(_named(parameters))
        return instructions

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[EvaluateFailure],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Aggregate the participants' evaluation, and close the round's record.

        In contrast to FedAvg, a loss of NaN or infinity is left out, and an error of
        `evaluate_metrics_aggregation_fn` is logged and does not end the run.
        """
        loss, metrics = self._evaluation_of(server_round, results, failures)
        self._log.note(evaluate_metrics=metrics if loss is None else {"loss": loss, **metrics})
        if self._shared is not None:
            self._close(_named(self._shared))
        return loss, metrics

    def _evaluation_of(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[EvaluateFailure],
    ) -> tuple[float | None, dict[str, Scalar]]:
        if not results and failures and all(map(_cannot_evaluate, failures)) and server_round == 1:
            log(WARNING, "CoLearn: no client has `evaluate`; fraction_evaluate=0 asks nobody")
        # FedAvg divides by the sum of the examples, which is zero without this.
        counted = [item for item in results if item[1].num_examples > 0]
        if not counted or (failures and not self.accept_failures):
            return None, {}
        for client, result in counted:
            if not math.isfinite(result.loss):
                log(WARNING, "Loss of participant %s left out: found %s", client.cid, result.loss)
        finite = [res for _, res in counted if math.isfinite(res.loss)]
        examples = sum(res.num_examples for res in finite)
        total = sum(res.num_examples * res.loss for res in finite)
        loss = total / examples if examples else math.nan
        function = self.evaluate_metrics_aggregation_fn
        if function is None:
            if server_round == 1:
                log(WARNING, "No evaluate_metrics_aggregation_fn provided")
            return loss, {}
        return loss, _called(function, [(res.num_examples, res.metrics) for _, res in counted])

    def _say_who_trains(self, connected: int) -> None:
        """Log, when the number changes, that more participants are connected than train."""
        if connected > self.min_fit_clients and connected != self._connected:
            log(
                WARNING,
                "CoLearn: %s of %s connected sites train, others in every round; "
                "num_participants=%s trains all",
                self.min_fit_clients,
                connected,
                connected,
            )
        self._connected = connected

    @property
    def _round_mean(self) -> RoundMean:
        """The mean of the round under way."""
        self._log.record  # noqa: B018  (raises if there is none)
        assert self._mean is not None
        return self._mean

    def _begin_mean(self, server_round: int, arrays: Arrays) -> None:
        if self._mean is None:
            check_initial(arrays)
            self._roles = assign_roles(arrays, self._given_roles)
            self._mean = RoundMean(
                arrays,
                self._roles,
                self._weighting,
                self.min_fit_clients,
                empty=self._outgoing.empty,
                guard=self.guard,
            )
        self._mean.renew(server_round, arrays, self._progress.local_epochs)
        self._sent = arrays

    def _clear(self) -> None:
        """Reset the strategy to its state before an earlier run."""
        self._progress, self._mean, self._change = Progress(), None, None
        self._log.clear()
        self._adherence.clear()

    def _close(self, arrays: Arrays) -> None:
        """Complete the record of the round under way, if any; `arrays` is the shared model."""
        if not self._log.is_open:
            return
        if not self._aggregated:
            self._account_for_own()
        new, old = trainable(arrays, self._roles), trainable(self._sent, self._roles)
        # Without an average the model is unchanged, which is no plateau in the sense of eq. 4.
        # A subclass with an aggregation of its own adds nothing to the mean, and changes the model.
        averaged = self._round_mean.count > 0 or any(
            array.base is not self._sent[name].base for name, array in arrays.items()
        )
        self._change = relative_change(new, old) if averaged and new else None
        self._log.close(self._change)

    def _count(self, down: int = 0, up: int = 0) -> None:
        """Count bytes of tensors; the legacy API has no Grid, and so no `MeteringGrid`."""
        self._log.note_traffic(RoundTraffic(bytes=Directions(down, up)))

    def _keep_model(self, error: ColearnError) -> None:
        """Give an error the model of the last completed round, and say where it is."""
        error.result = Result(arrays=to_record(dict(self._sent)))
        done = self._progress.round - 1
        if done:
            error.remedy = (
                f"The model of round {done} is not lost: evaluate_fn has received it, and it is "
                "error.result.arrays"
            )

    def _check_result(self, participant: str, result: FitRes) -> None:
        """Raise a ColearnError unless a result can be added to the mean."""
        model = _named(result.parameters)
        self._updates[participant] = self._round_mean.measured(model, result.num_examples)

    def _note_absences(self, failures: list[FitFailure]) -> None:
        """Record the restarts, and the participants whose models are not in the mean."""
        mean = self._round_mean
        if self._fits is not None:
            self._log.note_traffic(RoundTraffic(bytes=self._fits.bytes))
            mean.note(self._fits.events)
        missing = sorted(set(self._asked) - set(mean.participants) - self._lost.keys())
        # Not by `failures` alone: an exception in them does not state its participant.
        reason = "; ".join(map(_describe, failures)) or "its result was not given to CoLearn"
        mean.note(Event("absence", participant, reason) for participant in missing)

    def _require(self, failures: list[FitFailure]) -> None:
        """Raise a ColearnError if more participants are lost than the policy allows.

        Results that a subclass or a wrapper left out are not lost. Without recovery the failures
        are handled as FedAvg does: the others' average counts.
        """
        if self.recovery is None:
            return
        mean, lost = self._round_mean, self._lost
        # Under Flower's workflows no `fit` is called, so only the number of failures is known.
        seen = self._fits is not None and self._fits.began
        replied = len(self._asked) - len(lost) - (0 if seen else len(failures))
        least = self.recovery.required(len(self._asked))
        if replied < least:
            reasons = [f"{name}: {why}" for name, why in sorted(lost.items())]
            raise ColearnError(
                f"round {mean.round}: expected results from at least {least} participants, found "
                f"{replied}; lost {sorted(lost)}: {'; '.join(reasons or map(_describe, failures))}"
            )

    def _note_adherence(self) -> None:
        """Record a warning for participants whose time shows that they do not follow the plan."""
        for participant in self._round_mean.participants:
            self._adherence.check(participant, {})  # the legacy API has no mod that states epochs
        seconds = {} if self._fits is None else self._fits.seconds
        events = self._adherence.events(self._round_mean.participants, seconds)
        self._log.note_events(events)

    @property
    def _lost(self) -> dict[str, str]:
        """The participants that are known to be lost in this round, with the reasons."""
        return {**self._refused, **({} if self._fits is None else self._fits.lost)}

    def _account_for_own(self) -> None:
        """Record the trainings of a round whose aggregation calls no `super`."""
        if self._fits is not None:
            self._log.note_traffic(RoundTraffic(bytes=self._fits.bytes))
            self._log.note_events(self._fits.events)
            self._log.record.participants = sorted(self._fits.began - self._fits.lost.keys())

    def _fold_all(self, results: list[tuple[ClientProxy, FitRes]]) -> Metrics:
        """Add results to the mean; return the metrics of the accepted ones."""
        # Sorted, since the last bits of a float64 sum depend on its order.
        ordered = sorted(results, key=lambda item: item[0].cid)
        self._count(up=sum(size_of(result.parameters) for _, result in ordered))
        read = [
            (result, (client.cid, arrays, result.num_examples))
            for client, result in ordered
            if (arrays := self._read(client.cid, result)) is not None
        ]
        updates = [self._updates.get(name) for _, (name, *_) in read]
        fits = self._round_mean.add_all([model for _, model in read], updates)
        pairs = zip(read, fits, strict=True)
        return [(result.num_examples, result.metrics) for (result, _), fit in pairs if fit]

    def _read(self, participant: str, result: FitRes) -> Arrays | None:
        """Return a participant's model; None if it cannot be read, which is a refusal."""
        try:
            return _named(result.parameters)
        except ColearnError as error:
            self._round_mean.refuse(participant, str(error))
            return None


def _called(aggregate: MetricsAggregationFn, metrics: Metrics) -> dict[str, Scalar]:
    """Return the metrics that a user's function aggregates; none if it raises an error."""
    try:
        return aggregate(metrics)
    except Exception:  # a participant may lack a metric, and the model is valid all the same
        log(WARNING, "CoLearn: the metrics could not be aggregated", exc_info=True)
        return {}


def _named(parameters: Parameters) -> Arrays:
    """Return legacy parameters under the names that ``ArrayRecord(list)`` gives: '0', '1', ..."""
    return {str(i): view_bytes(str(i), tensor) for i, tensor in enumerate(parameters.tensors)}


def _cannot_evaluate(failure: EvaluateFailure) -> bool:
    """Return whether a failure is that of a client without a function for evaluation."""
    if isinstance(failure, BaseException):
        return False
    return failure[1].status.code is Code.EVALUATE_NOT_IMPLEMENTED


def _describe(failure: FitFailure) -> str:
    if isinstance(failure, BaseException):
        return str(failure) or type(failure).__name__
    client, result = failure
    return f"{client.cid}: {result.status.message}"
