"""The participant's part of model averaging: the decorator `learner`, which stores the model."""

from collections.abc import Callable

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from ..aggregation import arrays_of, check_model, examples_of
from ..compression import AGREEMENT
from ..errors import ColearnError
from ..records import records_of, view
from .client_state import LocalModel, recall, remember
from .messages import ARRAYS, CONFIG, METRICS, REPORT, Ask, Report

TrainFunction = Callable[[Message, Context], Message]


def learner(app: ClientApp) -> Callable[[TrainFunction], TrainFunction]:
    """Decorate a training function of a ClientApp whose participants keep their models.

    The decorator replaces ``@app.train()``. The function is one of Flower's Message API: it
    receives a model under ``arrays``, trains ``mini-batches`` of its stream (the first has the
    number ``batches-done``, from 0), and returns the model with a MetricRecord. The metrics are
    ``num-examples`` and, for the cumulative loss, ``loss``: the mean over these examples, each
    measured before the step that learns from it. The function works with arrays of any framework,
    and needs no code for the storage and the exchange of models.

    The state is in Flower's context, which ends with the SuperNode. With a folder ``state-dir`` in
    the SuperNode's node config it is saved on disk (see `flwr_colearn.participant_mod`). A learner
    that has lost its state reports it, and is reinitialised with model and reference.

    Parameters
    ----------
    app : ClientApp
        The app; its training function then answers all messages of the strategy.

    Raises
    ------
    ColearnError
        In a round, if the function's reply does not have a finite model like the one it received,
        and a positive ``num-examples``. The learner's state does not change then.

    Examples
    --------
    ::

        app = ClientApp(mods=[participant_mod])

        @learner(app)
        def train(message, context):
            model.load_state_dict(message.content["arrays"].to_torch_state_dict())
            config = message.content["config"]
            loss, examples = train_batches(model, config["batches-done"], config["mini-batches"])
            metrics = MetricRecord({"num-examples": examples, "loss": loss})
            arrays = ArrayRecord(model.state_dict())
            return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
    """

    def decorate(function: TrainFunction) -> TrainFunction:
        @app.train()
        def train(message: Message, context: Context) -> Message:
            ask = _ask(message)
            if ask.action == "fetch":
                return _fetch(ask, message, context)
            if ask.action == "set":
                return _set(ask, message, context)
            return _train(ask, function, message, context)

        return function

    return decorate


def _train(ask: Ask, function: TrainFunction, message: Message, context: Context) -> Message:
    local, lost = _state(message, context, ask)
    if local is None:
        return _reply(message, Report(lost=lost))
    # A repeated message, after a restart, is answered from the state: a second training would make
    # another model of the same mini-batches.
    if local.round < ask.server_round:
        message.content[ARRAYS] = local.model
        reply = function(message, context)
        if not reply.has_content():
            return reply
        metrics = _metrics_of(reply)
        model = arrays_of(reply)
        check_model(view(model), like=view(local.model))
        # Stored only after all checks, so that a failed training can be repeated.
        local = local.trained(ask.server_round, model, metrics)
        remember(context, local)
    distance = local.distance()
    arrays = local.model if distance > ask.bound else None
    return _reply(message, Report(local.weight, distance), arrays, local.metrics)


def _fetch(ask: Ask, message: Message, context: Context) -> Message:
    local, lost = _state(message, context, ask)
    if local is None:
        return _reply(message, Report(lost=lost))
    return _reply(message, Report(local.weight, local.distance()), local.model)


def _set(ask: Ask, message: Message, context: Context) -> Message:
    arrays = records_of(message.content, ArrayRecord)[ARRAYS]
    # The arrays of a full synchronisation are model and reference, so no old state is needed.
    if ask.reference_round is not None:
        local: LocalModel | None = LocalModel.anew(ask, arrays)
    else:
        local, lost = _state(message, context, ask)
    if local is None:
        return _reply(message, Report(lost=lost))
    local = local.set(ask, arrays)
    remember(context, local)
    return _reply(message, Report(local.weight, local.distance()))


def _state(message: Message, context: Context, ask: Ask) -> tuple[LocalModel | None, str]:
    """Return the learner's state, if need be from the message; else None and the reason."""
    local = recall(context)
    lost = "it has no state" if local is None else local.unusable_for(ask)
    given = records_of(message.content, ArrayRecord).get(ARRAYS)
    if lost and given is not None and ask.reference_round is not None:
        return LocalModel.anew(ask, given), ""
    return (None, lost) if lost else (local, "")


def _ask(message: Message) -> Ask:
    if AGREEMENT in message.content:
        raise ColearnError(
            "message: expected one that flwr_colearn.participant_mod has decoded, since the server "
            "compresses models, found an encoded one; add the mod to the ClientApp's mods: "
            "ClientApp(mods=[participant_mod])"
        )
    return Ask.from_config(records_of(message.content, ConfigRecord).get(CONFIG, ConfigRecord()))


def _metrics_of(reply: Message) -> dict[str, float | int]:
    examples_of(reply, "num-examples")
    (record,) = records_of(reply.content, MetricRecord).values()
    scalars = {key: value for key, value in record.items() if isinstance(value, int | float)}
    if len(scalars) != len(record):
        raise ColearnError(f"metrics: expected numbers, found lists in {sorted(record)}")
    return scalars


def _reply(
    message: Message,
    report: Report,
    arrays: ArrayRecord | None = None,
    metrics: dict[str, float | int] | None = None,
) -> Message:
    content = RecordDict({REPORT: report.to_config()})
    if metrics is not None:
        content[METRICS] = MetricRecord(dict(metrics))
    if arrays is not None:
        content[ARRAYS] = arrays
    return Message(content=content, reply_to=message)
