"""Dynamic model averaging: learners keep their models, and exchange them when they diverge."""

from .client import learner
from .operators import (
    Absolute,
    Continuous,
    Dynamic,
    FractionAveraging,
    Never,
    Operator,
    Periodic,
    Relative,
    Serial,
)
from .record import DynamicHistory, DynamicRecord
from .strategy import DynamicAveraging, ModelAveraging

__all__ = [
    "Absolute",
    "Continuous",
    "Dynamic",
    "DynamicAveraging",
    "DynamicHistory",
    "DynamicRecord",
    "FractionAveraging",
    "ModelAveraging",
    "Never",
    "Operator",
    "Periodic",
    "Relative",
    "Serial",
    "learner",
]
