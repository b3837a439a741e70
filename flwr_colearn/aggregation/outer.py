"""Outer optimizers: steps of the shared model towards, or beyond, the mean of a round."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from ..errors import ColearnError, expected, real_number
from ..roles import Arrays, NDArray
from .chunks import Chunks, Part, flat


@runtime_checkable
class OuterOptimizer(Protocol):
    """An outer optimizer: theta^{i+1} = theta^i + step(mean - theta^i).

    The change from the shared model to the mean of the participants' models takes the place of a
    negative gradient. An object with these two names is an outer optimizer; a checkpoint has its
    ``str``, which must be the same in every process.
    """

    @property
    def keeps_momentum(self) -> bool:
        """Whether `step` changes `momentum`, which is saved in checkpoints then."""

    def step(self, change: NDArray, momentum: NDArray) -> NDArray:
        """Return the step of some elements of the model, each independently of the others.

        Parameters
        ----------
        change : numpy.ndarray
            mean - theta^i, a float64 vector, which must not be changed.
        momentum : numpy.ndarray
            The momentum of the same elements, a float64 vector that is zero in the first round. It
            is changed in place. Empty unless `keeps_momentum`.
        """


@dataclass(frozen=True)
class ServerRate:
    """theta^{i+1} = theta^i + rate * (mean - theta^i): a learning rate on the server.

    Not part of Mi et al. (2020), whose eq. 2 is a rate of 1.

    Parameters
    ----------
    rate : float
        The server's learning rate, positive. 1 is the plain mean, less than 1 a part of the way.

    Raises
    ------
    ColearnError
        If `rate` is not positive and finite.

    Examples
    --------
    >>> ServerRate(0.5).step(np.array([1.0, -4.0]), np.empty(0))
    array([ 0.5, -2. ])
    """

    rate: float
    keeps_momentum: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_rate("rate of ServerRate", self.rate)

    def step(self, change: NDArray, momentum: NDArray) -> NDArray:
        """Return rate * change."""
        return self.rate * change


@dataclass(frozen=True)
class Nesterov:
    """Stochastic gradient descent with Nesterov's momentum, with theta^i - mean for a gradient.

    v^{i+1} = momentum * v^i + (mean - theta^i);  v^0 = 0
    theta^{i+1} = theta^i + rate * ((mean - theta^i) + momentum * v^{i+1})

    This is ``torch.optim.SGD(nesterov=True)``. Not part of Mi et al. (2020); the defaults are those
    of DiLoCo (Douillard et al., 2023, arXiv 2311.08105).

    Parameters
    ----------
    rate : float, default 0.7
        The server's learning rate, positive.
    momentum : float, default 0.9
        The share of v that remains after a round, at least 0 and less than 1.

    Raises
    ------
    ColearnError
        If an argument lies outside its range.

    Examples
    --------
    >>> v = np.zeros(1)
    >>> Nesterov(rate=0.5, momentum=0.5).step(np.array([1.0]), v), v
    (array([0.75]), array([1.]))
    """

    rate: float = 0.7
    momentum: float = 0.9
    keeps_momentum: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_rate("rate of Nesterov", self.rate)
        if not real_number("momentum of Nesterov", self.momentum, least=0.0) < 1.0:
            raise expected("momentum of Nesterov", "a number of at least 0 below 1", self.momentum)

    def step(self, change: NDArray, momentum: NDArray) -> NDArray:
        """Return rate * (change + momentum * v), with v updated in place."""
        momentum *= self.momentum
        momentum += change
        return self.rate * (change + self.momentum * momentum)


def outer_step(
    optimizer: OuterOptimizer,
    shared: Arrays,
    mean: Arrays,
    names: Collection[str],
    momentum: Mapping[str, NDArray],
) -> dict[str, NDArray]:
    """Return theta + step(mean - theta) of some arrays, computed in float64 and rounded once.

    The result is the mean, bit for bit, wherever the step is the whole change.

    Parameters
    ----------
    optimizer : OuterOptimizer
        The rule for the step.
    shared, mean : mapping of str to numpy.ndarray
        The model from which the participants started, and the mean of theirs.
    names : collection of str
        The arrays that take a step, of the same shapes in both models.
    momentum : mapping of str to numpy.ndarray
        The momentum of these arrays, contiguous float64 arrays that are changed in place; no arrays
        if the optimizer keeps none.

    Returns
    -------
    dict
        New arrays of the types of `shared`, by name.

    Raises
    ------
    ColearnError
        If a number of the result is not finite. The momentum cannot be used any more then.
    """
    new = {name: np.empty(shared[name].shape, shared[name].dtype) for name in names}
    outs, speeds = flat(new), flat(momentum)
    starts, means = ({name: side[name].reshape(-1) for name in new} for side in (shared, mean))
    none = np.empty(0)

    def advance(parts: list[Part]) -> str | None:
        # Overflow is found in the result, which names the array.
        with np.errstate(over="ignore", invalid="ignore"):
            for name, chunk in parts:
                average = means[name][chunk].astype(np.float64)
                change = average - starts[name][chunk]
                speed = speeds[name][chunk] if name in speeds else none
                rest = change - optimizer.step(change, speed)
                # theta + step would round where theta is much larger than the mean.
                outs[name][chunk] = np.where(rest == 0.0, average, average - rest)
                if not np.isfinite(outs[name][chunk]).all():
                    return name
        return None

    for name in filter(None, Chunks(new).map(advance)):
        raise ColearnError(
            f"outer optimizer {optimizer}: expected a step to finite numbers, found NaN or Inf in "
            f"array '{name}'; lower its rate or its momentum"
        )
    return new


def as_outer_optimizer(value: object) -> OuterOptimizer:
    """Return `value` if it is an outer optimizer.

    Raises
    ------
    ColearnError
        If it is anything else.
    """
    # A class has the same attributes as its objects.
    if isinstance(value, OuterOptimizer) and not isinstance(value, type):
        return value
    raise expected(
        "outer", "Nesterov(...), ServerRate(...), or an object with keeps_momentum and step", value
    )


def _check_rate(what: str, rate: float) -> None:
    if not real_number(what, rate, least=0.0) > 0.0:
        raise expected(what, "a positive number", rate)
