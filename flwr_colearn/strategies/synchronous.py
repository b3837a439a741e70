"""SynchronousSGD: a strategy that averages the participants' gradients in every step."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from ..aggregation import SGD
from ..errors import expected
from ..grids import ThreadedGrid
from ..plan import LocalPlan
from ..records import config_of, to_record, view
from ..roles import NDArray, Role
from ..schedules import LearningRate, RateFunction
from ..transport import ConnectedGrid
from .algorithm import algorithm_of
from .averaging import Averaging, folds

GRADIENTS = "gradients"
"""Config key: the names of the arrays whose gradients a participant replies with."""


class SynchronousSGD(Averaging):
    """Stochastic gradient descent over all participants' batches, with one exchange per step.

    g = sum_k B_k g_k / sum_k B_k, with B_k the examples of participant k's batch. The server takes
    a step with g, and the next round starts from the new weights. Without normalization layers, or
    with `Synchronised` normalization, this is SGD on the joint batch, to float precision. The
    strategy is the baseline for co-learning, and for participants in one process or machine room.

    It is not suited to several data centers: a Flower deployment takes 12 to 16 s per round of
    messages on two CPU cores, for a model of any size, and every step sends the model down and a
    gradient up. A hundred steps, which co-learning does in one local epoch, would take half an
    hour.

    A train message is a step. Its config has the plan of a round with one local epoch, and under
    ``gradients`` the names of the arrays to differentiate by. The reply has all names of the model:
    gradients (mean over the batch) under those in ``gradients``, and under the others, such as
    running statistics, the values after the forward pass; ``num-examples`` is B_k. The reference
    participant in ``clients`` implements this.

    Parameters
    ----------
    num_participants : int, optional
        K; see `Averaging`.
    learning_rate : float, LearningRate or callable
        The schedule over the steps: ``ExponentialRate(initial, decay, total_epochs=steps)`` decays
        over all of them, ``ConstantRate(function of the step)`` uses any function.
    momentum, weight_decay : float, default 0
        The parameters of SGD on the server. The velocity is part of a checkpoint.
    total_steps : int, optional
        The number of steps after which the run ends; `num_rounds` of `start` does the same.
    **kwargs
        Further arguments of `Averaging`: `normalization`, `roles`, `history`, `recovery`, ...;
        `fraction_evaluate` is 0 by default, since an evaluation by the participants after every
        step would cost more than the step.

    Raises
    ------
    ColearnError
        As `Averaging` does.

    Examples
    --------
    >>> strategy = SynchronousSGD(5, learning_rate=0.1, momentum=0.9)
    """

    exchanges_steps = True

    def __init__(
        self,
        num_participants: int | None = None,
        *,
        learning_rate: float | LearningRate | RateFunction,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        total_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("fraction_evaluate", 0.0)
        super().__init__(
            num_participants,
            algorithm=replace(algorithm_of(1, learning_rate, total_steps), advises=False),
            **kwargs,
        )
        # Int8 encodes differences to the shared model, and a gradient is not near it.
        if self.transport.compression.up.differential:
            raise expected(
                "compression of SynchronousSGD",
                "one without differences to the shared model, since gradients travel up",
                str(self.transport.compression),
            )
        self.sgd = SGD(momentum, weight_decay)
        self._velocity: dict[str, NDArray] = {}
        self._rate = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask K participants for the gradients of their next batches."""
        self._check_grid(grid)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        if not messages:
            return messages
        if server_round == 1:
            self._velocity = {}
        # All messages share one record, which was created for this round, so one change is enough.
        train_config = config_of(messages[0].content)
        self._rate = next(iter(LocalPlan.from_config(train_config))).learning_rate
        train_config["sgd"] = [self._rate, self.sgd.momentum, self.sgd.weight_decay]
        train_config[GRADIENTS] = self._shared.trained
        return messages

    def _check_grid(self, grid: Grid) -> None:
        bottom = grid.bottom if isinstance(grid, ConnectedGrid) else grid
        if self._features.normalization.all_reduces and not isinstance(bottom, ThreadedGrid):
            raise expected(
                "grid for synchronised normalization",
                "a ThreadedGrid, since every layer exchanges sums at every step; where "
                "participants are apart, use another scheme",
                type(bottom).__name__,
            )

    @folds
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the gradients with weights B_k and take a step.

        Raises
        ------
        ColearnError
            If no gradient arrived at all.
        """
        average, metrics = super().aggregate_train(server_round, replies)
        if average is None:
            return average, metrics
        # Trained arrays of the average are gradients; the others, such as statistics, are values.
        model = {name: np.array(array) for name, array in view(average).items()}
        shared = self._shared
        weights = {n: shared.arrays[n] for n in model if shared.roles[n] is Role.TRAINABLE}
        new, self._velocity = self.sgd.step(weights, model, self._velocity, self._rate)
        return to_record({**model, **new}), metrics

    def configuration(self) -> dict[str, str]:
        """Return the settings that a resumed run must have in common with the saved one."""
        return {**super().configuration(), "optimizer": str(self.sgd)}

    def strategy_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the strategy's state in types of JSON, and the velocity of every array."""
        state, _ = super().strategy_state()
        return state, dict(self._velocity)

    def restore_strategy_state(self, state: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
        """Restore the state that `strategy_state` returned."""
        super().restore_strategy_state(state, {})
        self._velocity = dict(arrays)
