import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from clients.partition import (
    class_shards,
    dirichlet_shards,
    equal_shards,
    group_shards,
    proportional_shards,
)
from flwr_colearn import ColearnError

LABELS = np.tile(np.arange(10), 60)  # ten classes of 60 examples, mixed
PARTITIONS = {
    "iid": lambda seed: equal_shards(len(LABELS), 5, seed),
    "shares": lambda seed: proportional_shards(len(LABELS), 5, "1:2:4:8:16", seed),
    "dirichlet": lambda seed: dirichlet_shards(LABELS, 5, 1.0, seed),
    "classes": lambda seed: class_shards(LABELS, 5, 2, seed),
}
every_partition = pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS)
seeds = st.integers(0, 2**32 - 1)


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def dealt_once(shards, num_examples):
    """Whether the shards are disjoint and complete."""
    return np.array_equal(np.sort(np.concatenate(shards)), np.arange(num_examples))


def skew(shards):
    """Distance of the participants' class shares to the shares of all data, 0 to 1, mean."""
    shares = [np.bincount(LABELS[shard], minlength=10) / len(shard) for shard in shards]
    return np.mean([np.abs(share - 0.1).sum() / 2 for share in shares])


@every_partition
def test_the_seed_alone_decides(partition):
    assert same(partition(0), partition(0))
    assert not same(partition(0), partition(1))


@every_partition
def test_every_example_belongs_to_exactly_one_participant_in_ascending_order(partition):
    shards = partition(3)
    assert dealt_once(shards, len(LABELS))
    assert all(np.array_equal(shard, np.sort(shard)) for shard in shards)


@given(st.integers(1, 300), st.integers(1, 20), seeds)
def test_equal_shards_differ_by_at_most_one_in_size(num_examples, k, seed):
    assume(num_examples >= k)
    shards = equal_shards(num_examples, k, seed)
    sizes = [len(shard) for shard in shards]
    assert len(sizes) == k
    assert max(sizes) - min(sizes) <= 1
    assert dealt_once(shards, num_examples)


def test_equal_shards_are_random_samples_not_blocks():
    # Sorted labels, dealt in blocks, would give every participant two of the ten classes.
    labels = np.sort(LABELS)
    for shard in equal_shards(len(labels), 5, seed=0):
        assert set(labels[shard]) == set(range(10))


def test_two_classes_each_of_ten_for_five_participants():
    shards = class_shards(LABELS, 5, 2, seed=0)
    held = [set(LABELS[shard]) for shard in shards]
    assert [len(classes) for classes in held] == [2] * 5
    assert set.union(*held) == set(range(10))
    assert [len(shard) for shard in shards] == [120] * 5


@given(st.integers(1, 8), st.integers(1, 10), st.integers(1, 10), seeds)
def test_every_participant_has_exactly_its_number_of_classes(k, num_classes, each, seed):
    assume(each <= num_classes <= k * each)
    labels = np.tile(np.arange(num_classes), 9)  # at least one example for each of 8 owners
    shards = class_shards(labels, k, each, seed)
    assert [len(set(labels[shard])) for shard in shards] == [each] * k
    assert dealt_once(shards, len(labels))
    for label in range(num_classes):
        parts = [count for shard in shards if (count := np.sum(labels[shard] == label))]
        assert max(parts) - min(parts) <= 1


@pytest.mark.parametrize(("k", "each"), [(5, 1), (1, 9), (5, 11), (5, 0), (5, -1)])
def test_impossible_classes_are_refused_with_the_possible_ones(k, each):
    least = {1: 10, 5: 2}[k]
    message = f"expected from {least} to 10 for {k} participants and 10 classes, found {each}"
    with pytest.raises(ColearnError, match=message):
        class_shards(LABELS, k, each, seed=0)


def test_a_class_too_small_for_its_owners_is_refused():
    # Two participants are to share class 1, which has one example.
    with pytest.raises(ColearnError, match=r"at least 2 examples of class 1.* 2 part.* found 1"):
        class_shards([0, 0, 0, 1], num_partitions=2, classes_each=2, seed=0)


def test_a_small_alpha_skews_and_a_large_one_does_not():
    skews = {
        alpha: np.mean([skew(dirichlet_shards(LABELS, 5, alpha, seed)) for seed in range(10)])
        for alpha in (0.3, 3.0, 300.0)
    }
    assert skews[0.3] > 1.5 * skews[3.0] > 3 * skews[300.0]


def test_an_enormous_alpha_shares_every_class_equally():
    for shard in dirichlet_shards(LABELS, 5, alpha=1e9, seed=0):
        assert np.all(np.abs(np.bincount(LABELS[shard], minlength=10) - 12) <= 1)


@given(st.floats(0.5, 100.0), seeds)
def test_dirichlet_shards_are_complete_or_refused(alpha, seed):
    try:
        shards = dirichlet_shards(LABELS, 5, alpha, seed)
    except ColearnError:
        return
    assert dealt_once(shards, len(LABELS))
    assert all(len(shard) for shard in shards)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_an_alpha_that_is_not_positive_is_refused(alpha):
    with pytest.raises(ColearnError, match=f"alpha.*: expected above 0, found {alpha}"):
        dirichlet_shards(LABELS, 5, alpha, seed=0)


@pytest.mark.parametrize(
    "deal",
    [
        lambda: equal_shards(3, 5, seed=0),
        lambda: dirichlet_shards([0, 0, 0], 5, alpha=1.0, seed=0),
        lambda: dirichlet_shards(LABELS % 4, 5, alpha=1e-9, seed=0),  # a class goes to one
        lambda: class_shards([0, 0, 0], 5, classes_each=1, seed=0),
    ],
    ids=["iid", "dirichlet", "skewed", "classes"],
)
def test_a_participant_without_examples_is_refused(deal):
    with pytest.raises(ColearnError, match=r"expected .* for each of .*5 participants, found"):
        deal()


def test_shards_have_the_sizes_of_the_shares():
    sizes = [len(shard) for shard in proportional_shards(310, 5, "1:2:4:8:16", seed=0)]
    assert sizes == [10, 20, 40, 80, 160]
    assert [len(shard) for shard in proportional_shards(10, 3, "1:1:1", seed=0)] == [3, 4, 3]


@pytest.mark.parametrize("shares", ["1:2", "1:2:0", "1:2:-1", "1:2:nan", "1:2:x", "", "1:2:3:4"])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ColearnError, match="expected 3 numbers above 0"):
        proportional_shards(100, 3, shares, seed=0)


@given(
    st.lists(st.integers(0, 30), min_size=60, max_size=200), st.integers(1, 5), st.integers(0, 9)
)
def test_groups_are_whole_and_shards_differ_by_at_most_the_largest_group(groups, k, seed):
    assume(len(set(groups)) >= k)
    shards = group_shards([f"speaker {group}" for group in groups], k, seed)
    assert sorted(np.concatenate(shards)) == list(range(len(groups)))
    assert all(np.all(np.diff(shard) > 0) for shard in shards)
    owners = [{groups[index] for index in shard} for shard in shards]
    assert sum(map(len, owners)) == len(set(groups))
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= np.bincount(groups).max()


def test_groups_are_dealt_by_the_seed_and_too_few_are_refused():
    groups = np.repeat(np.arange(12), 3)
    dealt = {tuple(map(tuple, group_shards(groups, 3, seed))) for seed in range(5)}
    assert len(dealt) == 5
    with pytest.raises(ColearnError, match="expected examples for each of 13 participants"):
        group_shards(groups, 13, 0)
