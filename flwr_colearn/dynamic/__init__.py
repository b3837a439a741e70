"""Dynamic model averaging: learners keep their models, and exchange them when they diverge."""

from .balancing import Balance
from .client import learner
from .operators import (
    Continuous,
    Dynamic,
    FractionAveraging,
    Never,
    Operator,
    Periodic,
    Serial,
)
from .record import DynamicHistory, DynamicRecord
from .strategy import DynamicAveraging, ModelAveraging
from .thresholds import Absolute, Calibrated, Relative

__all__ = [
    "Absolute",
    "Balance",
    "Calibrated",
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
