"""The speed of a local epoch, from which the time limit of the next round follows."""

import pytest

from flwr_colearn.strategies.algorithm import Progress


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (400.0, 100.0),
        (0.0, 20.0),  # nobody replied
        (60.0, 15.0),
        (4.0, 10.0),  # at most twice as fast: a resumed round trained one of its epochs, say
    ],
)
def test_the_speed_is_that_of_the_round_and_at_most_twice_the_one_before(seconds, expected):
    known = Progress(seconds_per_epoch=20.0, first_seconds_per_epoch=60.0)
    assert known.timed(seconds, 4).seconds_per_epoch == expected


def test_the_first_speed_is_that_of_the_first_round():
    assert Progress().timed(4.0, 4).seconds_per_epoch == 1.0
