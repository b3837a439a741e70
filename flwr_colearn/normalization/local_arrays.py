"""LocalArrays: the arrays of a model that a participant stores between rounds."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Context

from ..records import records_of, to_record, view
from ..roles import NDArray

STATE = "normalization"
"""The prefix of the keys in ``context.state``."""


@dataclass
class LocalArrays:
    """A participant's arrays before and after its last round of training, with the session.

    The arrays before the round are for a repeated round, after a restart or a resume of the server,
    which must start from the same arrays as the first time.
    """

    session: str = ""
    round: int = 0
    before: dict[str, NDArray] = field(default_factory=dict)
    after: dict[str, NDArray] = field(default_factory=dict)

    def at(self, session: str, server_round: int, training: bool) -> dict[str, NDArray]:
        """Return the arrays for training (or evaluation) in a round; empty if there are none.

        Arrays of another session or of a later round are not used.
        """
        if self.session != session or self.round > server_round:
            return {}
        return self.before if training and self.round == server_round else self.after


def load(context: Context, names: Mapping[str, int]) -> LocalArrays:
    """Return the arrays in the context's state; empty ones if a name is missing."""
    record = records_of(context.state, ConfigRecord).get(STATE)
    if record is None:
        return LocalArrays()
    stored = records_of(context.state, ArrayRecord)
    before, after = view(stored[f"{STATE}.before"]), view(stored[f"{STATE}.after"])
    arrays = LocalArrays(str(record["session"]), int(record["round"]), before, after)  # type: ignore[arg-type]
    return arrays if set(names) <= set(arrays.after) else LocalArrays()


def save(context: Context, arrays: LocalArrays) -> None:
    """Store the arrays in the context's state."""
    context.state[STATE] = ConfigRecord({"session": arrays.session, "round": arrays.round})
    context.state[f"{STATE}.before"] = to_record(arrays.before)
    context.state[f"{STATE}.after"] = to_record(arrays.after)
