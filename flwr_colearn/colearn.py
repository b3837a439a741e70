"""CoLearn, the strategy for Flower's Message API."""

import math
import random
import time
from collections.abc import Callable, Iterable
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from ._flwr import config_to_str, data_bytes, to_record, view
from .errors import ColearnError, expected, whole_number
from .history import History
from .roles import Arrays, Roles
from .rule import CoLearningRule, Weighting
from .schedules import EpochRule, LearningRate


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

    * *reply of participant ... refused*: the reason follows; the round's average is without it.
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
    **kwargs
        The arguments of ``flwr.serverapp.strategy.FedAvg``, except `fraction_train`, which must
        stay 1: nobody is left out of a round.

    Attributes
    ----------
    history : History
        The rounds so far.

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
            math.inf if wait_for_participants is None else wait_for_participants
        )
        self._rule = CoLearningRule(
            local_epochs, learning_rate, weighting, total_epochs, roles, history
        )
        self._viewed: tuple[ArrayRecord, Arrays] | None = None
        self._last_nodes: list[int] = []
        self._evaluated: ArrayRecord | None = None
        self._in_own_loop = False

    @property
    def history(self) -> History:
        """The rounds so far."""
        return self._rule.history

    def summary(self) -> None:
        """Log the settings of the strategy."""
        self._rule.log_summary(lambda line: log(INFO, line))
        log(INFO, "\t├──> Participants: %s", self.num_participants)
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
        plan = self._rule.open(server_round, self._view(arrays))
        if plan is None:
            return []
        log(
            INFO,
            "configure_train: %s participants train %s local epochs from learning rate %g",
            self.num_participants,
            plan.local_epochs,
            plan.learning_rate,
        )
        self._last_nodes = self._choose_nodes(grid)
        self._rule.sent_down(data_bytes(arrays) * len(self._last_nodes))
        # A copy: Flower hands the same ConfigRecord to every round.
        train_config = ConfigRecord({**config, **plan.to_config()})
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: train_config})
        return [
            Message(content=content, message_type=MessageType.TRAIN, dst_node_id=node_id)
            for node_id in self._last_nodes
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies one by one into the mean (eq. 2), refusing those that do not fit.

        Raises
        ------
        ColearnError
            If no model arrived at all.
        """
        if not self._rule.under_way:
            return None, None
        metrics: list[RecordDict] = []
        for reply in self._in_order(replies):
            if self._fold(reply):
                metrics.append(RecordDict({**reply.content.metric_records}))
        average = to_record(self._rule.average())
        train_metrics = self._aggregate_metrics(self.train_metrics_aggr_fn, metrics)
        self._rule.note(train_metrics=train_metrics)
        return average, train_metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask participants to evaluate the shared model, as FedAvg does."""
        self._evaluated = arrays
        if not self._rule.under_way:
            return []
        return super().configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate the participants' evaluation metrics; failed or malformed replies are left out.

        Under a wrapper that runs Flower's own loop, such as differential privacy, this is the
        last hook of a round, so the round's record is closed here.
        """
        contents = [reply.content for reply in replies if self._evaluation_ok(reply)]
        metrics = self._aggregate_metrics(self.evaluate_metrics_aggr_fn, contents)
        self._rule.note(evaluate_metrics=metrics)
        if not self._in_own_loop and self._evaluated is not None:
            self._rule.close(self._view(self._evaluated))
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
            Seconds to wait for the replies of one round. Rounds grow with T.
        train_config, evaluate_config : ConfigRecord, optional
            Further entries for the participants; the plan's keys are added to the former.
        evaluate_fn : callable, optional
            ``(round, arrays) -> MetricRecord | None``: the server's own evaluation, called with
            round 0 before the first one.

        Returns
        -------
        Result
            The final model and the metrics of every round, by round number.

        Raises
        ------
        ColearnError
            If fewer than K nodes connect in time, or a round brings no model. ``error.result``
            holds what was reached.
        """
        if num_rounds is None:
            num_rounds = 3 if self._rule.total_epochs is None else None
        else:
            whole_number("num_rounds", num_rounds, least=1)
        result = Result(arrays=initial_arrays)
        self._rule.reset()
        self._in_own_loop = True
        started = time.time()
        try:
            self._log_start(num_rounds, initial_arrays, train_config)
            self._evaluate_on_server(0, result, evaluate_fn)
            server_round = 0
            while server_round != num_rounds and not self._rule.spent:
                server_round += 1
                of = "" if num_rounds is None else f"/{num_rounds}"
                log(INFO, "")
                log(INFO, "[ROUND %s%s]", server_round, of)
                self._train(server_round, grid, result, timeout, train_config)
                self._evaluate(server_round, grid, result, timeout, evaluate_config)
                self._evaluate_on_server(server_round, result, evaluate_fn)
                self._rule.close(self._view(result.arrays))
        except ColearnError as error:
            error.result = result
            raise
        finally:
            self._in_own_loop = False
        log(INFO, "")
        log(INFO, "Strategy execution finished in %.2fs", time.time() - started)
        return result

    def _train(
        self,
        server_round: int,
        grid: Grid,
        result: Result,
        timeout: float,
        config: ConfigRecord | None,
    ) -> None:
        messages = self.configure_train(server_round, result.arrays, config or ConfigRecord(), grid)
        replies = grid.send_and_receive(messages=messages, timeout=timeout)
        arrays, metrics = self.aggregate_train(server_round, replies)
        if arrays is not None:
            result.arrays = arrays
        if metrics is not None:
            log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
            result.train_metrics_clientapp[server_round] = metrics

    def _evaluate(
        self,
        server_round: int,
        grid: Grid,
        result: Result,
        timeout: float,
        config: ConfigRecord | None,
    ) -> None:
        messages = self.configure_evaluate(
            server_round, result.arrays, config or ConfigRecord(), grid
        )
        replies = grid.send_and_receive(messages=messages, timeout=timeout)
        metrics = self.aggregate_evaluate(server_round, replies)
        if metrics is not None:
            log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
            result.evaluate_metrics_clientapp[server_round] = metrics

    def _evaluate_on_server(
        self,
        server_round: int,
        result: Result,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> None:
        if evaluate_fn is None:
            return
        metrics = evaluate_fn(server_round, result.arrays)
        log(INFO, "Global evaluation")
        log(INFO, "\t└──> MetricRecord: %s", metrics)
        if metrics is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics
            self._rule.note(server_metrics=metrics)

    def _log_start(
        self, num_rounds: int | None, arrays: ArrayRecord, config: ConfigRecord | None
    ) -> None:
        log(INFO, "Starting %s strategy:", type(self).__name__)
        log(INFO, "\t├── Number of rounds: %s", num_rounds or "until the budget is spent")
        log(INFO, "\t├── ArrayRecord (%.2f MB)", data_bytes(arrays) / 1024**2)
        log(INFO, "\t├── ConfigRecord (train): %s", config_to_str(config) if config else "(empty!)")
        self.summary()

    def _choose_nodes(self, grid: Grid) -> list[int]:
        """Return K connected nodes, those of the last round first."""
        wanted = max(self.min_available_nodes, self.num_participants)
        nodes = wait_for_nodes(grid, wanted, self.wait_for_participants)
        stayed = [node for node in self._last_nodes if node in nodes]
        others = sorted(set(nodes) - set(stayed))
        wanted = self.num_participants - len(stayed)
        return stayed + (others if len(others) == wanted else random.sample(others, wanted))

    def _fold(self, reply: Message) -> bool:
        participant = str(reply.metadata.src_node_id)
        try:
            arrays, examples = self._open_reply(reply)
            model = view(arrays)
        except ColearnError as error:
            self._rule.refuse(participant, str(error))
            return False
        return self._rule.fold(participant, model, examples, data_bytes(arrays))

    def _open_reply(self, reply: Message) -> tuple[ArrayRecord, float]:
        """Return a train reply's arrays and number of examples."""
        examples = self._examples(reply)
        records = list(reply.content.array_records.values())
        if len(records) != 1:
            raise expected("reply", "exactly one ArrayRecord", len(records))
        return records[0], examples

    def _examples(self, reply: Message) -> float:
        """Return the number of examples that any reply must state."""
        if reply.has_error():
            reason = (reply.error.reason or f"error {reply.error.code}").strip()
            raise ColearnError(f"the participant failed: {reason.splitlines()[-1]}")
        records = list(reply.content.metric_records.values())
        if len(records) != 1:
            raise expected("reply", "exactly one MetricRecord", len(records))
        examples = records[0].get(self.weighted_by_key)
        if not isinstance(examples, int | float) or not 0 < examples < math.inf:
            raise expected(f"'{self.weighted_by_key}' in the reply", "a positive number", examples)
        return examples

    def _evaluation_ok(self, reply: Message) -> bool:
        try:
            self._examples(reply)
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
        """Sort by node where the sum's last bit depends on the order: float64 models."""
        if self._rule.order_matters:
            return sorted(replies, key=lambda reply: reply.metadata.src_node_id)
        return replies

    def _view(self, arrays: ArrayRecord) -> Arrays:
        """Return views of a record, the same ones for the same record."""
        if self._viewed is None or self._viewed[0] is not arrays:
            self._viewed = arrays, view(arrays)
        return self._viewed[1]


def wait_for_nodes(grid: Grid, wanted: int, seconds: float) -> list[int]:
    """Return the connected nodes as soon as there are `wanted` of them.

    Raises
    ------
    ColearnError
        If fewer are connected after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while len(nodes := sorted(set(grid.get_node_ids()))) < wanted:
        if time.monotonic() >= deadline:
            raise ColearnError(
                f"participants: expected {wanted}, found {len(nodes)} connected after "
                f"{seconds:g} s. In a deployment start the missing SuperNodes; a simulation has as "
                "many as its federation config says: flwr run . --stream --federation-config "
                f'"num-supernodes={wanted} client-resources-num-cpus=1"'
            )
        log(INFO, "Waiting for participants: %s of %s connected", len(nodes), wanted)
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
    return nodes


def participant_arguments(
    num_participants: int | None, kwargs: dict[str, Any], fraction: str, least: tuple[str, ...]
) -> dict[str, int]:
    """Return FedAvg's arguments that make every round have exactly K participants.

    Parameters
    ----------
    num_participants : int or None
        K; ``None`` takes `least[0]` of `kwargs` (FedAvg's default is 2).
    kwargs : dict
        FedAvg's arguments as the user gave them.
    fraction : str
        Name of the argument for the fraction of nodes that train; must be 1.
    least : tuple of str
        Names of the arguments for the least number of nodes: training first.

    Raises
    ------
    ColearnError
        If the arguments contradict each other.
    """
    if kwargs.get(fraction, 1.0) != 1.0:
        raise expected(fraction, "1.0, since every participant takes part", kwargs[fraction])
    k = kwargs.get(least[0], 2) if num_participants is None else num_participants
    whole_number("num_participants", k, least=1)
    for name in least[:2]:
        if num_participants is not None and kwargs.get(name, k) != k:
            raise expected(name, f"num_participants={k}, or nothing", kwargs[name])
    return {name: kwargs.get(name, k) if name != least[0] else k for name in least}
