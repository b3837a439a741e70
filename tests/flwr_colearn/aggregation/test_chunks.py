"""Passes over chunks: every element once, whatever the sizes and threads."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_colearn import RunningMean, relative_change
from flwr_colearn.aggregation import check_model, chunks
from flwr_colearn.errors import ColearnError


def small_chunks(monkeypatch, threads):
    """Chunks of 7 elements, threads from the first element on."""
    for module in ("chunks", "mean", "distance", "validation"):
        monkeypatch.setattr(f"flwr_colearn.aggregation.{module}.CHUNK", 7)
    monkeypatch.setattr(chunks, "_THREADED", 1)
    monkeypatch.setattr(chunks.os, "cpu_count", lambda: threads)


@given(
    sizes=st.lists(st.integers(0, 60), max_size=8),
    threads=st.integers(1, 5),
)
def test_every_element_is_in_one_chunk(sizes, threads):
    model = {str(i): np.zeros(size) for i, size in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch, threads)
        shares = chunks.Chunks(model).map(lambda parts: parts)
        for name, chunk in (part for share in shares for part in share):
            assert 0 < chunk.stop - chunk.start <= 7
            model[name][chunk] += 1
    assert all((array == 1).all() for array in model.values())
    assert len(shares) <= threads


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads, monkeypatch):
    rng = np.random.default_rng(0)
    models = [
        {"a": rng.standard_normal((20, 9)).astype(np.float32), "b": rng.standard_normal(5)}
        for _ in range(3)
    ]
    plain = RunningMean(models[0])
    for model in models:
        plain.add(model, 3)
    expected, change = plain.mean(), relative_change(models[1], models[0])
    small_chunks(monkeypatch, threads)
    threaded = RunningMean(models[0])
    for model in models:
        threaded.add(model, 3)
    for name, array in threaded.mean().items():
        assert array.tobytes() == expected[name].tobytes()
        reference = np.mean([m[name].astype(np.float64) for m in models], axis=0)
        np.testing.assert_allclose(array, reference, rtol=1e-6, atol=1e-7)
    assert relative_change(models[1], models[0]) == pytest.approx(change, rel=1e-14)


def test_a_large_model_is_averaged_in_threads(monkeypatch):
    monkeypatch.setattr(chunks, "_THREADED", 1 << 20)
    size = (1 << 20) + chunks.CHUNK // 3
    rng = np.random.default_rng(0)
    models = [{"w": rng.standard_normal(size, dtype=np.float32)} for _ in range(2)]
    monkeypatch.setattr(chunks.os, "cpu_count", lambda: 2)
    mean = RunningMean(models[0])
    for model in models:
        mean.add(model)
    reference = (models[0]["w"].astype(np.float64) + models[1]["w"]) / 2
    assert np.array_equal(mean.mean()["w"], reference.astype(np.float32))


@pytest.mark.parametrize("where", [0, 6, 7, 100, 179])
@pytest.mark.parametrize("threads", [1, 3])
def test_one_bad_number_is_found_in_any_chunk(where, threads, monkeypatch):
    small_chunks(monkeypatch, threads)
    like = {"a": np.zeros(180, np.float32), "b": np.zeros(3, np.float32)}
    bad = {name: array.copy() for name, array in like.items()}
    bad["a"][where] = np.inf
    check_model(like, like)
    with pytest.raises(ColearnError, match="array 'a': expected finite numbers"):
        check_model(bad, like)


def test_a_renewed_mean_knows_nothing_of_the_last_one():
    rng = np.random.default_rng(0)
    model = {"w": np.zeros(5, np.float32), "n": np.array(0), "bn.running_mean": np.zeros(2)}
    model["bn.running_var"] = np.ones(2)

    def other():
        return {name: np.asarray(rng.integers(1, 9, a.shape), a.dtype) for name, a in model.items()}

    used = RunningMean(model)
    for _ in range(3):
        used.add(other(), 2)
    like, second = other(), [other(), other()]
    used.renew(like)
    new = RunningMean(like)
    for each in second:
        used.add(each)
        new.add(each)
    for name, array in new.mean().items():
        assert used.mean()[name].tobytes() == array.tobytes()
    assert (used.count, used.weight) == (2, 2)
    used.renew(like)
    with pytest.raises(ColearnError, match="at least one model"):
        used.mean()
