"""LocalArrays: what a participant keeps of its model between rounds."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Context

from ..records import records_of, to_record, view
from ..roles import NDArray

STATE = "normalization"
"""Keys in ``context.state`` begin so."""


@dataclass
class LocalArrays:
    """A participant's arrays before and after the last round that it trained, and of which session.

    The former are for a round that is repeated, by a restart or by a server that resumed: it must
    begin from what it began from the first time.
    """

    session: str = ""
    round: int = 0
    before: dict[str, NDArray] = field(default_factory=dict)
    after: dict[str, NDArray] = field(default_factory=dict)

    def at(self, session: str, server_round: int, training: bool) -> dict[str, NDArray]:
        """Return the arrays to begin a round with (or to evaluate with); empty if there are none.

        What another session left is no part of this one; nor is what was kept in a later round.
        """
        if self.session != session or self.round > server_round:
            return {}
        return self.before if training and self.round == server_round else self.after


def load(context: Context, names: Mapping[str, int]) -> LocalArrays:
    """Return what is in the context's state, if it has these arrays."""
    record = records_of(context.state, ConfigRecord).get(STATE)
    if record is None:
        return LocalArrays()
    stored = records_of(context.state, ArrayRecord)
    before, after = view(stored[f"{STATE}.before"]), view(stored[f"{STATE}.after"])
    arrays = LocalArrays(str(record["session"]), int(record["round"]), before, after)  # type: ignore[arg-type]
    return arrays if set(names) <= set(arrays.after) else LocalArrays()


def save(context: Context, arrays: LocalArrays) -> None:
    """Put the arrays into the context's state."""
    context.state[STATE] = ConfigRecord({"session": arrays.session, "round": arrays.round})
    context.state[f"{STATE}.before"] = to_record(arrays.before)
    context.state[f"{STATE}.after"] = to_record(arrays.after)
