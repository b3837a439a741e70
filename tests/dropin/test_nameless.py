"""Models without names, as Keras's `get_weights` and the legacy API send them."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flwr_colearn import (
    Averaging,
    CoLearn,
    ColearnError,
    Compression,
    Float16,
    IncreasingEpochs,
    InProcessGrid,
    LocalStatistics,
    Role,
    Transport,
    legacy,
    participant_mod,
    run,
    secagg,
)
from flwr_colearn.roles import assign_roles
from tests.dropin import shapes
from tests.dropin.shapes import answer, run_legacy

RULES = {"local_epochs": 1, "learning_rate": 0.1}
NAMES = ["fc.weight", "fc.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
MODEL = [
    np.zeros((2, 2), np.float32),
    np.zeros(2, np.float32),
    np.zeros(2, np.float32),
    np.ones(2, np.float32),
    np.array(0),
]


def trained(k):
    """Participants have the means 0 and 4, and the variance 1: the pooled variance is 5."""
    mean = np.full(2, 4.0 * k, np.float32)
    return [MODEL[0] + 1, MODEL[1] + 1, mean, MODEL[3], np.array(10)]


def app(mods=(participant_mod,)):
    client = ClientApp(mods=list(mods))

    @client.train()
    def train(message, context):
        arrays = trained(context.node_config["partition-id"])
        return answer(message, {str(i): array for i, array in enumerate(arrays)})

    return client


def start(strategy, rounds=1, **arguments):
    initial = ArrayRecord({str(i): Array(array) for i, array in enumerate(MODEL)})
    call = (
        strategy.start if hasattr(strategy, "history") else (lambda *a, **k: run(strategy, *a, **k))
    )
    result = call(InProcessGrid(app(), 2), initial, num_rounds=rounds, **arguments)
    return [array.numpy() for array in result.arrays.values()]


FEATURES = [{}, {"guard": None}, {"compression": Compression(down=Float16())}, {"recovery": None}]


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_with_names_statistics_are_pooled(features, flower_log):
    strategy = CoLearn(2, names=NAMES, fraction_evaluate=0.0, **RULES, **features)
    arrays = start(strategy)
    np.testing.assert_array_equal(arrays[3], [5.0, 5.0])
    assert arrays[4] == 10
    assert "have no names" not in flower_log.text
    kinds = [Role.TRAINABLE, Role.TRAINABLE, Role.MEAN, Role.VARIANCE, Role.COUNTER]
    assert list(strategy.roles.values()) == kinds


def test_without_names_they_are_averaged_as_weights_and_the_log_says_what_to_pass(flower_log):
    arrays = start(CoLearn(2, fraction_evaluate=0.0, **RULES))
    np.testing.assert_array_equal(arrays[3], [1.0, 1.0])
    assert flower_log.text.count("have no names") == 1
    assert "names=list(net.state_dict())" in flower_log.text


def test_the_warning_comes_once_with_checkpoints_too(tmp_path, flower_log):
    start(CoLearn(2, fraction_evaluate=0.0, checkpoints=tmp_path / "run", **RULES), rounds=3)
    assert flower_log.text.count("have no names") == 1


def test_names_of_a_transport_serve_any_strategy():
    config = ConfigRecord({"local-epochs": 1, "learning-rate": 0.1})
    strategy = FedAvg(fraction_evaluate=0.0)
    arrays = start(strategy, train_config=config, transport=Transport(names=NAMES))
    np.testing.assert_array_equal(arrays[3], [5.0, 5.0])


def test_names_of_a_connected_grid_serve_a_strategy_of_this_package():
    grid = Transport(names=NAMES).connect(InProcessGrid(app(), 2))
    initial = ArrayRecord({str(i): Array(array) for i, array in enumerate(MODEL)})
    strategy = Averaging(2, fraction_evaluate=0.0)
    config = ConfigRecord({"local-epochs": 1, "learning-rate": 0.1})
    result = strategy.start(grid, initial, num_rounds=1, train_config=config)
    np.testing.assert_array_equal(result.arrays["3"].numpy(), [5.0, 5.0])


def test_statistics_of_a_model_with_names_can_stay_local():
    strategy = CoLearn(
        2, names=NAMES, normalization=LocalStatistics(), fraction_evaluate=0.0, **RULES
    )
    np.testing.assert_array_equal(start(strategy)[3], MODEL[3])


def test_names_of_the_legacy_api(monkeypatch, flower_log):
    shared = []

    class Trains(shapes.Participant):
        def fit(self, parameters, config):
            return trained(self.k), 1, {}

    monkeypatch.setattr(shapes, "Participant", Trains)
    monkeypatch.setattr(shapes, "INITIAL", dict(zip(NAMES, MODEL, strict=True)))
    strategy = legacy.CoLearn(
        2,
        names=NAMES,
        fraction_evaluate=0.0,
        evaluate_fn=lambda _, arrays, config: shared.append(arrays),
        **RULES,
    )
    run_legacy(strategy, [1, 1])
    np.testing.assert_array_equal(shared[-1][3], [5.0, 5.0])
    assert "have no names" not in flower_log.text


def test_roles_by_name_change_the_default():
    arrays = {str(i): array for i, array in enumerate(MODEL)}
    strategy = CoLearn(2, names=NAMES, roles={"bn.running_var": "buffer"}, **RULES)
    assert assign_roles(arrays, strategy.transport.roles)["3"] is Role.BUFFER


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (NAMES[:4], r"one for each of the 5 arrays, found 4"),
        (NAMES[:4] + NAMES[:1], "different names"),
        ("fc.weight", "different names"),
        ([], "different names"),
    ],
)
def test_names_that_do_not_fit_are_refused(names, reason):
    with pytest.raises(ColearnError, match=f"names: expected {reason}"):
        start(CoLearn(2, names=names, **RULES))


def test_names_are_of_no_use_under_secure_aggregation():
    with pytest.raises(ColearnError, match=r"names under SecAgg\+: expected None"):
        secagg.CoLearn(2, names=NAMES, **RULES)


def shaped(*of):
    return {str(i): np.ones(shape, np.float32) for i, shape in enumerate(of)}


@pytest.mark.parametrize(
    ("model", "warns"),
    [
        (shaped((64, 32), (32,), (32, 10), (10,)), False),  # Keras: dense layers
        (shaped((32, 64), (32,), (32, 32), (32,)), False),  # torch: linear layers
        (shaped((10, 64), (10,)), False),  # scikit-learn
        (shaped((3, 3, 1, 8), (8,), (8, 10), (10,)), False),  # a convolution
        (shaped((64, 32), (32, 10)), False),
        (shaped((32, 64), (32,), (32,), (32,), (32,), (10, 32), (10,)), True),  # batch norm
        (shaped((32, 64), (32,), (32,)), True),  # without scale, and without a bias before
        (shaped((2,)), True),
    ],
)
def test_the_warning_comes_only_where_an_array_may_be_a_statistic(model, warns, flower_log):
    assign_roles(model)
    assert ("have no names" in flower_log.text) == warns


@pytest.mark.parametrize("name", ["0", "trees"])
@pytest.mark.parametrize("kind", ["message", "legacy"])
def test_a_model_of_integers_only_is_named_as_such(kind, name, flower_log, monkeypatch):
    model = {name: np.arange(4, dtype=np.int64)}
    rules = {"local_epochs": IncreasingEpochs(1, epsilon=1.0), "learning_rate": 0.1}
    if kind == "message":
        client = ClientApp()

        @client.train()
        def train(message, context):
            return answer(message, {name: model[name] + context.node_config["partition-id"]})

        strategy = CoLearn(2, fraction_evaluate=0.0, **rules)
        strategy.start(
            InProcessGrid(client, 2), ArrayRecord({name: Array(model[name])}), num_rounds=3
        )
    else:

        class Trains(shapes.Participant):
            def fit(self, parameters, config):
                return [parameters[0] + self.k], 1, {}

        monkeypatch.setattr(shapes, "Participant", Trains)
        monkeypatch.setattr(shapes, "INITIAL", model)
        strategy = legacy.CoLearn(2, fraction_evaluate=0.0, **rules)
        run_legacy(strategy, [1, 1], num_rounds=3)
    assert flower_log.text.count("The model's arrays are all integers") == 1
    assert "XGBoost" in flower_log.text
    assert strategy.history.epochs_path == [1, 1, 1]
