"""The arms of the paper's study: pairs of a learning-rate schedule and an epoch rule."""

from dataclasses import dataclass, replace
from typing import Any

from clients.settings import ParticipantSettings
from flwr_colearn import (
    Annealed,
    ColearnError,
    CosineRate,
    CyclicalRate,
    EpochRule,
    ExponentialRate,
    FixedEpochs,
    IncreasingEpochs,
    LearningRate,
    PlateauEpochs,
)
from simulations.settings import RunSettings


@dataclass(frozen=True)
class Arm:
    """An arm of the study.

    Attributes
    ----------
    title : str
        The name in tables and legends.
    cyclical : bool
        Whether the learning rate is cyclical (CLR) rather than exponential (ELR).
    increasing : bool
        Whether the local epochs increase (ILE) rather than stay fixed (FLE).
    pooled_data : bool
        Whether one site has all the data (vanilla learning).
    alone : bool
        Whether every participant trains separately and models are never averaged: the ensemble,
        and vanilla learning with the exponential rate.
    """

    title: str
    cyclical: bool = False
    increasing: bool = False
    pooled_data: bool = False
    alone: bool = False


ARMS = {
    "clr-ile": Arm("CLR+ILE (co-learning)", cyclical=True, increasing=True),
    "clr-fle": Arm("CLR+FLE", cyclical=True),
    "elr-ile": Arm("ELR+ILE", increasing=True),
    "elr-fle": Arm("ELR+FLE (federated averaging)"),
    "vanilla-elr": Arm("vanilla (ELR)", pooled_data=True, alone=True),
    "vanilla-clr": Arm("vanilla (CLR+ILE)", cyclical=True, increasing=True, pooled_data=True),
    "ensemble": Arm("ensemble (ELR)", alone=True),
}
"""The seven arms of the paper's study, by name."""


def arm_named(name: str) -> Arm:
    """Return the arm.

    Raises
    ------
    ColearnError
        If there is none of that name.
    """
    if name not in ARMS:
        raise ColearnError(f"arm: expected one of {', '.join(ARMS)}, found {name!r}")
    return ARMS[name]


def at_one_site(
    participants: ParticipantSettings, settings: RunSettings
) -> tuple[ParticipantSettings, RunSettings]:
    """Return the settings of vanilla learning: one participant with all the data."""
    # No compression, since no model is exchanged; it would only add rounding errors.
    alone = replace(
        settings, num_participants=1, compression_up="float32", compression_down="float32"
    )
    # Partitions by class need several participants; for one, "iid" is the whole data set.
    return replace(participants, partition="iid"), alone


def schedules(arm: Arm, settings: RunSettings) -> dict[str, Any]:
    """Return the arm's rules for ``CoLearn``: epochs, steps, learning rate and budget.

    Raises
    ------
    ColearnError
        If the rate is exponential or annealed and no total of local epochs is planned.
    """
    # In a run config 0 stands for "no limit", which CoLearn and the schedules call None.
    return {
        "learning_rate": _rate(arm, settings),
        "local_epochs": epoch_rule(arm, settings),
        "local_steps": settings.local_steps or None,
        "total_epochs": settings.total_epochs or None,
    }


def epoch_rule(arm: Arm, settings: RunSettings) -> EpochRule:
    """Return the arm's rule for T."""
    initial, maximum = settings.initial_epochs, settings.max_local_epochs
    if not arm.increasing:
        return FixedEpochs(initial)
    if settings.epsilon == "auto":
        return PlateauEpochs(initial, maximum=maximum or PlateauEpochs.maximum)
    return IncreasingEpochs(initial, float(settings.epsilon), maximum=maximum or None)


def _rate(arm: Arm, settings: RunSettings) -> LearningRate:
    anneal = settings.anneal
    if not settings.total_epochs and (anneal or not arm.cyclical):
        raise ColearnError(
            "run config 'total-epochs': expected the planned local epochs, since an exponential or "
            "annealed rate decays over them, found 0"
        )
    if not arm.cyclical:
        return ExponentialRate(settings.learning_rate, settings.decay, settings.total_epochs)
    rate = CyclicalRate(settings.learning_rate, settings.decay)
    return Annealed(rate, _factor(anneal, settings)) if anneal else rate


def _factor(anneal: str, settings: RunSettings) -> LearningRate:
    """Return the schedule of eta over the run, relative to the first eta."""
    if anneal == "cosine":
        return CosineRate(1.0, settings.total_epochs)
    if anneal == "exponential":
        return ExponentialRate(1.0, settings.decay, settings.total_epochs)
    raise ColearnError(
        f"run config 'anneal': expected '', 'cosine' or 'exponential', found {anneal!r}"
    )
