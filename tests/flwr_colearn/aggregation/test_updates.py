import math

import numpy as np
import pytest

from flwr_colearn import ColearnError, Guard, RunningMean
from flwr_colearn.aggregation import Updates
from flwr_colearn.aggregation.distance import relative_change, squared_norm, squared_update
from flwr_colearn.aggregation.updates import SAMPLE, contributions

SENT = {"w": np.array([3.0, 4.0], np.float32), "bn.running_mean": np.zeros(2, np.float32)}


def updates(sent=SENT, epochs=1, guard=None, **kwargs):
    found = Updates(guard or Guard(), ["w"], **kwargs)
    found.renew(sent, epochs)
    return found


def moved(step, sent=SENT):
    return {**sent, "w": sent["w"] + np.asarray(step, sent["w"].dtype)}


def limit_of(found, sent=SENT):
    """The largest step along one coordinate that passes, to a per mille."""
    low, high = 0.0, 1e15
    while high > low * 1.001 and high > 1e-12:
        middle = math.sqrt(max(low, 1e-12) * high)
        try:
            found.check(found.measure(moved([middle, 0.0], sent)))
            low = middle
        except ColearnError:
            high = middle
    return low


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
@pytest.mark.parametrize("size", [1, 1000, 300_000])
def test_the_squared_update_is_that_of_float64_to_four_digits(dtype, size):
    rng = np.random.default_rng(0)
    new, old = (rng.normal(scale=30.0, size=size).astype(dtype) for _ in range(2))
    truth = float(((new.astype(np.float64) - old.astype(np.float64)) ** 2).sum())
    assert squared_update({"w": new}, {"w": old}) == pytest.approx(truth, rel=3e-4)
    alone = float((new.astype(np.float64) ** 2).sum())
    assert squared_update({"w": new}) == pytest.approx(alone, rel=3e-4)


def test_squares_that_overflow_or_vanish_in_float32_are_not_lost():
    for step in (3e38, 1e-30):
        new, old = {"w": np.array([step, 0], np.float32)}, {"w": np.zeros(2, np.float32)}
        assert math.sqrt(squared_update(new, old)) == pytest.approx(step)


@pytest.mark.parametrize("size", [1, 2048, 2049, 3000, 140_001])
def test_the_relative_change_is_that_of_an_exact_sum(size):
    rng = np.random.default_rng(size)
    new, old = (rng.normal(size=size).astype(np.float32) for _ in range(2))
    change = math.fsum((float(a) - float(b)) ** 2 for a, b in zip(new, old, strict=True))
    model = math.fsum(float(b) ** 2 for b in old)
    assert relative_change([new], [old]) == pytest.approx(math.sqrt(change / model), rel=1e-13)
    assert squared_norm({"w": old}) == pytest.approx(model, rel=1e-13)


def test_only_arrays_that_are_equal_have_no_update():
    frozen = np.random.default_rng(0).random(3000).astype(np.float32)
    assert squared_update({"w": frozen.copy()}, {"w": frozen}) == 0.0
    assert squared_update({"w": np.zeros(3, np.float32)}) == 0.0
    # The squares of these differences vanish in float32.
    near = np.nextafter(np.zeros(3, np.float32), np.float32(1))
    assert squared_update({"w": near}, {"w": np.zeros(3, np.float32)}) > 0.0
    assert squared_update({"w": near}) > 0.0


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_the_squared_update_is_finite_only_if_the_model_is(wrong):
    new = {"w": np.array([1.0, wrong], np.float32)}
    assert not math.isfinite(squared_update(new, {"w": np.zeros(2, np.float32)}))


def test_in_round_1_an_update_is_at_most_1000_times_the_model():
    assert limit_of(updates()) == pytest.approx(5000, rel=2e-3)  # |(3, 4)| = 5
    assert limit_of(updates(guard=Guard(first=10))) == pytest.approx(50, rel=2e-3)


@pytest.mark.parametrize("value", [0.0, 1e-5])
def test_a_model_without_a_scale_counts_as_one_of_ones(value):
    sent = {**SENT, "w": np.full(4, value, np.float32)}
    found = Updates(Guard(), ["w"])
    found.renew(sent)
    near, far = ({**sent, "w": np.full(4, x, np.float32)} for x in (999.0, 1001.0))
    found.check(found.measure(near))
    with pytest.raises(ColearnError, match="at most 2000, 1000 times the model's norm"):
        found.check(found.measure(far))


def test_later_an_update_is_at_most_100_times_the_largest_accepted_one_and_grows_with_t():
    found = updates(epochs=2)
    for participant, step in (("a", [0.3, 0.4]), ("b", [0.1, 0.0])):
        found.accept(participant, found.measure(moved(step)))
    found.renew(SENT, 2)
    assert limit_of(found) == pytest.approx(50, rel=2e-3)  # 100 x |(0.3, 0.4)|
    found.renew(SENT, 8)
    assert limit_of(found) == pytest.approx(200, rel=2e-3)  # T is four times that of the norm
    found.renew(SENT, 1)
    assert limit_of(found) == pytest.approx(50, rel=2e-3)  # a smaller T lowers nothing


def test_a_measured_update_that_is_not_accepted_raises_no_bound():
    found = updates()
    found.accept("a", found.measure(moved([0.5, 0.0])))
    found.measure(moved([40.0, 0.0]))
    found.renew(SENT)
    assert limit_of(found) == pytest.approx(50, rel=2e-3)


@pytest.mark.parametrize("step", [0.0, 1e-6])
def test_a_round_in_which_nothing_moved_leaves_the_bound_of_round_1(step):
    found = updates()
    found.accept("a", found.measure(moved([step, 0.0])))
    found.renew(SENT)
    assert limit_of(found) == pytest.approx(5000, rel=2e-3)


def test_the_state_is_that_of_the_largest_norm_with_the_round_under_way():
    found = updates(epochs=2)
    found.accept("a", found.measure(moved([0.1, 0.0])))
    again = Updates(Guard(), ["w"])
    again.restore(found.state())
    again.renew(SENT, 6)
    assert limit_of(again) == pytest.approx(30, rel=3e-3)
    assert again.state() == found.state()


def test_gradients_are_the_update_themselves():
    found = updates(gradients=True)
    assert found.measure(moved([0.0, 0.0])).norm == pytest.approx(5.0)


def test_where_nothing_is_refused_norms_are_measured_all_the_same():
    found = updates(refuses=False)
    update = found.measure(moved([1e30, 0.0]))
    found.check(update)
    assert update.norm == pytest.approx(1e30)


def test_a_model_that_is_not_finite_is_refused_as_such():
    mean = RunningMean(SENT)
    for wrong in (np.nan, np.inf):
        with pytest.raises(ColearnError, match=r"array 'w': .*NaN or Inf"):
            updates().admitted(moved([wrong, 0.0]), mean, 1)


def test_norm_cosine_and_weight_of_every_participant():
    found = updates()
    for participant, step in (("b", [0.0, 1.0]), ("a", [2.0, 0.0]), ("c", [0.0, 0.0])):
        found.accept(participant, found.measure(moved(step)))
    # The mean update is (2 * 1 * (0, 1) + 1 * (2, 0)) / 4 = (0.5, 0.5).
    told = contributions({"a": 1, "b": 2, "c": 1}, found)
    assert {name: entry["weight"] for name, entry in told.items()} == {
        "a": 0.25,
        "b": 0.5,
        "c": 0.25,
    }
    assert [told[name]["norm"] for name in "abc"] == pytest.approx([2.0, 1.0, 0.0])
    assert [told[name]["cosine"] for name in "ab"] == pytest.approx([math.sqrt(0.5)] * 2)
    assert told["c"]["cosine"] is None


def test_without_a_guard_only_the_weight_is_known():
    told = contributions({"b": 1, "a": 3}, None)
    # In the order of names, so that the order of arrival changes no line of the history.
    assert list(told.items()) == [
        ("a", {"weight": 0.75, "norm": None, "cosine": None}),
        ("b", {"weight": 0.25, "norm": None, "cosine": None}),
    ]


def test_the_cosine_of_a_large_model_is_estimated_from_a_sample():
    rng = np.random.default_rng(1)
    sent = {"u": np.zeros(10, np.float32), "w": rng.normal(size=10 * SAMPLE).astype(np.float32)}
    steps = {name: rng.normal(size=sent["w"].size).astype(np.float32) for name in "ab"}
    steps["b"] += 2 * steps["a"]
    found = Updates(Guard(), ["u", "w"])
    found.renew(sent)
    for name, step in steps.items():
        update = found.measure(moved(step, sent))
        assert update.sample.size <= SAMPLE
        found.accept(name, update)
    mean = (steps["a"].astype(np.float64) + steps["b"]) / 2
    for name, step in steps.items():
        truth = mean @ step / np.linalg.norm(mean) / np.linalg.norm(step.astype(np.float64))
        assert found.described({"a": 1, "b": 1})[name]["cosine"] == pytest.approx(truth, abs=0.05)
