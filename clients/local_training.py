"""Local training of one round, and the optimizer's state that a participant stores in between."""

from collections.abc import Mapping
from dataclasses import dataclass
from logging import WARNING
from typing import cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from flwr.common import log

from clients.trainer import NDArray, Trainer, derive_seed, follow
from flwr_colearn import LocalPlan
from flwr_colearn.recovery import name_of

OPTIMIZER = "colearn.optimizer"
"""The prefix of the optimizer state's keys in ``context.state``."""


def train_locally(
    trainer: Trainer,
    plan: LocalPlan,
    context: Context,
    seed: int,
    keep_optimizer: bool,
    session: str = "",
) -> dict[str, float]:
    """Train the local epochs of a round and return the reply's metrics.

    Parameters
    ----------
    trainer : Trainer
        A trainer that has loaded the shared model.
    plan : LocalPlan
        The local epochs of the round and their learning rates.
    context : Context
        The participant's context. Its node config has the ``partition-id`` and may have a
        ``state-dir``, in which the last finished epoch is saved; its state stores the optimizer's
        state.
    seed : int
        The run's seed; the participant's own is drawn from it.
    keep_optimizer : bool
        Whether the participant stores the optimizer's state between rounds. If that state is
        missing, training continues with a new optimizer and the log has a warning.
    session : str
        The name of the training that the message belongs to; the state of another one is ignored.
    """
    # Participants draw different seeds: with a common one, all would shuffle and augment alike.
    own_seed = site_seed(seed, context)
    kept = participant_files(context)
    if not keep_optimizer:
        return follow(plan, trainer, own_seed, *kept)
    before = OptimizerState.of(context).at(session, plan.round)
    if before:
        trainer.set_optimizer_state(before)
    elif plan.round > 1:
        log(WARNING, "Optimizer: no state is stored; round %s starts with a new one", plan.round)
    metrics = follow(plan, trainer, own_seed, *kept)
    # Stored last: if training fails, the state of the round before remains.
    OptimizerState(session, plan.round, before, trainer.get_optimizer_state()).keep_in(context)
    return metrics


def participant_files(context: Context) -> tuple[str | None, str]:
    """Return the participant's folder ``state-dir``, None without one, and its name for files."""
    folder = context.node_config.get("state-dir")
    return str(folder) if folder else None, name_of(context).get("participant", "participant")


def site_seed(seed: int, context: Context) -> int:
    """Return the seed of a participant: drawn from the run's seed and its partition or name.

    A site of neither has its node id, which Flower keeps for a SuperNode with a registered key.
    """
    config = context.node_config
    if "partition-id" in config:
        return derive_seed(seed, int(config["partition-id"]))
    # A name by its bytes: hash() of a text differs from process to process.
    name = name_of(context).get("participant", str(context.node_id))
    return derive_seed(seed, *name.encode())


@dataclass(frozen=True)
class OptimizerState:
    """The optimizer's state before and after the last round that was trained.

    A round that is repeated, after a restart or by a server that resumed, starts from ``before``.
    """

    session: str
    round: int
    before: Mapping[str, NDArray]
    after: Mapping[str, NDArray]

    @classmethod
    def of(cls, context: Context) -> "OptimizerState":
        """Return the state that a participant's context stores; an empty one if there is none."""
        if OPTIMIZER not in context.state:
            return cls("", 0, {}, {})
        kept = cast(ConfigRecord, context.state[OPTIMIZER])
        before, after = (
            cast(ArrayRecord, context.state[f"{OPTIMIZER}.{when}"]) for when in ("before", "after")
        )
        return cls(
            str(kept["session"]),
            cast(int, kept["round"]),
            {name: array.numpy() for name, array in before.items()},
            {name: array.numpy() for name, array in after.items()},
        )

    def at(self, session: str, server_round: int) -> Mapping[str, NDArray]:
        """Return the state that a round starts from; empty if there is none of its session."""
        # A state of a later round is of no use: the server has resumed from an older checkpoint.
        if self.session != session or self.round > server_round:
            return {}
        return self.before if self.round == server_round else self.after

    def keep_in(self, context: Context) -> None:
        """Store the state in a participant's context."""
        context.state[OPTIMIZER] = ConfigRecord({"session": self.session, "round": self.round})
        for when, arrays in (("before", self.before), ("after", self.after)):
            record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
            context.state[f"{OPTIMIZER}.{when}"] = record
