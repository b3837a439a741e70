"""What a client in PyTorch needs of the normalization schemes; the extra is ``[torch]``."""

from .layers import BatchRenormLayer, holds_activation, timm_layers
from .normalization import convert, normalised, recalibrated

__all__ = [
    "BatchRenormLayer",
    "convert",
    "holds_activation",
    "normalised",
    "recalibrated",
    "timm_layers",
]
