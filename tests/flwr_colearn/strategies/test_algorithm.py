from flwr_colearn.strategies import Progress


def test_the_speed_of_participants_is_kept_if_nobody_replied():
    known = Progress(1, 2, 2).timed(30.0, 2)
    assert known.seconds_per_epoch == 15.0
    assert known.timed(0.0, 4) == known
    assert known.timed(40.0, 4).seconds_per_epoch == 10.0
    assert Progress().timed(0.0, 4).seconds_per_epoch == 0.0
    assert Progress().time_limit(60.0, 1000) == 60.0  # nothing is known yet
