"""Secure aggregation: the server receives the sum of the participants' models, and no model.

The protocol is that of Bonawitz et al. (CCS 2017) on the complete graph. Keys, shares and their
encryption are Flower's; masks and quantization are of this package. The server alone configures it,
by ``Transport(secure=SecureAggregation())``.
"""

from .client import masked
from .grid import SecureGrid, Surroundings
from .masks import Masks
from .messages import check_trained
from .settings import SecureAggregation, as_secure

__all__ = [
    "Masks",
    "SecureAggregation",
    "SecureGrid",
    "Surroundings",
    "as_secure",
    "check_trained",
    "masked",
]
