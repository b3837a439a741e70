"""Medians and ranges of measurements that were made in turns."""

import statistics
from collections.abc import Sequence


def ratios(yardstick: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Return the median and the range of the ratios of neighbouring measurements.

    In these slow changes of the machine's load cancel.
    """
    each = [b / a for a, b in zip(yardstick, ours, strict=True)]
    return {
        "ratio": round(statistics.median(each), 3),
        "lowest": round(min(each), 3),
        "highest": round(max(each), 3),
    }
