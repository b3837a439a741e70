"""What a task's outputs mean: how they are trained, and by which metrics they are judged."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clients.trainer import NDArray, accuracy

Metrics = Callable[[NDArray, NDArray], dict[str, float]]
"""``(outputs, targets) -> metrics`` over the whole evaluation set, targets in its order."""


def classification(outputs: NDArray, targets: NDArray) -> dict[str, float]:
    """Return the ``accuracy``: the share of examples whose largest output is their class's."""
    return {"accuracy": accuracy(outputs, targets)}


@dataclass(frozen=True)
class Objective:
    """How a task's models are trained and judged; its default is one class for every example.

    Attributes
    ----------
    metrics : callable
        Outputs [N, C] (logits, float32) and targets to metrics by name.
    headline : str
        The metric that stands for the model, in tables and curves: the higher, the better.
    multi_label : bool
        False: targets are classes [N], trained with cross-entropy. True: targets are 0 or 1 for
        every label [N, C], each trained with binary cross-entropy of its own output.
    """

    metrics: Metrics = classification
    headline: str = "accuracy"
    multi_label: bool = False

    def probabilities(self, outputs: NDArray) -> NDArray:
        """Return the probabilities that logits [N, C] stand for: what an ensemble averages.

        In float64, so that logits of different sizes stay different.
        """
        outputs = outputs.astype(np.float64)
        if self.multi_label:
            return np.exp(-np.logaddexp(0, -outputs))
        exponentials = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)  # type: ignore[no-any-return]


CLASSES = Objective()
"""One class for every example, judged by accuracy."""
