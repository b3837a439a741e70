"""Best: the best shared model of a run, and the end of a run that no longer improves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import Any, Literal, get_args

from flwr.app import ArrayRecord
from flwr.common import log
from flwr.serverapp.strategy import Result

from .checkpoint import check_same_configuration
from .errors import expected, whole_number
from .records import to_record, view
from .roles import NDArray

Mode = Literal["max", "min"]
Source = Literal["server", "participants"]
Metrics = Mapping[str, Any] | None

_SMALLER_IS_BETTER = ("loss", "error")
_PREFIX = "best/"


@dataclass(frozen=True)
class Best:
    """Keeps the best shared model of a run beside the last, and may end the run early.

    A model is better only if its metric is: of two with the same value the earlier one is kept,
    and one whose metric is NaN or infinite is never the best. The initial model takes part if the
    server evaluates it. A round without the metric changes nothing.

    A metric on the data for the final test is no good choice, since the best of many values on it
    is better than the model is.

    Parameters
    ----------
    metric : str
        The name of the metric.
    mode : {"max", "min"}, optional
        Whether the largest or the smallest value is the best. By default "min" for a metric whose
        name contains "loss" or "error", else "max".
    patience : int, optional
        The run ends early after so many evaluations in a row, each with the metric and none with a
        better value than the best; at least 1. By default it does not.
    source : {"server", "participants"}, optional
        Whose metric counts: that of the server's own evaluation, or the aggregated one of the
        participants. By default that of the first evaluation which has the metric, the server's
        before the participants', for the whole run.

    Raises
    ------
    ColearnError
        If an argument is invalid.

    Examples
    --------
    >>> Best("accuracy", patience=5)
    Best(metric='accuracy', mode='max', patience=5, source=None)
    >>> Best("val-loss").mode
    'min'
    """

    metric: str
    mode: Mode | None = None
    patience: int | None = None
    source: Source | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise expected("metric of Best", "the name of a metric", self.metric)
        if self.mode is None:
            smaller = any(word in self.metric.lower() for word in _SMALLER_IS_BETTER)
            # A frozen dataclass can be changed in no other way.
            object.__setattr__(self, "mode", "min" if smaller else "max")
        if self.mode not in get_args(Mode):
            raise expected("mode of Best", "'max' or 'min'", self.mode)
        if self.patience is not None:
            whole_number("patience of Best", self.patience, least=1)
        if self.source not in (None, *get_args(Source)):
            raise expected("source of Best", "'server', 'participants' or None", self.source)

    def is_better(self, value: float, than: float) -> bool:
        """Return whether a value of the metric is better than another."""
        return value > than if self.mode == "max" else value < than


@dataclass(frozen=True)
class BestModel:
    """The best shared model of a run.

    Attributes
    ----------
    arrays : ArrayRecord
        The model.
    round : int
        The round after which the shared model was this one; 0 for the initial model.
    metric : str
        The name of the metric.
    value : float
        Its value for this model.
    """

    arrays: ArrayRecord
    round: int
    metric: str
    value: float


@dataclass(repr=False)
class RunResult(Result):
    """The result of a run: Flower's ``Result``, with the best model.

    Attributes
    ----------
    best : BestModel or None
        The best shared model; ``None`` without `Best`, and if no evaluation had its metric as a
        finite number.
    stopped : str
        The reason why the run ended early, empty if it did not.
    """

    best: BestModel | None = None
    stopped: str = ""

    def __repr__(self) -> str:
        """Return Flower's text, with the best model where there is one."""
        text = super().__repr__()
        if self.best is not None:
            text += f"\nBest model:\n\tround {self.best.round}, "
            text += f"'{self.best.metric}' {self.best.value:.4e}\n"
        return text + (f"\nStopped early:\n\t{self.stopped}\n" if self.stopped else "")


class BestSoFar:
    """The best model of a run under way.

    Parameters
    ----------
    rule : Best or None
        How models are compared; with ``None`` they are not.

    Attributes
    ----------
    model : BestModel or None
        The best model so far.
    """

    def __init__(self, rule: Best | None) -> None:
        if rule is not None and not isinstance(rule, Best):
            raise expected("best", "Best(metric) or None", rule)
        self.rule = rule
        self.model: BestModel | None = None
        self._source = None if rule is None else rule.source
        # The evaluations in a row without a better value.
        self._waited = 0
        self._warned = False

    def observe(
        self, server_round: int, arrays: ArrayRecord, server: Metrics, participants: Metrics
    ) -> None:
        """Compare the shared model after a round with the best one.

        Parameters
        ----------
        server_round : int
            The number of the round; 0 for the initial model.
        arrays : ArrayRecord
            The shared model.
        server, participants : mapping or None
            The metrics of the server's own evaluation, and the aggregated ones of the participants.
        """
        if self.rule is None:
            return
        value = self._value(self.rule, server or {}, participants or {})
        if value is None:
            return
        is_first = self.model is None and math.isfinite(value)
        if is_first or (
            self.model is not None
            and math.isfinite(value)
            and self.rule.is_better(value, self.model.value)
        ):
            # A new record of the same arrays: the caller may change the other one.
            self.model = BestModel(ArrayRecord({**arrays}), server_round, self.rule.metric, value)
            self._waited = 0
            log(INFO, "Best model so far: '%s' %.6g", self.rule.metric, value)
        elif server_round:  # an initial model that has no value does not use up the patience
            self._waited += 1

    def _value(
        self, rule: Best, server: Mapping[str, Any], participants: Mapping[str, Any]
    ) -> float | None:
        """Return the metric, and decide whose it is when it is first there."""
        found: dict[Source, Mapping[str, Any]] = {"server": server, "participants": participants}
        for source, metrics in found.items():
            value = metrics.get(rule.metric)
            if self._source in (None, source) and isinstance(value, int | float):
                self._source = source
                return float(value)
        names = sorted({name for metrics in found.values() for name in metrics})
        if names and self._source is None and not self._warned:
            self._warned = True
            log(
                WARNING,
                "Best: expected an evaluation to have the metric '%s' as a number, found %s",
                rule.metric,
                names,
            )
        return None

    @property
    def reason(self) -> str:
        """The reason why the run should end; empty as long as it should not."""
        if self.rule is None or self.rule.patience is None or self._waited < self.rule.patience:
            return ""
        best = "none was finite"
        if self.model is not None:
            best = f"the best is {self.model.value:.6g}, of round {self.model.round}"
        return (
            f"'{self.rule.metric}' ({self.rule.mode}) has not improved in the last {self._waited} "
            f"evaluations: {best}"
        )

    def warn_at_the_end(self) -> None:
        """Log a warning if there was nothing to compare in the whole run."""
        if self.rule is not None and self.model is None:
            log(
                WARNING,
                "Best: no evaluation of this run had a finite '%s', so there is no best model",
                self.rule.metric,
            )

    # In checkpoints -----------------------------------------------------------------------------

    def state(self) -> dict[str, Any] | None:
        """Return the state for a checkpoint, in types of JSON, without the model's arrays."""
        if self.rule is None:
            return None
        best = None if self.model is None else [self.model.round, self.model.value]
        return {
            "settings": self._settings(),
            "source": self._source,
            "waited": self._waited,
            "best": best,
        }

    def arrays(self) -> dict[str, NDArray]:
        """Return the model's arrays for a checkpoint."""
        model = {} if self.model is None else view(self.model.arrays)
        return {f"{_PREFIX}{name}": array for name, array in model.items()}

    def restore(self, state: Mapping[str, Any] | None, arrays: Mapping[str, NDArray]) -> None:
        """Restore what `state` and `arrays` returned; other arrays are ignored.

        A run that was saved without a best model begins to compare here. The patience may change.

        Raises
        ------
        ColearnError
            If models were compared otherwise.
        """
        if state is None:
            return
        check_same_configuration(state["settings"], self._settings())
        assert self.rule is not None
        self._source, self._waited = state["source"], int(state["waited"])
        if state["best"] is not None:
            own = {n.removeprefix(_PREFIX): a for n, a in arrays.items() if n.startswith(_PREFIX)}
            server_round, value = state["best"]
            self.model = BestModel(to_record(own), server_round, self.rule.metric, value)

    def _settings(self) -> dict[str, str]:
        if self.rule is None:
            return {}
        return {
            "metric of the best model": f"{self.rule.metric} ({self.rule.mode})",
            "source of that metric": str(self.rule.source),
        }
