"""Loop: one run of CoLearn.start, with its clocks, budget, checkpoints and summary."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from ._flwr import config_to_str
from .checkpoint import Checkpoint, check_same_configuration, describe_arrays
from .errors import ColearnError, expected
from .normalization.schemes import PARTIAL
from .records import data_bytes, to_record
from .recovery.grid import RecoveringGrid

if TYPE_CHECKING:
    from .strategies.colearn import CoLearn

REPORT_WITHIN = 120.0
"""Seconds that Flower may take to report the end of a participant's process."""

SLACK = 3.0
"""An attempt may take so many times what its local epochs are expected to take."""

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


@dataclass
class Loop:
    """The rounds of one run, over the strategy's own hooks.

    Attributes
    ----------
    strategy : CoLearn
        Whose hooks are called.
    grid : Grid
        Connects to the participants.
    result : Result
        Filled as the run goes; holds the initial model at first.
    timeout : float
        Least time limit of one attempt of one participant, in seconds.
    train_config, evaluate_config : ConfigRecord
        Further entries for the participants.
    evaluate_fn : callable or None
        The server's own evaluation.
    """

    strategy: "CoLearn"
    grid: Grid
    result: Result
    timeout: float
    train_config: ConfigRecord
    evaluate_config: ConfigRecord
    evaluate_fn: EvaluateFn | None

    def run(self, num_rounds: int | None, resume: str) -> None:
        """Run to the last round, or until the budget is spent."""
        rule = self.strategy.rule
        self._log_start(num_rounds)
        server_round = self._begin(resume)
        if server_round == 0:
            self._evaluate_on_server(0)
            self._save(0)
        while (num_rounds is None or server_round < num_rounds) and not rule.spent:
            server_round += 1
            log(INFO, "")
            log(INFO, "[ROUND %s%s]", server_round, f"/{num_rounds}" if num_rounds else "")
            self._train(server_round)
            self._evaluate(server_round)
            self._evaluate_on_server(server_round)
            rule.close(self.strategy.view_of(self.result.arrays))
            self._save(server_round)

    def time_limit(self, local_epochs: int) -> float | None:
        """Return the seconds that one attempt of so many local epochs may take; None for no limit.

        It grows with T from the time that a local epoch was seen to take.
        """
        likely = local_epochs * self.strategy.rule.progress.seconds_per_epoch
        if SLACK * likely > self.timeout:
            log(
                WARNING,
                "CoLearn: %s local epochs take about %.0f s, so an attempt may take %.0f s instead "
                "of timeout=%.0f. Raise `timeout`, or bound the local epochs "
                "(IncreasingEpochs(maximum=...))",
                local_epochs,
                likely,
                SLACK * likely,
                self.timeout,
            )
        limit = max(self.timeout, SLACK * likely)
        return None if math.isinf(limit) else limit

    def log_recovery(self) -> None:
        """Log the run's restarts, refusals and absences by participant."""
        for kind in ("restarts", "refusals", "absences"):
            entries = [entry for record in self.strategy.history for entry in getattr(record, kind)]
            if entries:
                counts = Counter(entry["participant"] for entry in entries)
                log(INFO, "Run: %s %s (%s)", len(entries), kind, dict(counts))

    def _begin(self, resume: str) -> int:
        """Prepare a fresh or resumed run; return the last completed round."""
        if resume not in ("never", "auto"):
            raise expected("resume", "'never' or 'auto'", resume)
        folder = self.strategy.checkpoints
        self.strategy.rule.reset()
        saved = None if folder is None else folder.latest()
        if folder is None or saved is None:
            return 0
        if resume == "never":
            raise ColearnError(
                f"checkpoints: expected none, since resume='never', found round {saved.round} in "
                f"{folder.path}; pass resume='auto' or use another folder"
            )
        self._restore(saved)
        log(INFO, "CoLearn: resumed after round %s", saved.round)
        return saved.round

    def _restore(self, saved: Checkpoint) -> None:
        try:
            self._restore_state(saved)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ColearnError(
                "checkpoint: expected one of this version of flwr-colearn, found "
                f"{type(error).__name__}: {error}; use another folder"
            ) from error

    def _restore_state(self, saved: Checkpoint) -> None:
        check_same_configuration(saved.state["configuration"], self._configuration())
        self.result.arrays = to_record(dict(saved.arrays))
        arrays = self.strategy.view_of(self.result.arrays)
        self.strategy.rule.restore(saved.state["rule"], arrays)
        self.strategy.restore_extra(saved.extra)
        self.strategy.last_nodes = [int(node) for node in saved.state["nodes"]]
        version, numbers, gauss = saved.state["random"]
        self.strategy.random.setstate((version, tuple(numbers), gauss))
        for record in self.strategy.history:
            for metrics, by_round in (
                (record.train_metrics, self.result.train_metrics_clientapp),
                (record.evaluate_metrics, self.result.evaluate_metrics_clientapp),
                (record.server_metrics, self.result.evaluate_metrics_serverapp),
            ):
                if metrics:
                    by_round[record.round] = MetricRecord(metrics)

    def _save(self, server_round: int) -> None:
        if self.strategy.checkpoints is None:
            return
        state = {
            "configuration": self._configuration(),
            "rule": self.strategy.rule.state(),
            "random": self.strategy.random.getstate(),
            "nodes": self.strategy.last_nodes,
        }
        arrays = self.strategy.view_of(self.result.arrays)
        extra = self.strategy.extra_arrays()
        self.strategy.checkpoints.save(Checkpoint(server_round, arrays, state, extra))

    def _configuration(self) -> dict[str, str]:
        """Return what must be the same for a run to be resumed."""
        return {
            **self.strategy.configuration(),
            "model": describe_arrays(self.strategy.view_of(self.result.arrays)),
        }

    def _train(self, server_round: int) -> None:
        messages = list(
            self.strategy.configure_train(
                server_round, self.result.arrays, self.train_config, self.grid
            )
        )
        limit = self.strategy.time_limit
        timeout = math.inf if limit is None else limit + REPORT_WITHIN
        grid = self.grid
        send = grid.stream if isinstance(grid, RecoveringGrid) else grid.send_and_receive
        replies = send(messages=messages, timeout=timeout)
        arrays, metrics = self.strategy.aggregate_train(server_round, replies)
        if arrays is not None and self.strategy.normalization.due(server_round):
            arrays = self.strategy.recalibrate(server_round, arrays, self.grid, timeout)
        if arrays is not None:
            self.result.arrays = arrays
        if metrics is not None:
            log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
            self.result.train_metrics_clientapp[server_round] = metrics

    def _evaluate(self, server_round: int) -> None:
        messages = list(
            self.strategy.configure_evaluate(
                server_round, self.result.arrays, self.evaluate_config, self.grid
            )
        )
        replies = self.grid.send_and_receive(messages=messages, timeout=self.timeout)
        metrics = self.strategy.aggregate_evaluate(server_round, replies)
        if metrics is not None:
            log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
            self.result.evaluate_metrics_clientapp[server_round] = metrics

    def _evaluate_on_server(self, server_round: int) -> None:
        if self.evaluate_fn is None:
            return
        metrics = self.evaluate_fn(server_round, self.result.arrays)
        log(INFO, "Global evaluation")
        log(INFO, "\t└──> MetricRecord: %s", metrics)
        if metrics is not None:
            self.result.evaluate_metrics_serverapp[server_round] = metrics
            self.strategy.rule.note(server_metrics=metrics)
        if self.strategy.normalization.is_local:
            log(WARNING, "The shared model is %s", PARTIAL)

    def _log_start(self, num_rounds: int | None) -> None:
        log(INFO, "Starting %s strategy:", type(self.strategy).__name__)
        log(INFO, "\t├── Number of rounds: %s", num_rounds or "until the budget is spent")
        log(INFO, "\t├── ArrayRecord (%.2f MB)", data_bytes(self.result.arrays) / 1024**2)
        config = config_to_str(self.train_config) if self.train_config else "(empty!)"
        log(INFO, "\t├── ConfigRecord (train): %s", config)
        self.strategy.summary()
