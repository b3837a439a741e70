import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, Strategy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flwr_colearn import (
    CoLearn,
    ColearnError,
    ConstantRate,
    CyclicalRate,
    ExponentialRate,
    FixedEpochs,
    History,
    IncreasingEpochs,
    InProcessGrid,
    LocalPlan,
)

K = 3


def record(**arrays):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def numpy_of(arrays):
    return {name: array.numpy() for name, array in arrays.items()}


def bits(arrays):
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in numpy_of(arrays).items()}


def client_app(train, examples=lambda k: 1, evaluate=lambda k, arrays: {}):
    """A participant that answers a round with the arrays that ``train(k, plan, arrays)`` returns.

    `train` may also return a whole RecordDict or an Error, which is then sent as it is.
    """
    app = ClientApp()

    @app.train()
    def _(message, context):
        k = context.node_config["partition-id"]
        plan = LocalPlan.from_config(message.content["config"])
        model = train(k, plan, numpy_of(message.content["arrays"]))
        if isinstance(model, dict) and not isinstance(model, RecordDict):
            model = reply(record(**model), **{"num-examples": examples(k), "loss": float(k)})
        return Message(model, reply_to=message)

    @app.evaluate()
    def _(message, context):
        k = context.node_config["partition-id"]
        metrics = evaluate(k, numpy_of(message.content["arrays"]))
        content = RecordDict({"metrics": MetricRecord({"num-examples": examples(k), **metrics})})
        return Message(content, reply_to=message)

    return app


def reply(*arrays, **metrics):
    """The content of a participant's reply, well-formed or not."""
    content = {f"arrays{index}": each for index, each in enumerate(arrays)}
    return RecordDict({**content, "metrics": MetricRecord(metrics)})


def grid_of(train, k=K, grid=InProcessGrid, **kwargs):
    return grid(client_app(train, **kwargs), k)


def echo(k, plan, arrays):
    return arrays


def strategy_of(k=K, epochs=5, rate=0.1, **kwargs):
    return CoLearn(k, local_epochs=epochs, learning_rate=rate, **kwargs)


def lenient(**kwargs):
    """A strategy that leaves failed participants out of the round, instead of restarting them."""
    return strategy_of(recovery=None, **kwargs)


def seen_plans(strategy, train=echo, rounds=3, k=K, initial=None, **kwargs):
    """Run, and return each round's plan (less its time limit), the same for all participants."""
    plans = {}

    def watched(k, plan, arrays):
        plans.setdefault(plan.round, []).append((k, replace(plan, time_limit=None)))
        return train(k, plan, arrays)

    initial = record(w=np.ones(2, np.float32)) if initial is None else initial
    strategy.start(grid_of(watched, k), initial, num_rounds=rounds, **kwargs)
    for round_, seen in plans.items():
        assert len({participant for participant, _ in seen}) == len(seen) == k
        assert len({plan for _, plan in seen}) == 1, round_
    assert list(plans) == list(range(1, len(plans) + 1))
    return [seen[0][1] for seen in plans.values()]


def epochs_of(plans):
    return [plan.local_epochs for plan in plans]


# Algorithm 1 ------------------------------------------------------------------------------------


def descend(k, plan, arrays):
    """Full-batch gradient descent towards the participant's own optimum, k + 1."""
    w = arrays["w"]
    for epoch in plan:
        w = w - np.float32(epoch.learning_rate) * (w - np.float32(k + 1))
    return {"w": w}


def reference(rounds, initial_epochs, epsilon, eta, r):
    """Algorithm 1 as SPEC.md has it, written without the package: the T's and the models."""
    w, w_prev, local_epochs = np.zeros(2, np.float32), None, initial_epochs
    path, models = [], []
    for _ in range(rounds):
        if w_prev is not None:
            with np.errstate(divide="ignore"):
                change = np.linalg.norm(w.astype(float) - w_prev) / np.linalg.norm(w_prev)
            local_epochs *= 2 if change <= epsilon else 1
        replies = []
        for k in range(K):
            wk = w
            for j in range(1, local_epochs + 1):
                wk = wk - np.float32(eta * r ** (j / local_epochs)) * (wk - np.float32(k + 1))
            replies.append(wk)
        w_prev, w = w, np.mean(replies, axis=0, dtype=np.float64).astype(np.float32)
        path.append(local_epochs)
        models.append(w)
    return path, models


def test_a_run_is_algorithm_1():
    path, models = reference(rounds=12, initial_epochs=2, epsilon=0.2, eta=0.1, r=0.25)
    assert len(set(path)) > 2  # T doubles more than once

    strategy = strategy_of(epochs=IncreasingEpochs(2, epsilon=0.2), rate=CyclicalRate(0.1, 0.25))
    shared = []
    strategy.start(
        grid_of(descend),
        record(w=np.zeros(2, np.float32)),
        num_rounds=12,
        evaluate_fn=lambda _, arrays: shared.append(arrays["w"].numpy()),
    )
    assert strategy.history.epochs_path == path
    np.testing.assert_allclose(shared[1:], models, rtol=1e-6)


def test_every_participant_gets_the_plan_of_every_round():
    strategy = strategy_of(epochs=FixedEpochs(4), rate=CyclicalRate(lambda i: 0.01 * 0.9**i, 0.5))
    assert seen_plans(strategy) == [
        LocalPlan.of(CyclicalRate(0.01, 0.5), 1, 4),
        LocalPlan.of(CyclicalRate(0.01 * 0.9, 0.5), 2, 4, 4),
        LocalPlan.of(CyclicalRate(0.01 * 0.9**2, 0.5), 3, 4, 8),
    ]


def test_the_exponential_rate_runs_through_all_rounds_without_a_restart():
    strategy = strategy_of(epochs=2, rate=ExponentialRate(0.1, decay=0.25, total_epochs=6))
    rates = [epoch.learning_rate for plan in seen_plans(strategy) for epoch in plan]
    assert rates == pytest.approx([0.1 * 0.25 ** (e / 6) for e in range(1, 7)])


def test_a_function_of_the_progress_is_a_schedule_of_the_budget():
    strategy = strategy_of(epochs=2, rate=lambda progress: 1 - progress, total_epochs=5)
    plans = seen_plans(strategy)
    assert [plan.learning_rates for plan in plans] == [
        (1.0, 0.8),
        (0.6, 0.4),
        (pytest.approx(0.2),),
    ]
    assert [plan.learning_rate for plan in plans] == [1.0, 0.6, pytest.approx(0.2)]


def test_a_function_of_the_progress_needs_a_budget():
    with pytest.raises(ColearnError, match="expected total_epochs beside a function"):
        strategy_of(epochs=2, rate=lambda progress: 1 - progress)


def test_an_object_of_ones_own_is_a_schedule():
    class Halving:
        kind = "halving"

        def start(self, round_index):
            return 0.5**round_index

        def at(self, epoch, local_epochs, round_index=0, epochs_done=0):
            return self.start(round_index) / epoch

    plans = seen_plans(strategy_of(epochs=2, rate=Halving()), rounds=3)
    assert [plan.learning_rates for plan in plans] == [(1.0, 0.5), (0.5, 0.25), (0.25, 0.125)]


def test_numbers_are_shorthand_for_fixed_epochs_and_a_constant_rate():
    in_short = seen_plans(strategy_of(epochs=3, rate=0.1))
    in_full = seen_plans(strategy_of(epochs=FixedEpochs(3), rate=ConstantRate(0.1)))
    assert in_short == in_full
    assert [epoch.learning_rate for epoch in in_short[0]] == [0.1] * 3


def test_numpy_numbers_do_as_well():
    strategy = strategy_of(
        epochs=np.int64(3), rate=CyclicalRate(np.float32(0.5), decay=np.float32(0.25))
    )
    assert seen_plans(strategy, rounds=1) == [LocalPlan.of(CyclicalRate(0.5, 0.25), 1, 3)]


# Equation 4 -------------------------------------------------------------------------------------


def scripted(models):
    """Participants all of whom answer round i with ``models[i - 1]``."""
    return lambda k, plan, arrays: {**arrays, **models[plan.round - 1]}


def vector(*values):
    return {"w": np.array(values, np.float32)}


def test_epochs_grow_by_equation_4_with_tie_cap_and_first_comparison():
    models = [
        vector(3, 5),  # against the initial (3, 4): 1/5 = 0.2, a tie: doubles
        vector(3, 50),  # far
        vector(3, 51),  # 1/50.09: doubles, capped
        vector(3, 51),  # 0: at the cap already
        vector(3, 99),
    ]
    strategy = strategy_of(epochs=IncreasingEpochs(2, epsilon=0.2, maximum=5))
    plans = seen_plans(strategy, scripted(models), rounds=5, initial=record(**vector(3, 4)))
    assert epochs_of(plans) == [2, 4, 4, 5, 5]
    changes = [each.relative_change for each in strategy.history]
    assert changes == pytest.approx(
        [1 / 5, 45 / math.hypot(3, 5), 1 / math.hypot(3, 50), 0, 48 / math.hypot(3, 51)]
    )


def test_a_change_above_epsilon_leaves_the_epochs_alone():
    strategy = strategy_of(epochs=IncreasingEpochs(2, epsilon=0.1999))
    plans = seen_plans(
        strategy, scripted([vector(3, 5)] * 2), rounds=2, initial=record(**vector(3, 4))
    )
    assert epochs_of(plans) == [2, 2]


def test_the_change_is_that_of_the_average_and_not_of_the_participants():
    def apart(k, plan, arrays):  # far from the shared model, but around it
        return {"w": arrays["w"] + np.float32([-100, 0, 100][k])}

    plans = seen_plans(strategy_of(epochs=IncreasingEpochs(1, epsilon=0)), apart)
    assert epochs_of(plans) == [1, 2, 4]


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"), None),
        (("bn/moving_mean", "bn/moving_variance", "step"), None),
        (("0", "1", "2"), ["mean", "variance", "counter", "trainable"]),
    ],
)
def test_jumping_statistics_and_counters_do_not_count(names, roles):
    mean, variance, counter = names
    initial = {
        mean: np.zeros(2, np.float32),
        variance: np.ones(2, np.float32),
        counter: np.array(0),
        "3": np.ones(2, np.float32),
    }

    def jump(k, plan, arrays):
        return {
            mean: arrays[mean] + np.float32(1e6),
            variance: arrays[variance] * np.float32(1e3),
            counter: arrays[counter] + 10_000,
            "3": arrays["3"],
        }

    strategy = strategy_of(epochs=IncreasingEpochs(1, epsilon=0), roles=roles)
    assert epochs_of(seen_plans(strategy, jump, initial=record(**initial))) == [1, 2, 4]


def test_nameless_models_bring_one_warning_a_run(flower_log):
    seen_plans(strategy_of(), initial=ArrayRecord([np.ones(2, np.float32)]))
    assert flower_log.text.count("arrays have no names") == 1


# The budget -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "total", "expected"),
    [
        (4, 10, [4, 4, 2]),
        (4, 8, [4, 4]),
        (4, 3, [3]),
        (IncreasingEpochs(1, epsilon=0), 12, [1, 2, 4, 5]),
    ],
)
def test_the_budget_cuts_the_last_round_and_ends_the_run(epochs, total, expected):
    strategy = strategy_of(epochs=epochs, total_epochs=total)
    plans = seen_plans(strategy, rounds=None)
    assert epochs_of(plans) == expected
    assert [each.epochs_done for each in strategy.history] == list(np.cumsum(expected))


def test_num_rounds_may_end_a_run_before_its_budget():
    assert len(seen_plans(strategy_of(epochs=1, total_epochs=10), rounds=4)) == 4


def test_without_budget_and_rounds_a_run_has_flowers_three_rounds():
    assert len(seen_plans(strategy_of(), rounds=None)) == 3


def test_a_cut_round_is_annealed_to_its_own_end():
    strategy = strategy_of(epochs=4, rate=CyclicalRate(0.1), total_epochs=6)
    last = seen_plans(strategy, rounds=None)[-1]
    assert [epoch.learning_rate for epoch in last] == pytest.approx([0.05, 0.025])


def test_the_exponential_rates_plan_must_be_the_runs_budget():
    with pytest.raises(ColearnError, match="the run's own total_epochs=20, found 10"):
        strategy_of(rate=ExponentialRate(0.1, 0.5, total_epochs=10), total_epochs=20)


# Participants -----------------------------------------------------------------------------------


def test_num_participants_sets_fedavgs_numbers():
    strategy = strategy_of(5)
    assert isinstance(strategy, FedAvg)
    assert (strategy.min_train_nodes, strategy.min_available_nodes) == (5, 5)
    assert strategy.min_evaluate_nodes == 5


def test_fedavgs_own_arguments_do_as_well():
    strategy = strategy_of(None, min_train_nodes=4, fraction_evaluate=0.0)
    assert (strategy.num_participants, strategy.min_available_nodes) == (4, 4)
    assert strategy_of(None).num_participants == FedAvg().min_train_nodes


def test_exactly_k_of_the_connected_nodes_take_part_in_every_round():
    seen = {}

    def train(k, plan, arrays):
        seen.setdefault(plan.round, []).append(k)
        return arrays

    strategy_of().start(grid_of(train, k=7), record(w=np.ones(1)))
    assert [len(nodes) for nodes in seen.values()] == [K] * 3
    assert all(len(set(nodes)) == K for nodes in seen.values())


class ChangingGrid(InProcessGrid):
    """A grid that sees the nodes of `connected`, one entry a look, the last one for ever."""

    connected: list[list[int]]

    def get_node_ids(self):
        return self.connected.pop(0) if len(self.connected) > 1 else self.connected[0]


def test_a_node_that_left_is_replaced_and_the_others_stay():
    seen = {}

    def train(k, plan, arrays):
        seen.setdefault(plan.round, set()).add(k)
        return arrays

    grid = grid_of(train, k=5, grid=ChangingGrid)
    grid.connected = [[1, 2, 3], [2, 3, 4, 5]]
    strategy_of(fraction_evaluate=0).start(grid, record(w=np.ones(1)), num_rounds=3)
    assert seen[1] == {0, 1, 2}
    [newcomer] = seen[2] - {1, 2}
    assert newcomer in {3, 4}
    assert seen[3] == seen[2] == {1, 2, newcomer}


def test_a_run_begins_as_soon_as_enough_nodes_are_connected():
    grid = grid_of(echo, grid=ChangingGrid)
    grid.connected = [[1], [1, 2, 3]]
    strategy = strategy_of(wait_for_participants=0.2)
    strategy.start(grid, record(w=np.ones(1)), num_rounds=1)
    assert strategy.history.records[0].participants == ["1", "2", "3"]


def test_too_few_nodes_end_the_run_with_the_command_that_gives_more():
    strategy = strategy_of(wait_for_participants=0.01)
    with pytest.raises(ColearnError, match="participants: expected 3, found 2") as error:
        strategy.start(grid_of(echo, k=2), record(w=np.ones(1)))
    assert 'flwr run . --stream --federation-config "num-supernodes=3 ' in str(error.value)
    assert "start the missing SuperNodes" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction_train": 0.5}, "fraction_train: expected 1.0.*found 0.5"),
        ({"fraction_train": 0.0}, "fraction_train: expected 1.0"),
        ({"min_train_nodes": 2}, "min_train_nodes: expected num_participants=3.*found 2"),
        ({"min_available_nodes": 5}, "min_available_nodes: expected num_participants=3"),
        ({"weighting": "by size"}, "weighting: expected 'uniform' or 'weighted'"),
        ({"total_epochs": 0}, "total_epochs: expected a whole number of at least 1"),
        ({"epochs": 0}, "expected a whole number of at least 1, found 0"),
        ({"epochs": "5"}, "local_epochs: expected"),
        ({"rate": -1}, "initial learning rate: expected a number of at least 0"),
        ({"rate": "0.1"}, "learning_rate: expected"),
        ({"k": 0}, "num_participants: expected a whole number of at least 1, found 0"),
        ({"k": 2.5}, "num_participants: expected a whole number"),
        ({"wait_for_participants": -1}, "wait_for_participants: expected"),
        ({"wait_for_participants": math.nan}, "wait_for_participants: expected"),
        ({"wait_for_participants": "1 minute"}, "wait_for_participants: expected"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ColearnError, match=message):
        strategy_of(**arguments)


@pytest.mark.parametrize("rounds", [0, -1, 2.5, "3", True])
def test_an_impossible_number_of_rounds_is_refused(rounds):
    with pytest.raises(ColearnError, match="num_rounds: expected a whole number"):
        strategy_of().start(grid_of(echo), record(w=np.ones(1)), num_rounds=rounds)


# The average ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({}, 2), ({"weighting": "uniform"}, 2), ({"weighting": "weighted"}, 3)],
)
def test_the_mean_is_uniform_unless_weighted(arguments, expected):
    def train(k, plan, arrays):
        return {"w": np.full(2, 4 * k, np.float32)}

    grid = grid_of(train, k=2, examples=lambda k: [10, 30][k])
    result = strategy_of(2, **arguments).start(grid, record(w=np.zeros(2, np.float32)))
    assert result.arrays["w"].numpy().tolist() == [expected, expected]


def test_the_weights_may_have_another_key():
    def train(k, plan, arrays):
        return reply(record(w=np.full(1, 4.0 * k)), tokens=[1, 3][k])

    strategy = strategy_of(2, weighting="weighted", weighted_by_key="tokens", fraction_evaluate=0)
    result = strategy.start(grid_of(train, k=2), record(w=np.zeros(1)), num_rounds=1)
    assert result.arrays["w"].numpy() == 3


def test_names_shapes_and_types_survive_a_run():
    initial = record(
        **{
            "z.weight": np.ones((2, 3), np.float32),
            "a.half": np.ones(2, np.float16),
            "scale": np.array(0.5, np.float32),
            "none": np.zeros((0, 4)),
            "bn.running_mean": np.zeros(1, np.float32),
            "bn.running_var": np.ones(1, np.float32),
            "bn.num_batches_tracked": np.array(3),
        }
    )
    result = strategy_of().start(grid_of(echo), initial)
    assert bits(result.arrays) == bits(initial)
    assert list(result.arrays) == list(initial)


def test_arrays_in_fortran_order_are_averaged_element_by_element():
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    grid = grid_of(lambda k, plan, arrays: {"w": array})
    result = strategy_of().start(grid, record(w=np.zeros((2, 3), np.float32)), num_rounds=1)
    assert np.array_equal(result.arrays["w"].numpy(), array)


def test_batch_norm_statistics_are_pooled():
    def train(k, plan, arrays):
        return {"bn.running_mean": np.float32([4 * k]), "bn.running_var": np.float32([1])}

    initial = record(**{"bn.running_mean": np.float32([0]), "bn.running_var": np.float32([1])})
    grid = grid_of(train, k=2, examples=lambda k: [30_000, 10_000][k])
    result = strategy_of(2, weighting="weighted").start(grid, initial, num_rounds=1)
    assert result.arrays["bn.running_var"].numpy() == 4


class ShuffledGrid(InProcessGrid):
    """A grid whose replies arrive in an order that depends on `seed`."""

    seed = 0

    def send_and_receive(self, messages, *, timeout=None):
        replies = list(super().send_and_receive(messages, timeout=timeout))
        random.Random(self.seed).shuffle(replies)
        return replies


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_order_of_the_replies_does_not_change_a_bit(dtype):
    def train(k, plan, arrays):
        return {"w": np.random.default_rng(k).normal(size=1000).astype(dtype)}

    results = set()
    for seed in range(6):
        grid = grid_of(train, k=6, grid=ShuffledGrid)
        grid.seed = seed
        result = lenient(k=6).start(grid, record(w=np.zeros(1000, dtype)), num_rounds=1)
        results.add(result.arrays["w"].data)
    assert len(results) == 1


# Bad replies ------------------------------------------------------------------------------------

INITIAL = {"w": np.zeros((2, 2), np.float32), "n": np.array(0)}
GOOD = {"w": np.ones((2, 2), np.float32), "n": np.array(4)}


def arrays_with_data(data, stype="numpy.ndarray"):
    arrays = record(**GOOD)
    arrays["w"] = Array(dtype="float32", shape=(2, 2), stype=stype, data=data)
    return arrays


def damaged(position, junk):
    """The good array's bytes with something written over a part of them."""
    data = bytearray(record(**GOOD)["w"].data)
    data[position : position + len(junk)] = junk
    return bytes(data)


def fail():
    raise RuntimeError("CUDA out of memory")


BAD = {
    "nan": (lambda: {**GOOD, "w": np.full((2, 2), np.nan, np.float32)}, "'w'.*NaN or Inf"),
    "missing key": (lambda: {"w": GOOD["w"]}, r"1 missing \['n'\]"),
    "unknown key": (lambda: {**GOOD, "v": GOOD["w"]}, r"1 unknown \['v'\]"),
    "wrong shape": (lambda: {**GOOD, "w": np.ones(4, np.float32)}, r"shape \(2, 2\), found"),
    "wrong dtype": (lambda: {**GOOD, "w": np.ones((2, 2))}, "expected float32.*found float64"),
    "zero examples": (lambda: reply(record(**GOOD), **{"num-examples": 0}), "a positive number"),
    "negative examples": (
        lambda: reply(record(**GOOD), **{"num-examples": -5}),
        "'num-examples' in the reply: expected a positive number, found -5",
    ),
    "nan examples": (
        lambda: reply(record(**GOOD), **{"num-examples": math.nan}),
        "a positive number, found nan",
    ),
    "a list of examples": (
        lambda: reply(record(**GOOD), **{"num-examples": [1, 2]}),
        r"a positive number, found \[1, 2\]",
    ),
    "no examples": (lambda: reply(record(**GOOD), loss=1.0), "a positive number, found None"),
    "no MetricRecord": (
        lambda: RecordDict({"arrays": record(**GOOD)}),
        "exactly one MetricRecord, found 0",
    ),
    "no ArrayRecord": (lambda: reply(**{"num-examples": 1}), "exactly one ArrayRecord, found 0"),
    "two ArrayRecords": (
        lambda: reply(record(**GOOD), record(**GOOD), **{"num-examples": 1}),
        "exactly one ArrayRecord, found 2",
    ),
    "empty content": (lambda: RecordDict(), "exactly one MetricRecord, found 0"),
    "exception": (fail, r"participant failed \(code 2\): RuntimeError: CUDA out of memory"),
    "error": (lambda: Error(7, "disk full"), r"participant failed \(code 7\): disk full"),
    "error without a reason": (lambda: Error(7), r"participant failed \(code 7\)"),
    "error with a blank reason": (lambda: Error(7, " \n"), r"participant failed \(code 7\)"),
    "bytes of something else": (
        lambda: reply(arrays_with_data(b"PK\x03\x04 torch"), **{"num-examples": 1}),
        "array 'w': expected a serialised numpy array",
    ),
    "no bytes": (
        lambda: reply(arrays_with_data(b""), **{"num-examples": 1}),
        "array 'w': expected a serialised numpy array",
    ),
    "cut bytes": (
        lambda: reply(arrays_with_data(damaged(0, b"")[:-3]), **{"num-examples": 1}),
        "array 'w': expected a serialised numpy array",
    ),
    "another serialisation": (
        lambda: reply(arrays_with_data(damaged(0, b""), "torch.tensor"), **{"num-examples": 1}),
        "array 'w': expected a serialised numpy array, found .*torch.tensor",
    ),
}


def run_with_one_bad_participant(answer, **arguments):
    """Two rounds of three participants, the last of whom gives `answer` in the first round."""

    def train(k, plan, arrays):
        if k == 2 and plan.round == 1:
            return answer()
        return {"w": arrays["w"] + np.float32(k + 1), "n": arrays["n"] + 4}

    strategy = lenient(**arguments)
    result = strategy.start(grid_of(train), record(**INITIAL), num_rounds=2)
    return strategy.history.records, numpy_of(result.arrays)


@pytest.mark.parametrize(("answer", "reason"), BAD.values(), ids=BAD)
def test_a_bad_reply_is_refused_and_recorded_while_the_round_goes_on(answer, reason, flower_log):
    (first, second), arrays = run_with_one_bad_participant(answer)
    assert first.participants == ["1", "2"]
    assert first.train_metrics == {"loss": 0.5}  # without the third's
    [refusal] = first.refusals
    assert refusal["participant"] == "3"
    assert re.search(reason, refusal["reason"])
    assert f"participant 3 refused: {refusal['reason']}" in flower_log.text
    # The average of the first round is that of participants 0 and 1, of the second that of all.
    assert first.relative_change == math.inf
    assert second.participants == ["1", "2", "3"]
    assert second.refusals == []
    assert np.array_equal(arrays["w"], np.full((2, 2), 1.5 + 2, np.float32))
    assert arrays["n"] == 8


@pytest.mark.parametrize("examples", [1e19, 1e300])
def test_an_absurd_number_of_examples_does_not_end_the_run(examples):
    def answer():
        return reply(record(**{**GOOD, "n": np.array(0)}), **{"num-examples": examples})

    (first, second), _ = run_with_one_bad_participant(answer, weighting="weighted")
    assert len(first.participants) + len(first.refusals) == 3
    assert len(second.participants) == 3


@pytest.mark.slow
@given(
    position=st.integers(0, 140),
    junk=st.binary(min_size=1, max_size=4)
    | st.text("(){}[]'\",0179:<f \n", min_size=1).map(str.encode),
)
@example(position=12, junk=b"<,f4")
@example(position=60, junk=b"(" * 9)
@example(position=60, junk=b"(" + b"9" * 30)
@settings(max_examples=200)
def test_no_bytes_that_a_participant_sends_end_the_run(position, junk):
    answer = reply(arrays_with_data(damaged(position, junk)), **{"num-examples": 1})
    (first, second), _ = run_with_one_bad_participant(lambda: answer)
    assert len(first.participants) + len(first.refusals) == 3
    assert len(second.participants) == 3


class DoublingGrid(InProcessGrid):
    """A grid that delivers the first participant's reply twice."""

    def send_and_receive(self, messages, *, timeout=None):
        replies = list(super().send_and_receive(messages, timeout=timeout))
        return replies + replies[:1]


def test_a_second_reply_of_one_participant_is_refused():
    def train(k, plan, arrays):
        return {"w": np.full(1, [9.0, 0.0, 0.0][k])}

    strategy = lenient()
    result = strategy.start(grid_of(train, grid=DoublingGrid), record(w=np.zeros(1)), num_rounds=1)
    assert result.arrays["w"].numpy() == 3
    [refusal] = strategy.history.records[0].refusals
    assert refusal["participant"] == "1"
    assert "found a second one" in refusal["reason"]


class SilentGrid(InProcessGrid):
    """A grid in which the replies of `unanswered` nodes do not arrive before the timeout."""

    unanswered: tuple[int, ...] = ()

    def send_and_receive(self, messages, *, timeout=None):
        replies = super().send_and_receive(messages, timeout=timeout)
        return [each for each in replies if each.metadata.src_node_id not in self.unanswered]


def test_a_participant_that_does_not_answer_is_not_in_the_average():
    grid = grid_of(lambda k, plan, arrays: {"w": arrays["w"] + k}, grid=SilentGrid)
    grid.unanswered = (1,)
    strategy = lenient()
    result = strategy.start(grid, record(w=np.zeros(1)), num_rounds=1)
    assert result.arrays["w"].numpy() == 1.5
    assert strategy.history.records[0].participants == ["2", "3"]


def test_a_round_without_any_reply_ends_the_run():
    grid = grid_of(echo, grid=SilentGrid)
    grid.unanswered = (1, 2, 3)
    with pytest.raises(
        ColearnError, match=r"round 1: .* found none .no replies before the timeout"
    ):
        lenient().start(grid, record(w=np.zeros(1)))


def test_a_round_that_brings_nothing_ends_the_run_with_the_last_good_model():
    def train(k, plan, arrays):
        return arrays if plan.round < 3 else fail()

    strategy = lenient()
    with pytest.raises(ColearnError, match="round 3: expected a model from at least one") as error:
        strategy.start(grid_of(train), record(w=np.ones(2)), num_rounds=5)
    for node in ("1", "2", "3"):
        assert f"{node}: the participant failed (code 2): RuntimeError: CUDA" in str(error.value)
    result = error.value.result
    assert result.arrays["w"].numpy().tolist() == [1, 1]
    assert list(result.train_metrics_clientapp) == [1, 2]
    assert strategy.history.epochs_path == [5, 5]


def test_an_error_in_the_first_round_returns_the_initial_model():
    initial = record(w=np.ones(2))
    with pytest.raises(ColearnError, match="round 1: expected a model from at least one") as error:
        lenient().start(grid_of(lambda *_: fail()), initial)
    assert bits(error.value.result.arrays) == bits(initial)


def test_metrics_that_do_not_fit_together_do_not_cost_the_model(flower_log):
    def failing(contents, key):
        raise KeyError("auc")

    strategy = strategy_of(train_metrics_aggr_fn=failing)
    result = strategy.start(grid_of(echo), record(w=np.ones(2)), num_rounds=1)
    assert strategy.history.records[0].participants == ["1", "2", "3"]
    assert result.train_metrics_clientapp == {}
    assert "metrics could not be aggregated" in flower_log.text


# Configs, metrics, history ----------------------------------------------------------------------


def test_the_users_train_config_reaches_participants_and_is_not_changed():
    seen = []
    app = ClientApp()

    @app.train()
    def _(message, context):
        seen.append(dict(message.content["config"]))
        arrays = message.content["arrays"]
        return Message(reply(arrays, **{"num-examples": 1}), reply_to=message)

    config = ConfigRecord({"batch-size": 32, "local-epochs": 77})
    strategy = strategy_of(1, epochs=2, rate=0.5, fraction_evaluate=0.0)
    strategy.start(InProcessGrid(app, 1), record(w=np.ones(1)), train_config=config)
    assert dict(config) == {"batch-size": 32, "local-epochs": 77}
    assert [each["server-round"] for each in seen] == [1, 2, 3]
    assert all(each["batch-size"] == 32 and each["local-epochs"] == 2 for each in seen)


def test_records_travel_under_the_users_own_keys():
    app = ClientApp()

    @app.train()
    def _(message, context):
        assert sorted(message.content) == ["options", "weights"]
        content = reply(message.content["weights"], **{"num-examples": 1})
        return Message(content, reply_to=message)

    strategy = strategy_of(
        1, arrayrecord_key="weights", configrecord_key="options", fraction_evaluate=0.0
    )
    strategy.start(InProcessGrid(app, 1), record(w=np.ones(1)), num_rounds=1)
    assert strategy.history.records[0].refusals == []


def test_metrics_are_aggregated_as_fedavg_does():
    grid = grid_of(
        echo,
        k=2,
        examples=lambda k: [1, 3][k],
        evaluate=lambda k, arrays: {"accuracy": [0.0, 1.0][k]},
    )
    strategy = strategy_of(2)
    result = strategy.start(grid, record(w=np.ones(1)), num_rounds=2)
    for round_, each in enumerate(strategy.history, start=1):
        assert result.train_metrics_clientapp[round_] == each.train_metrics == {"loss": 0.75}
        assert result.evaluate_metrics_clientapp[round_] == each.evaluate_metrics
        assert each.evaluate_metrics == {"accuracy": 0.75}


def test_a_metric_that_a_site_lacks_is_averaged_over_the_others(flower_log):
    def train(k, plan, arrays):
        metrics = {} if k == 2 else {"auc": 0.9}
        return reply(record(**arrays), **{"num-examples": 1, **metrics})

    def evaluate(k, arrays):
        return {"accuracy": [math.nan, 0.25, 0.75][k]}

    strategy = strategy_of()
    grid = grid_of(train, evaluate=evaluate)
    result = strategy.start(grid, record(w=np.ones(1)), num_rounds=1)
    assert result.train_metrics_clientapp[1]["auc"] == pytest.approx(0.9)
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == 0.5
    assert strategy.history.records[0].site_means == {"accuracy": 0.5}
    assert re.search("metric 'auc': expected .* 3 participants, found none from 3", flower_log.text)
    assert "metric 'accuracy': " in flower_log.text


def test_a_failed_evaluation_is_left_out():
    def evaluate(k, arrays):
        return {"accuracy": [0.2, 0.4][k]} if k < 2 else fail()

    result = strategy_of().start(
        grid_of(echo, evaluate=evaluate), record(w=np.ones(1)), num_rounds=1
    )
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx(0.3)


def test_participants_evaluate_the_new_average():
    grid = grid_of(
        lambda k, plan, arrays: {"w": arrays["w"] + k},
        evaluate=lambda k, arrays: {"w": arrays["w"].item()},
    )
    result = strategy_of().start(grid, record(w=np.zeros(1)))
    metrics = result.evaluate_metrics_clientapp
    assert {round_: metrics[round_]["w"] for round_ in metrics} == pytest.approx({1: 1, 2: 2, 3: 3})


@pytest.mark.parametrize("arguments", [{}, {"epochs": 2, "total_epochs": 5}])
def test_the_server_evaluates_the_initial_model_and_every_average(arguments):
    seen = []

    def evaluate(server_round, arrays):
        seen.append((server_round, arrays["w"].numpy().item()))
        return MetricRecord({"score": 10.0 * server_round})

    strategy = strategy_of(**arguments)
    grid = grid_of(lambda k, plan, arrays: {"w": arrays["w"] + 1})
    result = strategy.start(grid, record(w=np.zeros(1)), evaluate_fn=evaluate)
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 3)]
    scores = {i: each["score"] for i, each in result.evaluate_metrics_serverapp.items()}
    assert scores == {0: 0, 1: 10, 2: 20, 3: 30}
    assert [each.server_metrics for each in strategy.history] == [
        {"score": 10},
        {"score": 20},
        {"score": 30},
    ]


def test_the_history_on_disk_is_the_history_in_memory_and_counts_every_byte(tmp_path):
    path = tmp_path / "runs" / "history.jsonl"
    strategy = strategy_of(history=path)
    initial = record(w=np.zeros((100, 3), np.float32), b=np.zeros(7), n=np.array(1))
    strategy.start(grid_of(echo), initial, num_rounds=2)
    assert History.read(path).records == strategy.history.records
    one_model = sum(len(array.data) for array in initial.values())
    for each in strategy.history:
        assert each.bytes_down == each.bytes_up == K * one_model
    assert strategy.history.bytes_total == 2 * 2 * K * one_model
    assert [(each.round, each.learning_rate) for each in strategy.history] == [(1, 0.1), (2, 0.1)]


def test_a_rounds_duration_is_that_of_its_training_and_evaluation(clock):
    def train(k, plan, arrays):
        clock.sleep(2.5 * plan.round)
        return arrays

    def evaluate(k, arrays):
        clock.sleep(1.0)
        return {}

    strategy = strategy_of()
    strategy.start(grid_of(train, evaluate=evaluate), record(w=np.ones(1)), num_rounds=2)
    assert [each.seconds for each in strategy.history] == [K * 2.5 + K, K * 5.0 + K]


def test_a_history_may_be_handed_in():
    history = History()
    strategy_of(history=history).start(grid_of(echo), record(w=np.ones(1)))
    assert len(history) == 3


def test_the_summary_shows_colearnings_settings_and_fedavgs(flower_log):
    strategy_of(epochs=IncreasingEpochs(5, epsilon=0.01), rate=CyclicalRate(0.02)).summary()
    for part in ("initial=5", "epsilon=0.01", "CyclicalRate", "0.02", "uniform", "Keys in records"):
        assert part in flower_log.text


# One strategy, several runs and wrappers --------------------------------------------------------


def run_of_each_kind(strategy, start=None):
    start = start or strategy.start
    initial = record(w=np.zeros(2, np.float32))
    result = start(grid_of(descend), initial, num_rounds=6)
    rounds = [(each.round, each.local_epochs, each.relative_change) for each in strategy.history]
    return bits(result.arrays), rounds


def increasing(**kwargs):
    rules = {"epochs": IncreasingEpochs(2, epsilon=0.5), "rate": CyclicalRate(0.1)}
    return strategy_of(**rules, **kwargs)


@pytest.mark.parametrize("total_epochs", [None, 9])
def test_a_second_start_gives_what_the_first_gave(total_epochs):
    strategy = increasing(total_epochs=total_epochs)
    first = run_of_each_kind(strategy)
    assert len({epochs for _, epochs, _ in first[1]}) > 1
    assert run_of_each_kind(strategy) == first


def test_a_start_after_a_failed_one_begins_anew():
    strategy = increasing(recovery=None)
    with pytest.raises(ColearnError, match="round 1: expected a model from"):
        strategy.start(grid_of(lambda *_: fail()), record(w=np.ones(5)))
    assert run_of_each_kind(strategy) == run_of_each_kind(increasing())


class Announcing(CoLearn):
    """As a user's subclass: something before and after the run."""

    def start(self, *args, **kwargs):
        result = super().start(*args, **kwargs)
        self.announced = True
        return result


class WithFlowersLoop(CoLearn):
    """As a user's subclass whose own start() is Flower's loop."""

    def start(self, *args, **kwargs):
        return Strategy.start(self, *args, **kwargs)


@pytest.mark.parametrize("subclass", [Announcing, WithFlowersLoop])
@pytest.mark.parametrize("fraction_evaluate", [0.0, 1.0])
def test_a_subclass_may_override_start(subclass, fraction_evaluate):
    strategy = subclass(
        K,
        local_epochs=IncreasingEpochs(2, epsilon=0.5),
        learning_rate=CyclicalRate(0.1),
        fraction_evaluate=fraction_evaluate,
    )
    expected = run_of_each_kind(increasing(fraction_evaluate=fraction_evaluate))
    assert run_of_each_kind(strategy) == expected
    assert run_of_each_kind(strategy) == expected


def private(strategy, noise=0.0):
    return DifferentialPrivacyServerSideFixedClipping(
        strategy, noise_multiplier=noise, clipping_norm=1e6, num_sampled_clients=K
    )


@pytest.mark.parametrize("fraction_evaluate", [0.0, 1.0])
def test_under_differential_privacy_without_noise_the_run_is_the_same(fraction_evaluate):
    strategy = increasing(fraction_evaluate=fraction_evaluate)
    dp = private(strategy)
    arrays, rounds = run_of_each_kind(strategy, dp.start)
    _, expected_rounds = run_of_each_kind(increasing())
    assert [epochs for _, epochs, _ in rounds] == [epochs for _, epochs, _ in expected_rounds]
    assert [change for *_, change in rounds] == pytest.approx(
        [change for *_, change in expected_rounds], rel=1e-5
    )
    assert len(rounds) == 6  # one record for every round, the last included
    result = dp.start(grid_of(descend), record(w=np.zeros(2, np.float32)), num_rounds=6)
    assert bits(result.arrays) == arrays
    assert len(strategy.history) == 6


def test_under_differential_privacy_the_noise_counts_in_equation_4():
    def around(k, plan, arrays):  # the mean of the three is the model that they got
        return {"w": arrays["w"] + [-1.0, 0.5, 0.5][k]}

    initial = record(w=np.ones(50))
    quiet, noisy = (strategy_of(epochs=IncreasingEpochs(1, epsilon=1e-3)) for _ in range(2))
    private(quiet).start(grid_of(around), initial, num_rounds=3)
    private(noisy, noise=1e-6).start(grid_of(around), initial, num_rounds=3)
    assert quiet.history.epochs_path == [1, 2, 4]
    assert noisy.history.epochs_path == [1, 1, 1]  # deviation 1e-6 * 1e6 / 3
    assert all(each.relative_change > 1e-3 for each in noisy.history)


def test_under_differential_privacy_a_budget_is_refused_before_anybody_trains():
    dp = private(strategy_of(epochs=2, total_epochs=5))
    with pytest.raises(ColearnError, match=r"total_epochs under a wrapper.*use num_rounds"):
        dp.start(grid_of(lambda *_: pytest.fail("trained")), record(w=np.ones(1)), num_rounds=6)


def test_a_round_without_an_average_does_not_make_the_epochs_grow():
    # Differential privacy skips the aggregation when a participant failed: the model stays what
    # it was because nothing was averaged, not because it has converged.
    def train(k, plan, arrays):
        if plan.round == 1 and k == 0:
            fail()
        return {"w": arrays["w"] + 1}

    strategy = strategy_of(epochs=IncreasingEpochs(2, epsilon=0.01))
    private(strategy).start(grid_of(train), record(w=np.ones(2)), num_rounds=2)
    assert strategy.history.epochs_path == [2, 2]
