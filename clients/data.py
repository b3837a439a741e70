"""Data sets in memory and the order of a local epoch's batches, in numpy only."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from clients.objective import CLASSES, Objective
from clients.trainer import NDArray
from flwr_colearn import ColearnError


@dataclass(frozen=True)
class Examples:
    """A data set as two arrays.

    Attributes
    ----------
    inputs : array, [N, ...]
        Images are [N, height, width, channels].
    labels : array, [N] of int64 or [N, labels] of float32
        The class of every example, or 0 or 1 for each of its labels.
    """

    inputs: NDArray
    labels: NDArray

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise ColearnError(
                f"examples: expected a label for each of {len(self.inputs)} inputs, found "
                f"{len(self.labels)} labels"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray) -> Self:
        """Return a copy of the examples at these indices."""
        return type(self)(self.inputs[indices], self.labels[indices])

    def chunks(self, size: int) -> Iterator[Self]:
        """Yield the examples in order, `size` at a time."""
        # Slices are views: nothing is copied, in contrast to `take`.
        for start in range(0, len(self), size):
            yield type(self)(self.inputs[start : start + size], self.labels[start : start + size])


NO_EXAMPLES = Examples(np.empty(0, np.float32), np.empty(0, np.int64))
"""An empty data set."""


@dataclass(frozen=True)
class Subset:
    """Some of the examples of a data set that has a length and an item for each index.

    Attributes
    ----------
    dataset : object
        The data set, such as one of PyTorch's.
    indices : array of int, [N]
        The indices of the examples.
    """

    dataset: Any
    indices: NDArray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]


def take(examples: Any, indices: NDArray) -> Any:
    """Return the examples of a data set at these indices: `Examples`, or else a `Subset`."""
    if isinstance(examples, Examples):
        return examples.take(indices)
    return Subset(examples, indices)


@dataclass(frozen=True)
class Task:
    """A learning task: its data sets, its objective and the options of its models.

    Attributes
    ----------
    train_set : Examples
        The examples that participants train on; in a simulation they are partitioned, in a fixed
        random order. With PyTorch also any data set that has a length and an item for each index.
    test_set : Examples
        The examples for evaluation; by default there are none.
    objective : Objective
        The loss and the metrics of the models.
    model_options : mapping
        The model's keyword arguments that depend on the task, such as ``num_classes``.
    own_objective : Objective, optional
        The objective with which participants evaluate on their own shard, for tasks whose
        `objective` is defined on `test_set` only; by default `objective`.
    agreement : str
        A digest of what all sites must have alike besides the settings, such as a vocabulary read
        from a file; empty if there is no such thing.
    """

    train_set: Examples = NO_EXAMPLES
    test_set: Examples = NO_EXAMPLES
    objective: Objective = CLASSES
    model_options: Mapping[str, Any] = field(default_factory=dict)
    own_objective: Objective | None = None
    agreement: str = ""

    def for_other_data(self) -> "Task":
        """Return the task with the objective that is defined on other data than `test_set` too."""
        return replace(self, objective=self.own_objective or self.objective)


def with_validation(task: Task, size: int) -> Task:
    """Return the task with its last `size` training examples in place of the test set.

    Every task's examples are in random order, so these are a random part. They are not trained on.
    They are evaluated by the task's `own_objective`, if it has one: `objective` is then defined on
    the test set only.

    Raises
    ------
    ColearnError
        If no training examples would be left.
    """
    rest = len(task.train_set) - size
    if not 0 < size < len(task.train_set):
        raise ColearnError(
            f"run config 'validation-examples': expected fewer than the {len(task.train_set)} "
            f"training examples, and at least 1, found {size}"
        )
    return replace(
        task.for_other_data(),
        train_set=take(task.train_set, np.arange(rest)),
        test_set=take(task.train_set, np.arange(rest, rest + size)),
    )


def shuffled_batches(num_examples: int, batch_size: int, seed: int) -> list[NDArray]:
    """Return one epoch's batches of indices in a seeded random order.

    The last batch may be smaller. A last batch of a single example is left out, because batch norm
    cannot train on it.

    Examples
    --------
    >>> [len(batch) for batch in shuffled_batches(10, 4, seed=0)]
    [4, 4, 2]
    >>> [len(batch) for batch in shuffled_batches(9, 4, seed=0)]
    [4, 4]
    """
    order = np.random.default_rng(seed).permutation(num_examples)
    batches = np.split(order, range(batch_size, num_examples, batch_size))
    return batches[: batches_in(num_examples, batch_size)]


def batches_in(num_examples: int, batch_size: int) -> int:
    """Return the number of batches of one epoch, without a last one of a single example.

    Examples
    --------
    >>> [batches_in(examples, 4) for examples in (8, 9, 10, 1)]
    [2, 2, 3, 1]
    """
    # A data set of one example keeps its only batch, so that an epoch is never empty.
    one_left = num_examples > 1 and num_examples % batch_size == 1
    return -(-num_examples // batch_size) - one_left
