"""Seeded partitions of a data set into disjoint shards, one for each participant."""

import numpy as np
import numpy.typing as npt

from flwr_colearn import ColearnError

Labels = npt.ArrayLike
Shards = list[npt.NDArray[np.int64]]


def equal_shards(num_examples: int, num_partitions: int, seed: int) -> Shards:
    """Return equal random shards (IID, as in the paper); their sizes differ by at most one."""
    order = np.random.default_rng(seed).permutation(num_examples)
    # The order within a shard has no effect, because every epoch shuffles it again.
    return _checked([np.sort(shard) for shard in np.array_split(order, num_partitions)])


def proportional_shards(num_examples: int, num_partitions: int, shares: str, seed: int) -> Shards:
    """Return random shards of unequal sizes.

    Parameters
    ----------
    num_examples, num_partitions : int
        N and K.
    shares : str
        One number above 0 for each participant, such as "1:2:4:8:16": the sizes in proportion.
    seed : int
        The seed of the draw.
    """
    try:
        weights = np.array([float(share) for share in shares.split(":")])
    except ValueError:
        weights = np.zeros(0)
    if len(weights) != num_partitions or not (np.isfinite(weights) & (weights > 0)).all():
        raise ColearnError(
            f"shares of the partition: expected {num_partitions} numbers above 0, one for each "
            f"participant, such as '1:2:4', found {shares!r}"
        )
    order = np.random.default_rng(seed).permutation(num_examples)
    # Rounding the ends, not the sizes, assigns every example exactly once.
    ends = np.rint(np.cumsum(weights)[:-1] / weights.sum() * num_examples).astype(int)
    return _checked([np.sort(shard) for shard in np.split(order, ends)])


def dirichlet_shards(labels: Labels, num_partitions: int, alpha: float, seed: int) -> Shards:
    """Split each class in proportions drawn from Dirichlet(alpha) (arXiv 1909.06335).

    Parameters
    ----------
    labels : array of int, [N]
        The class of every example.
    num_partitions : int
        K, the number of participants.
    alpha : float
        The concentration, above 0; small values give every class to few participants.
    seed : int
        The seed of the draw.

    Returns
    -------
    list of arrays
        The indices of each participant's examples, ascending.
    """
    if not alpha > 0:
        raise ColearnError(f"alpha of the Dirichlet partition: expected above 0, found {alpha!r}")
    rng = np.random.default_rng(seed)
    labels = np.asarray(labels)
    shards: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(num_partitions)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        # Rounding the ends, not the sizes, assigns every example exactly once.
        ends = np.cumsum(rng.dirichlet([alpha] * num_partitions))[:-1] * len(members)
        for shard, part in zip(shards, np.split(members, ends.astype(int)), strict=True):
            shard.append(part)
    return _checked([np.sort(np.concatenate(shard)) for shard in shards])


def class_shards(labels: Labels, num_partitions: int, classes_each: int, seed: int) -> Shards:
    """Assign `classes_each` classes to every participant and split each class equally.

    Classes are assigned in a random order that repeats, so every class is used if
    num_partitions * classes_each is at least their number.

    Raises
    ------
    ColearnError
        If a class would be unused, a participant would get a class twice, or a class has fewer
        examples than participants.
    """
    rng = np.random.default_rng(seed)
    labels = np.asarray(labels)
    classes = rng.permutation(np.unique(labels))
    if classes_each > len(classes) or num_partitions * classes_each < len(classes):
        raise ColearnError(
            f"classes for each participant: expected from {-(-len(classes) // num_partitions)} to "
            f"{len(classes)} for {num_partitions} participants and {len(classes)} classes, found "
            f"{classes_each}"
        )
    # resize repeats the shuffled classes: a row holds consecutive ones, so none of them twice.
    dealt = np.resize(classes, (num_partitions, classes_each))
    shards: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(num_partitions)]
    for label in classes:
        owners = np.flatnonzero((dealt == label).any(axis=1))
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < len(owners):
            raise ColearnError(
                f"partition: expected at least {len(owners)} examples of class {label}, one for "
                f"each of its {len(owners)} participants, found {len(members)}"
            )
        for owner, part in zip(owners, np.array_split(members, len(owners)), strict=True):
            shards[owner].append(part)
    return _checked([np.sort(np.concatenate(shard)) for shard in shards])


def group_shards(groups: npt.ArrayLike, num_partitions: int, seed: int) -> Shards:
    """Return shards of about equal size that split no group, for instance no speaker's clips.

    Parameters
    ----------
    groups : array, [N]
        The group of every example.
    num_partitions : int
        K, the number of participants.
    seed : int
        The seed of the order in which groups are assigned, each to the smallest shard so far.

    Returns
    -------
    list of arrays
        The indices of each participant's examples, ascending.
    """
    names, members = np.unique(np.asarray(groups), return_inverse=True)
    shards: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(num_partitions)]
    sizes = [0] * num_partitions
    for group in np.random.default_rng(seed).permutation(len(names)):
        smallest = int(np.argmin(sizes))
        shards[smallest].append(np.flatnonzero(members == group))
        sizes[smallest] += len(shards[smallest][-1])
    empty = [np.empty(0, np.int64)]
    return _checked([np.sort(np.concatenate(empty + shard)) for shard in shards])


def _checked(shards: Shards) -> Shards:
    # An empty shard would fail only later, in that participant's trainer.
    empty = [index for index, shard in enumerate(shards) if len(shard) == 0]
    if empty:
        raise ColearnError(
            f"partition: expected examples for each of {len(shards)} participants, found none for "
            f"participant {empty[0]}; use fewer participants, more data, or less skew"
        )
    return shards
