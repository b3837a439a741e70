"""SynchronousSGD: every step the participants' gradients are averaged and applied."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from ..aggregation.sgd import SGD
from ..errors import expected
from ..grids.threaded import SideBySideGrid
from ..plan import LocalPlan
from ..records import records_of, to_record, view
from ..roles import Arrays, NDArray, Role, assign_roles
from ..schedules import LearningRate
from .colearn import CoLearn

GRADIENTS = "gradients"
"""Config key: the names of the arrays whose gradients a participant replies with."""


class SynchronousSGD(CoLearn):
    """Stochastic gradient descent over all participants' batches, one exchange a step.

    g = sum_k B_k g_k / sum_k B_k, with B_k the examples of participant k's batch; then the server
    takes a step with g and the next round begins from the new weights. Without normalization
    layers this is SGD on the joint batch, to float precision; with `Synchronised` normalization it
    is with them too. It is the reference that co-learning is compared with, and for participants
    in one process or one machine room.

    It is the wrong tool between data centers: a Flower deployment takes 12 to 16 s a message round
    on two CPU cores, whatever the model's size, and every step moves the model down and a gradient
    up. A hundred steps that co-learning does in one local epoch would take half an hour.

    A train message is a step: its config has the plan of a round with one local epoch, and under
    ``gradients`` the names of the arrays to differentiate by. The participant replies
    with the model's names: gradients (mean over its batch) under those, and under the others, such
    as running statistics, the values after its forward pass; ``num-examples`` is B_k. The
    reference participant in ``clients`` does so.

    Parameters
    ----------
    num_participants : int, optional
        K; see `CoLearn`.
    learning_rate : float or LearningRate
        Of every step; ``ExponentialRate(initial, decay, total_epochs=steps)`` decays over the
        steps, ``ConstantRate(function of the step)`` does what the function says.
    momentum, weight_decay : float, default 0
        Of SGD, on the server. The velocity is part of a checkpoint.
    total_steps : int, optional
        The run ends after so many steps; `num_rounds` of `start` does the same.
    **kwargs
        Further arguments of `CoLearn`: `normalization`, `roles`, `history`, `recovery`, ...;
        `fraction_evaluate` is 0 by default, since an evaluation by the participants after every
        step would cost more than the step.

    Raises
    ------
    ColearnError
        As `CoLearn` does.

    Examples
    --------
    >>> strategy = SynchronousSGD(5, learning_rate=0.1, momentum=0.9)
    """

    exchanges_steps = True

    def __init__(
        self,
        num_participants: int | None = None,
        *,
        learning_rate: float | LearningRate,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        total_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("fraction_evaluate", 0.0)
        super().__init__(
            num_participants,
            local_epochs=1,
            learning_rate=learning_rate,
            total_epochs=total_steps,
            weighting="weighted",
            **kwargs,
        )
        if self.wire.up.differential:
            raise expected(
                "wire of SynchronousSGD",
                "one without differences to the shared model, since gradients travel up",
                str(self.wire),
            )
        self.sgd = SGD(momentum, weight_decay)
        self._velocity: dict[str, NDArray] = {}
        self._differentiated: list[str] = []
        self._weights: Arrays = {}
        self._side_by_side: SideBySideGrid | None = None
        self._rate = 0.0
        self._exchanged = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask K participants for the gradients of their next batches."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        if not messages:
            return messages
        self._weights = self.view_of(arrays)
        if server_round == 1:
            self._velocity = {}
        if server_round == 1 or not self._differentiated:
            roles = assign_roles(self._weights, self._roles)
            self._differentiated = [n for n, role in roles.items() if role is Role.TRAINABLE]
        # One record for all messages, made for this round.
        train_config = records_of(messages[0].content, ConfigRecord)[self.configrecord_key]
        self._rate = next(iter(LocalPlan.from_config(train_config))).learning_rate
        train_config["sgd"] = [self._rate, self.sgd.momentum, self.sgd.weight_decay]
        train_config[GRADIENTS] = self._differentiated
        return messages

    def configuration(self) -> dict[str, str]:
        """Return what must be the same for a run to be resumed."""
        return {**super().configuration(), "optimizer": str(self.sgd)}

    def extra_arrays(self) -> Arrays:
        """Return the velocity of every array."""
        return self._velocity

    def restore_extra(self, arrays: Arrays) -> None:
        """Go on with the velocity that was saved."""
        self._velocity, self._differentiated = dict(arrays), []

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
        model = {name: np.array(array) for name, array in view(average).items()}
        names = [name for name in model if self.rule.roles[name] is Role.TRAINABLE]
        weights = {name: self._weights[name] for name in names}
        new, self._velocity = self.sgd.step(weights, model, self._velocity, self._rate)
        self._note_exchange()
        return to_record({**model, **new}), metrics

    def _normalized(self, grid: Grid) -> Grid:
        if self.normalization.side_by_side and not isinstance(grid, SideBySideGrid):
            raise expected(
                "grid for synchronised normalization",
                "a SideBySideGrid, since every layer exchanges sums at every step; where "
                "participants are apart, use another scheme",
                type(grid).__name__,
            )
        self._side_by_side = grid if isinstance(grid, SideBySideGrid) else None
        self._exchanged = 0 if self._side_by_side is None else self._side_by_side.exchanged
        return super()._normalized(grid)

    def _note_exchange(self) -> None:
        """Record the bytes that layers exchanged in this step."""
        if self._side_by_side is None or not self.normalization.side_by_side:
            return
        moved = self._side_by_side.exchanged - self._exchanged
        self._exchanged = self._side_by_side.exchanged
        self.rule.note_normalization(moved // 2, moved - moved // 2)
