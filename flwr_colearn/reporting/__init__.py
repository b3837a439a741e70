"""Figures and tables from a history, and the command ``flwr-colearn``."""

from .calibration import Calibration, calibration_of
from .figures import Curve, curve, doublings, save_figure, save_panels
from .report import read_runs, save_report
from .runs import Run
from .sinks import TensorBoard, scalars

__all__ = [
    "Calibration",
    "Curve",
    "Run",
    "TensorBoard",
    "calibration_of",
    "curve",
    "doublings",
    "read_runs",
    "save_figure",
    "save_panels",
    "save_report",
    "scalars",
]
