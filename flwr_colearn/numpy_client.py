"""numpy_client_app: a Message API ClientApp around legacy clients such as NumPyClient."""

from collections.abc import Callable, Mapping, Sequence
from logging import WARNING
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Code, EvaluateIns, FitIns, Parameters, Status, log

from .errors import ColearnError, expected, whole_number
from .participant import participant_mod
from .records import records_of, view, view_bytes

ClientFn = Callable[[Context], Client | NumPyClient]
Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]


def numpy_client_app(client_fn: ClientFn, mods: Sequence[Mod] = ()) -> ClientApp:
    """Return a Message API ClientApp that trains and evaluates with legacy clients.

    A strategy of the Message API, such as `flwr_colearn.CoLearn`, then works with an unchanged
    ``NumPyClient``. The model's arrays keep their names: `fit` receives and returns them as a list
    in the model's order, and the app restores the names.

    Parameters
    ----------
    client_fn : callable
        ``Context -> NumPyClient`` or ``Context -> Client``, as for Flower's
        ``ClientApp(client_fn)``. The app calls it for every message.
    mods : sequence of Flower mods, optional
        Further mods. They run inside `flwr_colearn.participant_mod`, which the app always has.

    Returns
    -------
    flwr.clientapp.ClientApp
        An app with a train and an evaluate function.

    Notes
    -----
    `fit` and `evaluate` receive the same as from Flower's legacy server: new, writable arrays, and
    the config as a dict, from which ``LocalPlan.from_config(config)`` reads the plan. Values of
    the config may be lists, which the legacy API does not have.

    The metrics are sent in a ``MetricRecord``, so booleans become 0 and 1. Metrics that are not
    numbers are left out, and a warning names each of them once. The app adds ``num-examples`` and,
    to the metrics of an evaluation, ``loss``.

    The app replies with an error where a legacy app fails: if the client has no `fit` or
    `evaluate`, if it returns a status other than OK, or if it raises. `fit` must return as many
    arrays as it received.

    Examples
    --------
    The complete ``client_app.py``, besides the NumPyClient::

        from flwr_colearn import numpy_client_app

        app = numpy_client_app(lambda context: HospitalClient(context.node_config["data"]))
    """
    app = ClientApp(mods=[participant_mod, *mods])
    participant = _LegacyParticipant(client_fn)
    app.train()(participant.train)
    app.evaluate()(participant.evaluate)
    return app


class _LegacyParticipant:
    """Translates messages to calls of the legacy API, and their results to replies."""

    def __init__(self, client_fn: ClientFn) -> None:
        self._client_fn = client_fn
        # Names of metrics, so that a warning is logged once and not in every round.
        self._left_out: set[str] = set()

    def train(self, message: Message, context: Context) -> Message:
        """Answer a train message with the client's `fit`."""
        arrays = _arrays_of(message)
        instructions = FitIns(_parameters_of(arrays), _config_of(message))
        result = self._client(context).fit(instructions)
        _check_status("fit", result.status)
        metrics = self._numbers(result.metrics)
        metrics["num-examples"] = whole_number("num_examples of fit", result.num_examples, least=0)
        trained = _record_of(result.parameters, list(arrays))
        return _reply(message, arrays=trained, metrics=MetricRecord(metrics))

    def evaluate(self, message: Message, context: Context) -> Message:
        """Answer an evaluate message with the client's `evaluate`."""
        instructions = EvaluateIns(_parameters_of(_arrays_of(message)), _config_of(message))
        result = self._client(context).evaluate(instructions)
        _check_status("evaluate", result.status)
        metrics = self._numbers(result.metrics)
        examples = whole_number("num_examples of evaluate", result.num_examples, least=0)
        metrics.update({"loss": float(result.loss), "num-examples": examples})
        return _reply(message, metrics=MetricRecord(metrics))

    def _client(self, context: Context) -> Client:
        # For every message, as Flower does: a client that keeps state uses `context.state`.
        client = self._client_fn(context)
        if not isinstance(client, Client | NumPyClient):
            raise expected("client_fn", "a NumPyClient or a Client in return", client)
        return client.to_client()

    def _numbers(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics that a MetricRecord can hold; warn once of each other metric."""
        numbers = {name: _number(value) for name, value in metrics.items()}
        new = {name for name, value in numbers.items() if value is None} - self._left_out
        self._left_out |= new
        if new:
            log(
                WARNING,
                "Metrics %s are left out of the reply: expected numbers, found %s",
                sorted(new),
                ", ".join(sorted({type(metrics[name]).__name__ for name in new})),
            )
        return {name: value for name, value in numbers.items() if value is not None}


def _number(value: object) -> int | float | None:
    """Return a number as the plain int or float of its value, and None for anything else."""
    if isinstance(value, bool | np.bool_ | int | np.integer):
        return int(value)
    return float(value) if isinstance(value, float | np.floating) else None


def _arrays_of(message: Message) -> ArrayRecord:
    """Return the message's only ArrayRecord."""
    # `fit` and `evaluate` have one argument for arrays, so a second record has no place in them.
    records = records_of(message.content, ArrayRecord)
    if len(records) != 1:
        raise expected(
            "message", "one ArrayRecord, which is the model for a NumPyClient", sorted(records)
        )
    [record] = records.values()
    return record


def _config_of(message: Message) -> dict[str, Any]:
    """Return the strategy's config: the only one, or the one that states the round."""
    records = list(records_of(message.content, ConfigRecord).values())
    if len(records) > 1:
        records = [record for record in records if "server-round" in record]
    return dict(records[0]) if records else {}


def _parameters_of(record: ArrayRecord) -> Parameters:
    """Return a model as legacy parameters, whose tensors are the bytes of its arrays."""
    view(record)  # for its error, which names the malformed array
    return Parameters([array.data for array in record.values()], "numpy.ndarray")


def _record_of(parameters: Parameters, names: Sequence[str]) -> ArrayRecord:
    """Return legacy parameters under the names of the model that was received."""
    tensors = parameters.tensors
    if len(tensors) != len(names):
        raise ColearnError(
            f"fit: expected the {len(names)} arrays of the model that it received, in their "
            f"order, found {len(tensors)}"
        )
    record = ArrayRecord()
    # The tensors are numpy's format already, which is that of the record: nothing is serialised.
    for name, tensor in zip(names, tensors, strict=True):
        array = view_bytes(name, tensor)
        record[name] = Array(str(array.dtype), array.shape, "numpy.ndarray", tensor)
    return record


def _check_status(method: str, status: Status) -> None:
    if status.code != Code.OK:
        raise expected(f"{method} of the client", "the status OK", status.message)


def _reply(message: Message, **records: ArrayRecord | MetricRecord) -> Message:
    return Message(content=RecordDict({**records}), reply_to=message)
