"""Stochastic gradient descent on arrays, for the shared model and for local arrays."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import real_number
from ..roles import Arrays, NDArray


@dataclass(frozen=True)
class SGD:
    """v = momentum * v + (g + weight_decay * w);  w = w - rate * v, as in torch and Keras 2.

    The step is computed in float64 and rounded once to the weights' type.

    Parameters
    ----------
    momentum, weight_decay : float, default 0
        The factors in the equation, at least 0.

    Raises
    ------
    ColearnError
        If an argument lies outside its range.

    Examples
    --------
    >>> w, g = {"w": np.array([1.0])}, {"w": np.array([0.5])}
    >>> new, velocity = SGD(momentum=0.9).step(w, g, {}, rate=0.1)
    >>> new["w"], velocity["w"]
    (array([0.95]), array([0.5]))
    """

    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        real_number("momentum", self.momentum, least=0.0)
        real_number("weight_decay", self.weight_decay, least=0.0)

    def step(
        self, weights: Arrays, gradients: Arrays, velocity: Mapping[str, NDArray], rate: float
    ) -> tuple[dict[str, NDArray], dict[str, NDArray]]:
        """Return the weights and the velocity after one step.

        Parameters
        ----------
        weights, gradients : mapping of str to numpy.ndarray
            The weights and their gradients, with the same names and shapes.
        velocity : mapping of str to numpy.ndarray
            The velocity that the last step returned; a missing array counts as zero.
        rate : float
            The learning rate.
        """
        new, speeds = {}, {}
        for name, weight in weights.items():
            speed = np.asarray(gradients[name], np.float64)
            if self.weight_decay:
                speed = speed + self.weight_decay * weight
            if self.momentum and name in velocity:
                speed = self.momentum * velocity[name] + speed
            new[name] = np.asarray(weight - rate * speed, weight.dtype)
            if self.momentum:
                speeds[name] = speed
        return new, speeds
