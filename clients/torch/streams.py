"""Endless streams of mini-batches for online learners.

A mini-batch depends on its number only, not on a state of the stream, so a learner that is
restarted continues with exactly the same data.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clients.trainer import NDArray


class Stream(Protocol):
    """The interface of a learner's data."""

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of mini-batch number `index`, from 0."""


@dataclass(frozen=True)
class Passes:
    """Repeated passes over a data set, each in a random order of its own.

    Attributes
    ----------
    inputs, targets : Tensor
        The learner's examples.
    batch_size : int
        The size of a mini-batch; a smaller rest at the end of a pass is left out.
    seed : int
        The learner's seed.
    """

    inputs: Tensor
    targets: Tensor
    batch_size: int
    seed: int
    _order: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return mini-batch number `index`."""
        number, within = divmod(index, len(self.targets) // self.batch_size)
        # Only the current pass's order is cached: it is as long as the data set.
        if number not in self._order:
            self._order.clear()
            order = np.random.default_rng((self.seed, number)).permutation(len(self.targets))
            self._order[number] = torch.from_numpy(order)
        chosen = self._order[number][within * self.batch_size : (within + 1) * self.batch_size]
        return self.inputs[chosen], self.targets[chosen]


@dataclass(frozen=True)
class Interleaved:
    """The mini-batches of several streams in turn, for serial learning on all data.

    Attributes
    ----------
    streams : tuple of Stream
        The streams; number i of stream k is number i * len(streams) + k of this one.
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
        The number of features.
    seed : int
        The seed of the structure and the probabilities.
    """

    features: int
    seed: int

    def sample(self, examples: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Draw features in {-1, 1} [N, features] and classes [N]."""
        # Ancestral sampling: a feature's parent has a lower number, so it is drawn before.
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
    """Examples of a graphical model that every drift replaces, at the same time for all learners.

    Attributes
    ----------
    drifts : tuple of int
        The numbers of the mini-batches that are the first of a new model, ascending.
    features, batch_size : int
        The number of features, and of examples in a mini-batch.
    concept_seed : int
        The seed of the models, common to all learners.
    seed : int
        The learner's own seed.
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


@dataclass(frozen=True)
class Relabelled:
    """A stream whose classes are numbered anew at given times, the same way for all learners.

    Attributes
    ----------
    stream : Stream
        The stream.
    drifts : tuple of int
        The numbers of the mini-batches that are the first with another numbering, ascending.
    classes : int
        The number of classes.
    seed : int
        The seed of the numberings.
    """

    stream: Stream
    drifts: tuple[int, ...]
    classes: int
    seed: int

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return mini-batch number `index`."""
        inputs, targets = self.stream.batch(index)
        concept = sum(index >= drift for drift in self.drifts)
        return inputs, relabelled(targets, concept, self.classes, self.seed)


def relabelled(targets: Tensor, concept: int, classes: int, seed: int) -> Tensor:
    """Return classes [N] in the numbering of a concept; that of concept 0 is the original one."""
    if not concept:
        return targets
    return torch.from_numpy(np.random.default_rng((seed, concept)).permutation(classes))[targets]


def random_drifts(steps: int, drifts: int, seed: int) -> tuple[int, ...]:
    """Return the random times of a number of drifts, no two of them close together."""
    rng = np.random.default_rng(seed)
    # Evenly spaced times, moved by up to a quarter of the spacing: at least half remains between.
    length = steps / (drifts + 1)
    return tuple(int(length * (i + rng.uniform(-0.25, 0.25))) for i in range(1, drifts + 1))


@lru_cache(maxsize=64)
def _network(features: int, seed: int) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    parents = np.array([0] + [rng.integers(0, j) for j in range(1, features)])
    return parents, rng.beta(2, 2, (features, 2, 2))
