"""The quantizer: its error, its expected value, and the room that sums have."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flwr_colearn.secure.quantization import Quantizer

NUMBERS = arrays(np.float64, st.integers(1, 40), elements=st.floats(-10, 10, width=32))


def generator(seed=0):
    return np.random.default_rng(seed)


@given(NUMBERS, st.floats(1e-6, 1e6), st.integers(3, 50), st.sampled_from([32, 64]))
def test_the_error_of_a_number_is_less_than_a_step(values, clipping_range, participants, bits):
    quantizer = Quantizer(clipping_range, (2 ** (bits - 1) - 1) // participants)
    words, clipped = quantizer.encode(values, generator())
    inside = np.clip(values, -clipping_range, clipping_range)
    assert clipped == sum(abs(value) > clipping_range for value in values.tolist())
    # A float64 has 53 bits, so with 64-bit words its own rounding is the larger error.
    tolerance = max(quantizer.step, clipping_range * 2**-50)
    assert np.abs(quantizer.decode(words) - inside).max() <= tolerance


@given(st.data())
def test_the_error_of_a_mean_is_less_than_c_over_q(data):
    k = data.draw(st.integers(3, 50))
    values = [data.draw(arrays(np.float64, 5, elements=st.floats(-2, 2))) for _ in range(k)]
    quantizer = Quantizer(2.0, 1000)
    words = sum(quantizer.encode(value, generator(i))[0] for i, value in enumerate(values))
    error = quantizer.decode(words) / k - np.mean(values, axis=0)
    assert np.abs(error).max() < 2.0 / 1000


def test_the_rounding_is_unbiased_and_follows_its_seed():
    quantizer = Quantizer(1.0, 10)
    values = np.full(200_000, 0.123)
    words, _ = quantizer.encode(values, generator(3))
    assert set(np.unique(words)) == {1, 2}
    # The standard error of the mean is 0.42 / sqrt(200,000) of a step.
    assert abs(words.mean() - 1.23) < 5 * 0.42 / np.sqrt(200_000)
    assert np.array_equal(words, quantizer.encode(values, generator(3))[0])
    assert not np.array_equal(words, quantizer.encode(values, generator(4))[0])


@pytest.mark.parametrize("k", [3, 5, 20, 50])
@pytest.mark.parametrize(("bits", "kind"), [(32, np.int32), (64, np.int64)])
def test_a_sum_of_the_largest_numbers_does_not_overflow(k, bits, kind):
    quantizer = Quantizer(1.0, (2 ** (bits - 1) - 1) // k)
    for sign in (1.0, -1.0):
        words, _ = quantizer.encode(np.full(1000, sign), generator())
        total = k * int(words[0])
        assert (words == words[0]).all()
        assert np.iinfo(kind).min <= total <= np.iinfo(kind).max
        assert abs(total) > 0.99 * np.iinfo(kind).max


def test_weights_multiply_what_was_clipped():
    quantizer = Quantizer(2.0, 1000)
    words, clipped = quantizer.encode(np.array([5.0, 1.0]), generator(), share=0.5)
    assert clipped == 1
    assert words.tolist() == [500, 250]
