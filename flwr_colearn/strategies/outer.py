"""OuterStep: the step from a round's mean to the next shared model, with its momentum."""

from collections.abc import Callable, Collection, Mapping

import numpy as np
from flwr.app import ArrayRecord

from ..aggregation import (
    OuterOptimizer,
    ServerRate,
    as_outer_optimizer,
    outer_step,
    spectral_vectors,
)
from ..errors import expected
from ..records import to_record, view
from ..roles import NDArray
from .shared_model import SharedModel

_PREFIX = "momentum/"  # a subclass of the strategy may have arrays of its own


class OuterStep:
    """Takes the step of an outer optimizer after every round, and keeps its momentum between them.

    Parameters
    ----------
    optimizer : OuterOptimizer or None
        The rule for the step; with ``None`` the mean is the new shared model (eq. 2).

    Attributes
    ----------
    momentum : dict
        The momentum by array name, in float64; empty before the first round, and without momentum.

    Raises
    ------
    ColearnError
        If `optimizer` is neither.
    """

    def __init__(self, optimizer: OuterOptimizer | None) -> None:
        self.optimizer = None if optimizer is None else as_outer_optimizer(optimizer)
        self.momentum: dict[str, NDArray] = {}

    def taken(
        self, average: ArrayRecord, shared: SharedModel, names: Collection[str]
    ) -> ArrayRecord:
        """Return the new shared model.

        Parameters
        ----------
        average : ArrayRecord
            The mean of the round. Its statistics and counters are not changed.
        shared : SharedModel
            The model from which the participants started.
        names : collection of str
            The trainable arrays that have a mean, which take the step.

        Raises
        ------
        ColearnError
            If the step leads to numbers that are not finite.
        """
        if self.optimizer is None:
            return average
        if self.optimizer.keeps_momentum and not self.momentum:
            self.momentum = {name: np.zeros(shared.arrays[name].shape) for name in names}
        mean = view(average)
        new = outer_step(self.optimizer, shared.arrays, mean, names, self.momentum)
        # The vectors of spectral normalization in the average are those of the mean's weights.
        new |= spectral_vectors({**mean, **new}, shared.roles, shared.arrays)
        ours = to_record(new)
        return ArrayRecord({name: ours.get(name, array) for name, array in average.items()})

    def clear(self) -> None:
        """Reset the state of an earlier run."""
        self.momentum = {}

    def arrays(self) -> dict[str, NDArray]:
        """Return the arrays of a checkpoint."""
        return {f"{_PREFIX}{name}": array for name, array in self.momentum.items()}

    def restore(self, arrays: Mapping[str, NDArray]) -> None:
        """Restore the momentum that `arrays` returned; other arrays are ignored."""
        self.momentum = {
            name.removeprefix(_PREFIX): np.array(array, np.float64)
            for name, array in arrays.items()
            if name.startswith(_PREFIX)
        }

    def configuration(self) -> dict[str, str]:
        """Return the settings that a resumed run must have in common with the saved one."""
        return {} if self.optimizer is None else {"outer optimizer": str(self.optimizer)}

    def log_summary(self, write: Callable[[str], None]) -> None:
        """Write the settings in the form of Flower's summary of a strategy."""
        if self.optimizer is not None:
            write(f"\t├──> Outer optimizer: {self.optimizer}")

    def check_private(self) -> None:
        """Raise a ColearnError unless a wrapper may add its noise after the step.

        In Flower's own loop the wrapper adds noise to what the strategy returns. In
        `flwr_colearn.run` the step comes after the noise, so any is private.
        """
        plain = self.optimizer is None
        if not plain and not (isinstance(self.optimizer, ServerRate) and self.optimizer.rate <= 1):
            raise expected(
                "outer in the own loop of a differential privacy wrapper",
                "ServerRate of at most 1, since the wrapper's noise is added after the step and is "
                "calibrated for a share of 1/K of each update, and momentum would carry updates "
                "without noise; flwr_colearn.run(wrapper, ...) takes the step after the noise",
                self.optimizer,
            )
