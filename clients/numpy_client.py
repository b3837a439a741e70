"""One NumPyClient for every Trainer, for projects on Flower's legacy API."""

from collections.abc import Callable
from typing import Any, cast

from flwr.app import Array, ArrayRecord, Context
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp

from clients.trainer import NDArray, Trainer, derive_seed, follow
from flwr_colearn import ColearnError, LocalPlan, participant_mod

OPTIMIZER = "colearn.optimizer"
"""Key in ``context.state`` under which a participant keeps its optimizer's state."""


class TrainerClient(NumPyClient):
    """A participant around a Trainer: trains as the plan in the fit config says.

    Parameters
    ----------
    trainer : Trainer
        The model with this participant's data.
    context : Context
        What Flower gives to `client_fn`.
    seed : int, default 0
        The run's seed; the participant's own is drawn from it and its ``partition-id``.
    keep_optimizer : bool, default False
        Keep the optimizer's state on the participant between rounds. It lives in
        ``context.state`` and is lost with the participant's process; training then goes on with a
        fresh optimizer.
    """

    def __init__(
        self, trainer: Trainer, context: Context, seed: int = 0, keep_optimizer: bool = False
    ) -> None:
        self.trainer = trainer
        self.context = context
        self.seed = seed
        self.keep_optimizer = keep_optimizer

    def get_parameters(self, config: dict[str, Any]) -> list[NDArray]:
        """Return the model's arrays in order."""
        return list(self.trainer.get_weights().values())

    def fit(
        self, parameters: list[NDArray], config: dict[str, Any]
    ) -> tuple[list[NDArray], int, dict[str, Any]]:
        """Train the shared model for the local epochs of the plan."""
        plan = LocalPlan.from_config(config)
        self._load(parameters)
        metrics = train_locally(self.trainer, plan, self.context, self.seed, self.keep_optimizer)
        return self.get_parameters({}), int(metrics.pop("num-examples")), metrics

    def evaluate(
        self, parameters: list[NDArray], config: dict[str, Any]
    ) -> tuple[float, int, dict[str, Any]]:
        """Evaluate the shared model on the evaluation data."""
        self._load(parameters)
        metrics = self.trainer.evaluate()
        return metrics.pop("loss"), int(metrics.pop("num-examples")), dict(metrics)

    def _load(self, parameters: list[NDArray]) -> None:
        names = self.trainer.get_weights()
        if len(names) != len(parameters):
            raise ColearnError(
                f"parameters: expected the {len(names)} arrays of this participant's model, found "
                f"{len(parameters)}; is it the server's model?"
            )
        self.trainer.set_weights(dict(zip(names, parameters, strict=True)))


def train_locally(
    trainer: Trainer, plan: LocalPlan, context: Context, seed: int, keep_optimizer: bool
) -> dict[str, float]:
    """Follow the plan, with the optimizer's state kept in the context if asked for."""
    if keep_optimizer and OPTIMIZER in context.state:
        record = cast(ArrayRecord, context.state[OPTIMIZER])
        trainer.set_optimizer_state({name: array.numpy() for name, array in record.items()})
    metrics = follow(
        plan, trainer, derive_seed(seed, int(context.node_config.get("partition-id", 0)))
    )
    if keep_optimizer:
        state = trainer.get_optimizer_state()
        context.state[OPTIMIZER] = ArrayRecord({name: Array(a) for name, a in state.items()})
    return metrics


def make_numpy_client_app(
    build: Callable[[Context], Trainer], seed: int = 0, keep_optimizer: bool = False
) -> ClientApp:
    """Return a legacy ClientApp whose participants train what `build` returns for their context."""
    return ClientApp(
        client_fn=lambda context: TrainerClient(
            build(context), context, seed, keep_optimizer
        ).to_client(),
        mods=[participant_mod],
    )
