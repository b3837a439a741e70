"""Arrays whose value in the average is not their mean."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import CoLearn, ColearnError, InProcessGrid, Role, RunningMean
from flwr_colearn.records import to_record, view
from flwr_colearn.roles import assign_roles

INF = np.float32(np.inf)


def f4(*values):
    return np.array(values, np.float32)


SENT = {
    "w": f4(0, 0),
    "u": f4(1, 0),
    "high": f4(-INF, -INF, 1),
    "low": f4(INF, INF, 1),
    "top": np.array([3, 2**62], np.int64),
    "random": np.array([7, 2**64 - 1], np.uint64),
    "codes": f4(5, np.nan),
}
ROLES = {
    "u": "unit",
    "high": "max",
    "low": "min",
    "top": "max",
    "random": "keep",
    "codes": "keep",
}
MODELS = [
    {
        "w": f4(1, 2),
        "u": f4(0.6, 0.8),
        "high": f4(2, -INF, -5),
        "low": f4(2, INF, -5),
        "top": np.array([9, 2**62 - 1], np.int64),
        "random": np.array([1, 2], np.uint64),
        "codes": f4(np.inf, 0),
    },
    {
        "w": f4(3, 4),
        "u": f4(0.8, -0.6),
        "high": f4(-1, -INF, 4),
        "low": f4(-1, INF, 4),
        "top": np.array([-9, 2**62], np.int64),
        "random": np.array([3, 4], np.uint64),
        "codes": f4(1, 1),
    },
]
AVERAGE = {
    "w": f4(2, 3),
    # (1.4, 0.2) / sqrt(2)
    "u": f4(1.4 / 2**0.5, 0.2 / 2**0.5),
    "high": f4(2, -INF, 4),
    "low": f4(-1, INF, -5),
    "top": np.array([9, 2**62], np.int64),
    "random": SENT["random"],
    "codes": SENT["codes"],
}


def check(found):
    assert list(found) == list(SENT)
    for name, array in found.items():
        assert array.dtype == SENT[name].dtype
        np.testing.assert_allclose(array, AVERAGE[name], rtol=1e-6)


def mean_of(models, at_once):
    mean = RunningMean(SENT, ROLES)
    if at_once:
        mean.add_all([(model, 1) for model in models])
    else:
        for model in models:
            mean.add(model)
    return mean.mean()


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("models", [MODELS, MODELS[::-1]], ids=["in order", "reversed"])
def test_every_role_has_its_own_rule(models, at_once):
    given = [{name: array.copy() for name, array in model.items()} for model in models]
    check(mean_of(given, at_once))
    for model, before in zip(given, models, strict=True):
        for name, array in model.items():
            np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("at_once", [False, True])
def test_an_extreme_of_nan_is_refused(at_once):
    with pytest.raises(ColearnError, match="array 'high': expected a number as the extreme"):
        mean_of([MODELS[0], {**MODELS[1], "high": f4(0, np.nan, 0)}], at_once)


def test_vectors_that_cancel_out_stay_as_sent():
    mean = RunningMean({"u": f4(1, 0)}, {"u": "unit"})
    mean.add({"u": f4(0, 1)})
    mean.add({"u": f4(0, -1)})
    assert mean.mean()["u"].tolist() == [1, 0]


def test_a_mean_after_another_has_none_of_its_extremes():
    mean = RunningMean({"high": f4(0)}, {"high": "max"})
    mean.add({"high": f4(9)})
    mean.renew({"high": f4(0)})
    mean.add({"high": f4(1)})
    assert mean.mean()["high"].tolist() == [1]


def participants():
    app = ClientApp()

    @app.train()
    def train(message, context):
        arrays = MODELS[context.node_config["partition-id"]]
        content = {"arrays": to_record(arrays), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    return InProcessGrid(app, 2)


def co_learn(initial):
    strategy = CoLearn(2, local_epochs=1, learning_rate=0.1, roles=ROLES, fraction_evaluate=0.0)
    return strategy.start(participants(), initial, num_rounds=1)


def test_a_strategy_of_ours_follows_the_roles():
    # NaN in an initial model is refused, in whatever role.
    sent = {**SENT, "codes": f4(5, 6)}
    found = view(co_learn(ArrayRecord({n: Array(a) for n, a in sent.items()})).arrays)
    check({**found, "codes": SENT["codes"]})
    assert found["codes"].tolist() == [5, 6]


# By name


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (["a.parametrizations.weight.0._u", "a.parametrizations.weight.0._v"], ["unit", "unit"]),
        (["a.weight_orig", "a.weight_u", "a.weight_v"], ["trainable", "unit", "unit"]),
        (["weight_orig", "weight_u", "weight_v"], ["trainable", "unit", "unit"]),
        (["spectral_normalization/vector_u"], ["unit"]),
        (["o.eps", "o.min_val", "o.max_val"], ["trainable", "min", "max"]),
        # Names that mean nothing by themselves.
        (["gru.weight_u", "gru.weight_v"], ["trainable", "trainable"]),
        (["a.weight_u", "b.weight_v", "a.weight_orig"], ["trainable"] * 3),
        (["clip.min_val", "clip.max_val"], ["trainable", "trainable"]),
    ],
)
def test_roles_by_name_where_the_layer_says_what_they_are(names, roles):
    assert list(assign_roles({name: f4(1, 2) for name in names}).values()) == roles


def test_a_unit_vector_has_a_float_type():
    with pytest.raises(ColearnError, match="role 'unit': expected a float type"):
        assign_roles({"n": np.array([1])}, {"n": Role.UNIT})
