"""Schemes for normalization layers where participants' data differ, and their implementation."""

from .answering import UsableBatches, answer_recalibration, model_and_batches
from .client import with_local_arrays
from .grid import NormalizationGrid
from .messages import LOCAL, RECALIBRATE
from .recalibration import Keys, Recalibration
from .schemes import (
    PARTIAL,
    SCHEMES,
    Average,
    BatchRenorm,
    Frozen,
    GroupNorm,
    LayerNorm,
    LocalBN,
    LocalStatistics,
    Normalization,
    Pooled,
    Recalibrated,
    Synchronised,
    as_normalization,
    layer_arrays,
    scheme_named,
    statistics_of,
)

__all__ = [
    "LOCAL",
    "PARTIAL",
    "RECALIBRATE",
    "SCHEMES",
    "Average",
    "BatchRenorm",
    "Frozen",
    "GroupNorm",
    "Keys",
    "LayerNorm",
    "LocalBN",
    "LocalStatistics",
    "Normalization",
    "NormalizationGrid",
    "Pooled",
    "Recalibrated",
    "Recalibration",
    "Synchronised",
    "UsableBatches",
    "answer_recalibration",
    "as_normalization",
    "layer_arrays",
    "model_and_batches",
    "scheme_named",
    "statistics_of",
    "with_local_arrays",
]
