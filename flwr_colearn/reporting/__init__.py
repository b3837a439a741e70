"""Figures and tables from a history, and the command ``flwr-colearn``."""

from .calibration import Calibration, calibration_of
from .figures import Curve, curve, doublings, save_figure, save_panels

__all__ = [
    "Calibration",
    "Curve",
    "calibration_of",
    "curve",
    "doublings",
    "save_figure",
    "save_panels",
]
