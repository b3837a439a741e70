import math
import re
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import (
    Code,
    FitRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import ServerAppComponents, ServerConfig, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp

from flwr_colearn import (
    CoLearn,
    ColearnError,
    CyclicalRate,
    ExponentialRate,
    History,
    IncreasingEpochs,
    InProcessGrid,
    LocalPlan,
    Quorum,
    Recovery,
    legacy,
)

K = 3
INITIAL = [np.zeros((2, 3), np.float32), np.array(0.5, np.float32), np.array([1, 2])]
EXAMPLES = [10, 20, 50]


def descend(k, plan, arrays):
    """Local training of both APIs: gradient descent towards k + 1, and one more step counted."""
    weights, scalar, steps = arrays
    for epoch in plan:
        weights = weights - np.float32(epoch.learning_rate) * (weights - np.float32(k + 1))
        scalar = scalar * np.float32(1 - epoch.learning_rate)
        steps = steps + k + 1
    return [weights, np.asarray(scalar), steps]


def legacy_app(train, configs=None, evaluate=None):
    class Participant(NumPyClient):
        def __init__(self, k):
            self.k = k

        def get_parameters(self, config):
            return INITIAL

        def fit(self, parameters, config):
            if configs is not None:
                configs.append((self.k, dict(config)))
            plan = LocalPlan.from_config(config)
            return train(self.k, plan, parameters), EXAMPLES[self.k], {"k": self.k}

        def evaluate(self, parameters, config):
            loss = float(self.k) if evaluate is None else evaluate(self.k, parameters)
            return loss, EXAMPLES[self.k], {}

    return ClientApp(client_fn=lambda context: client_of(Participant, context))


def client_of(participant, context: Context):
    return participant(context.node_config["partition-id"]).to_client()


def run_legacy(strategy, app, num_rounds=3):
    """Run Flower's own legacy server over K participants in this process."""
    components = ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=num_rounds))
    server = ServerApp(server_fn=lambda context: components)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    server(InProcessGrid(app, K), context)


def legacy_strategy(epochs=2, rate=0.1, shared=None, **kwargs):
    """A strategy that starts from INITIAL and appends every shared model to `shared`."""

    def evaluate(server_round, arrays, config):
        shared.append(arrays)
        return float(server_round), {"server": 1.0}

    return legacy.CoLearn(
        K,
        local_epochs=epochs,
        learning_rate=rate,
        initial_parameters=ndarrays_to_parameters(INITIAL),
        evaluate_fn=None if shared is None else evaluate,
        **kwargs,
    )


def run_with_messages(train, num_rounds=3, **arguments):
    """The same participants with the Message API: returns plans, shared models and history."""
    plans, shared = [], []
    app = ClientApp()

    @app.train()
    def _(message, context):
        k = context.node_config["partition-id"]
        plan = LocalPlan.from_config(message.content["config"])
        plans.append((k, replace(plan, time_limit=None, session=None)))
        arrays = ArrayRecord(train(k, plan, message.content["arrays"].to_numpy_ndarrays()))
        metrics = MetricRecord({"num-examples": EXAMPLES[k]})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    strategy = CoLearn(K, fraction_evaluate=0.0, **arguments)
    strategy.start(
        InProcessGrid(app, K),
        ArrayRecord({str(i): Array(array) for i, array in enumerate(INITIAL)}),
        num_rounds=num_rounds,
        evaluate_fn=lambda _, arrays: shared.append(arrays.to_numpy_ndarrays()),
    )
    return plans, shared, strategy.history


def round_and_participant(entry):
    k, config = entry
    return config["server-round"], k


def outline(history):
    """What must be equal in the histories of both APIs (seconds differ)."""
    return [
        (each.round, each.local_epochs, each.epochs_done, each.relative_change, each.bytes_up)
        for each in history
    ]


def bits(models):
    return [[(a.dtype, a.shape, a.tobytes()) for a in model] for model in models]


@pytest.mark.parametrize(
    "arguments",
    [
        {"epochs": IncreasingEpochs(2, epsilon=0.5), "rate": CyclicalRate(0.1)},
        {"epochs": 2, "rate": ExponentialRate(0.1, 0.25, total_epochs=12), "weighting": "weighted"},
        {"epochs": 3, "rate": CyclicalRate(lambda i: 0.01 * 0.9**i), "total_epochs": 10},
        {"epochs": 1, "rate": 0.1, "roles": ["trainable", "mean", "counter"]},
    ],
    ids=["CLR+ILE", "ELR+FLE weighted", "falling rate and budget", "roles"],
)
@pytest.mark.parametrize("fraction_evaluate", [0.0, 1.0])
def test_both_apis_send_the_same_plans_and_make_the_same_averages(arguments, fraction_evaluate):
    arguments = dict(arguments)
    epochs, rate = arguments.pop("epochs"), arguments.pop("rate")
    configs, shared = [], []
    strategy = legacy_strategy(
        epochs, rate, shared, fraction_evaluate=fraction_evaluate, **arguments
    )
    run_legacy(strategy, legacy_app(descend, configs), num_rounds=6)

    plans, message_shared, history = run_with_messages(
        descend, num_rounds=6, local_epochs=epochs, learning_rate=rate, **arguments
    )
    assert sorted(configs, key=round_and_participant) == [
        (k, plan.to_fit_config()) for k, plan in plans
    ]
    assert bits(shared[: len(history) + 1]) == bits(message_shared)
    assert outline(strategy.history) == outline(history)


def test_the_initial_rate_falls_from_round_to_round():
    configs = []
    strategy = legacy_strategy(1, CyclicalRate(lambda i: 0.01 * 0.9**i))
    run_legacy(strategy, legacy_app(descend, configs))
    rates = {config["server-round"]: config["learning-rate"] for _, config in configs}
    assert rates == pytest.approx({1: 0.01, 2: 0.009, 3: 0.0081})


def test_the_mean_is_uniform_and_no_sample_weighted_one():
    shared = []
    run_legacy(
        legacy_strategy(shared=shared),
        legacy_app(lambda k, plan, arrays: [arrays[0] + np.float32(3 * k), *arrays[1:]]),
        num_rounds=1,
    )
    assert np.array_equal(shared[-1][0], np.full((2, 3), 3, np.float32))


def test_once_the_budget_is_spent_nothing_is_sent_and_nothing_changes():
    configs, shared = [], []
    strategy = legacy_strategy(epochs=2, total_epochs=5, shared=shared)
    run_legacy(strategy, legacy_app(descend, configs), num_rounds=6)
    assert sorted(config["server-round"] for _, config in configs) == [1] * K + [2] * K + [3] * K
    assert strategy.history.epochs_path == [2, 2, 1]
    assert bits(shared[4:]) == bits([shared[3]] * 3)


def test_the_users_fit_config_is_kept_beside_the_plan():
    configs = []
    strategy = legacy_strategy(on_fit_config_fn=lambda server_round: {"batch-size": 32})
    run_legacy(strategy, legacy_app(descend, configs), num_rounds=1)
    assert all(config["batch-size"] == 32 and "local-epochs" in config for _, config in configs)


def test_initial_parameters_may_come_from_a_participant():
    strategy = legacy.CoLearn(K, local_epochs=1, learning_rate=0.1)
    run_legacy(strategy, legacy_app(descend), num_rounds=2)
    assert strategy.history.epochs_path == [1, 1]


def test_nameless_statistics_are_pooled_when_roles_name_them():
    shared = []

    def train(k, plan, arrays):
        return [np.full((2, 3), [0, 0, 6][k], np.float32), np.full((2, 3), 1, np.float32)]

    strategy = legacy.CoLearn(
        K,
        local_epochs=1,
        learning_rate=0.1,
        roles=["mean", "variance"],
        initial_parameters=ndarrays_to_parameters([np.zeros((2, 3), np.float32)] * 2),
        evaluate_fn=lambda server_round, arrays, config: shared.append(arrays),
    )
    run_legacy(strategy, legacy_app(train), num_rounds=1)
    assert np.array_equal(shared[-1][1], np.full((2, 3), 9, np.float32))  # 1 + (4 + 4 + 16) / 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda arrays: [arrays[0] * np.float32(np.nan), *arrays[1:]], "finite numbers"),
        (lambda arrays: arrays[:2], r"1 missing \['2'\]"),
        (lambda arrays: [arrays[0].T, *arrays[1:]], r"shape \(2, 3\), found"),
        (lambda arrays: [arrays[0].astype(float), *arrays[1:]], "expected float32"),
        (lambda arrays: 1 / 0, "division by zero"),
    ],
    ids=["nan", "missing", "shape", "dtype", "exception"],
)
def test_a_bad_result_is_refused_and_recorded_while_the_round_goes_on(answer, reason):
    shared = []

    def train(k, plan, arrays):
        if k == 2 and plan.round == 1:
            return answer(arrays)
        return [arrays[0] + np.float32(k), *arrays[1:]]

    strategy = legacy_strategy(shared=shared, recovery=None)
    run_legacy(strategy, legacy_app(train), num_rounds=2)
    first, second = strategy.history
    assert first.participants == ["1", "2"]
    left_out = first.refusals + first.absences
    assert {entry["participant"] for entry in left_out} == {"3"}
    assert re.search(reason, left_out[0]["reason"])
    assert np.array_equal(shared[1][0], np.full((2, 3), 0.5, np.float32))
    assert second.participants == ["1", "2", "3"]
    assert np.array_equal(shared[2][0], np.full((2, 3), 1.5, np.float32))


class RawClient(Client):
    """A participant that answers with the bytes (or the status) given."""

    def __init__(self, k, tensors, status):
        self.k, self.tensors, self.status = k, tensors, status

    def fit(self, ins):
        tensors = ins.parameters.tensors if self.k < 2 else self.tensors
        status = Status(Code.OK, "") if self.k < 2 else self.status
        return FitRes(status, Parameters(tensors, "numpy.ndarray"), EXAMPLES[self.k], {})


@pytest.mark.parametrize(
    ("tensors", "status", "reason"),
    [
        ([b"", b"", b""], Status(Code.OK, ""), "expected a serialised numpy array"),
        ([b"no numpy"] * 3, Status(Code.OK, ""), "expected a serialised numpy array"),
        ([b"PK\x03\x04 a zip file"] * 3, Status(Code.OK, ""), "expected a serialised numpy array"),
        (
            [b"\x93NUMPY\x01\x00\x0a\x00{(((((((((\n"] * 3,
            Status(Code.OK, ""),
            "expected a serialised numpy",
        ),
        ([], Status(Code.FIT_NOT_IMPLEMENTED, "disk full"), "disk full"),
    ],
    ids=["no bytes", "other bytes", "zip", "damaged header", "status"],
)
def test_no_result_that_a_participant_sends_ends_the_run(tensors, status, reason):
    app = ClientApp(
        client_fn=lambda context: RawClient(context.node_config["partition-id"], tensors, status)
    )
    strategy = legacy_strategy(fraction_evaluate=0.0, recovery=None)
    run_legacy(strategy, app, num_rounds=1)
    [record] = strategy.history
    assert record.participants == ["1", "2"]
    left_out = record.refusals + record.absences
    assert {entry["participant"] for entry in left_out} == {"3"}
    assert reason in left_out[0]["reason"]


def test_a_round_that_brings_nothing_ends_the_run():
    def train(k, plan, arrays):
        raise RuntimeError("disk full")

    with pytest.raises(
        ColearnError, match=r"round 1: expected a model from at least one.*disk full"
    ):
        run_legacy(legacy_strategy(recovery=None), legacy_app(train))


@pytest.mark.parametrize("fault", ["exception", "nan"])
def test_a_participant_that_fails_is_restarted_in_the_same_round(fault):
    shared, clean, failed = [], [], set()

    def train(k, plan, arrays):
        if k == 1 and plan.round not in failed:
            failed.add(plan.round)
            return 1 / 0 if fault == "exception" else [a * np.float32(np.nan) for a in arrays[:2]]
        return descend(k, plan, arrays)

    strategy = legacy_strategy(shared=shared, recovery=Recovery(pause=0.0))
    run_legacy(strategy, legacy_app(train))
    run_legacy(legacy_strategy(shared=clean), legacy_app(descend))
    for record in strategy.history:
        assert sorted(record.participants) == ["1", "2", "3"]
        assert [entry["participant"] for entry in record.restarts] == ["2"]
    for one, other in zip(shared, clean, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("policy", "goes_on"), [("fail", False), (Quorum(3), False), (Quorum(2), True)]
)
def test_a_participant_that_is_lost_is_dealt_with_by_the_policy(policy, goes_on):
    def train(k, plan, arrays):
        return 1 / 0 if k == 2 else [arrays[0] + np.float32(k), *arrays[1:]]

    shared = []
    recovery = Recovery(max_restarts=2, pause=0.0, policy=policy)
    strategy = legacy_strategy(shared=shared, recovery=recovery)
    if goes_on:
        run_legacy(strategy, legacy_app(train), num_rounds=1)
        [record] = strategy.history
        assert len(record.restarts) == 2
        assert [entry["participant"] for entry in record.absences] == ["3"]
        np.testing.assert_array_equal(shared[1][0], np.full((2, 3), 0.5, np.float32))
    else:
        with pytest.raises(ColearnError, match=r"lost \['3'\].*division by zero"):
            run_legacy(strategy, legacy_app(train), num_rounds=1)


def test_failures_end_the_run_if_they_are_not_accepted():
    def train(k, plan, arrays):
        return arrays if k else 1 / 0

    with pytest.raises(ColearnError, match=r"expected no failures .*found 1"):
        run_legacy(legacy_strategy(accept_failures=False), legacy_app(train))


def test_nan_in_the_initial_model_is_refused_before_anybody_trains():
    strategy = legacy_strategy()
    strategy.initial_parameters = ndarrays_to_parameters([np.array([1.0, np.nan])])
    with pytest.raises(ColearnError, match="initial model, array '0': expected no NaN"):
        run_legacy(strategy, legacy_app(lambda *_: pytest.fail("trained")))


def test_metrics_of_every_kind_reach_the_history(tmp_path):
    shared = []
    strategy = legacy_strategy(
        shared=shared,
        history=tmp_path / "history.jsonl",
        fit_metrics_aggregation_fn=lambda metrics: {"ks": float(sum(m["k"] for _, m in metrics))},
    )
    run_legacy(strategy, legacy_app(descend), num_rounds=2)
    read = History.read(tmp_path / "history.jsonl").records
    assert read == strategy.history.records
    for number, record in enumerate(read, start=1):
        assert record.train_metrics == {"ks": 3.0}
        assert record.evaluate_metrics == {"loss": pytest.approx((20 * 1 + 50 * 2) / 80)}
        assert record.server_metrics == {"loss": number, "server": 1.0}


def test_a_metrics_function_that_raises_does_not_end_the_run(flower_log):
    def failing(metrics):
        return {"auc": sum(each["auc"] for _, each in metrics)}

    strategy = legacy_strategy(
        fit_metrics_aggregation_fn=failing, evaluate_metrics_aggregation_fn=failing
    )
    run_legacy(strategy, legacy_app(descend), num_rounds=2)
    assert len(strategy.history.records) == 2
    for record in strategy.history:
        assert record.train_metrics == {}
        assert record.evaluate_metrics == {"loss": pytest.approx((20 * 1 + 50 * 2) / 80)}
    assert "the metrics could not be aggregated" in flower_log.text
    assert "KeyError: 'auc'" in flower_log.text


def test_a_loss_of_nan_of_one_participant_is_left_out(flower_log):
    def evaluate(k, arrays):
        return [math.nan, 1.0, 2.0][k]

    strategy = legacy_strategy()
    run_legacy(strategy, legacy_app(descend, evaluate=evaluate), num_rounds=1)
    [record] = strategy.history
    assert record.evaluate_metrics == {"loss": pytest.approx((20 * 1 + 50 * 2) / 70)}
    assert "left out: found nan" in flower_log.text


def test_numpy_metrics_do_not_end_a_run_that_writes_its_history(tmp_path):
    strategy = legacy.CoLearn(
        K,
        local_epochs=1,
        learning_rate=0.1,
        history=tmp_path / "history.jsonl",
        evaluate_fn=lambda *_: (np.float32(0.5), {"accuracy": np.float32(0.25)}),
    )
    run_legacy(strategy, legacy_app(descend), num_rounds=2)
    records = History.read(tmp_path / "history.jsonl").records
    assert [record.server_metrics for record in records] == [{"loss": 0.5, "accuracy": 0.25}] * 2


def test_num_participants_sets_fedavgs_numbers():
    strategy = legacy_strategy()
    assert isinstance(strategy, FedAvg)
    assert (strategy.min_fit_clients, strategy.min_available_clients) == (K, K)
    assert strategy.min_evaluate_clients == K


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction_fit": 0.5}, "fraction_fit: expected 1.0"),
        ({"min_fit_clients": 2}, "min_fit_clients: expected num_participants=3"),
        ({"min_available_clients": 9}, "min_available_clients: expected num_participants=3"),
        ({"weighting": "size"}, "weighting: expected 'uniform' or 'weighted'"),
        ({"epochs": 0}, "a whole number of at least 1"),
        ({"rate": math.nan}, "a finite number"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ColearnError, match=message):
        legacy_strategy(**arguments)


def test_a_complete_round_with_a_result_of_no_examples_goes_without_that_one():
    grid, manager = InProcessGrid(ClientApp(), 2), SimpleClientManager()
    for node_id in grid.get_node_ids():
        manager.register(GridClientProxy(node_id, grid, run_id=1))
    strategy = legacy.CoLearn(2, local_epochs=1, learning_rate=0.1, recovery=None)
    initial = ndarrays_to_parameters([np.zeros(2)])
    asked = [client for client, _ in strategy.configure_fit(1, initial, manager)]
    results = [(client, result_of(np.full(2, float(client.cid)))) for client in asked]
    results[1][1].num_examples = 0
    average, _ = strategy.aggregate_fit(1, results, [])
    assert np.array_equal(parameters_to_ndarrays(average)[0], np.full(2, float(asked[0].cid)))
    strategy.configure_fit(2, average, manager)  # closes the record of round 1
    assert [entry["participant"] for entry in strategy.history.records[0].refusals] == [
        asked[1].cid
    ]


def test_results_in_any_order_give_the_same_bits():
    # float64, where the last bit of a sum depends on the order of its terms.
    grid, manager = InProcessGrid(ClientApp(), K), SimpleClientManager()
    for node_id in grid.get_node_ids():
        manager.register(GridClientProxy(node_id, grid, run_id=1))
    strategy = legacy.CoLearn(K, local_epochs=1, learning_rate=0.1)
    initial = ndarrays_to_parameters([np.zeros(1000)])
    averages = set()
    for order in permutations(range(K)):
        asked = {client.cid: client for client, _ in strategy.configure_fit(1, initial, manager)}
        results = [
            (asked[str(k + 1)], result_of(np.random.default_rng(k).normal(size=1000)))
            for k in order
        ]
        parameters, _ = strategy.aggregate_fit(1, results, [])
        averages.add(parameters.tensors[0])
    assert len(averages) == 1


def result_of(array):
    return FitRes(Status(Code.OK, ""), ndarrays_to_parameters([array]), 1, {})
