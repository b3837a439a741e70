"""The decorator `recalibrate`, with which a ClientApp answers the scheme `Recalibrated`."""

from collections.abc import Callable, Iterable
from typing import Any

import keras
from flwr.app import Context
from flwr.clientapp import ClientApp

from ..normalization import answer_recalibration, model_and_batches
from ..roles import Arrays, NDArray
from .arrays import set_arrays, variables_as
from .normalization import recalibrated

ModelAndBatches = Callable[[Context], tuple[keras.Model, Iterable[Any]]]


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
        A decorator for a function ``context -> (model, batches)``. The model has the arrays of the
        server's, under one of the kinds of names of `flwr_colearn.keras.set_arrays`. The batches
        are an iterable of the model's inputs, without labels and augmentation. Batches of a single
        example are left out if there are others, and do not count.

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
            x_train, y_train = load_data(context)
            return load_model(), [x_train]
    """

    def decorate(function: ModelAndBatches) -> ModelAndBatches:
        def statistics_of(arrays: Arrays, context: Context) -> tuple[dict[str, NDArray], int]:
            model, batches = model_and_batches(function(context))
            set_arrays(model, arrays)
            # The statistics have the names of the message, which may be Keras's paths.
            names = {id(variable): name for name, variable in variables_as(model, arrays).items()}
            found = recalibrated(model, batches, lambda variable: names[id(variable)])
            return found, batches.examples

        answer_recalibration(app, statistics_of)
        return function

    return decorate
