"""Flower's own FedAvg with a normalization scheme: the baseline that others are compared with."""

import time
from collections.abc import Callable, Iterable
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from ..aggregation.mean import RunningMean
from ..errors import ColearnError, expected
from ..history import History, RoundRecord
from ..normalization.grid import NormalizationGrid
from ..normalization.recalibration import recalibrate
from ..normalization.schemes import PARTIAL, Average, Normalization, as_normalization
from ..records import Outgoing, data_bytes, records_of, view
from ..roles import Roles, assign_roles


class NormalizedFedAvg(FedAvg):
    """``flwr.serverapp.strategy.FedAvg``, its statistics as a scheme has them.

    With `Average` it aggregates as FedAvg does, by FedAvg's own code. With any other scheme the
    models are averaged by `RunningMean`, weighted by FedAvg's `weighted_by_key`. `Synchronised`
    needs an exchange at every step, and is refused.

    Parameters
    ----------
    normalization : Normalization
        The scheme.
    roles : mapping or sequence, optional
        See `flwr_colearn.Role`.
    history : str, Path or History, optional
        Where rounds and their bytes are recorded, by default in memory. A record's local epochs
        and learning rate are those of the train config's ``local-epochs`` and ``learning-rate``.
    **kwargs
        The arguments of ``flwr.serverapp.strategy.FedAvg``.

    Raises
    ------
    ColearnError
        If the scheme cannot be had with FedAvg; during a run, if it does not fit the model.

    Examples
    --------
    >>> from flwr_colearn import LocalStatistics
    >>> strategy = NormalizedFedAvg(LocalStatistics(), min_train_nodes=5)
    """

    def __init__(
        self,
        normalization: Normalization,
        *,
        roles: Roles = None,
        history: str | Path | History | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.normalization = as_normalization(normalization)
        if normalization.side_by_side:
            raise expected(
                "normalization",
                "a scheme that is exchanged once a round; layers that compute together need "
                "SynchronousSGD",
                normalization,
            )
        self.history = history if isinstance(history, History) else History(history)
        self._roles = roles
        self._grid: NormalizationGrid | None = None
        self._sent: ArrayRecord = ArrayRecord()
        self._record: RoundRecord | None = None
        self._epochs_done = 0
        self._extra = (0, 0)
        self._opened_at = 0.0
        self._timeout = 3600.0

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run FedAvg's own loop; see ``flwr.serverapp.strategy.FedAvg.start``."""
        self.history.clear()
        self._epochs_done, self._timeout = 0, timeout
        self._grid = NormalizationGrid(grid, self.normalization, self._roles)
        return super().start(
            self._grid,
            initial_arrays,
            num_rounds,
            timeout,
            train_config,
            evaluate_config,
            evaluate_fn,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample participants as FedAvg does, and begin the round's record."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._extra = (0, 0)
        self._sent, self._opened_at = arrays, time.perf_counter()
        epochs, rate = int(_number(config, "local-epochs")), _number(config, "learning-rate")
        self._epochs_done += epochs
        self._record = RoundRecord(
            server_round,
            epochs,
            rate,
            self._epochs_done,
            bytes_down=data_bytes(arrays) * len(messages),
        )
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the models of the replies, statistics by the scheme."""
        replies = list(replies)
        good = [reply for reply in replies if reply.has_content()]
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None and not isinstance(self.normalization, Average):
            arrays = self._average(server_round, good)
        if self._record is not None:
            self._close(good, metrics)
        return arrays, metrics

    def _average(self, server_round: int, replies: list[Message]) -> ArrayRecord:
        sent = view(self._sent)
        roles = self.normalization.roles(sent, assign_roles(sent, self._roles))
        outgoing = Outgoing()
        mean = RunningMean(sent, roles, outgoing.empty)
        for reply in replies:
            (record,) = records_of(reply.content, ArrayRecord).values()
            (metrics,) = records_of(reply.content, MetricRecord).values()
            try:
                mean.add(view(record), metrics[self.weighted_by_key])  # type: ignore[arg-type]
            except ColearnError as error:
                self._refuse(reply, str(error))
        if not mean.count:
            return self._sent
        average = outgoing.record(mean.mean())
        if not self.normalization.due(server_round) or self._grid is None:
            return average
        nodes = [reply.metadata.src_node_id for reply in replies]
        result = recalibrate(
            self._grid,
            nodes,
            server_round,
            average,
            roles,
            lambda examples: examples,
            self._timeout,
            (self.arrayrecord_key, self.configrecord_key, self.weighted_by_key),
        )
        self._extra = result.bytes_down, result.bytes_up
        return result.arrays

    def _refuse(self, reply: Message, reason: str) -> None:
        participant = str(reply.metadata.src_node_id)
        log(WARNING, "NormalizedFedAvg: reply of node %s refused: %s", participant, reason)
        if self._record is not None:
            self._record.refusals.append({"participant": participant, "reason": reason})

    def _close(self, replies: list[Message], metrics: MetricRecord | None) -> None:
        assert self._record is not None
        record, self._record = self._record, None
        refused = {entry["participant"] for entry in record.refusals}
        nodes = [str(reply.metadata.src_node_id) for reply in replies]
        record.participants = [node for node in nodes if node not in refused]
        record.bytes_up = sum(
            data_bytes(r)
            for reply in replies
            for r in records_of(reply.content, ArrayRecord).values()
        )
        record.train_metrics = dict(metrics or {})
        record.seconds = round(time.perf_counter() - self._opened_at, 3)
        if self._grid is not None:
            traffic = self._grid.take_traffic()
            down = self._extra[0] - traffic.saved_down
            up = self._extra[1] - traffic.saved_up
            record.bytes_down += down
            record.bytes_up += up
            record.normalization = {
                "scheme": self.normalization.name,
                "bytes": down + up,
                "fresh": [str(node_id) for node_id in traffic.fresh],
                **({"shared-model": PARTIAL} if self.normalization.is_local else {}),
            }
        self.history.append(record)


def _number(config: ConfigRecord, key: str) -> float:
    value = config.get(key)
    return float(value) if isinstance(value, int | float) else 0.0
