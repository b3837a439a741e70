import numpy as np
import pytest

from flwr_colearn import ColearnError
from flwr_colearn.aggregation.buckets import BucketSum
from flwr_colearn.aggregation.statistics import PooledStatistics

LIKE = {
    "matrix": np.zeros((2, 3), np.float32),
    "none": np.zeros((0, 4), np.float16),
    "half": np.zeros(2, np.float16),
    "scalar": np.zeros(()),
}


def model(seed):
    rng = np.random.default_rng(seed)
    return {n: np.asarray(rng.normal(size=a.shape), a.dtype) for n, a in LIKE.items()}


@pytest.mark.parametrize("weights", [[1, 1, 1], [2, 5, 0.5]])
def test_the_sum_is_that_of_every_array_by_itself(weights):
    bucket, models = BucketSum(LIKE), [model(seed) for seed in range(3)]
    for each, weight in zip(models, weights, strict=True):
        bucket.add(each, weight)
    result = bucket.split(bucket.total)
    for name, like in LIKE.items():
        alone = sum(w * m[name].astype(np.float64) for m, w in zip(models, weights, strict=True))
        assert result[name].dtype == like.dtype
        assert np.array_equal(result[name], np.asarray(alone).astype(like.dtype))


def test_a_sum_begun_anew_forgets_and_one_of_nothing_is_empty():
    bucket = BucketSum(LIKE)
    bucket.add(model(0), 1)
    bucket.clear()
    bucket.add(model(1), 1)
    assert np.array_equal(bucket.split(bucket.total)["matrix"], model(1)["matrix"])
    nothing = BucketSum({})
    assert nothing.add(model(0), 1).size == 0
    assert nothing.split(nothing.total) == {}


@pytest.mark.parametrize("name", ["matrix", "half", "scalar"])
@pytest.mark.parametrize("wrong", [[np.nan], [np.inf, -np.inf]])
def test_a_number_that_is_not_finite_is_found_by_its_arrays_name(name, wrong):
    bucket = BucketSum(LIKE)
    for value in wrong:
        bad = model(0)
        bad[name].flat[-1] = value
        bucket.add(bad, 1)
    with pytest.raises(ColearnError, match=f"array '{name}': expected finite numbers"):
        bucket.check()


def test_several_layers_are_pooled_as_their_data_would_be():
    rng = np.random.default_rng(0)
    sites = [rng.normal(k, 1 + k, size=(40, 5)) for k in range(4)]
    like = {n: np.zeros(s) for n, s in (("m1", 2), ("v1", 2), ("m2", 3), ("v2", 3))}
    pooling = PooledStatistics(like, [("m1", "v1"), ("m2", "v2")])
    for data in sites:
        mean, variance = data.mean(0), data.var(0)
        arrays = {"m1": mean[:2], "v1": variance[:2], "m2": mean[2:], "v2": variance[2:]}
        pooling.add(arrays, 40)
    pooled, joint = pooling.pooled(160), np.concatenate(sites)
    assert np.allclose(np.r_[pooled["m1"], pooled["m2"]], joint.mean(0), rtol=1e-12)
    assert np.allclose(np.r_[pooled["v1"], pooled["v2"]], joint.var(0), rtol=1e-12)
