"""CoLearn, the strategy for Flower's Message API."""

from pathlib import Path
from typing import Any

from ..aggregation import Weighting
from ..checkpoint import CheckpointFolder
from ..compression import Compression
from ..history import History
from ..normalization import Normalization, Pooled
from ..policy import Recovery
from ..roles import Roles
from ..schedules import EpochRule, LearningRate, RateFunction
from .algorithm import algorithm_of
from .averaging import Averaging


class CoLearn(Averaging):
    """Co-learning: a drop-in for FedAvg that trains in few, long rounds (Mi et al., 2020).

    Every round all K participants start from the shared model and train T local epochs, at a
    learning rate that decays within the round (eq. 3) and restarts with the next; the shared model
    becomes the plain mean of theirs (eq. 2); T doubles whenever it moved by no more than epsilon
    (eq. 4). The participants learn T and the rates from the train config::

        from flwr_colearn import LocalPlan

        @app.train()
        def train(message, context):
            ...
            for epoch in LocalPlan.from_config(message.content["config"]):
                train_one_epoch(model, data, lr=epoch.learning_rate)

    What to do when you see it in the log:

    * *Recovery: restart of participant ...*: it failed or its reply was refused, for the reason
      given, and trains again in the same round.
    * *an attempt may take ... instead of timeout*: rounds have outgrown `timeout`; raise it, or
      bound T with ``IncreasingEpochs(maximum=...)``.
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
    learning_rate : float, LearningRate or callable
        ``CyclicalRate`` (CLR), ``ExponentialRate`` (ELR), ``ConstantRate``, or a number for the
        latter; ``CosineRate``, ``Warmup``, or any object with ``kind``, ``start`` and ``at`` (see
        `flwr_colearn.LearningRate`). A plain function is given the progress of the run, epochs
        done / `total_epochs`, which it needs.
    total_epochs : int, optional
        Budget: the run ends when every participant has done so many local epochs, the last
        round's T being cut to fit.
    weighting : {"uniform", "weighted"}, default "uniform"
        1/K each as in eq. 2, or by FedAvg's `weighted_by_key` (number of examples).
    roles, history, wait_for_participants, recovery, checkpoints, compression, normalization
        See `Averaging`.
    **kwargs
        The arguments of ``flwr.serverapp.strategy.FedAvg``, except `fraction_train`, which must
        stay 1: nobody is left out of a round.

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
        learning_rate: float | LearningRate | RateFunction,
        total_epochs: int | None = None,
        weighting: Weighting = "uniform",
        roles: Roles = None,
        history: str | Path | History | None = None,
        wait_for_participants: float | None = None,
        recovery: Recovery | None = Recovery(),  # noqa: B008  (an immutable value)
        checkpoints: str | Path | CheckpointFolder | None = None,
        compression: Compression = Compression(),  # noqa: B008
        normalization: Normalization = Pooled(),  # noqa: B008
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_participants,
            weighting=weighting,
            roles=roles,
            history=history,
            wait_for_participants=wait_for_participants,
            recovery=recovery,
            checkpoints=checkpoints,
            compression=compression,
            normalization=normalization,
            algorithm=algorithm_of(local_epochs, learning_rate, total_epochs),
            **kwargs,
        )
