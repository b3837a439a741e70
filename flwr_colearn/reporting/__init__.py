"""Figures from a history."""

from .figures import Curve, curve, doublings, save_figure, save_panels

__all__ = ["Curve", "curve", "doublings", "save_figure", "save_panels"]
