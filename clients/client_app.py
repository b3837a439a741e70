"""One Message API ClientApp for every Trainer."""

from collections.abc import Callable

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.numpy_client import train_locally
from clients.trainer import NDArray, Trainer, derive_seed
from flwr_colearn import ColearnError, LocalPlan, introduce, normalization_mod, participant_mod
from flwr_colearn.synchronous import GRADIENTS


def make_client_app(
    build: Callable[[Context], Trainer],
    seed: Callable[[Context], int] = lambda context: 0,
    keep_optimizer: Callable[[Context], bool] = lambda context: False,
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
        ``Context -> bool``: keep the optimizer's state on the participant between rounds.
    """
    app = ClientApp(mods=[participant_mod, normalization_mod])
    app.query("colearn")(introduce)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        trainer = _load(build(context), message)
        config = message.content.config_records["config"]
        plan = LocalPlan.from_config(config)
        if GRADIENTS in config:
            weights, metrics = step_of(trainer, plan, config, context, seed(context))
        else:
            metrics = train_locally(trainer, plan, context, seed(context), keep_optimizer(context))
            weights = trainer.get_weights()
        return _reply(weights, metrics, message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = _load(build(context), message).evaluate()
        content = RecordDict({"metrics": MetricRecord(metrics)})
        return Message(content=content, reply_to=message)

    return app


def step_of(
    trainer: Trainer, plan: LocalPlan, config: ConfigRecord, context: Context, seed: int
) -> tuple[dict[str, NDArray], dict[str, float]]:
    """Return the gradients of one step of ``SynchronousSGD``, and its metrics.

    Raises
    ------
    ColearnError
        If the trainer does not offer gradients.
    """
    gradients = getattr(trainer, "gradients", None)
    if gradients is None:
        raise ColearnError(
            f"SynchronousSGD: expected a trainer with gradients(), found {type(trainer).__name__}"
        )
    own_seed = derive_seed(seed, int(context.node_config.get("partition-id", 0)))
    arrays, result = gradients(config[GRADIENTS], plan.round, own_seed)
    return arrays, {"num-examples": result.num_examples, "train-loss": result.loss}


def _reply(arrays: dict[str, NDArray], metrics: dict[str, float], message: Message) -> Message:
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    content = RecordDict({"arrays": record, "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)


def _load(trainer: Trainer, message: Message) -> Trainer:
    arrays = message.content.array_records["arrays"]
    trainer.set_weights({name: array.numpy() for name, array in arrays.items()})
    return trainer
