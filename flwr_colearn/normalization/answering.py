"""The participant's answer to `Recalibrated`: a ClientApp's function for ``train.recalibrate``."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from ..aggregation import arrays_of
from ..errors import expected
from ..records import to_record, view
from ..roles import Arrays, NDArray
from .messages import RECALIBRATE

StatisticsOf = Callable[[Arrays, Context], tuple[dict[str, NDArray], int]]


def answer_recalibration(app: ClientApp, statistics_of: StatisticsOf) -> None:
    """Register the function of a ClientApp that answers the messages of `Recalibrated`.

    `flwr_colearn.torch.recalibrate` and `flwr_colearn.keras.recalibrate` do this for a model of
    their framework. For another framework, call this function directly.

    Parameters
    ----------
    app : ClientApp
        The app, which must not have a function for this message yet.
    statistics_of : callable
        ``(arrays, context) -> (statistics, examples)``: from the shared model's arrays by name,
        which are read-only, to the means and variances of the participant's data by name, and the
        number of examples.

    Examples
    --------
    ::

        app = ClientApp(mods=[participant_mod])

        def statistics_of(arrays, context):
            x = load_data(context)
            return {"norm/moving_mean": x.mean(0), "norm/moving_variance": x.var(0)}, len(x)

        answer_recalibration(app, statistics_of)
    """

    @app.train(RECALIBRATE.partition(".")[2])
    def recalibrate(message: Message, context: Context) -> Message:
        arrays, examples = statistics_of(view(arrays_of(message)), context)
        metrics = MetricRecord({"num-examples": examples})
        content = RecordDict({"arrays": to_record(arrays), "metrics": metrics})
        return Message(content, reply_to=message)


def model_and_batches(returned: object) -> tuple[Any, "UsableBatches"]:
    """Return the two values of a function that `recalibrate` of a framework decorates.

    Raises
    ------
    ColearnError
        If the function has returned anything else.
    """
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise expected(
            "function of recalibrate", "(model, batches of inputs) in return", type(returned)
        )
    model, batches = returned
    return model, UsableBatches(batches)


class UsableBatches:
    """The batches with which batch norm can train, and the number of their examples.

    A batch of a single example has no variance, so it is left out if there are others. PyTorch
    refuses it behind a layer without positions.

    Parameters
    ----------
    batches : iterable
        Batches of inputs, whose first axis is that of the examples. A batch may be a tuple, list or
        mapping of several inputs.

    Attributes
    ----------
    examples : int
        The number of examples in the batches that were iterated.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.examples = 0
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        single = None
        for batch in self._batches:
            count = _examples_in(batch)
            if count == 1:
                single = batch
                continue
            self.examples += count
            yield batch
        if not self.examples and single is not None:
            self.examples = 1
            yield single


def _examples_in(batch: Any) -> int:
    while isinstance(batch, Mapping | tuple | list):
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return len(batch)
