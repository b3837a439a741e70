"""The ranges of the next round, computed by hand."""

import pytest

from flwr_colearn import SecureAggregation
from flwr_colearn.secure.ranges import Ranges


def after(*rounds, **settings):
    ranges = Ranges(SecureAggregation(**settings))
    for largest, clipped, weight in rounds:
        ranges.update(largest, clipped, weight)
    return ranges


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ([], 8.0),
        ([(0.25, 0, 5)], 2.0),
        ([(0.25, 1, 5)], 16.0),  # a single clipped element: twice the range that clipped it
        ([(4.0, 1, 5)], 32.0),  # more than twice
        ([(0.25, 0, 5), (0.125, 0, 5)], 1.0),
        ([(0.25, 0, 5), (0.125, 7, 5), (0.125, 7, 5)], 8.0),
        ([(0.25, 0, 5), (0.0, 0, 5)], 2.0),  # an update of zeros has no scale
    ],
)
def test_the_clipping_range_is_eight_times_the_last_mean_and_doubles(rounds, expected):
    assert after(*rounds).clipping == expected


def test_a_fixed_range_and_another_first_one():
    assert after((100.0, 9, 5), clipping_range=0.5).clipping == 0.5
    assert after(first_range=2.0).clipping == 2.0


def test_the_largest_weight_follows_the_largest_sum_of_weights():
    assert after().largest_weight(weighted=False) == (1, 32)
    assert after().largest_weight(weighted=True) == (2**20, 64)
    assert after((0.1, 0, 100), (0.1, 0, 40)).largest_weight(weighted=True) == (6400, 32)
    assert after((0.1, 0, 10**6)).largest_weight(weighted=True) == (2**20, 32)


def test_the_state_is_restored():
    ranges = after((0.25, 3, 100))
    other = after()
    other.restore(ranges.state())
    assert (other.clipping, other.weight) == (16.0, 100)
