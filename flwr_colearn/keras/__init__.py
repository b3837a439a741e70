"""What a client in Keras 3 needs of this plugin, for any model; the extra is ``[tensorflow]``.

Nothing else in ``flwr_colearn`` imports this package, so TensorFlow is loaded only by those who ask
for it. Keras must have the backend TensorFlow.
"""

from ..errors import ColearnError, MissingExtraError

try:
    import keras
    import tensorflow  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("keras", "tensorflow"):
        raise  # the library of another backend, which Keras is set to
    raise MissingExtraError.of(__name__, "tensorflow", error) from error

if keras.backend.backend() != "tensorflow":
    raise ColearnError(
        f"Keras: expected the backend tensorflow, found {keras.backend.backend()}; set the "
        "environment variable KERAS_BACKEND=tensorflow"
    )

from .arrays import as_array, assign_all, get_arrays, load, named_variables, roles, set_arrays
from .normalization import batch_norms, convert, normalised, recalibrated
from .recalibration import recalibrate

__all__ = [
    "as_array",
    "assign_all",
    "batch_norms",
    "convert",
    "get_arrays",
    "load",
    "named_variables",
    "normalised",
    "recalibrate",
    "recalibrated",
    "roles",
    "set_arrays",
]
