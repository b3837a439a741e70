"""A round of local training, with the state of the optimizer kept between rounds if asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from logging import WARNING
from typing import cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from flwr.common import log

from clients.trainer import NDArray, Trainer, derive_seed, follow
from flwr_colearn import LocalPlan

OPTIMIZER = "colearn.optimizer"
"""Keys in ``context.state`` of the optimizer's state begin so."""


def train_locally(
    trainer: Trainer,
    plan: LocalPlan,
    context: Context,
    seed: int,
    keep_optimizer: bool,
    session: str = "",
) -> dict[str, float]:
    """Follow the plan of a round.

    Parameters
    ----------
    trainer : Trainer
        With the shared model's weights.
    plan : LocalPlan
        What the round asks for.
    context : Context
        Its node config has the ``partition-id``; its state keeps the optimizer's.
    seed : int
        The run's; the participant's own is drawn from it.
    keep_optimizer : bool
        Whether to keep the optimizer's state on the participant between rounds. A participant that
        has lost it goes on with a new optimizer, and says so in its log.
    session : str
        The training that the message belongs to; what another one left is not used.
    """
    own_seed = derive_seed(seed, int(context.node_config.get("partition-id", 0)))
    if not keep_optimizer:
        return follow(plan, trainer, own_seed)
    before = OptimizerState.of(context).at(session, plan.round)
    if before:
        trainer.set_optimizer_state(before)
    elif plan.round > 1:
        log(WARNING, "Optimizer: no state is kept here; round %s begins a new one", plan.round)
    metrics = follow(plan, trainer, own_seed)
    OptimizerState(session, plan.round, before, trainer.get_optimizer_state()).keep_in(context)
    return metrics


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's state before and after the last round that was trained.

    The former is for a round that is repeated, by a restart or by a server that resumed.
    """

    session: str
    round: int
    before: Mapping[str, NDArray]
    after: Mapping[str, NDArray]

    @classmethod
    def of(cls, context: Context) -> "OptimizerState":
        """Return what a participant's context has kept; empty if that is nothing."""
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
        """Return the state to begin a round with; empty if there is none of its training."""
        if self.session != session or self.round > server_round:
            return {}
        return self.before if self.round == server_round else self.after

    def keep_in(self, context: Context) -> None:
        """Put the state into a participant's context."""
        context.state[OPTIMIZER] = ConfigRecord({"session": self.session, "round": self.round})
        for when, arrays in (("before", self.before), ("after", self.after)):
            record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
            context.state[f"{OPTIMIZER}.{when}"] = record
