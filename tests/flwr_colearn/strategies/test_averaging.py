import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flwr_colearn import (
    Average,
    Averaging,
    ColearnError,
    Frozen,
    InProcessGrid,
    LocalBN,
    Pooled,
    Recalibrated,
    Synchronised,
    participant_mod,
)

K = 3
MODEL = {
    "fc.weight": np.array([1.0, 2.0], np.float32),
    "1.weight": np.array([1.0], np.float32),
    "1.running_mean": np.array([0.0], np.float32),
    "1.running_var": np.array([1.0], np.float32),
}
LAYER = [name for name in MODEL if name.startswith("1.")]


def record(arrays):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def reply(message, arrays, examples):
    content = {"arrays": record(arrays), "metrics": MetricRecord({"num-examples": examples})}
    return FlowerMessage(RecordDict(content), reply_to=message)


def client_app(seen=None):
    """Participant k has k + 1 examples, adds k + 1 to every array, and recalibrates to 10 k."""
    app = ClientApp(mods=[participant_mod])

    @app.train()
    def _(message, context):
        k = context.node_config["partition-id"]
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        if seen is not None:
            seen.append((message.content["config"]["server-round"], k, arrays))
        return reply(message, {n: a + np.float32(k + 1) for n, a in arrays.items()}, k + 1)

    @app.train("recalibrate")
    def _(message, context):
        k = context.node_config["partition-id"]
        mean, variance = np.array([10.0 * k], np.float32), np.array([2.0], np.float32)
        return reply(message, {"1.running_mean": mean, "1.running_var": variance}, k + 1)

    return app


def run(strategy, rounds=2, seen=None):
    config = ConfigRecord({"local-epochs": 2, "learning-rate": 0.5})
    result = strategy.start(InProcessGrid(client_app(seen), K), record(MODEL), rounds,
                            train_config=config)  # fmt: skip
    return {name: array.numpy() for name, array in result.arrays.items()}


def fedavg(scheme):
    return Averaging(K, normalization=scheme, fraction_evaluate=0.0, recovery=None)


def test_average_is_flowers_own_fedavg():
    stock = run(FedAvg(fraction_evaluate=0.0, min_train_nodes=K, min_available_nodes=K))
    found = run(fedavg(Average()))
    for name in MODEL:  # float32 sums in random order, as Flower samples
        np.testing.assert_allclose(stock[name], found[name], rtol=1e-6)


def test_pooled_differs_in_the_variance_only():
    averaged, pooled = run(fedavg(Average()), rounds=1), run(fedavg(Pooled()), rounds=1)
    # Weights 1, 2, 3 of 6: the means 1, 2, 3 have mean 14/6, and the variances are 2, 3, 4.
    between = (1 * 1 + 2 * 4 + 3 * 9) / 6 - (14 / 6) ** 2
    assert averaged["1.running_var"] == pytest.approx(20 / 6, rel=1e-6)
    assert pooled["1.running_var"] == pytest.approx(20 / 6 + between, rel=1e-6)
    for name in ("fc.weight", "1.weight", "1.running_mean"):
        np.testing.assert_allclose(averaged[name], pooled[name], rtol=1e-6)


def test_local_layers_stay():
    seen, strategy = [], fedavg(LocalBN())
    model = run(strategy, seen=seen)
    assert all(np.array_equal(model[name], MODEL[name]) for name in LAYER)
    second = {k: arrays for round_, k, arrays in seen if round_ == 2}
    assert [float(second[k]["1.weight"][0]) for k in range(K)] == [2.0, 3.0, 4.0]
    first, last = strategy.history
    local = sum(len(Array(MODEL[name]).data) for name in LAYER)
    assert first.bytes_down == last.bytes_down + K * local
    assert last.bytes_down == last.bytes_up == K * len(Array(MODEL["fc.weight"]).data)
    assert "participants" in last.normalization["shared-model"]
    assert (last.local_epochs, last.epochs_done, last.learning_rate) == (2, 4, 0.5)


def test_recalibrated_weighs_by_examples_and_costs_an_exchange():
    strategy = fedavg(Recalibrated())
    model = run(strategy, rounds=1)
    mean = (0 * 1 + 10 * 2 + 20 * 3) / 6
    between = (0 * 1 + 100 * 2 + 400 * 3) / 6 - mean**2
    assert model["1.running_mean"] == pytest.approx(mean, rel=1e-6)
    assert model["1.running_var"] == pytest.approx(2 + between, rel=1e-6)
    size = {name: len(Array(array).data) for name, array in MODEL.items()}
    cost = K * (sum(size.values()) + size["1.running_mean"] + size["1.running_var"])
    assert strategy.history.bytes_total == 2 * K * sum(size.values()) + cost


def test_frozen_statistics_stay_as_they_were():
    two, four = run(fedavg(Pooled()), rounds=2), run(fedavg(Frozen(2)), rounds=4)
    assert np.array_equal(two["1.running_var"], four["1.running_var"])
    assert not np.array_equal(two["1.weight"], four["1.weight"])


def test_layers_that_compute_together_are_refused():
    with pytest.raises(ColearnError, match="SynchronousSGD"):
        fedavg(Synchronised())


def test_a_failed_participant_is_left_out_as_flower_does():
    app = client_app()
    broken = ClientApp(mods=[lambda message, context, call: (
        call(message, context) if context.node_config["partition-id"] else 1 / 0
    )])  # fmt: skip

    @broken.train()
    def _(message, context):
        return app(message, context)

    strategy = fedavg(Pooled())
    result = strategy.start(InProcessGrid(broken, K), record(MODEL), 1)
    assert sorted(strategy.history.records[0].participants) == ["2", "3"]
    wanted = MODEL["fc.weight"] + np.float32((2 * 2 + 3 * 3) / 5)
    np.testing.assert_allclose(result.arrays["fc.weight"].numpy(), wanted, rtol=1e-6)


def test_a_model_with_nan_is_refused_and_recorded():
    app = ClientApp(mods=[participant_mod])

    @app.train()
    def _(message, context):
        k = context.node_config["partition-id"]
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        return reply(message, {n: a + np.float32(k or np.nan) for n, a in arrays.items()}, 1)

    strategy = fedavg(Pooled())
    result = strategy.start(InProcessGrid(app, K), record(MODEL), 1)
    np.testing.assert_allclose(result.arrays["fc.weight"].numpy(), MODEL["fc.weight"] + 1.5)
    (refusal,) = strategy.history.records[0].refusals
    assert refusal["participant"] == "1"
    assert "finite" in refusal["reason"]


def test_fedavgs_own_arguments_decide_where_k_is_not_given():
    strategy = Averaging(min_train_nodes=3, min_available_nodes=5)
    assert (strategy.num_participants, strategy.min_available_nodes) == (3, 5)
    assert Averaging().num_participants == 2  # as FedAvg's
    assert Averaging(3, min_evaluate_nodes=1).min_evaluate_nodes == 1
