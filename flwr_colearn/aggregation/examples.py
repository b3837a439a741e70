"""ToldExamples: the number of examples that each participant stated first."""

from collections.abc import Mapping
from logging import WARNING

from flwr.common import log

from ..traffic import Event


class ToldExamples:
    """The number of examples that each participant stated first, which is its weight from then on.

    Otherwise a site could take over the average of a single round by stating a large number.
    """

    def __init__(self) -> None:
        self._first: dict[str, float] = {}

    def fixed(self, participant: str, examples: float) -> tuple[float, list[Event]]:
        """Return the number to use, and a warning if the participant states another one now."""
        first = self._first.get(participant, examples)
        if first == examples:
            return first, []
        reason = (
            f"number of examples: expected {first:g} as stated before, found {examples:g}; "
            f"{first:g} is used. If its data have changed, begin a new run"
        )
        log(WARNING, "CoLearn: participant %s: %s", participant, reason)
        return first, [Event("warning", participant, reason)]

    def remember(self, participant: str, examples: float) -> None:
        """Remember the number of a participant whose reply was accepted, if it is the first."""
        self._first.setdefault(participant, examples)

    def state(self) -> dict[str, float]:
        """Return the numbers in types of JSON."""
        return dict(self._first)

    def restore(self, state: Mapping[str, float]) -> None:
        """Restore the numbers that `state` returned."""
        self._first = dict(state)
