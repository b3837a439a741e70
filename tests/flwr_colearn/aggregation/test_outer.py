"""Outer optimizers, against vectors by hand, torch's optimizer and properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flwr_colearn import ColearnError, Nesterov, ServerRate
from flwr_colearn.aggregation import as_outer_optimizer, outer_step
from flwr_colearn.aggregation.chunks import CHUNK


def walk(optimizer, start, means):
    """Return the shared model after each of the rounds with these means, and the last momentum."""
    shared, momentum, path = {"w": start}, {}, []
    if optimizer.keeps_momentum:
        momentum = {"w": np.zeros(start.shape)}
    for mean in means:
        shared = outer_step(optimizer, shared, {"w": mean}, ["w"], momentum)
        path.append(shared["w"])
    return path, momentum


def floats(*numbers, dtype=np.float32):
    return [np.array([number], dtype) for number in numbers]


def test_nesterov_by_hand():
    # v -2, -1, 0.5; steps 0.5 * (-2 - 1), 0.5 * (0 - 0.5), 0.5 * (1 + 0.25)
    path, momentum = walk(Nesterov(0.5, 0.5), *floats(4), floats(2, 2.5, 3.25))
    assert [array.tolist() for array in path] == [[2.5], [2.25], [2.875]]
    assert momentum["w"].tolist() == [0.5]


def test_a_server_rate_by_hand():
    path, _ = walk(ServerRate(0.25), *floats(4), floats(0, 7, -5))
    assert [array.tolist() for array in path] == [[3.0], [4.0], [1.75]]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize(("rate", "momentum"), [(0.7, 0.9), (1.0, 0.5), (1.5, 0.0), (1.0, 0.0)])
def test_nesterov_is_that_of_torch(dtype, rate, momentum):
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(1)
    start, *means = (generator.normal(0, 3, (5, 7)).astype(dtype) for _ in range(13))
    parameter = torch.nn.Parameter(torch.tensor(start.astype(np.float64)))
    nesterov = bool(momentum)  # torch refuses it without momentum
    optimizer = torch.optim.SGD([parameter], rate, momentum=momentum, nesterov=nesterov)
    path, _ = walk(Nesterov(rate, momentum), start, means)
    for mean, found in zip(means, path, strict=True):
        parameter.grad = parameter.detach() - torch.tensor(mean.astype(np.float64))
        optimizer.step()
        # The model that travels is rounded to its type after every round.
        expected = parameter.detach().numpy().astype(dtype)
        parameter.data = torch.tensor(expected.astype(np.float64))
        assert found.dtype == dtype
        # Two ways to write the same sums in float64 differ by rounding errors of their terms.
        slack = np.spacing(np.abs(expected)) if dtype != np.float64 else 0
        assert (np.abs(found - expected) <= slack + 1e-13).all()


def elements(dtype):
    most = min(float(np.finfo(dtype).max), 1e300) / 2
    width = np.finfo(dtype).bits
    return st.floats(-most, most, width=width, allow_nan=False).map(dtype)


@st.composite
def pairs(draw):
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3))
    each = elements(dtype)
    return tuple(draw(hnp.arrays(dtype, shape, elements=each)) for _ in range(3))


@pytest.mark.parametrize("optimizer", [Nesterov(1.0, 0.0), ServerRate(1.0)], ids=str)
@given(models=pairs())
def test_a_rate_of_1_without_momentum_is_the_mean_bit_for_bit(optimizer, models):
    start, *means = models
    path, _ = walk(optimizer, start, means)
    for found, mean in zip(path, means, strict=True):
        assert (found.dtype, found.shape) == (mean.dtype, mean.shape)
        assert found.tobytes() == mean.tobytes()


@given(models=pairs(), rate=st.floats(0.01, 0.99))
def test_a_smaller_rate_stays_between_the_model_and_the_mean(models, rate):
    start, mean, _ = models
    [found], _ = walk(ServerRate(rate), start, [mean])
    low, high = np.minimum(start, mean), np.maximum(start, mean)
    # The computation may round outwards by a unit in the last place of the larger one.
    slack = np.spacing(np.maximum(np.abs(start), np.abs(mean)))
    assert (found >= low - slack).all()
    assert (found <= high + slack).all()


def test_chunks_do_not_change_the_bits():
    generator = np.random.default_rng(2)
    start, first, second = (generator.normal(size=2 * CHUNK + 3) for _ in range(3))
    whole, momentum = walk(Nesterov(), start, [first, second])
    for part in (slice(CHUNK - 5, CHUNK + 5), slice(2 * CHUNK, None)):
        few, own = walk(Nesterov(), start[part], [first[part], second[part]])
        assert few[-1].tobytes() == whole[-1][part].tobytes()
        assert own["w"].tobytes() == momentum["w"][part].tobytes()


def test_the_given_models_are_not_changed_and_only_named_arrays_are_returned():
    shared = {"w": np.ones(2), "bn": np.ones(2), "t": np.ones((2, 3)).T}
    mean = {name: 2 * array for name, array in shared.items()}
    for array in (*shared.values(), *mean.values()):
        array.flags.writeable = False
    new = outer_step(ServerRate(0.5), shared, mean, ["w", "t"], {})
    assert {name: array.tolist() for name, array in new.items()} == {
        "w": [1.5, 1.5],
        "t": [[1.5, 1.5]] * 3,
    }


def test_a_step_out_of_the_type_is_an_error_that_names_the_array():
    with pytest.raises(ColearnError, match=r"Nesterov\(rate=1\.5.*array 'w'; lower its rate"):
        walk(Nesterov(1.5, 0.5), *floats(0, dtype=np.float16), floats(60_000, dtype=np.float16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ServerRate(0), "rate of ServerRate: expected a positive number"),
        (lambda: ServerRate(float("nan")), "rate of ServerRate: expected a finite number"),
        (lambda: Nesterov(-0.1), "rate of Nesterov: expected a number of at least 0"),
        (lambda: Nesterov(0.7, 1.0), "momentum of Nesterov: expected .* below 1"),
        (lambda: Nesterov(0.7, -0.5), "momentum of Nesterov: expected a number of at least 0"),
        (lambda: as_outer_optimizer(Nesterov), "outer: expected Nesterov"),
        (lambda: as_outer_optimizer(0.7), "outer: expected Nesterov"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ColearnError, match=message):
        make()
