import math
from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_colearn import (
    Annealed,
    ColearnError,
    ConstantRate,
    CosineRate,
    CyclicalRate,
    ExponentialRate,
    ProgressRate,
    Warmup,
)
from flwr_colearn.schedules import as_learning_rate, describe_rate, rates_of

NOT_RATES = [-0.01, math.nan, math.inf, -math.inf, True, "0.01", None, 1j]
NOT_DECAYS = [0, 0.0, -0.25, 1.0000001, 4, math.nan, math.inf, True, "0.25", None]
NOT_COUNTS = [0, -1, 2.0, 2.5, math.nan, True, "5", None]


def rates(schedule, local_epochs, *where, **named):
    return [schedule.at(j, local_epochs, *where, **named) for j in range(1, local_epochs + 1)]


# Learning rates ---------------------------------------------------------------------------------


def test_cyclical_rate_gives_the_papers_vector_for_five_epochs():
    vector = [0.007579, 0.005743, 0.004353, 0.003299, 0.0025]
    assert rates(CyclicalRate(0.01, 0.25), 5) == pytest.approx(vector, abs=5e-7)


@pytest.mark.parametrize(("epochs", "first"), [(10, 0.008706), (20, 0.009330), (40, 0.009659)])
def test_cyclical_rate_starts_as_in_the_spec_and_ends_at_eta_times_r(epochs, first):
    all_rates = rates(CyclicalRate(0.01, 0.25), epochs)
    assert all_rates[0] == pytest.approx(first, abs=5e-7)
    assert all_rates[-1] == 0.0025


def test_cyclical_rate_defaults_are_the_papers():
    assert CyclicalRate() == CyclicalRate(initial=0.01, decay=0.25)


def test_cyclical_rate_of_a_single_epoch_is_eta_times_r():
    assert rates(CyclicalRate(0.8, 0.25), 1) == [0.2]


def test_decay_of_one_is_a_constant_rate():
    assert rates(CyclicalRate(0.01, 1), 4) == [0.01] * 4
    assert rates(ExponentialRate(0.01, decay=1, total_epochs=4), 4) == [0.01] * 4


def test_a_rate_of_zero_stays_zero():
    assert rates(CyclicalRate(0), 3) == [0, 0, 0]


@given(
    eta=st.floats(1e-6, 10),
    decay=st.floats(0.01, 0.99),
    epochs=st.integers(2, 60),
    done=st.integers(0, 1000),
)
def test_cyclical_rate_falls_by_one_factor_and_never_uses_the_full_eta(eta, decay, epochs, done):
    all_rates = rates(CyclicalRate(eta, decay), epochs, epochs_done=done)
    assert all_rates[0] < eta
    assert all_rates[-1] == pytest.approx(eta * decay, rel=1e-12)
    ratios = [b / a for a, b in pairwise(all_rates)]
    assert ratios == pytest.approx([decay ** (1 / epochs)] * (epochs - 1), rel=1e-9)


def test_cyclical_rate_restarts_with_every_round():
    schedule = CyclicalRate(0.01)
    first, later = rates(schedule, 5), rates(schedule, 5, round_index=7, epochs_done=35)
    assert first == later


def test_exponential_rate_gives_hand_values():
    # 0.01 * (1/16) ** (e/4): e = 1 halves, e = 2 quarters, and so on.
    schedule = ExponentialRate(0.01, decay=1 / 16, total_epochs=4)
    assert rates(schedule, 4) == pytest.approx([0.005, 0.0025, 0.00125, 0.000625], rel=1e-14)


def test_exponential_rate_does_not_restart():
    schedule = ExponentialRate(0.1, decay=0.25, total_epochs=12)
    in_one_round = rates(schedule, 12)
    in_three_rounds = (
        rates(schedule, 3, round_index=0, epochs_done=0)
        + rates(schedule, 3, round_index=1, epochs_done=3)
        + rates(schedule, 6, round_index=2, epochs_done=6)
    )
    assert in_three_rounds == in_one_round
    assert in_one_round[-1] == pytest.approx(0.025)


def test_exponential_rate_goes_on_decaying_beyond_the_plan():
    schedule = ExponentialRate(0.1, decay=0.25, total_epochs=10)
    assert schedule.at(10, 10, epochs_done=10) == pytest.approx(0.1 / 16)


def test_constant_rate_is_the_same_in_every_epoch_and_round():
    assert rates(ConstantRate(0.3), 3, round_index=4, epochs_done=9) == [0.3] * 3


@pytest.mark.parametrize(
    "make",
    [
        ConstantRate,
        lambda eta: CyclicalRate(eta, 1),
        lambda eta: ExponentialRate(eta, decay=1, total_epochs=9),
    ],
)
def test_initial_rate_may_be_a_function_of_the_round(make):
    schedule = make(lambda i: 0.01 * 0.9**i)
    starts = [schedule.start(i) for i in range(3)]
    assert starts == pytest.approx([0.01, 0.009, 0.0081])
    assert [schedule.at(1, 1, round_index=i) for i in range(3)] == starts


def test_a_falling_initial_rate_is_annealed_from_its_own_value():
    schedule = CyclicalRate(lambda i: 0.01 * 0.9**i)
    assert schedule.at(5, 5, round_index=2) == pytest.approx(0.0081 / 4)


@pytest.mark.parametrize("value", NOT_RATES)
@pytest.mark.parametrize("make", [ConstantRate, CyclicalRate, lambda x: ExponentialRate(x, 1, 1)])
def test_impossible_initial_rates_are_refused(make, value):
    with pytest.raises(ColearnError, match=r"initial learning rate: expected a .*number") as error:
        make(value)
    assert f"found {value!r}" in str(error.value)


@pytest.mark.parametrize("value", NOT_RATES)
def test_an_impossible_value_of_the_initial_function_is_refused_with_its_round(value):
    schedule = CyclicalRate(lambda i: 0.01 if i < 3 else value)
    assert schedule.start(2) == 0.01
    with pytest.raises(ColearnError, match=r"round i=3: expected a .*number"):
        schedule.start(3)


@pytest.mark.parametrize("value", NOT_DECAYS)
@pytest.mark.parametrize(
    "make", [lambda r: CyclicalRate(0.01, r), lambda r: ExponentialRate(0.01, r, 10)]
)
def test_impossible_decays_are_refused(make, value):
    with pytest.raises(ColearnError, match=r"decay.*expected a number in \(0, 1\]") as error:
        make(value)
    assert f"found {value!r}" in str(error.value)


@pytest.mark.parametrize("value", NOT_COUNTS)
def test_impossible_total_epochs_are_refused(value):
    with pytest.raises(ColearnError, match=r"total_epochs.*a whole number of at least 1"):
        ExponentialRate(0.01, 0.5, value)


@pytest.mark.parametrize(("epoch", "local_epochs"), [(0, 5), (6, 5), (-1, 5)])
@pytest.mark.parametrize(
    "schedule", [ConstantRate(0.1), CyclicalRate(0.1), ExponentialRate(0.1, 0.5, 10)]
)
def test_epochs_outside_the_round_are_refused(schedule, epoch, local_epochs):
    with pytest.raises(ColearnError, match="from 1 to local_epochs=5, found"):
        schedule.at(epoch, local_epochs)


# CosineRate and Warmup --------------------------------------------------------------------------


def test_the_cosine_is_that_of_other_libraries():
    """Ten epochs from 0.1 to 0.01, of torch 2.14's CosineAnnealingLR(T_max=10, eta_min=0.01)."""
    literal = [
        0.1, 0.09779754323328192, 0.09140576474687265, 0.08145033635316128, 0.06890576474687263,
        0.055, 0.04109423525312737, 0.02854966364683872, 0.01859423525312735, 0.01220245676671809,
    ]  # fmt: skip
    schedule = CosineRate(0.1, total_epochs=10, final=0.01)
    assert rates(schedule, 10) == pytest.approx(literal, rel=1e-12)
    parts = rates(schedule, 4) + rates(schedule, 6, round_index=1, epochs_done=4)
    assert parts == rates(schedule, 10)
    assert rates(schedule, 2, round_index=2, epochs_done=10) == [0.01] * 2


@given(eta=st.floats(1e-6, 10), total=st.integers(1, 300), share=st.floats(0, 1))
def test_the_cosine_falls_from_the_first_rate_to_the_last(eta, total, share):
    found = rates(CosineRate(eta, total, final=share * eta), total)
    assert found[0] == pytest.approx(eta)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(found))
    assert min(found) >= share * eta * (1 - 1e-12)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0.1, 0), "total_epochs of CosineRate: expected .* at least 1, found 0"),
        ((0.1, 2.5), "total_epochs of CosineRate: expected a whole number .* found 2.5"),
        ((-0.1, 5), "initial learning rate: expected .* at least 0.0, found -0.1"),
        ((0.1, 5, -0.1), "final rate of CosineRate: expected .* from 0.0 to 0.1, found -0.1"),
        ((0.1, 5, 0.2), "final rate of CosineRate: expected .* from 0.0 to 0.1, found 0.2"),
        ((0.1, 5, "low"), "final rate of CosineRate: expected a finite number, found 'low'"),
    ],
)
def test_an_impossible_cosine_is_refused(arguments, match):
    with pytest.raises(ColearnError, match=match):
        CosineRate(*arguments)


def test_a_warm_up_rises_to_the_other_schedule():
    assert rates(Warmup(0.8, epochs=4), 6) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    inner = CyclicalRate(0.01, 0.25)
    found = rates(Warmup(inner, epochs=7), 5) + rates(Warmup(inner, 7), 5, 1, 5)
    plain = [0.007579, 0.005743, 0.004353, 0.003299, 0.0025]  # of the paper's eq. 3
    wanted = [rate * (j + 1) / 7 for j, rate in enumerate(plain)]
    wanted += [plain[0] * 6 / 7, *plain[1:]]
    assert found == pytest.approx(wanted, abs=1e-6)
    assert Warmup(inner, epochs=7).start(0) == 0.01


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0.1, 0), "epochs of Warmup: expected .* at least 1, found 0"),
        ((0.1, 1.5), "epochs of Warmup: expected a whole number .* found 1.5"),
        (("0.1", 5), "learning_rate: expected a number, a schedule .* found '0.1'"),
        ((lambda progress: 0.1, 5), "learning_rate: expected total_epochs beside a function"),
    ],
)
def test_an_impossible_warm_up_is_refused(arguments, match):
    with pytest.raises(ColearnError, match=match):
        Warmup(*arguments)


# Annealed ---------------------------------------------------------------------------------------


def test_the_factor_is_that_of_the_round_and_eq_3_holds_within_it():
    schedule = Annealed(CyclicalRate(0.8, 0.25), CosineRate(1.0, total_epochs=8))
    # The cosine at 0, 4 and 6 of 8 epochs: 1, 1/2 and (1 - 1/sqrt(2)) / 2.
    assert rates(schedule, 4) == pytest.approx([0.8 * 2**-0.5, 0.4, 0.4 * 2**-0.5, 0.2])
    assert rates(schedule, 2, 1, 4) == pytest.approx([0.2, 0.1])
    last = (1 - 2**-0.5) / 2
    assert rates(schedule, 2, 2, 6) == pytest.approx([0.4 * last, 0.2 * last])
    assert schedule.start(1) is None
    assert rates_of(schedule, 2, 1, 4) == (pytest.approx(0.2), pytest.approx((0.2, 0.1)))


def test_any_schedule_is_a_factor():
    plain = [0.007579, 0.005743, 0.004353, 0.003299, 0.0025]  # of the paper's eq. 3
    factors = {
        ExponentialRate(1.0, 0.25, 10): 0.25 ** (6 / 10),
        ConstantRate(lambda i: 0.5**i): 0.125,
        ProgressRate(lambda progress: 1 - progress, 10): 0.5,
        0.1: 0.1,
    }
    for factor, share in factors.items():
        found = rates(Annealed(CyclicalRate(0.01), factor), 5, 3, 5)
        assert found == pytest.approx([share * rate for rate in plain], abs=1e-6)


def test_it_composes_with_the_warm_up():
    inner = Annealed(CyclicalRate(0.8), CosineRate(1.0, 4))
    outside, inside = Warmup(inner, 4), Annealed(Warmup(CyclicalRate(0.8), 4), CosineRate(1.0, 4))
    assert rates(outside, 2, 1, 2) == pytest.approx([0.2 * 0.75, 0.1])
    assert rates(inside, 2, 1, 2) == pytest.approx([0.2 * 0.75, 0.1])
    assert outside.total_epochs == inside.total_epochs == 4


@given(
    eta=st.floats(1e-6, 10),
    decay=st.floats(0.01, 1),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
)
def test_every_round_ends_at_decay_times_its_own_eta(eta, decay, lengths):
    total, done = sum(lengths), 0
    factor = CosineRate(1.0, total)
    for index, length in enumerate(lengths):
        found = rates(Annealed(CyclicalRate(eta, decay), factor), length, index, done)
        own = eta * factor.at(1, length, index, done)
        assert found[-1] == pytest.approx(own * decay)
        assert found[0] == pytest.approx(own * decay ** (1 / length))
        done += length


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0.1, "0.1"), "learning_rate: expected a number, a schedule .* found '0.1'"),
        (("0.1", 0.1), "learning_rate: expected a number, a schedule .* found '0.1'"),
        ((0.1, lambda progress: 0.1), "learning_rate: expected total_epochs beside a function"),
        (
            (CosineRate(0.1, 10), CosineRate(1.0, 20)),
            "total_epochs of Annealed's factor: expected the rate's 10, found 20",
        ),
    ],
)
def test_an_impossible_annealing_is_refused(arguments, match):
    with pytest.raises(ColearnError, match=match):
        Annealed(*arguments)


# Schedules of one's own -------------------------------------------------------------------------


def test_a_function_is_given_the_progress():
    seen = []

    def function(progress):
        seen.append(progress)
        return 0.5 - progress / 4

    schedule = as_learning_rate(function, total_epochs=8)
    start, found = rates_of(schedule, local_epochs=3, round_index=1, epochs_done=2)
    assert seen == [0.25, 0.375, 0.5]
    assert found == (0.4375, 0.40625, 0.375)
    assert start == found[0]


def test_a_function_without_a_total_is_refused():
    with pytest.raises(ColearnError, match=r"expected total_epochs beside a function.*found None"):
        as_learning_rate(lambda progress: 0.1)


class Alternating:
    """A schedule that knows nothing of this package."""

    kind = "alternating"

    def start(self, round_index):
        return 0.5

    def at(self, epoch, local_epochs, round_index=0, epochs_done=0):
        return 0.5 if (epochs_done + epoch) % 2 else 0.25


def test_any_object_with_the_attributes_is_a_schedule():
    schedule = Alternating()
    assert as_learning_rate(schedule) is schedule
    assert rates_of(schedule, 3, 1, 1) == (0.5, (0.25, 0.5, 0.25))


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, "0.1", None])
def test_what_a_schedule_must_not_return_is_named(bad):
    class Bad(Alternating):
        def at(self, epoch, local_epochs, round_index=0, epochs_done=0):
            return 0.5 if epoch == 1 else bad

    with pytest.raises(ColearnError, match=r"epoch 2 of round i=3 by Bad \(kind 'alternating'\)"):
        rates_of(Bad(), 2, 3, 0)


def test_a_description_is_the_same_in_another_process():
    assert describe_rate(CyclicalRate(0.1)) == "CyclicalRate(initial=0.1, decay=0.25)"
    functions = [lambda progress: 1 - progress for _ in range(2)]
    first, second = (describe_rate(as_learning_rate(each, 10)) for each in functions)
    assert first == second
    assert "0x" not in first
    assert first != describe_rate(as_learning_rate(lambda progress: 1.0, 10))
    assert describe_rate(Alternating()) == describe_rate(Alternating())


# All of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        ConstantRate(0.1),
        CyclicalRate(0.1),
        ExponentialRate(0.1, 0.5, 10),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_immutable_and_equal_by_content(value):
    with pytest.raises(FrozenInstanceError):
        value.initial = 7
    assert value == type(value)(**vars(value))
    assert hash(value) == hash(type(value)(**vars(value)))


def test_numbers_are_shorthand_for_a_constant_rate():
    assert as_learning_rate(0.1) == ConstantRate(0.1)
    assert as_learning_rate(1) == ConstantRate(1)


@pytest.mark.parametrize("value", ["0.1", None, True, [0.1], CyclicalRate, object()])
def test_what_is_no_learning_rate_is_refused(value):
    with pytest.raises(ColearnError, match=r"learning.rate: expected"):
        as_learning_rate(value)
