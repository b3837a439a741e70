"""The decorator `recalibrate`, with which a ClientApp answers the scheme `Recalibrated`."""

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from torch import nn

from ..normalization import answer_recalibration, model_and_batches
from ..roles import Arrays, NDArray
from .arrays import set_arrays
from .normalization import recalibrated

ModelAndBatches = Callable[[Context], tuple[nn.Module, Iterable[Any]]]


def recalibrate(app: ClientApp) -> Callable[[ModelAndBatches], ModelAndBatches]:
    """Decorate a function that returns a participant's model and data, to answer `Recalibrated`.

    With ``normalization=Recalibrated()`` the server asks every participant, after a round, for the
    statistics of its data under the averaged weights. The app then loads these weights into the
    model that the function returns, passes the batches through it once, and replies with the
    means and variances of the batch-norm layers and the number of examples.

    Parameters
    ----------
    app : ClientApp
        The app whose function for the message is registered.

    Returns
    -------
    callable
        A decorator for a function ``context -> (model, batches)``. The model has the names and
        shapes of the server's. The batches are an iterable of the model's inputs, without labels
        and augmentation, on the model's device. Batches of a single example are left out if there
        are others, and do not count.

    Raises
    ------
    ColearnError
        In a round, if the model's arrays are not those of the message, if there is no batch, or if
        the function returns anything else.

    Examples
    --------
    ::

        app = ClientApp(mods=[participant_mod])

        @recalibrate(app)
        def model_and_batches(context):
            return Net(), (images for images, labels in load_data(context))
    """

    def decorate(function: ModelAndBatches) -> ModelAndBatches:
        def statistics_of(arrays: Arrays, context: Context) -> tuple[dict[str, NDArray], int]:
            model, batches = model_and_batches(function(context))
            set_arrays(model, arrays)
            return recalibrated(model, batches), batches.examples

        answer_recalibration(app, statistics_of)
        return function

    return decorate
