"""RuledArrays: arrays whose value in the average is not their mean, by their role."""

from collections.abc import Mapping

import numpy as np

from ..errors import expected
from ..roles import Arrays, NDArray, Role

_EXTREMES = {Role.MAXIMUM: np.fmax, Role.MINIMUM: np.fmin}


class RuledArrays:
    """The arrays of the roles ``keep``, ``max``, ``min`` and ``unit`` of every model added.

    Parameters
    ----------
    roles : mapping of str to Role
        The roles of all arrays of the model.
    """

    def __init__(self, roles: Mapping[str, Role]) -> None:
        self._keep = [name for name, role in roles.items() if role is Role.KEEP]
        self._extremes = {n: _EXTREMES[role] for n, role in roles.items() if role in _EXTREMES}
        self._units = [name for name, role in roles.items() if role is Role.UNIT]
        self.names = frozenset((*self._keep, *self._extremes))
        """The arrays of which no mean is computed."""
        self.clear()

    def clear(self) -> None:
        """Begin a new average."""
        self._found: dict[str, NDArray] = {}

    def check(self, arrays: Arrays) -> None:
        """Raise a ColearnError if an extreme is NaN.

        Infinity is allowed: a layer that has seen no data has it, and it is no one's extreme.
        """
        for name in self._extremes:
            if arrays[name].dtype.kind == "f" and np.isnan(arrays[name]).any():
                raise expected(f"array '{name}'", "a number as the extreme", "NaN")

    def add(self, arrays: Arrays) -> None:
        """Add one model's arrays; no reference to them is kept."""
        for name, extreme in self._extremes.items():
            found = self._found.get(name)
            array = arrays[name]
            self._found[name] = array.copy() if found is None else extreme(found, array, out=found)

    def averages(self, means: Arrays, sent: Arrays) -> dict[str, NDArray]:
        """Return the values of these arrays in the average.

        Parameters
        ----------
        means : mapping
            The means, which have those of the role ``unit``.
        sent : mapping
            The model that the participants received.
        """
        kept = {name: sent[name].copy() for name in self._keep}
        units = {name: _unit(means[name], sent[name]) for name in self._units}
        return {**kept, **self._found, **units}


def _unit(mean: NDArray, sent: NDArray) -> NDArray:
    """Return a mean divided by its L2 norm; what was sent, if the vectors cancelled out."""
    wide = mean.astype(np.float64)
    norm = np.sqrt(np.square(wide).sum())
    return (wide / norm).astype(mean.dtype) if norm > 0 else sent.copy()
