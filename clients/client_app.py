"""The Message API ClientApp that serves any Trainer."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.local_training import site_seed, train_locally
from clients.trainer import NDArray, Trainer
from flwr_colearn import (
    ColearnError,
    LocalPlan,
    participant_mod,
)
from flwr_colearn.normalization import answer_recalibration
from flwr_colearn.records import to_record, view
from flwr_colearn.strategies import GRADIENTS

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]


def make_client_app(
    build: Callable[[Context], Trainer],
    seed: Callable[[Context], int] = lambda context: 0,
    keep_optimizer: Callable[[Context], bool] = lambda context: False,
    mods: Sequence[Mod] = (),
) -> ClientApp:
    """Return a ClientApp whose participants train what `build` returns for their context.

    Parameters
    ----------
    build : callable
        ``Context -> Trainer``: the model and this participant's data, which the context's node
        config and run config describe.
    seed : callable, optional
        ``Context -> int``: the run's seed; each participant's own is drawn from it.
    keep_optimizer : callable, optional
        ``Context -> bool``: whether the participant stores the optimizer's state between rounds.
    mods : sequence of Flower mods, optional
        Further mods, which run after decompression and receive the whole model.
    """
    # Flower calls mods from first to last and passes replies from last to first. participant_mod
    # comes first: it decompresses the message for the others and compresses the reply after them.
    app = ClientApp(mods=[participant_mod, *mods])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        trainer = _load(build(context), message)
        config = cast(ConfigRecord, message.content["config"])
        plan = LocalPlan.from_config(config)
        with normalising(trainer, config):
            # Synchronous SGD asks for the gradients of one batch in place of local epochs.
            if GRADIENTS in config:
                weights, metrics = step_of(trainer, plan, config, context, seed(context))
                return _reply(weights, metrics, message)
            metrics = train_locally(
                trainer,
                plan,
                context,
                seed(context),
                keep_optimizer(context),
                session=str(config.get("session", "")),
            )
        return _reply(trainer.get_weights(), metrics, message)

    def statistics_of(arrays: Mapping[str, NDArray], context: Context) -> Any:
        trainer = build(context)
        trainer.set_weights(arrays)
        return _offered(trainer, "recalibrated")()

    answer_recalibration(app, statistics_of)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = _load(build(context), message).evaluate()
        content = RecordDict({"metrics": MetricRecord({**metrics})})
        return Message(content=content, reply_to=message)

    return app


def step_of(
    trainer: Trainer, plan: LocalPlan, config: ConfigRecord, context: Context, seed: int
) -> tuple[dict[str, NDArray], dict[str, float]]:
    """Return the gradients of one step of ``SynchronousSGD``, and its metrics.

    Raises
    ------
    ColearnError
        If the trainer has no method ``gradients``.
    """
    own_seed = site_seed(seed, context)
    arrays, result = _offered(trainer, "gradients")(config[GRADIENTS], plan.round, own_seed)
    return arrays, {"num-examples": result.num_examples, "train-loss": result.loss}


def normalising(trainer: Trainer, config: ConfigRecord) -> AbstractContextManager[None]:
    """Return a context manager that applies the server's normalization scheme to the training.

    Raises
    ------
    ColearnError
        If the scheme changes how layers train, and the trainer has no method ``normalised``.
    """
    if config.get("normalization") == "synchronised" or config.get("normalization-frozen"):
        return _offered(trainer, "normalised")(config)  # type: ignore[no-any-return]
    return nullcontext()


def _offered(trainer: Trainer, method: str) -> Any:
    """Return an optional method of a trainer, one beyond the protocol `Trainer`."""
    if not hasattr(trainer, method):
        raise ColearnError(
            f"trainer: expected one with {method}(), which the server's strategy and normalization "
            f"scheme need, found {type(trainer).__name__}"
        )
    return getattr(trainer, method)


def _reply(arrays: dict[str, NDArray], metrics: dict[str, float], message: Message) -> Message:
    content = RecordDict({"arrays": to_record(arrays), "metrics": MetricRecord({**metrics})})
    return Message(content=content, reply_to=message)


def _load(trainer: Trainer, message: Message) -> Trainer:
    trainer.set_weights(view(cast(ArrayRecord, message.content["arrays"])))
    return trainer
