"""CoLearn for projects on Flower's legacy API: ``ServerAppComponents`` and ``NumPyClient``."""

import time
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    log,
)
from flwr.server import ClientManager
from flwr.server.strategy import FedAvg

from ._flwr import ClientProxy, fit_clients
from .errors import ColearnError, expected
from .history import History
from .records import Outgoing, view_bytes
from .recovery.grid import LONGEST_PAUSE, Event, Quorum, Recovery
from .recovery.membership import participant_arguments
from .roles import Arrays, Roles
from .schedules import EpochRule, LearningRate
from .strategies.algorithm import CoLearningRule, Weighting

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

    Legacy parameters are nameless, so batch-norm statistics are pooled only if `roles` lists a
    role for every array. Flower's legacy server always runs ``ServerConfig.num_rounds`` rounds:
    once `total_epochs` is spent the remaining ones send nothing and change nothing.

    Parameters
    ----------
    num_participants : int, optional
        K; by default `min_fit_clients`.
    local_epochs, learning_rate, total_epochs, weighting, roles, history
        As for `flwr_colearn.CoLearn`.
    recovery : Recovery, optional
        As for `flwr_colearn.CoLearn`, as far as the legacy API lets us: participants that failed
        are asked again through the same ``ClientProxy``, all of them at once. One whose SuperNode
        came back with another node id is not recognised, `patience` is not used, and there are no
        deadlines, checkpoints or resume, and no compression. For SecAgg+ there is
        `flwr_colearn.secagg.CoLearn`.
    **kwargs
        The arguments of ``flwr.server.strategy.FedAvg``, except `fraction_fit`, which must stay 1.

    Attributes
    ----------
    history : History
        The rounds so far.

    Raises
    ------
    ColearnError
        If an argument is not what it should be; during a run, if no model arrived.
    """

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
        recovery: Recovery | None = Recovery(),  # noqa: B008  (an immutable value)
        **kwargs: Any,
    ) -> None:
        if "wire" in kwargs:
            raise expected(
                "wire",
                "none, since the legacy API knows one serialisation for all arrays of a model; "
                "flwr_colearn.CoLearn compresses",
                str(kwargs["wire"]),
            )
        clients = participant_arguments(
            num_participants,
            kwargs,
            fraction="fraction_fit",
            least=("min_fit_clients", "min_available_clients", "min_evaluate_clients"),
        )
        super().__init__(**{**kwargs, **clients})
        self._outgoing = Outgoing()
        self._rule = CoLearningRule(
            local_epochs,
            learning_rate,
            weighting,
            total_epochs,
            roles,
            history,
            empty=self._outgoing.empty,
            participants=self.min_fit_clients,
        )
        self.recovery = recovery
        self._shared: Parameters | None = None
        self._asked: dict[str, tuple[ClientProxy, FitIns]] = {}
        self._rule.log_summary(lambda line: log(INFO, line))

    def __repr__(self) -> str:
        """Return the strategy's name and its two rules."""
        return f"CoLearn({self._rule.local_epochs}, {self._rule.learning_rate})"

    @property
    def history(self) -> History:
        """The rounds so far."""
        return self._rule.history

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Decide T (eq. 4) from the parameters received, and ask K participants to train."""
        plan = self._rule.open(server_round, _named(parameters))
        if plan is None:
            return []
        config: dict[str, Scalar] = {}
        if self.on_fit_config_fn is not None:
            config.update(self.on_fit_config_fn(server_round))
        config.update(plan.to_config())
        clients = client_manager.sample(
            num_clients=self.min_fit_clients, min_num_clients=self.min_available_clients
        )
        self._rule.sent_down(_size(parameters) * len(clients))
        self._asked = {client.cid: (client, FitIns(parameters, config)) for client in clients}
        return list(self._asked.values())

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[FitFailure],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Fold the results into the mean (eq. 2), refusing those that do not fit.

        Raises
        ------
        ColearnError
            If no model arrived at all, a participant is lost (see `recovery`), or one failed and
            `accept_failures` is False.
        """
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
        metrics = self._fold_all(results)
        metrics += self._restart_missing(server_round, failures)
        record = self._outgoing.record(self._rule.average())
        average = Parameters([array.data for array in record.values()], "numpy.ndarray")
        aggregated: dict[str, Scalar] = {}
        if self.fit_metrics_aggregation_fn is not None:
            aggregated = self.fit_metrics_aggregation_fn(metrics)
        self._rule.note(train_metrics=aggregated)
        return average, aggregated

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Evaluate the shared model on the server, if an `evaluate_fn` was given."""
        outcome = super().evaluate(server_round, parameters)
        if outcome is not None:
            self._rule.note(server_metrics={"loss": outcome[0], **outcome[1]})
        return outcome

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Ask participants to evaluate the shared model, as FedAvg does."""
        self._shared = parameters
        if not self._rule.under_way:
            return []
        instructions = super().configure_evaluate(server_round, parameters, client_manager)
        if not instructions:  # then Flower does not call aggregate_evaluate
            self._rule.close(_named(parameters))
        return instructions

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[EvaluateFailure],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Aggregate the participants' evaluation as FedAvg does, and close the round's record."""
        counted = [item for item in results if item[1].num_examples > 0]
        loss, metrics = super().aggregate_evaluate(server_round, counted, failures)
        self._rule.note(evaluate_metrics=metrics if loss is None else {"loss": loss, **metrics})
        if self._shared is not None:
            self._rule.close(_named(self._shared))
        return loss, metrics

    def _restart_missing(self, server_round: int, failures: list[FitFailure]) -> Metrics:
        """Ask participants without a usable result again, until the recovery's policy says stop."""
        metrics: Metrics = []
        restarts = 0
        while missing := sorted(set(self._asked) - set(self._rule.replied)):
            reason = "; ".join(map(_describe, failures)) or "its result was refused"
            if self.recovery is None or (
                restarts >= self.recovery.max_restarts and self.recovery.policy != "wait"
            ):
                self._give_up(server_round, missing, reason)
                break
            time.sleep(min(self.recovery.pause * 2**restarts, LONGEST_PAUSE))
            restarts += 1
            self._rule.note_recovery(Event("restart", cid, reason) for cid in missing)
            for cid in missing:
                self._rule.sent_down(_size(self._asked[cid][1].parameters))
            again = [self._asked[cid] for cid in missing]
            results, failures = fit_clients(again, None, None, server_round)
            metrics += self._fold_all(results)
        return metrics

    def _give_up(self, server_round: int, missing: list[str], reason: str) -> None:
        self._rule.note_recovery(Event("absence", cid, reason) for cid in missing)
        log(WARNING, "Round %s goes without participants %s: %s", server_round, missing, reason)
        if self.recovery is None:
            return
        policy, replied = self.recovery.policy, len(self._rule.replied)
        least = policy.least if isinstance(policy, Quorum) else len(self._asked)
        if replied < least:
            raise ColearnError(
                f"round {server_round}: expected results from at least {least} participants, found "
                f"{replied}; lost {missing}: {reason}"
            )

    def _fold_all(self, results: list[tuple[ClientProxy, FitRes]]) -> Metrics:
        """Fold results into the mean by participant; return the metrics of those accepted."""
        ordered = sorted(results, key=lambda item: item[0].cid)
        read = [
            (result, model)
            for client, result in ordered
            if (model := self._read(client.cid, result)) is not None
        ]
        models = [model for _, model in read]
        if len(models) == len(self._asked):  # unless it refuses one, nobody is folded later
            fits = self._rule.fold_all(models)
        else:
            fits = [self._rule.fold(*model) for model in models]
        pairs = zip(read, fits, strict=True)
        return [(result.num_examples, result.metrics) for (result, _), fit in pairs if fit]

    def _read(self, participant: str, result: FitRes) -> tuple[str, Arrays, float, int] | None:
        """Return participant, model, examples and bytes; None if there is no model to read."""
        try:
            arrays = _named(result.parameters)
        except ColearnError as error:
            self._rule.refuse(participant, str(error))
            return None
        return participant, arrays, result.num_examples, _size(result.parameters)


def _named(parameters: Parameters) -> Arrays:
    """Return legacy parameters under the names that ``ArrayRecord(list)`` gives: '0', '1', ..."""
    return {str(i): view_bytes(str(i), tensor) for i, tensor in enumerate(parameters.tensors)}


def _size(parameters: Parameters) -> int:
    return sum(len(tensor) for tensor in parameters.tensors)


def _describe(failure: FitFailure) -> str:
    if isinstance(failure, BaseException):
        return str(failure) or type(failure).__name__
    client, result = failure
    return f"{client.cid}: {result.status.message}"
