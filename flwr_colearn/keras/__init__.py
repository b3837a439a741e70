"""What a client in Keras 3 on TensorFlow needs of the schemes; the extra is ``[tensorflow]``."""

from .normalization import batch_norms, convert, normalised, recalibrated

__all__ = ["batch_norms", "convert", "normalised", "recalibrated"]
