"""Words of models, against the mean that the package computes without masks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_colearn import ColearnError, Role, RunningMean
from flwr_colearn.roles import assign_roles
from flwr_colearn.secure.layout import Layout

MODEL = {
    "weight": np.linspace(-1, 1, 12).astype(np.float32).reshape(3, 4),
    "half": np.linspace(-1, 1, 5).astype(np.float16),
    "double": np.linspace(-1, 1, 5),
    "scalar": np.array(0.25, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "bn.running_mean": np.array([1.0, -50.0], np.float32),
    "bn.running_var": np.array([2.0, 900.0], np.float32),
    "bn.num_batches_tracked": np.array(7),
    "bytes": np.arange(4, dtype=np.uint8),
    "large": np.array([2**40, -(2**40)]),
    "flag": np.array([True, False]),
    "mask": np.array([0.0, -np.inf], np.float32),
}


def layout_of(model, k, weighted=False, bits=32, roles=None, absent=(), clipping_range=8.0):
    given = assign_roles(model, roles)
    largest = 2**20 if weighted else 1
    return Layout.of(model, given, list(absent), k, clipping_range, largest, bits)


def trained(k, generator):
    """A participant's model, whose statistics and counters have moved too."""
    return {
        "weight": (MODEL["weight"] + generator.normal(0, 0.3, (3, 4))).astype(np.float32),
        "half": (MODEL["half"] + generator.normal(0, 0.3, 5)).astype(np.float16),
        "double": MODEL["double"] + generator.normal(0, 0.3, 5),
        "scalar": np.array(0.25 + k / 3, np.float32),
        "empty": MODEL["empty"],
        "bn.running_mean": generator.normal(0, 60, 2).astype(np.float32),
        "bn.running_var": generator.uniform(0, 2000, 2).astype(np.float32),
        "bn.num_batches_tracked": np.array(7 + 3 * k),
        "bytes": generator.integers(0, 256, 4).astype(np.uint8),
        "large": np.array([2**40 + k, -(2**40) - k]),
        "flag": np.array([k % 2 == 0, False]),
        "mask": MODEL["mask"],
    }


def summed(layout, models, weights):
    """The sums of words, as the masks leave them: modulo the word."""
    sums = layout.empty(MODEL)
    for index, (model, weight) in enumerate(zip(models, weights, strict=True)):
        words, _ = layout.encode(MODEL, model, weight, np.random.default_rng(index))
        assert {n: (a.dtype, a.shape) for n, a in words.items()} == {
            n: (a.dtype, a.shape) for n, a in sums.items()
        }
        for name, total in sums.items():
            total += words[name]
    return sums


@given(st.integers(0, 10**6), st.lists(st.integers(1, 1000), min_size=3, max_size=8), st.booleans())
def test_the_mean_is_that_of_the_models_in_their_types(seed, weights, weighted):
    generator = np.random.default_rng(seed)
    k = len(weights)
    weights = weights if weighted else [1] * k
    models = [trained(index, generator) for index in range(k)]
    layout = layout_of(MODEL, k, weighted, bits=64 if weighted else 32)
    sums = summed(layout, models, weights)
    found, largest = layout.decode(MODEL, sums, sum(weights))
    reference = RunningMean(MODEL)
    for model, weight in zip(models, weights, strict=True):
        reference.add(model, weight)
    expected = reference.mean()
    assert set(found) == set(MODEL) - {"mask"}
    step = layout.quantizer.step * layout.largest_weight * k / sum(weights)
    for name, array in found.items():
        assert array.dtype == MODEL[name].dtype
        assert array.shape == MODEL[name].shape
        if array.dtype.kind != "f":
            assert np.array_equal(array, expected[name]), name
            continue
        rounding = np.finfo(array.dtype).eps * np.maximum(1, np.abs(expected[name]).astype(float))
        error = np.abs(array.astype(np.float64) - expected[name])
        wide = 1e-3 if name.startswith("bn.") else 0.0  # of squares up to 10^4
        assert (error <= step + 2 * rounding + wide).all(), name
    floats = ("weight", "half", "double", "scalar")
    moved = [np.abs(expected[n].astype(float) - MODEL[n].astype(float)).max() for n in floats]
    assert largest == pytest.approx(max(moved), abs=1e-3)


def test_statistics_are_pooled():
    """30,000 values of variance 1 around 0, and 10,000 around 4: the variance of all is 4."""
    model = {"n.running_mean": np.zeros(1), "n.running_var": np.ones(1)}
    layout = layout_of(model, 4)
    sums = layout.empty(model)
    for index, mean in enumerate([0.0, 0.0, 0.0, 4.0]):
        site = {"n.running_mean": np.array([mean]), "n.running_var": np.ones(1)}
        words, _ = layout.encode(model, site, 1, np.random.default_rng(index))
        for name in sums:
            sums[name] += words[name]
    pooled, _ = layout.decode(model, sums, 4)
    assert pooled["n.running_mean"] == pytest.approx(1.0, abs=1e-9)
    assert pooled["n.running_var"] == pytest.approx(4.0, abs=1e-9)


def test_the_bytes_of_words_are_those_of_float32_where_all_are_floats():
    model = {"weight": np.zeros((100, 10), np.float32)}
    assert sum(a.nbytes for a in layout_of(model, 5).empty(model).values()) == 4000


def test_elements_beyond_the_range_are_clipped_and_counted():
    model = {"w": np.zeros(4, np.float32)}
    layout = layout_of(model, 3, clipping_range=0.5)
    site = {"w": np.array([0.4, -0.6, 0.5, 3.0], np.float32)}
    words, clipped = layout.encode(model, site, 1, np.random.default_rng(0))
    assert clipped == 2
    decoded = layout.quantizer.decode(words["w"].view(np.int32))
    assert np.abs(decoded - [0.4, -0.5, 0.5, 0.5]).max() < 1e-8


@pytest.mark.parametrize(
    ("name", "array", "match"),
    [
        ("weight", np.full((3, 4), np.nan, np.float32), "'weight': expected finite numbers"),
        ("scalar", np.array(np.inf, np.float32), "'scalar': expected finite numbers"),
        ("bn.running_mean", np.array([np.nan, 0], np.float32), "expected finite"),
        ("bn.running_var", np.array([1.0, -1.0], np.float32), "numbers of at least 0"),
        ("bn.running_var", np.array([1.0, 1e9], np.float32), "changes of at most"),
        ("large", np.array([2**62, 0]), "sum within int64"),
        ("weight", np.zeros((4, 3), np.float32), "of shape"),
        ("weight", np.zeros((3, 4)), "expected float32"),
        ("mask", np.array([0.0, 0.0], np.float32), "the values that the server sent"),
    ],
)
def test_what_cannot_be_summed_is_refused_at_the_site(name, array, match):
    site = {**MODEL, name: array}
    with pytest.raises(ColearnError, match=match):
        layout_of(MODEL, 5).encode(MODEL, site, 1, np.random.default_rng(0))


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_other_arrays_are_refused_at_the_site(change):
    site = {**MODEL, "more": MODEL["half"]}
    if change == "missing":
        site = {name: array for name, array in MODEL.items() if name != "half"}
    with pytest.raises(ColearnError, match=f"1 {change}"):
        layout_of(MODEL, 5).encode(MODEL, site, 1, np.random.default_rng(0))


@pytest.mark.parametrize("weight", [0, 2**20 + 1])
def test_a_weight_beyond_its_range_is_refused(weight):
    with pytest.raises(ColearnError, match="largest_weight of SecureAggregation"):
        layout_of(MODEL, 5, weighted=True).encode(MODEL, MODEL, weight, np.random.default_rng(0))


def test_absent_and_kept_arrays_have_no_words():
    layout = layout_of(MODEL, 5, absent=["half"], roles={"double": Role.KEEP})
    assert set(layout.empty(MODEL)) == set(MODEL) - {"half", "double", "mask"}
    site = {name: array for name, array in MODEL.items() if name not in ("half", "double")}
    words, _ = layout.encode(MODEL, site, 1, np.random.default_rng(0))
    assert "half" not in words


@pytest.mark.parametrize("role", ["max", "min"])
def test_an_extreme_is_no_sum(role):
    with pytest.raises(ColearnError, match="role of array 'half' under secure aggregation"):
        layout_of(MODEL, 5, roles={"half": role})


def test_metrics_are_means_of_those_that_have_them():
    layout = layout_of(MODEL, 3, weighted=True)
    names = ["accuracy", "loss"]
    sites = [
        ({"accuracy": 0.5, "loss": 2.0}, 1),
        ({"loss": 4.0, "accuracy": float("nan")}, 3),
        ({}, 4),
    ]
    words = [layout.encode_metrics(metrics, names, weight) for metrics, weight in sites]
    sums = [sum(column) for column in zip(*words, strict=True)]
    means = layout.decode_metrics(names, sums)
    assert means["accuracy"] == pytest.approx(0.5, abs=1e-4)
    assert means["loss"] == pytest.approx(3.5, abs=1e-4)
    assert layout.decode_metrics(["other"], [0, 0]) == {}


def test_the_layout_survives_the_message():
    from flwr.app import ConfigRecord

    for layout in (layout_of(MODEL, 5), layout_of({"w": np.zeros(2)}, 3)):
        assert Layout.from_config(ConfigRecord(layout.to_config())) == layout
