"""The operators of the study of dynamic averaging by name."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flwr_colearn import Calibrated, ColearnError, Relative
from flwr_colearn.dynamic import (
    Absolute,
    Balance,
    Dynamic,
    FractionAveraging,
    Never,
    Operator,
    Periodic,
    Serial,
)

NAMES = "periodic-B, fedavg-C@B, dynamic-THRESHOLD@B, full-THRESHOLD@B, none or serial"


@dataclass(frozen=True)
class FullOnViolation(Dynamic):
    """Dynamic averaging without balancing: one violation fetches all models.

    Every synchronisation is full and renews the reference, which separates the effect of partial
    averages, and of an old reference, from that of the threshold.
    """

    def further(self, balance: Balance) -> Iterator[list[int]]:
        """Yield all learners that have not sent their models, if any learner has."""
        others = sorted(set(range(balance.learners)) - set(balance.reporters))
        if balance.reporters and others:
            yield others


def operator_named(name: str, learners: int) -> Operator:
    """Return the operator of a name.

    ``periodic-B``, ``fedavg-C@B``, ``dynamic-THRESHOLD@B``, ``full-THRESHOLD@B``, ``none`` or
    ``serial``. B, the mini-batches between two opportunities, is 8 for FedAvg and 1 for dynamic
    averaging unless it is given. A THRESHOLD is Delta, a percentage of |r|^2 such as ``1%``,
    ``auto``, or the factor of a calibrated one such as ``4x``. Serial learning takes the
    mini-batches of all learners in turn.

    Raises
    ------
    ColearnError
        If there is no such operator.
    """
    kind, _, rest = name.partition("-")
    value, _, every = rest.partition("@")
    simple: dict[str, Callable[[], Operator]] = {
        "none": Never,
        "serial": lambda: Serial(check_every=learners),
    }
    try:
        if name in simple:
            return simple[name]()
        if kind == "periodic":
            return Periodic(int(value))
        if kind == "fedavg":
            return FractionAveraging(float(value), int(every or 8))
        if kind in ("dynamic", "full"):
            operator = Dynamic if kind == "dynamic" else FullOnViolation
            return operator(_threshold(value), int(every or 1))
    except ValueError:
        pass
    raise ColearnError(f"operator: expected {NAMES}, found {name!r}")


def _threshold(text: str) -> Absolute | Relative | Calibrated:
    if text == "auto":
        return Calibrated()
    if text.endswith("%"):
        return Relative(float(text[:-1]) / 100)
    if text.endswith("x"):
        return Calibrated(float(text[:-1]))
    return Absolute(float(text))
