"""One Message API ClientApp for every Trainer."""

from collections.abc import Callable
from typing import cast

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.numpy_client import train_locally
from clients.trainer import Trainer
from flwr_colearn import LocalPlan, introduce, participant_mod
from flwr_colearn._flwr import to_record, view


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
    app = ClientApp(mods=[participant_mod])
    app.query("colearn")(introduce)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        trainer = _load(build(context), message)
        plan = LocalPlan.from_config(message.content["config"])
        metrics = train_locally(trainer, plan, context, seed(context), keep_optimizer(context))
        content = RecordDict(
            {"arrays": to_record(trainer.get_weights()), "metrics": MetricRecord(metrics)}
        )
        return Message(content=content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = _load(build(context), message).evaluate()
        content = RecordDict({"metrics": MetricRecord(metrics)})
        return Message(content=content, reply_to=message)

    return app


def _load(trainer: Trainer, message: Message) -> Trainer:
    arrays = cast(ArrayRecord, message.content["arrays"])
    trainer.set_weights(view(arrays))
    return trainer
