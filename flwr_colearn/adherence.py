"""Adherence: whether participants train the local epochs that the plan has."""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from logging import WARNING
from typing import Any

from flwr.common import log

from .errors import ColearnError
from .plan import EPOCHS, RATES, READ, LocalPlan
from .traffic import Event

GREW = 1.25
"""The growth of the seconds of a round up to which they count as unchanged."""

FIRST_FALL = 0.75
"""The same for a fall from the first round, whose seconds include the start of the participant."""

_REMEDY = (
    "the training function of the ClientApp must iterate the plan: "
    "for epoch in LocalPlan.from_config(config): train one epoch at epoch.learning_rate"
)


@dataclass
class _Round:
    """T of a round, and the seconds of one participant's training."""

    number: int
    local_epochs: int
    seconds: float


class Adherence:
    """Compares the local epochs that participants have trained with the plan of each round.

    `flwr_colearn.participant_mod` states in every train reply for how many epochs, and at which
    rates, the ClientApp iterated the plan. Of a participant without the mod only the time is known:
    if T grew and the seconds did not, its training probably ignores the plan. A warning is logged
    once for each participant, and recorded in every round.

    Parameters
    ----------
    strict : bool, default False
        Whether a reply whose statement differs from the plan is refused.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.renew(None)
        self._rounds: dict[str, list[_Round]] = {}
        self._warned: set[str] = set()

    def renew(self, plan: LocalPlan | None) -> None:
        """Begin a round with this plan; None if participants are sent none."""
        self._plan, self._began = plan, time.monotonic()
        self._faults: dict[str, str] = {}
        self._silent: set[str] = set()

    def clear(self) -> None:
        """Forget the participants of an earlier run."""
        self._rounds, self._warned = {}, set()
        self.renew(None)

    def check(self, participant: str, stated: Mapping[str, Any]) -> None:
        """Compare what a participant's mod states with the plan; log a warning if it differs.

        Parameters
        ----------
        participant : str
            The name of the participant.
        stated : mapping
            The echo in its reply; one without a statement is of a participant without the mod.

        Raises
        ------
        ColearnError
            If it differs and the check is strict.
        """
        if self._plan is None:
            return
        if EPOCHS not in stated:
            self._silent.add(participant)
            return
        fault = _fault(self._plan, stated)
        if fault is None:
            return
        if self.strict:
            raise ColearnError(f"local epochs: {fault}")
        self._faults[participant] = fault
        self._warn(participant, fault)

    def events(self, participants: Iterable[str], seconds: Mapping[str, float]) -> list[Event]:
        """Return a warning for each of these participants that does not follow the plan.

        Parameters
        ----------
        participants : iterable of str
            The participants whose replies were accepted in this round.
        seconds : mapping of str to float
            The seconds of their trainings, as far as they were measured one by one.
        """
        found = {}
        for name in participants:
            fault = self._faults.get(name)
            if self._plan is not None and name in self._silent:
                fault = self._fault_of_time(name, seconds.get(name))
            if fault is not None:
                found[name] = fault
                self._warn(name, fault)
        return [Event("warning", name, fault) for name, fault in sorted(found.items())]

    def _fault_of_time(self, participant: str, seconds: float | None) -> str | None:
        """Return what the time of a participant without the mod shows, and remember the time."""
        assert self._plan is not None
        took = time.monotonic() - self._began if seconds is None else seconds
        now = _Round(self._plan.round, self._plan.local_epochs, took)
        before = self._rounds.setdefault(participant, [])
        shorter = [each for each in before if 2 * each.local_epochs <= now.local_epochs]
        first = before[0] if before else None
        before.append(now)
        if not shorter:
            return None
        base = min(shorter, key=lambda each: each.seconds)
        # The first round alone is a weak measure: it includes downloads, imports and compilation.
        least = FIRST_FALL * base.seconds if base is first and len(shorter) == 1 else 0.0
        if base.seconds <= 0.0 or not least <= took <= GREW * base.seconds:
            return None
        return (
            f"the local epochs grew from {base.local_epochs} to {now.local_epochs}, and its "
            f"training took {took:.3g} s after {base.seconds:.3g} s; if it does not follow the "
            f"plan, {_REMEDY}. With ClientApp(mods=[participant_mod]) it states what it trained"
        )

    def _warn(self, participant: str, fault: str) -> None:
        if participant not in self._warned:
            self._warned.add(participant)
            log(WARNING, "CoLearn: local epochs of participant %s: %s", participant, fault)


def _fault(plan: LocalPlan, stated: Mapping[str, Any]) -> str | None:
    """Return how a participant's statement differs from the plan; None if it does not."""
    epochs = stated[EPOCHS]
    # Of a number of steps each participant makes its own T, by the mini-batches of its data.
    expected = max(epochs, 1) if plan.local_steps is not None else plan.local_epochs
    if epochs != expected:
        how = (
            "LocalPlan was read and not iterated" if stated.get(READ) else "LocalPlan was not read"
        )
        found = f"{epochs}" if epochs else f"0, since {how}"
        return f"expected {expected} iterated, found {found}; {_REMEDY}"
    if plan.local_steps is not None:
        return None
    rates, wanted = list(stated.get(RATES, [])), plan.learning_rates or ()
    if len(rates) != len(wanted) or not all(map(math.isclose, rates, wanted)):
        return f"expected the learning rates {list(wanted)}, found {rates}; {_REMEDY}"
    return None
