"""Flower Grids: layers around another grid, and grids with participants in this process."""

from .all_reduce import GROUP, RANK, AllReduceGroup, group_of, new_group
from .bounding import BoundingGrid, bounded_metrics
from .in_process import InProcessGrid
from .metering import MeteringGrid, control_bytes
from .progress import ProgressGrid
from .rewriting import RewritingGrid
from .selecting import SelectingGrid
from .threaded import ThreadedGrid
from .wrapping import WrappingGrid, is_closed

__all__ = [
    "GROUP",
    "RANK",
    "AllReduceGroup",
    "BoundingGrid",
    "InProcessGrid",
    "MeteringGrid",
    "ProgressGrid",
    "RewritingGrid",
    "SelectingGrid",
    "ThreadedGrid",
    "WrappingGrid",
    "bounded_metrics",
    "control_bytes",
    "group_of",
    "is_closed",
    "new_group",
]
