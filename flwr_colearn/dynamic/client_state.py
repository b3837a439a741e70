"""LocalModel: the state of a learner between rounds, stored in its context."""

from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord

from ..aggregation import squared_distance
from ..compression import REFERENCE
from ..records import records_of, view
from .messages import Ask, checksum

_MODEL, _MEMORY, _METRICS = "colearn.model", "colearn.learner", "colearn.metrics"


@dataclass(frozen=True)
class LocalModel:
    """A learner's model and its other state.

    Attributes
    ----------
    model, reference : ArrayRecord
        f and r.
    session : str
        The session of the training.
    reference_round : int
        The round whose full synchronisation gave r.
    round : int
        The last trained round; 0 before the first.
    examples : float
        The number of examples since the last full synchronisation.
    left_out : list of str
        The names of the arrays that are not part of the distance.
    metrics : dict
        The metrics of the last training.
    """

    model: ArrayRecord
    reference: ArrayRecord
    session: str
    reference_round: int
    round: int
    left_out: tuple[str, ...] = ()
    examples: float = 0
    metrics: dict[str, Any] | None = None

    @classmethod
    def anew(cls, ask: Ask, arrays: ArrayRecord) -> "LocalModel":
        """Return the state of a learner that is reinitialised with model and reference."""
        assert ask.reference_round is not None
        # The round of the message is not trained yet.
        before = ask.server_round - 1
        return cls(arrays, arrays, ask.session, ask.reference_round, before, ask.left_out)

    def trained(
        self, server_round: int, model: ArrayRecord, metrics: dict[str, Any]
    ) -> "LocalModel":
        """Return the state after a round's training."""
        examples = self.examples + metrics["num-examples"]
        return replace(self, model=model, round=server_round, examples=examples, metrics=metrics)

    def set(self, ask: Ask, arrays: ArrayRecord) -> "LocalModel":
        """Return the state with the model of a synchronisation."""
        return replace(self, model=arrays, round=ask.server_round)

    def distance(self) -> float:
        """Return |f - r|^2 over the trainable arrays."""
        model, reference = view(self.model), view(self.reference)
        return squared_distance(
            {name: array for name, array in model.items() if name not in self.left_out}, reference
        )

    @property
    def weight(self) -> float:
        """The number of examples since the last full synchronisation; 1 right after it."""
        return self.examples or 1

    def unusable_for(self, ask: Ask) -> str:
        """Return why this is not the state that the message requires; empty if it is."""
        if self.session != ask.session:
            return "it belongs to another training"
        if ask.reference_round is not None and self.reference_round != ask.reference_round:
            return f"its reference is of round {self.reference_round}, not of {ask.reference_round}"
        # A server that resumed from an older checkpoint may have made a second reference of the
        # same round. A difference to the wrong one would be decoded to a wrong model. Only codecs
        # that send differences have this check, since it reads the whole model.
        wanted = ask.reference_check
        if wanted is not None and checksum(view(self.reference)) != wanted:
            return f"its reference of round {self.reference_round} is another one"
        if self.round > ask.server_round:
            return f"it is already at round {self.round}"
        return ""


def remember(context: Context, local: LocalModel) -> None:
    """Store a learner's state in its context."""
    context.state[_MODEL] = local.model
    # Under the key where the compression's mod looks for the reference of differences.
    context.state[REFERENCE] = local.reference
    context.state[_METRICS] = MetricRecord(dict(local.metrics or {}))
    context.state[_MEMORY] = ConfigRecord(
        {
            "session": local.session,
            "reference-round": local.reference_round,
            "round": local.round,
            "examples": local.examples,
            "left-out": list(local.left_out),
        }
    )


def recall(context: Context) -> LocalModel | None:
    """Return the learner's state from its context, or None."""
    if _MEMORY not in context.state:
        return None
    memory: dict[str, Any] = dict(records_of(context.state, ConfigRecord)[_MEMORY])
    metrics = dict(records_of(context.state, MetricRecord)[_METRICS])
    arrays = records_of(context.state, ArrayRecord)
    return LocalModel(
        arrays[_MODEL],
        arrays[REFERENCE],
        session=memory["session"],
        reference_round=memory["reference-round"],
        round=memory["round"],
        left_out=tuple(memory["left-out"]),
        examples=memory["examples"],
        metrics=metrics or None,
    )
