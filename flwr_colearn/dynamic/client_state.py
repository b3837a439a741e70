"""LocalModel: what a learner remembers between rounds, in its context's state and on its disk."""

from dataclasses import dataclass, replace
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.common import log

from ..aggregation import squared_distance
from ..checkpoint import Checkpoint, CheckpointFolder
from ..compression import REFERENCE
from ..errors import ColearnError, expected
from ..records import records_of, to_record, view
from .messages import Ask, checksum

_MODEL, _MEMORY, _METRICS = "colearn.model", "colearn.learner", "colearn.metrics"


@dataclass(frozen=True)
class LocalModel:
    """A learner's model and what belongs to it.

    Attributes
    ----------
    model, reference : ArrayRecord
        f and r.
    session : str
        Of the training it belongs to.
    reference_round : int
        Whose full synchronisation gave r.
    round : int
        The last one that was trained; 0 before the first.
    examples : float
        Seen since the last full synchronisation.
    left_out : list of str
        Names of the arrays that do not count in the distance.
    metrics : dict
        The last training's.
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
        """Return the state of a learner that is given model and reference anew."""
        assert ask.reference_round is not None
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
        """Examples since the last full synchronisation; 1 right after it."""
        return self.examples or 1

    def unusable_for(self, ask: Ask) -> str:
        """Return why this is not the state that the coordinator counts on; empty if it is."""
        if self.session != ask.session:
            return "it belongs to another training"
        if ask.reference_round is not None and self.reference_round != ask.reference_round:
            return f"its reference is of round {self.reference_round}, not of {ask.reference_round}"
        # Of one round there may be two, where a server resumed from an older checkpoint. Codecs
        # that send differences cannot do with the wrong one, and only they pay for the checksum.
        wanted = ask.reference_check
        if wanted is not None and checksum(view(self.reference)) != wanted:
            return f"its reference of round {self.reference_round} is another one"
        if self.round > ask.server_round:
            return f"it is already at round {self.round}"
        return ""


def remember(context: Context, local: LocalModel) -> None:
    """Keep a learner's state in its context and, where the node config says so, on disk."""
    _hold(context, local)
    folder = _folder(context, local.session)
    if folder is not None:
        arrays = {f"model/{name}": array for name, array in view(local.model).items()}
        arrays |= {f"reference/{name}": array for name, array in view(local.reference).items()}
        state = {**_memory(local), "metrics": local.metrics}
        folder.save(Checkpoint(local.round, arrays, state))


def recall(context: Context, session: str) -> LocalModel | None:
    """Return the learner's state from its context, else from its disk, else None."""
    if _MEMORY in context.state:
        memory = dict(records_of(context.state, ConfigRecord)[_MEMORY])
        metrics = dict(records_of(context.state, MetricRecord)[_METRICS])
        model = records_of(context.state, ArrayRecord)[_MODEL]
        return _from(memory, metrics, model, records_of(context.state, ArrayRecord)[REFERENCE])
    folder = _folder(context, session)
    try:
        saved = None if folder is None else folder.latest()
    except ColearnError as error:
        log(WARNING, "The learner's state on disk is lost: %s", error)
        return None
    if saved is None:
        return None
    parts: dict[str, dict[str, Any]] = {"model": {}, "reference": {}}
    for key, array in saved.arrays.items():
        part, _, name = key.partition("/")
        parts[part][name] = array
    metrics = saved.state.pop("metrics") or {}
    model, reference = to_record(parts["model"]), to_record(parts["reference"])
    local = _from(saved.state, metrics, model, reference)
    _hold(context, local)
    return local


def _hold(context: Context, local: LocalModel) -> None:
    context.state[_MODEL] = local.model
    context.state[REFERENCE] = local.reference
    context.state[_METRICS] = MetricRecord(dict(local.metrics or {}))
    context.state[_MEMORY] = ConfigRecord(_memory(local))


def _memory(local: LocalModel) -> dict[str, Any]:
    return {
        "session": local.session,
        "reference-round": local.reference_round,
        "round": local.round,
        "examples": local.examples,
        "left-out": list(local.left_out),
    }


def _from(
    memory: dict[str, Any], metrics: dict[str, Any], model: ArrayRecord, reference: ArrayRecord
) -> LocalModel:
    return LocalModel(
        model,
        reference,
        session=memory["session"],
        reference_round=memory["reference-round"],
        round=memory["round"],
        left_out=tuple(memory["left-out"]),
        examples=memory["examples"],
        metrics=metrics or None,
    )


def _folder(context: Context, session: str) -> CheckpointFolder | None:
    """Return the folder of this training on the participant's disk, if it has one."""
    path = context.node_config.get("state-dir")
    if not path:
        return None
    if not session.isalnum():  # it becomes the name of a folder
        raise expected("session of the training", "letters and digits", session)
    return CheckpointFolder(Path(str(path)) / session, keep=1)
