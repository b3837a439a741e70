"""Endless streams of mini-batches, each a function of its number: what online learners learn from.

A stream has no state, so a learner that is restarted goes on exactly where it was.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clients.trainer import NDArray


class Stream(Protocol):
    """A learner's data."""

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of mini-batch number `index`, from 0."""


@dataclass(frozen=True)
class Passes:
    """Pass after pass over a data set, each in an order of its own.

    Attributes
    ----------
    inputs, targets : Tensor
        The learner's examples.
    batch_size : int
        What is left over at the end of a pass is left out of it.
    seed : int
        The learner's.
    """

    inputs: Tensor
    targets: Tensor
    batch_size: int
    seed: int
    _order: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return mini-batch number `index`."""
        number, within = divmod(index, len(self.targets) // self.batch_size)
        if number not in self._order:
            self._order.clear()
            order = np.random.default_rng((self.seed, number)).permutation(len(self.targets))
            self._order[number] = torch.from_numpy(order)
        chosen = self._order[number][within * self.batch_size : (within + 1) * self.batch_size]
        return self.inputs[chosen], self.targets[chosen]


@dataclass(frozen=True)
class Interleaved:
    """The mini-batches of several streams in turn: all data at one place, for serial learning.

    Attributes
    ----------
    streams : tuple of Stream
        Number i of stream k is number i * len(streams) + k here.
    """

    streams: tuple[Stream, ...]

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return mini-batch number `index`."""
        number, which = divmod(index, len(self.streams))
        return self.streams[which].batch(number)


@dataclass(frozen=True)
class GraphicalModel:
    """A random Bayesian network over binary features and a binary class, to draw examples from.

    Every feature depends on the class and on one earlier feature (a tree-augmented naive Bayes
    network), by conditional probabilities drawn from Beta(2, 2).

    Attributes
    ----------
    features : int
        How many.
    seed : int
        Of structure and probabilities.
    """

    features: int
    seed: int

    def sample(self, examples: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Draw features in {-1, 1} [N, features] and classes [N]."""
        parents, tables = _network(self.features, self.seed)
        labels = rng.integers(0, 2, examples)
        x = np.zeros((examples, self.features), np.int64)
        uniform = rng.random((examples, self.features))
        for j in range(self.features):
            parent = x[:, parents[j]] if j else np.zeros(examples, np.int64)
            x[:, j] = uniform[:, j] < tables[j, labels, parent]
        return torch.from_numpy(2 * x - 1).float(), torch.from_numpy(labels)


@dataclass(frozen=True)
class Drifting:
    """Examples of one graphical model, and of another after each drift: the same for all learners.

    Attributes
    ----------
    drifts : tuple of int
        Numbers of the mini-batches that are the first of a new model, ascending.
    features, batch_size : int
        Of every mini-batch.
    concept_seed : int
        Of the models, common to all learners.
    seed : int
        The learner's own.
    """

    drifts: tuple[int, ...]
    features: int
    batch_size: int
    concept_seed: int
    seed: int

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return mini-batch number `index`."""
        concept = sum(index >= drift for drift in self.drifts)
        rng = np.random.default_rng((self.seed, index))
        model = GraphicalModel(self.features, 1000 * self.concept_seed + concept)
        return model.sample(self.batch_size, rng)


def random_drifts(steps: int, drifts: int, seed: int) -> tuple[int, ...]:
    """Return the times of so many drifts: random, but no two of them close together."""
    rng = np.random.default_rng(seed)
    length = steps / (drifts + 1)
    return tuple(int(length * (i + rng.uniform(-0.25, 0.25))) for i in range(1, drifts + 1))


@lru_cache(maxsize=64)
def _network(features: int, seed: int) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    parents = np.array([0] + [rng.integers(0, j) for j in range(1, features)])
    return parents, rng.beta(2, 2, (features, 2, 2))
