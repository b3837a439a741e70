"""CoLearn, the strategy for Flower's Message API."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..aggregation import Weighting
from ..checkpoint import CheckpointFolder
from ..compression import Compression
from ..epoch_rules import EpochRule
from ..history import History
from ..normalization import Normalization, Pooled
from ..policy import DEFAULT_GUARD, DEFAULT_RECOVERY, Guard, Recovery
from ..roles import Roles
from ..schedules import LearningRate, RateFunction
from .algorithm import algorithm_of
from .averaging import Averaging


class CoLearn(Averaging):
    """Co-learning: a replacement for FedAvg with few, long rounds (Mi et al., 2020).

    In every round all K participants start from the shared model and train T local epochs, with a
    learning rate that decays within the round (eq. 3) and restarts with the next. The new shared
    model is the plain mean of theirs (eq. 2). With ``IncreasingEpochs`` T doubles if the relative
    change of the shared model is at most epsilon (eq. 4); with ``PlateauEpochs``, a rule of ours
    without an epsilon, if that change has stopped falling. The participants read T and the rates
    from the train config::

        from flwr_colearn import LocalPlan

        @app.train()
        def train(message, context):
            ...
            for epoch in LocalPlan.from_config(message.content["config"]):
                train_one_epoch(model, data, lr=epoch.learning_rate)

    Messages in the log, and what to do:

    * *Recovery: restart of participant ...*: the participant failed or its reply was refused, for
      the reason given, and its training is restarted in the same round. Nothing needs to be done.
    * *an attempt may take ... instead of timeout*: rounds take longer than `timeout`. Raise it, or
      bound T with the rule's `maximum`.
    * *Waiting for participants*: fewer than K nodes are connected. Start the missing ones.
    * *5 of 10 connected sites train*: raise `num_participants`, or let them take turns by
      ``rotate=True``.
    * *local epochs of participant ...: expected 4 iterated, found 1*: the ClientApp does not follow
      the plan. Iterate ``LocalPlan`` in its training function; ``strict=True`` refuses its replies.
    * *Relative change*: how far the round moved the shared model, which eq. 4 compares with
      epsilon. It falls for some rounds and then stays at a level that grows with T.
    * *epsilon=... is below the level that T=... holds: T will not grow*: as it should be, if rounds
      are to stay this short. For longer ones raise epsilon above the level, or use
      ``PlateauEpochs``.
    * *T has grown after each of three rounds in a row*: epsilon is above what a round moves the
      model by. Lower it, bound T by `maximum`, or use ``PlateauEpochs``.
    * *the model may not have begun to learn*, *T stays*: the training loss has hardly fallen. Check
      the learning rate.

    Parameters
    ----------
    num_participants : int, optional
        K, the number of distinct participants of every round. It sets FedAvg's `min_train_nodes`,
        `min_available_nodes` and `min_evaluate_nodes`. By default K is `min_train_nodes`.
    local_epochs : int or EpochRule
        The rule for T: ``IncreasingEpochs`` (ILE), ``PlateauEpochs``, ``FixedEpochs``, or a number
        for the latter.
    learning_rate : float, LearningRate or callable
        The schedule: ``CyclicalRate`` (CLR), ``ExponentialRate`` (ELR), ``ConstantRate``, or a
        number for the latter; ``CosineRate``, ``Warmup``, ``Annealed``, or any object with
        ``kind``, ``start`` and ``at`` (see `flwr_colearn.LearningRate`). A plain function receives
        the progress of the run, epochs done / `total_epochs`, and so needs `total_epochs`.
    total_epochs : int, optional
        The budget: the run ends when every participant has trained so many local epochs. T of the
        last round is limited to the rest.
    local_steps : int, optional
        The steps (mini-batches) that every participant trains in place of one local epoch of the
        rule, for participants with data of very different sizes: in round i each trains
        T_i * local_steps steps. The participants iterate ``plan.over(len(batches))``, see
        `flwr_colearn.LocalPlan`. By default a local epoch is a pass over the participant's data.
    weighting : {"uniform", "weighted"}, default "uniform"
        "uniform" for 1/K each as in eq. 2, "weighted" for FedAvg's `weighted_by_key` (number of
        examples).
    roles, names, history, wait_for_participants, recovery, checkpoints, compression, \
normalization, participants, guard, rotate, strict
        See `Averaging`.
    **kwargs
        The arguments of ``flwr.serverapp.strategy.FedAvg``, except `fraction_train`, which must
        stay 1, since all participants train in every round.

    Raises
    ------
    ColearnError
        If an argument is invalid; during a run, if participants are missing or no model arrived.
        Its `result` then holds the result up to the last completed round.

    Examples
    --------
    >>> from flwr_colearn import CyclicalRate, PlateauEpochs
    >>> strategy = CoLearn(
    ...     num_participants=5,
    ...     local_epochs=PlateauEpochs(5, maximum=20),
    ...     learning_rate=CyclicalRate(0.01),
    ...     total_epochs=100,
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
        local_steps: int | None = None,
        weighting: Weighting = "uniform",
        roles: Roles = None,
        names: Sequence[str] | None = None,
        history: str | Path | History | None = None,
        wait_for_participants: float | None = None,
        recovery: Recovery | None = DEFAULT_RECOVERY,
        checkpoints: str | Path | CheckpointFolder | None = None,
        compression: Compression = Compression(),  # noqa: B008  (an immutable value)
        normalization: Normalization = Pooled(),  # noqa: B008
        participants: Sequence[str] | None = None,
        guard: Guard | None = DEFAULT_GUARD,
        rotate: bool = False,
        strict: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_participants,
            weighting=weighting,
            roles=roles,
            names=names,
            history=history,
            wait_for_participants=wait_for_participants,
            recovery=recovery,
            checkpoints=checkpoints,
            compression=compression,
            normalization=normalization,
            participants=participants,
            guard=guard,
            rotate=rotate,
            strict=strict,
            algorithm=algorithm_of(local_epochs, learning_rate, total_epochs, local_steps),
            **kwargs,
        )
