"""The Message API ClientApp that serves any Trainer."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.alone import CompareAlone
from clients.local_training import site_seed, train_locally
from clients.trainer import NDArray, Trainer
from flwr_colearn import (
    ColearnError,
    LocalPlan,
    participant_mod,
    shared_metrics,
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
    compare: Callable[[Context], CompareAlone | None] = lambda context: None,
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
    compare : callable, optional
        ``Context -> CompareAlone or None``: whether the participant also trains a model on its data
        alone, to compare the shared model with. The results are in the participant's log. They are
        in its replies as far as the node config's ``share-metrics`` names them.
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
                _refuse_comparison(compare(context))
                weights, metrics = step_of(trainer, plan, config, context, seed(context))
                return _reply(weights, metrics, message)
            session = str(config.get("session", ""))
            metrics = train_locally(
                trainer, plan, context, seed(context), keep_optimizer(context), session
            )
        reply = _reply(trainer.get_weights(), metrics, message)
        # After the reply is made, and outside of the server's normalization scheme, which may
        # exchange statistics with other sites.
        if (comparison := compare(context)) is not None:
            received = _arrays_of(message)
            comparison.train(trainer, received, plan, context, seed(context), session)
        return reply

    def statistics_of(arrays: Mapping[str, NDArray], context: Context) -> Any:
        trainer = build(context)
        trainer.set_weights(arrays)
        return _offered(trainer, "recalibrated")()

    answer_recalibration(app, statistics_of)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        trainer = _load(build(context), message)
        metrics = trainer.evaluate()
        if (comparison := compare(context)) is not None:
            found = comparison.evaluate(trainer, _arrays_of(message), context, *_moment_of(message))
            metrics |= {name: found[name] for name in shared_metrics(found, context)}
        content = RecordDict({"metrics": MetricRecord({**metrics})})
        return Message(content=content, reply_to=message)

    return app


def _refuse_comparison(comparison: CompareAlone | None) -> None:
    if comparison is not None:
        raise ColearnError(
            "compare-alone: expected a strategy with local epochs, such as CoLearn, found "
            "SynchronousSGD, whose participants train no model of their own"
        )


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
    trainer.set_weights(_arrays_of(message))
    return trainer


def _arrays_of(message: Message) -> dict[str, NDArray]:
    return view(cast(ArrayRecord, message.content["arrays"]))


def _moment_of(message: Message) -> tuple[str, int]:
    """Return the session and the round of a message; a late round where it does not say one."""
    config = message.content.get("config")
    config = config if isinstance(config, ConfigRecord) else ConfigRecord()
    server_round = config.get("server-round", sys.maxsize)
    return str(config.get("session", "")), cast(int, server_round)
