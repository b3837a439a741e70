import contextlib
import math
import tracemalloc
from functools import partial
from itertools import permutations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flwr_colearn import ColearnError, Role, RunningMean, relative_change
from flwr_colearn.aggregation import RoundMean, trainable
from flwr_colearn.aggregation.chunks import CHUNK
from flwr_colearn.aggregation.mean import _SMALL


@pytest.fixture(autouse=True, scope="module", params=["in buckets", "each by itself"])
def bucketed(request):
    """Small arrays are summed in one vector; all that holds of the mean must hold without, too."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "in buckets":
            patch.setattr("flwr_colearn.aggregation.mean._SMALL", 0)
        yield


shapes = hnp.array_shapes(min_dims=0, max_dims=3, max_side=4)


def floats32(low, high, shape=(3,)):
    low, high = float(np.float32(low)), float(np.float32(high))
    return hnp.arrays(np.float32, shape, elements=st.floats(low, high, width=32))


def within_a_factor_of_2_to_the_24(shape):
    """float32 arrays whose non-zero magnitudes lie within 2**24 of each other."""
    whole = hnp.arrays(np.int32, shape, elements=st.integers(-(2**24), 2**24))
    return whole.map(lambda numbers: np.asarray(numbers * 2.0**-12, np.float32))


def average(models, weights=None, like=None, roles=None):
    mean = RunningMean(models[0] if like is None else like, roles)
    for model, weight in zip(models, weights or [1] * len(models), strict=True):
        mean.add(model, weight)
    return mean.mean()


def bits(model):
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in model.items()}


def batch_norm(mean, variance, dtype=np.float32):
    return {
        "bn.running_mean": np.asarray(mean, dtype),
        "bn.running_var": np.asarray(variance, dtype),
    }


def model_of_every_kind():
    """One array for every role and type that a model may hold."""
    return {
        "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.array([1.5, -2.5], np.float16),
        "double": np.array([1 / 3]),
        "scalar": np.array(0.25, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "bn.running_mean": np.array([1.0, 2.0], np.float32),
        "bn.running_var": np.array([3.0, 4.0], np.float32),
        "bn.num_batches_tracked": np.array(7, np.int64),
        "small": np.array([3, 250], np.uint8),
        "flag": np.array([True, False]),
    }


# All models at once -----------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.lists(st.sampled_from([1, 2, 31, 0.5, 1 / 3]), min_size=1, max_size=5),
)
def test_models_added_at_once_give_the_bits_of_models_added_one_by_one(seed, weights):
    rng = np.random.default_rng(seed)
    models = [
        {
            name: (array + rng.integers(0, 2, array.shape)).astype(array.dtype)
            if array.dtype.kind != "f"
            else np.asarray(array * rng.uniform(0.5, 2, array.shape), array.dtype)
            for name, array in model_of_every_kind().items()
        }
        for _ in weights
    ]
    at_once = RunningMean(models[0])
    at_once.add_all(list(zip(models, weights, strict=True)))
    assert (at_once.count, at_once.weight) == (len(models), sum(weights))
    result = at_once.mean()
    assert bits(result) == bits(average(models, weights))
    assert list(result) == list(models[0])


def test_models_larger_than_a_block_are_added_at_once_with_threads_too(monkeypatch):
    monkeypatch.setattr("flwr_colearn.aggregation.chunks._THREADED", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    rng = np.random.default_rng(0)
    # The last chunk of an array is a smaller one.
    models = [{"w": rng.normal(size=3 * CHUNK - 5).astype(np.float32)} for _ in range(3)]
    at_once = RunningMean(models[0])
    at_once.add_all([(model, 1) for model in models])
    expected = np.mean([model["w"].astype(np.float64) for model in models], axis=0)
    assert np.array_equal(at_once.mean()["w"], expected.astype(np.float32))


@pytest.mark.parametrize(
    "faults",
    [
        [("weight", np.nan, 1)],
        [("weight", np.inf, 0), ("weight", -np.inf, 1)],  # which cancel in the sum, but to NaN
        [("double", np.inf, 2)],
        [("half", -np.inf, 0)],
        [("bn.running_mean", np.nan, 2)],
    ],
)
def test_models_at_once_with_one_that_is_not_finite_leave_the_mean_empty(faults):
    models = [model_of_every_kind() for _ in range(3)]
    for name, value, index in faults:
        models[index][name].flat[0] = value
    mean = RunningMean(model_of_every_kind())
    with pytest.raises(ColearnError, match=faults[0][0]):
        mean.add_all([(model, 1) for model in models])
    assert (mean.count, mean.weight) == (0, 0)
    mean.add(model_of_every_kind())
    assert bits(mean.mean()) == bits(model_of_every_kind())


def test_models_at_once_are_all_there_are():
    mean = RunningMean(model_of_every_kind())
    with pytest.raises(ColearnError, match="found 0 for one of 0"):
        mean.add_all([])
    mean.add_all([(model_of_every_kind(), 1)])
    for add in (mean.add, lambda model: mean.add_all([(model, 1)])):
        with pytest.raises(ColearnError, match="mean: expected"):
            add(model_of_every_kind())
    mean.mean()
    with pytest.raises(ColearnError, match="asked once after add_all"):
        mean.mean()
    mean.renew(model_of_every_kind())
    mean.add(model_of_every_kind(), 2)
    assert mean.weight == 2


def test_doubles_whose_block_sums_to_more_than_float64_holds_are_still_averaged():
    model = {"w": np.full(_SMALL, 0.5 * np.finfo(np.float64).max)}
    mean = RunningMean(model, models=1)
    # The mean of one by one takes over.
    with pytest.raises(ColearnError, match="array 'w': expected finite"):
        mean.add_all([(model, 1)])
    mean.add(model)
    assert np.array_equal(mean.mean()["w"], model["w"])


# The mean ---------------------------------------------------------------------------------------


@given(
    model=st.fixed_dictionaries(
        {
            "single": hnp.arrays(np.float32, shapes, elements={"allow_nan": False}),
            "half": hnp.arrays(np.float16, shapes, elements={"allow_nan": False}),
            "count": hnp.arrays(np.int64, shapes, elements=st.integers(-(2**50), 2**50)),
            "byte": hnp.arrays(np.uint8, shapes),
            "flag": hnp.arrays(np.bool_, shapes),
        }
    ).filter(lambda model: all(np.isfinite(array).all() for array in model.values())),
    k=st.integers(1, 9),
)
def test_mean_of_equal_models_is_the_model(model, k):
    result = average([model] * k)
    for name, array in model.items():
        assert np.array_equal(result[name], array), name


@given(
    mean=floats32(-1e4, 1e4),
    variance=floats32(1e-3, 1e4),
    k=st.integers(1, 9),
    start=floats32(-1e4, 1e4),
)
@example(mean=np.full(3, 273.15, "f4"), variance=np.full(3, 1e-3, "f4"), k=5, start=np.zeros(3))
def test_pooling_equal_statistics_changes_nothing(mean, variance, k, start):
    model = batch_norm(mean, variance)
    result = average([model] * k, like=batch_norm(start, np.ones(3)))
    for name, array in model.items():
        assert np.array_equal(result[name], array), name


@given(
    models=st.lists(
        st.fixed_dictionaries(
            {
                "single": within_a_factor_of_2_to_the_24((5,)),
                "half": hnp.arrays(np.float16, 3, elements=st.floats(-6e4, 6e4, width=16)),
                "count": hnp.arrays(np.int64, 2, elements=st.integers(-(2**50), 2**50)),
            }
        ),
        min_size=2,
        max_size=6,
    ),
    shuffle=st.randoms(use_true_random=False),
)
def test_order_of_the_models_does_not_change_a_bit(models, shuffle):
    shuffled = shuffle.sample(models, len(models))
    assert bits(average(models)) == bits(average(shuffled, like=models[0]))


@pytest.mark.parametrize("center", [1, 300, 10_000])
def test_order_of_the_models_does_not_change_a_bit_of_the_statistics(center):
    rng = np.random.default_rng(0)
    start = batch_norm(0.1 * rng.normal(size=2000), np.ones(2000))
    models = [
        batch_norm(center + 0.1 * rng.normal(size=2000), rng.uniform(0.05, 0.2, size=2000))
        for _ in range(4)
    ]
    first, *others = [average(order, like=start) for order in permutations(models)]
    for other in others:
        assert bits(other) == bits(first)


def test_names_shapes_and_types_survive_in_the_order_of_the_model_sent():
    like = model_of_every_kind()
    reply = dict(reversed(list(model_of_every_kind().items())))
    result = average([reply, reply, reply], like=like)
    assert bits(result) == bits(like)
    assert list(result) == list(like)


def test_arrays_in_fortran_order_are_averaged_element_by_element():
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    result = average([{"w": array}, {"w": array.copy("C")}], weights=[3, 2])
    assert np.array_equal(result["w"], array)


@given(
    arrays=st.lists(hnp.arrays(np.float64, 4, elements=st.floats(-1e6, 1e6)), min_size=2).map(
        lambda arrays: np.array(arrays, np.float32)
    ),
    data=st.data(),
)
def test_weighted_mean_agrees_with_a_float64_reference(arrays, data):
    k = len(arrays)
    weights = data.draw(st.lists(st.floats(0.01, 1e5), min_size=k, max_size=k))
    result = average([{"w": array} for array in arrays], weights)["w"]
    reference = np.average(arrays.astype(np.float64), axis=0, weights=weights)
    # The least that float32 can be off: below 1e-38 its numbers are as far apart as there.
    least = float(np.finfo(np.float32).smallest_subnormal)
    atol = max(1e-6 * float(np.abs(arrays).max()), least)
    np.testing.assert_allclose(result, reference, rtol=1e-6, atol=atol)


def test_large_arrays_are_weighted_block_by_block_as_a_whole():
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(3, 7, 30_011)).astype(np.float32)
    result = average([{"w": array} for array in arrays], [1, 2, 5])["w"]
    reference = np.average(arrays.astype(np.float64), axis=0, weights=[1, 2, 5])
    np.testing.assert_array_equal(result, reference.astype(np.float32))


def test_float32_is_summed_in_float64():
    # In float32 1e8 + 1 is 1e8: a float32 sum would lose all the ones.
    models = [{"w": np.array([value], np.float32)} for value in (1e8, 1, 1, 1, -1e8)]
    assert average(models)["w"] == np.float32(3 / 5)


def test_sums_of_half_precision_do_not_overflow():
    models = [{"w": np.array([60000], np.float16)}] * 4
    assert average(models)["w"] == 60000


@pytest.mark.parametrize(
    ("counts", "weights", "expected"),
    [
        ([1, 2], None, 2),  # halves upwards
        ([-1, -2], None, -1),
        ([1, 1, 2], None, 1),
        ([1, 2, 2], None, 2),
        ([10, 20], [3, 1], 13),  # 12.5
        ([10, 20], [0.5, 1.5], 18),  # 17.5
        ([2**53 + 1] * 3, None, 2**53 + 1),  # a float could not hold it
    ],
)
def test_counters_stay_whole_numbers(counts, weights, expected):
    models = [{"n": np.array(count)} for count in counts]
    result = average(models, weights)["n"]
    assert result.dtype == np.int64
    assert result == expected


def test_memory_does_not_grow_with_the_number_of_models():
    size = 1_000_000
    mean = RunningMean({"w": np.zeros(size, np.float32)})
    tracemalloc.start()
    for k in range(8):
        mean.add({"w": np.full(size, k, np.float32)})
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1.1 * 8 * size  # the float64 sum
    assert peak < 1.2 * (8 + 4 + 4) * size  # and two models in float32: the last and the next


@pytest.mark.parametrize("at_once", [False, True])
def test_the_memory_of_integers_is_one_sum(at_once):
    size = 40 * CHUNK
    models = [{"n": np.full(size, k, np.int8)} for k in range(4)]
    mean = RunningMean(models[0])
    tracemalloc.start()
    if at_once:
        mean.add_all([(model, 1) for model in models])
    else:
        for model in models:
            mean.add(model)
    average = mean.mean()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (average["n"] == 2).all()  # 1.5, halves upwards
    # An int64 sum and the int8 average; each chunk's work is a small part of the 40.
    assert peak < 1.2 * (8 + 1) * size


def test_mean_of_nothing_is_refused():
    with pytest.raises(ColearnError, match="at least one model added, found none"):
        RunningMean({"w": np.zeros(2)}).mean()


# Pooled statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pooled_statistics_of_the_spec_are_exact(dtype):
    # 30,000 values of N(0, 1) and 10,000 of N(4, 1); a naive mean of the variances gives 1.
    models = [batch_norm([0], [1], dtype), batch_norm([4], [1], dtype)]
    result = average(models, weights=[30_000, 10_000])
    assert (result["bn.running_mean"], result["bn.running_var"]) == (1, 4)


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    offset=st.floats(-100, 100),
    spread=st.floats(0, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_pooled_statistics_are_those_of_the_pooled_data(sizes, offset, spread, seed):
    rng = np.random.default_rng(seed)
    data = [offset + spread * rng.normal() + rng.normal(size=(n, 3)) for n in sizes]
    models = [batch_norm(part.mean(axis=0), part.var(axis=0), np.float64) for part in data]
    result = average(models, sizes, like=batch_norm(np.zeros(3), np.ones(3), np.float64))
    pooled = np.concatenate(data)
    np.testing.assert_allclose(result["bn.running_mean"], pooled.mean(axis=0), atol=1e-10)
    np.testing.assert_allclose(result["bn.running_var"], pooled.var(axis=0), rtol=1e-9, atol=1e-9)


def test_statistics_of_several_layers_are_pooled_each_for_itself():
    def model(a, b):
        return {
            "a/moving_mean": np.array([a], np.float32),
            "b/moving_variance": np.array([1], np.float32),
            "b/moving_mean": np.array([b], np.float32),
            "a/moving_variance": np.array([1], np.float32),
        }

    result = average([model(0, 0), model(2, 6)])
    assert [float(result[name].item()) for name in result] == [1, 10, 3, 2]


def test_nameless_statistics_are_pooled_when_roles_say_so_and_averaged_otherwise():
    models = [{"0": np.array([m], np.float32), "1": np.ones(1, np.float32)} for m in (0, 4)]
    assert average(models, roles=["mean", "variance"])["1"] == 5
    assert average(models)["1"] == 1


def test_a_variance_without_its_mean_is_averaged():
    models = [{"bn.running_var": np.array([v], np.float32)} for v in (1, 3)]
    assert average(models)["bn.running_var"] == 2


# Refusals ---------------------------------------------------------------------------------------


def replaced(name, array):
    return {**model_of_every_kind(), name: array}


def without(name):
    return {key: array for key, array in model_of_every_kind().items() if key != name}


REFUSED = {
    "nan": (replaced("weight", np.full((2, 3), np.nan, np.float32)), 1, "'weight'.*finite"),
    "inf": (replaced("half", np.array([1, np.inf], np.float16)), 1, "'half'.*finite"),
    "inf and -inf": (replaced("half", np.array([-np.inf, np.inf], "f2")), 1, "'half'.*finite"),
    "missing": (without("scalar"), 1, r"10 names.*1 missing \['scalar'\]"),
    "unknown": (replaced("new", np.zeros(1)), 1, r"1 unknown \['new'\]"),
    "shape": (replaced("weight", np.zeros((3, 2), "f4")), 1, r"shape \(2, 3\), found .*\(3, 2\)"),
    "0-d": (replaced("scalar", np.zeros(1, "f4")), 1, r"'scalar': expected .*shape \(\), found"),
    "dtype": (replaced("weight", np.zeros((2, 3))), 1, "expected float32 .*found float64"),
    "byte order": (replaced("weight", np.zeros((2, 3), ">f4")), 1, "expected float32"),
    "huge integer": (
        replaced("bn.num_batches_tracked", np.array(2**63 - 1)),
        1,
        "sum within int64",
    ),
    "least integer": (replaced("bn.num_batches_tracked", np.array(-(2**63))), 1, "sum within"),
    "weight 0": (model_of_every_kind(), 0, "weight.*a positive finite number, found 0"),
    "weight -1": (model_of_every_kind(), -1, "weight.*a positive finite number, found -1"),
    "weight nan": (model_of_every_kind(), math.nan, "weight.*found nan"),
    "weight inf": (model_of_every_kind(), math.inf, "weight.*found inf"),
}


@pytest.mark.parametrize(("model", "weight", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refused_model_leaves_the_mean_as_it_was(model, weight, message):
    mean = RunningMean(model_of_every_kind())
    mean.add(model_of_every_kind(), 2)
    before = bits(mean.mean()), mean.count, mean.weight
    with pytest.raises(ColearnError, match=message):
        mean.add(model, weight)
    assert (bits(mean.mean()), mean.count, mean.weight) == before


@pytest.mark.parametrize("weight", [1e19, 1e300])
def test_a_model_of_absurd_weight_is_added_whole_or_not_at_all(weight):
    model = {"w": np.ones(2, np.float32), "n": np.zeros(2, np.int64)}
    mean = RunningMean(model)
    mean.add(model)
    with contextlib.suppress(ColearnError):
        mean.add(model, weight)
    assert bits(mean.mean()) == bits(model)


@pytest.mark.parametrize(
    ("models", "dtype", "value", "weight", "accepted"),
    [
        (5, np.int64, (2**63 - 1) // 5, 1, True),
        (5, np.int64, (2**63 - 1) // 5 + 1, 1, False),
        (5, np.int64, -((2**63 - 1) // 5), 1, True),
        (5, np.int64, (2**63 - 1) // 10, 2, True),
        (5, np.int64, (2**63 - 1) // 10 + 1, 2, False),
        (1, np.int64, 2**63 - 1, 1, True),
        (1, np.uint64, 2**63, 1, False),
        (5, np.int32, 2**30, 2**30, True),
        (5, np.int32, 2**30, 2**33, False),
        (5, np.float64, 3.5e307, 1, True),
        (5, np.float64, 3.7e307, 1, False),
        (5, np.float32, 3e38, 1, True),
        (4, np.float64, 1.0, 2**51, True),
        (4, np.float64, 1.0, 2**51 + 1, False),
    ],
)
def test_what_is_accepted_depends_on_the_model_alone(models, dtype, value, weight, accepted):
    model = {"a": np.array([0, 0], dtype), "n": np.array([0, value], dtype)}
    # Ordinary numbers: of a model that was sent with such large ones, they are kept (test_kept).
    sent = {name: np.zeros(2, dtype) for name in model}
    for others in range(models):
        mean = RunningMean(sent, models=models)
        for _ in range(others):
            mean.add(
                {"a": model["a"], "n": np.array([value if accepted else 1, 1], dtype)},
                weight if accepted else 1,
            )
        if accepted:
            mean.add(model, weight)
            assert np.isfinite(mean.mean()["n"]).all()
        else:
            with pytest.raises(ColearnError, match=r"array 'n': expected|weight of a model"):
                mean.add(model, weight)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("place", range(6))
def test_every_element_of_an_integer_array_is_bounded(place, sign, at_once):
    """One element too large for the sum of five is refused, wherever it is, and no smaller one."""

    def mean_of(value):
        array = np.ones((2, 3), np.int64)
        array.flat[place] = value
        mean = RunningMean({"n": np.zeros((2, 3), np.int64)}, models=5)
        if at_once:
            mean.add_all([({"n": array}, 1)] * 5)
        else:
            for _ in range(5):
                mean.add({"n": array})
        return array, mean.mean()["n"]

    most = (2**63 - 1) // 5
    array, mean = mean_of(sign * most)
    assert np.array_equal(mean, array)  # exactly, as int64
    wanted = f"array 'n': expected integers that sum within int64, found {most + 1}"
    with pytest.raises(ColearnError, match=wanted):
        mean_of(sign * (most + 1))


@pytest.mark.parametrize("at_once", [True, False])
def test_no_more_models_are_added_than_there_may_be(at_once):
    model = {"w": np.ones(2)}
    mean = RunningMean(model, models=2)
    if not at_once:
        mean.add(model)
        mean.add(model)
    add = partial(mean.add_all, [(model, 1)] * 3) if at_once else partial(mean.add, model)
    with pytest.raises(ColearnError, match="expected at most 2 models, found 3"):
        add()


# Relative change --------------------------------------------------------------------------------


def test_relative_change_by_hand():
    old = [np.array([3.0]), np.array([[4.0, 0.0]])]
    new = [np.array([3.0]), np.array([[4.0, 0.5]])]
    assert relative_change(new, old) == 0.1


def test_relative_change_divides_by_the_old_model():
    assert relative_change([np.array([4.0])], [np.array([1.0])]) == 3
    assert relative_change([np.array([1.0])], [np.array([4.0])]) == 0.75


def test_relative_change_against_zeros():
    zero, one = [np.zeros(2)], [np.ones(2)]
    assert relative_change(zero, zero) == 0
    assert relative_change(one, zero) == math.inf
    assert relative_change(zero, one) == 1


@given(
    old=floats32(-1e3, 1e3, (2, 3)).filter(lambda array: np.abs(array).max() > 1e-3),
    new=floats32(-1e3, 1e3, (2, 3)),
    power=st.integers(-20, 20),
)
def test_relative_change_does_not_depend_on_the_scale(old, new, power):
    scale = np.float32(2.0**power)
    assert relative_change([new * scale], [old * scale]) == pytest.approx(
        relative_change([new], [old]), rel=1e-9
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_relative_change_is_numpys_norm_of_the_concatenation(dtype):
    rng = np.random.default_rng(1)
    layout = [(), (3,), (400, 300), (70, 1000), (0, 2), (1 << 16,), ((1 << 16) + 1,)]
    old = [np.asarray(rng.normal(size=shape), dtype) for shape in layout]
    new = [np.asarray(array + rng.normal(scale=0.1, size=array.shape), dtype) for array in old]
    flat_old, flat_new = (
        np.concatenate([array.reshape(-1).astype(np.float64) for array in model])
        for model in (old, new)
    )
    expected = np.linalg.norm(flat_new - flat_old) / np.linalg.norm(flat_old)
    assert relative_change(new, old) == pytest.approx(expected, rel=1e-12)


def test_relative_change_reads_any_memory_layout():
    array = np.arange(12.0).reshape(3, 4)
    assert relative_change([np.asfortranarray(array)], [array]) == 0
    assert relative_change([array[:, ::2]], [array[:, ::2].copy()]) == 0


def test_relative_change_of_half_precision_does_not_overflow():
    old, new = np.full(2, 6e4, np.float16), np.full(2, -6e4, np.float16)
    assert relative_change([new], [old]) == 2


def test_relative_change_matches_arrays_by_name():
    old = {"a": np.array([1.0]), "b": np.array([2.0])}
    new = {"b": np.array([2.0]), "a": np.array([1.0])}
    assert relative_change(new, old) == 0


@pytest.mark.parametrize(
    "other", [{"w": np.zeros(3)}, {"v": np.zeros(2)}, {"w": np.zeros((2, 1))}, {}]
)
def test_relative_change_of_different_models_is_refused(other):
    with pytest.raises(ColearnError, match="two models of the same arrays"):
        relative_change(other, {"w": np.zeros(2)})


def test_only_trainable_arrays_count():
    model = model_of_every_kind()
    roles = RunningMean(model).roles
    assert list(trainable(model, roles)) == ["weight", "half", "double", "scalar", "empty"]
    assert roles["bn.running_var"] is Role.VARIANCE


@pytest.mark.parametrize(("order", "at_once"), [("C", 1), ("F", 0)])
def test_models_in_another_memory_order_are_copied_one_at_a_time(order, at_once, monkeypatch):
    calls, add_all = [], RunningMean.add_all
    monkeypatch.setattr(
        RunningMean, "add_all", lambda self, models: calls.append(models) or add_all(self, models)
    )
    mean = RoundMean({"w": np.zeros((2, 3))})
    arrays = np.asarray(np.arange(6.0).reshape(2, 3), order=order)
    assert mean.add_all([(name, {"w": arrays}, 5) for name in "ab"]) == [True, True]
    assert len(calls) == at_once
    assert np.array_equal(mean.mean()["w"], arrays)
