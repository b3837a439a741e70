"""The participant's half of model averaging: it keeps its model, and trains when asked."""

from collections.abc import Callable

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from ..aggregation.mean import check_model
from ..aggregation.replies import arrays_of, examples_of
from ..compression.codecs import ADD_THE_MOD, WIRE
from ..errors import ColearnError
from ..records import records_of, view
from .client_state import LocalModel, recall, remember
from .messages import (
    ARRAYS,
    CONFIG,
    FETCH_ACTION,
    METRICS,
    REPORT,
    SET_ACTION,
    Ask,
    Report,
)

TrainFunction = Callable[[Message, Context], Message]


def learner(app: ClientApp) -> Callable[[TrainFunction], TrainFunction]:
    """Decorate a training function of a ClientApp whose participants keep their models.

    In the place of ``@app.train()``. The function is an ordinary one of Flower's: it finds a model
    under ``arrays``, trains ``mini-batches`` of its stream (the first is number ``batches-done``,
    from 0), and returns the model with a MetricRecord that has ``num-examples`` and, for the
    cumulative loss, ``loss``: the mean over these examples, each measured before the step that
    learns from it. Arrays in, arrays out, of whatever framework; that the model stays here from
    round to round, and whether it is sent anywhere, is not the function's concern.

    The state lives in Flower's context, which ends with the SuperNode. A folder ``state-dir`` in
    the SuperNode's node config, one for each, keeps it on disk; a learner that has lost its state
    says so and is given model and reference anew.

    Parameters
    ----------
    app : ClientApp
        Gets the functions that the strategy needs besides training.

    Raises
    ------
    ColearnError
        In a round: if the function's reply is not a model like the one it was given, finite, with
        a positive ``num-examples``. The learner's state is then as it was before the round.

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
            return _train(function, message, context)

        app.train(FETCH_ACTION)(_fetch)
        app.train(SET_ACTION)(_set)
        return function

    return decorate


def _train(function: TrainFunction, message: Message, context: Context) -> Message:
    ask = _ask(message)
    local, lost = _state(message, context, ask)
    if local is None:
        return _reply(message, Report(lost=lost))
    if local.round < ask.server_round:  # else the question is repeated, and so is the answer
        message.content[ARRAYS] = local.model
        reply = function(message, context)
        if not reply.has_content():
            return reply
        metrics = _metrics_of(reply)
        model = arrays_of(reply)
        check_model(view(model), like=view(local.model))
        local = local.trained(ask.server_round, model, metrics)
        remember(context, local)
    distance = local.distance()
    arrays = local.model if distance > ask.bound else None
    return _reply(message, Report(local.weight, distance), arrays, local.metrics)


def _fetch(message: Message, context: Context) -> Message:
    local, lost = _state(message, context, _ask(message))
    if local is None:
        return _reply(message, Report(lost=lost))
    return _reply(message, Report(local.weight, local.distance()), local.model)


def _set(message: Message, context: Context) -> Message:
    ask, arrays = _ask(message), records_of(message.content, ArrayRecord)[ARRAYS]
    if ask.reference_round is not None:  # model and reference in one: the old state is not needed
        local: LocalModel | None = LocalModel.fresh(ask, arrays)
    else:
        local, lost = _state(message, context, ask)
    if local is None:
        return _reply(message, Report(lost=lost))
    local = local.set(ask, arrays)
    remember(context, local)
    return _reply(message, Report(local.weight, local.distance()))


def _state(message: Message, context: Context, ask: Ask) -> tuple[LocalModel | None, str]:
    """Return the learner's state, from the message where that brings it; or why there is none."""
    local = recall(context, ask.session)
    lost = "it has no state" if local is None else local.unusable_for(ask)
    given = records_of(message.content, ArrayRecord).get(ARRAYS)
    if lost and given is not None and ask.reference_round is not None:
        return LocalModel.fresh(ask, given), ""
    return (None, lost) if lost else (local, "")


def _ask(message: Message) -> Ask:
    if WIRE in message.content:
        raise ColearnError(
            "message: expected one that flwr_colearn.wire_mod has decoded, since the server "
            "compresses models, found none such; " + ADD_THE_MOD
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
