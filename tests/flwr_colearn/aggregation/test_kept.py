"""Arrays without a mean, masks of -inf and large integers: constant at all sites, or refused."""

import math

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import (
    CoLearn,
    ColearnError,
    Compression,
    DynamicAveraging,
    Float16,
    InProcessGrid,
    Int8,
    Recovery,
    learner,
    participant_mod,
)
from flwr_colearn.aggregation import RunningMean
from tests.faults import K, numpy_of, participants, record_of

MASK = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
CONSTANT = {
    "mask": MASK,
    "both": np.array([np.inf, -np.inf, 0.5]),
    "half": np.array([-np.inf, 1], np.float16),
    "hash": np.array([6 * 10**18, -5]),
    "largest": np.array(2**63 - 1),
    "unsigned": np.array([2**64 - 1, 1], np.uint64),
}
MODEL = {"w": np.arange(6, dtype=np.float32), **CONSTANT}


def models(count=3, change=None):
    """Models that differ in w alone, the last of them also in the arrays of `change`."""
    made = [{**MODEL, "w": MODEL["w"] + np.float32(k)} for k in range(count)]
    made[-1].update(change or {})
    return made


def one_by_one(mean, weighted):
    for model, weight in weighted:
        mean.add(model, weight)


def at_once(mean, weighted):
    mean.add_all(weighted)


WAYS = pytest.mark.parametrize("add", [one_by_one, at_once])


@WAYS
@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 2, 5), (0.5, 0.25, 0.125)])
def test_constant_arrays_keep_their_bits_and_the_others_are_averaged(add, weights):
    mean = RunningMean(MODEL, models=3)
    add(mean, list(zip(models(), weights, strict=True)))
    found = mean.mean()
    assert list(found) == list(MODEL)
    for name, array in CONSTANT.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
        assert found[name] is not array  # the caller may change the average
    shift = np.average(range(3), weights=weights)
    np.testing.assert_allclose(found["w"], MODEL["w"] + shift, rtol=1e-6)


@WAYS
@pytest.mark.parametrize(
    "change",
    [
        {"mask": np.zeros((4, 4), np.float32)},
        {"mask": -MASK},
        {"mask": np.full((4, 4), np.nan, np.float32)},
        {"both": np.array([np.inf, -np.inf, 0.25])},
        {"hash": np.array([6 * 10**18, -4])},
        {"unsigned": np.array([2**64 - 2, 1], np.uint64)},
        {"w": np.full(6, -np.inf, np.float32)},  # finite where it was sent
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_change_of_an_array_without_a_mean_is_refused_by_name(add, change):
    with pytest.raises(ColearnError, match=f"array '{next(iter(change))}': expected"):
        add(RunningMean(MODEL, models=3), [(model, 1) for model in models(change=change)])


@pytest.mark.parametrize(
    "compression", [Compression(), Compression(up=Int8(), down=Float16())], ids=str
)
@pytest.mark.parametrize("weighting", ["uniform", "weighted"])
def test_a_model_with_a_mask_trains_and_the_others_are_not_refused(compression, weighting):
    def train(k, plan, arrays):
        return {**arrays, "w": arrays["w"] + np.float32(1)}

    strategy = CoLearn(
        K,
        local_epochs=2,
        learning_rate=0.1,
        fraction_evaluate=0.0,
        compression=compression,
        weighting=weighting,
        recovery=Recovery(max_restarts=0),
    )
    model = {name: MODEL[name] for name in ("w", "mask", "half", "hash")}
    result = strategy.start(InProcessGrid(participants(train), K), record_of(model), 3)
    found = numpy_of(result.arrays)
    for name in ("mask", "half", "hash"):
        assert found[name].tobytes() == MODEL[name].tobytes()
    np.testing.assert_allclose(found["w"], MODEL["w"] + 3, atol=0.05)
    for record in strategy.history:
        assert len(record.participants) == K
        assert math.isfinite(record.relative_change)


def test_a_mask_passes_dynamic_averaging():
    app = ClientApp(mods=[participant_mod])

    @learner(app)
    def train(message, context):
        arrays = numpy_of(message.content["arrays"])
        arrays["w"] = arrays["w"] + np.float32(1 + context.node_config["partition-id"])
        metrics = MetricRecord({"num-examples": 4})
        content = {"arrays": record_of(arrays), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    strategy = DynamicAveraging(1e-3, num_learners=2, recovery=Recovery(max_restarts=0))
    model = {"w": MODEL["w"], "mask": MASK}
    result = strategy.start(InProcessGrid(app, 2), record_of(model), 3)
    found = numpy_of(result.arrays)
    assert found["mask"].tobytes() == MASK.tobytes()
    np.testing.assert_allclose(found["w"], MODEL["w"] + 4.5)
    assert all(math.isfinite(record.largest_distance) for record in strategy.history)
