"""What a client in PyTorch needs of this plugin, for any ``nn.Module``; the extra is ``[torch]``.

Nothing else in ``flwr_colearn`` imports this package, so PyTorch is loaded only by those who ask
for it.
"""

from ..errors import MissingExtraError

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtraError.of(__name__, "torch", error) from error

from .arrays import check_state, get_arrays, roles, save_state_dict, set_arrays, to_array
from .layers import BatchRenormLayer, holds_activation, timm_layers
from .normalization import convert, normalised, recalibrated
from .recalibration import recalibrate

__all__ = [
    "BatchRenormLayer",
    "check_state",
    "convert",
    "get_arrays",
    "holds_activation",
    "normalised",
    "recalibrate",
    "recalibrated",
    "roles",
    "save_state_dict",
    "set_arrays",
    "timm_layers",
    "to_array",
]
