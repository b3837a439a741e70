"""The objectives of tasks: which loss trains a model and which metrics evaluate it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clients.trainer import NDArray, accuracy

Metrics = Callable[[NDArray, NDArray], dict[str, float]]
"""``(outputs, targets) -> metrics`` over the whole evaluation set, in its order."""


def classification(outputs: NDArray, targets: NDArray) -> dict[str, float]:
    """Return ``accuracy``, the share of examples whose class has the largest output."""
    return {"accuracy": accuracy(outputs, targets)}


@dataclass(frozen=True)
class Objective:
    """The loss and the metrics of a task; the default is one class for every example.

    Attributes
    ----------
    metrics : callable
        The function from outputs [N, C] (logits, float32) and targets to metrics by name.
    headline : str
        The metric that tables and curves show; higher is better.
    multi_label : bool
        False: targets are classes [N], and the loss is cross-entropy. True: targets are 0 or 1 for
        every label [N, C], and the loss is the binary cross-entropy of each label's output.
    """

    metrics: Metrics = classification
    headline: str = "accuracy"
    multi_label: bool = False

    def probabilities(self, outputs: NDArray) -> NDArray:
        """Return the probabilities [N, C] of logits [N, C], which an ensemble averages.

        The result is float64, so that large logits of different size stay different.
        """
        outputs = outputs.astype(np.float64)
        if self.multi_label:
            # The sigmoid, by its logarithm: exp(-outputs) itself would overflow.
            return np.exp(-np.logaddexp(0, -outputs))
        # Softmax does not change if all logits are shifted; their maximum keeps exp from overflow.
        exponentials = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)  # type: ignore[no-any-return]

    def loss(self, probabilities: NDArray, targets: NDArray) -> float:
        """Return the mean negative log-likelihood of probabilities [N, C], the training loss.

        A probability of zero counts as the smallest normal float64.
        """
        if self.multi_label:
            likely = np.where(targets > 0.5, probabilities, 1 - probabilities)
        else:
            likely = probabilities[np.arange(len(targets)), targets]
        return float(-np.log(np.maximum(likely, np.finfo(np.float64).tiny)).mean())


CLASSES = Objective()
"""The objective of tasks with one class for every example, evaluated by accuracy."""
