"""`run`: Flower's hooks round by round, for strategies that know nothing of this package."""

import random

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    Strategy,
)

from flwr_colearn import (
    Average,
    CoLearn,
    ColearnError,
    Compression,
    DynamicAveraging,
    Float16,
    History,
    InProcessGrid,
    Int8,
    Quorum,
    Recovery,
    Transport,
    run,
)
from flwr_colearn.strategy_state import restore_state, save_state
from tests.faults import (
    EXAMPLES,
    MODEL,
    FaultyGrid,
    K,
    bits,
    is_query,
    numpy_of,
    participants,
    record_of,
)

ROUNDS = 3
PLAN = {"local-epochs": 1, "learning-rate": 0.2}


def start(strategy, grid=None, rounds=ROUNDS, **kwargs):
    grid = InProcessGrid(participants(), K) if grid is None else grid
    kwargs.setdefault("train_config", ConfigRecord({**PLAN}))
    return run(strategy, grid, record_of(MODEL), rounds, **kwargs)


class Watching(FedAvg):
    """Says what it was given."""

    def __init__(self, **kwargs):
        super().__init__(fraction_evaluate=0.0, **kwargs)
        self.given = []

    def aggregate_train(self, server_round, replies):
        assert isinstance(replies, list)
        self.given.append([reply.metadata.src_node_id for reply in replies])
        return super().aggregate_train(server_round, replies)


# What a strategy is given, and what becomes of its aggregate ------------------------------------


def test_replies_are_a_list_in_the_order_of_the_names():
    names = [{"name": name} for name in ("d", "a", "c", "b")]
    strategy = Watching()
    start(strategy, InProcessGrid(participants(), K, node_configs=names))
    assert strategy.given == [[2, 4, 3, 1]] * ROUNDS


def test_aggregates_have_the_types_and_integers_are_rounded():
    class Halves(FedAvg):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            for name in arrays:
                arrays[name] = type(arrays[name])(np.full(MODEL[name].shape, 2.6, np.float64))
            return arrays, metrics

    transport = Transport(normalization=Average())
    found = numpy_of(start(Halves(), rounds=1, transport=transport).arrays)
    for name, array in found.items():
        assert array.dtype == MODEL[name].dtype
        assert np.all(array == (3 if array.dtype.kind == "i" else array.dtype.type(2.6)))


def test_statistics_are_pooled_whatever_the_strategy_did_to_them():
    """Against the mean and variance of all examples, written out."""
    means = [np.full(2, k, np.float32) for k in range(K)]

    def train(k, plan, arrays):
        own = {"bn.running_mean": means[k], "bn.running_var": np.full(2, 1 + k, np.float32)}
        return {**arrays, **own, "bn.num_batches_tracked": np.array(10 * k)}

    strategy = FedAvgM(server_learning_rate=0.5, server_momentum=0.9, fraction_evaluate=0.0)
    found = numpy_of(start(strategy, InProcessGrid(participants(train), K)).arrays)
    weights = np.array(EXAMPLES) / sum(EXAMPLES)
    mean = sum(w * k for k, w in enumerate(weights))
    variance = sum(w * (1 + k + (k - mean) ** 2) for k, w in enumerate(weights))
    np.testing.assert_allclose(found["bn.running_mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(found["bn.running_var"], variance, rtol=1e-6)
    assert found["bn.num_batches_tracked"] == round(sum(weights * [0, 10, 20, 30]))


def test_a_model_of_integers_only_is_left_to_the_strategy():
    """Trees and counts have no weights; the mean of integers would not be theirs."""

    class Latest(FedAvg):
        def aggregate_train(self, server_round, replies):
            return next(iter(replies[-1].content.array_records.values())), None

    model = {"trees": np.arange(5, dtype=np.uint8)}
    grid = InProcessGrid(participants(lambda k, plan, arrays: {"trees": arrays["trees"] + k}), K)
    strategy = Latest(fraction_evaluate=0.0)
    result = run(strategy, grid, record_of(model), 2, train_config=ConfigRecord({**PLAN}))
    assert bits(result.arrays) == bits(record_of({"trees": model["trees"] + 2 * (K - 1)}))


def test_a_strategy_may_leave_out_a_round():
    class Idle(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            return (
                []
                if server_round == 2
                else super().configure_train(server_round, arrays, config, grid)
            )

    history = History()
    start(Idle(fraction_evaluate=0.0), history=history)
    assert [len(record.participants) for record in history] == [K, 0, K]
    assert [record.bytes_down > 0 for record in history] == [True, False, True]


def test_own_evaluation_functions_are_called_as_flower_does():
    calls = []

    def evaluate(server_round, arrays):
        calls.append(server_round)
        return MetricRecord({"round": server_round})

    history = History()
    result = start(FedAvg(), evaluate_fn=evaluate, history=history)
    assert calls == [0, 1, 2, 3]
    assert dict(result.evaluate_metrics_serverapp[2]) == {"round": 2}
    wanted = sum(n * k / 8 for k, n in enumerate(EXAMPLES)) / sum(EXAMPLES)
    assert [dict(result.evaluate_metrics_clientapp[i]) for i in (1, 2, 3)] == [
        {"accuracy": pytest.approx(wanted)}
    ] * 3
    assert [record.evaluate_metrics["accuracy"] for record in history] == [
        pytest.approx(wanted)
    ] * 3
    assert all(record.evaluation["bytes_down"] == record.bytes_down for record in history)


# Recovery ---------------------------------------------------------------------------------------


def test_attempts_that_are_given_up_are_pulled_and_counted(clock):
    """A reply that comes too late leaves the SuperLink, and its bytes are in the record."""
    grid, history = FaultyGrid(clock, {(1, 2, 0): "late"}), History()
    start(FedAvg(fraction_evaluate=0.0), grid, timeout=60.0, history=history)
    assert [len(record.restarts) for record in history] == [1, 0, 0]
    model = sum(len(array.data) for array in record_of(MODEL).values())
    assert sum(grid.bytes_up.values()) == (1 + K * ROUNDS) * model
    assert sum(record.bytes_up for record in history) == (1 + K * ROUNDS) * model
    assert sum(record.bytes_down for record in history) == (1 + K * ROUNDS) * model


def test_a_participant_that_is_lost_ends_the_run_with_what_was_reached(clock):
    faults = {(2, 1, attempt): "raises" for attempt in range(9)}
    transport = Transport(recovery=Recovery(max_restarts=2))
    with pytest.raises(ColearnError, match="lost participant partition-1") as error:
        start(Watching(), FaultyGrid(clock, faults), transport=transport)
    whole = start(Watching(), FaultyGrid(clock), rounds=1)
    assert bits(error.value.result.arrays) == bits(whole.arrays)


def test_a_quorum_goes_on_without_it(clock):
    faults = {(2, 1, attempt): "raises" for attempt in range(9)}
    transport, history = Transport(recovery=Recovery(2, policy=Quorum(3))), History()
    start(Watching(), FaultyGrid(clock, faults), transport=transport, history=history)
    assert [len(record.participants) for record in history] == [K, K - 1, K]
    assert [each["participant"] for each in history.records[1].absences] == ["partition-1"]


# Resume -----------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def kill_in(last):
    def evaluate(server_round, arrays):
        if server_round == last:
            raise Killed

    return evaluate


def test_the_nodes_of_a_round_are_those_that_it_had_begun_with(tmp_path):
    """Even of a strategy that draws them with a generator that nobody saves."""

    class Drawing(Watching):
        def configure_train(self, server_round, arrays, config, grid):
            messages = super().configure_train(server_round, arrays, config, grid)
            return random.SystemRandom().sample(list(messages), 2)

    strategy = Drawing()
    with pytest.raises(Killed):
        start(strategy, checkpoints=tmp_path, evaluate_fn=kill_in(2))
    for _ in range(5):
        again = Drawing()
        with pytest.raises(Killed):
            start(again, checkpoints=tmp_path, evaluate_fn=kill_in(2), resume="auto")
        assert again.given == [strategy.given[1]]


def sessions_of(grid):
    seen = []
    call = grid._call

    def watch(message):
        if not is_query(message):
            seen.append(message.content["config"]["session"])
        return call(message)

    grid._call = watch
    return seen


def test_a_run_has_one_session_whatever_restarts(tmp_path):
    def watched():
        grid = InProcessGrid(participants(), K)
        return grid, sessions_of(grid)

    grid, first = watched()
    with pytest.raises(Killed):
        start(FedAvg(), grid, checkpoints=tmp_path, evaluate_fn=kill_in(2))
    grid, second = watched()
    start(FedAvg(), grid, checkpoints=tmp_path, resume="auto")
    grid, other = watched()
    start(FedAvg(), grid)
    assert len(set(first + second)) == 1
    assert len(set(other)) == 1
    assert set(other) != set(first)


class Own(FedAvg):
    """Remembers something that is no attribute of Flower's."""

    def __init__(self, **kwargs):
        super().__init__(fraction_evaluate=0.0, **kwargs)
        self.rounds, self.control = 0, np.zeros(2)

    def aggregate_train(self, server_round, replies):
        self.rounds += 1
        self.control = self.control + server_round
        return super().aggregate_train(server_round, replies)


class Saved(Own):
    def strategy_state(self):
        return {"rounds": self.rounds}, {"control": self.control}

    def restore_strategy_state(self, state, arrays):
        self.rounds, self.control = state["rounds"], arrays["control"]


def test_what_a_strategy_says_it_remembers_is_restored(tmp_path, flower_log):
    with pytest.raises(Killed):
        start(Saved(), checkpoints=tmp_path, evaluate_fn=kill_in(3))
    strategy = Saved()
    start(strategy, rounds=4, checkpoints=tmp_path, resume="auto")
    assert strategy.rounds == 4
    np.testing.assert_array_equal(strategy.control, [10, 10])
    assert "will not be restored" not in flower_log.text


def test_what_it_does_not_say_is_named_once(flower_log):
    start(Own())
    warnings = [each.getMessage() for each in flower_log.records if each.levelname == "WARNING"]
    warnings = [each for each in warnings if "will not be restored" in each]
    assert len(warnings) == 1
    assert "Own.control, Own.rounds changed" in warnings[0]
    assert "strategy_state()" in warnings[0]


ALL = {"noise_multiplier": 0.0, "num_sampled_clients": K}


@pytest.mark.parametrize(
    "strategy",
    [
        FedAdam(eta=0.01),
        FedAvgM(server_momentum=0.9),
        DifferentialPrivacyServerSideAdaptiveClipping(FedAdam(eta=0.01), **ALL),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_flowers_own_strategies_forget_nothing(strategy, flower_log):
    model = {name: MODEL[name] for name in ("fc.weight", "fc.bias")}
    grid = InProcessGrid(participants(), K)
    run(strategy, grid, record_of(model), 3, train_config=ConfigRecord({**PLAN}))
    assert "will not be restored" not in flower_log.text
    state, arrays = save_state(strategy)
    assert any(state.values())
    new = type(strategy)(*([FedAdam(eta=0.01)] if hasattr(strategy, "strategy") else []), **(
        ALL if hasattr(strategy, "strategy") else {}
    ))  # fmt: skip
    restore_state(new, (state, arrays))
    again, arrays_again = save_state(new)
    assert again == state
    assert arrays.keys() == arrays_again.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(arrays_again[name], array)


def test_the_state_of_other_strategies_is_refused(tmp_path):
    start(FedAvg(), checkpoints=tmp_path, rounds=1)
    with pytest.raises(ColearnError, match="another strategy: FedAvg there, FedAdam now"):
        start(FedAdam(), checkpoints=tmp_path, resume="auto")
    transport = Transport(compression=Compression(up=Int8()))
    with pytest.raises(ColearnError, match=r"another compression: float32 .* int8 up"):
        start(FedAvg(), checkpoints=tmp_path, resume="auto", transport=transport)
    with pytest.raises(ColearnError, match="expected none, since resume='never'"):
        start(FedAvg(), checkpoints=tmp_path)


# Its arguments ----------------------------------------------------------------------------------


def test_co_learnings_own_start_is_this_loop():
    def strategy(**kwargs):
        return CoLearn(K, local_epochs=2, learning_rate=0.1, fraction_evaluate=0.0, **kwargs)

    grid = InProcessGrid(participants(), K)
    own = strategy().start(grid, record_of(MODEL), ROUNDS)
    history = History()
    other = run(strategy(), InProcessGrid(participants(), K), record_of(MODEL), ROUNDS)
    start(strategy(), train_config=ConfigRecord(), history=history)
    assert bits(own.arrays) == bits(other.arrays)
    assert [record.round for record in history] == [1, 2, 3]


def test_a_history_is_a_path_or_an_object(tmp_path):
    path = tmp_path / "history.jsonl"
    start(FedAvg(), history=path)
    assert [record.round for record in History.read(path)] == [1, 2, 3]


@pytest.mark.parametrize("rounds", [0, -1, 1.5, True, "3"])
def test_an_impossible_number_of_rounds_is_refused(rounds):
    with pytest.raises(ColearnError, match=f"num_rounds: expected .*, found {rounds!r}"):
        start(FedAvg(), rounds=rounds)


@pytest.mark.parametrize("resume", ["always", True, None])
def test_another_word_than_never_or_auto_is_refused(resume):
    with pytest.raises(ColearnError, match=f"resume: expected 'never' or 'auto', found {resume!r}"):
        start(FedAvg(), resume=resume)


def test_what_the_strategy_and_the_run_both_say_is_refused():
    strategy = CoLearn(K, local_epochs=1, learning_rate=0.1, compression=Compression(up=Int8()))
    transport = Transport(compression=Compression(down=Float16()))
    with pytest.raises(ColearnError, match=r"compression: expected it once.*'?int8.*Transport"):
        start(strategy, train_config=ConfigRecord(), transport=transport)


def untrained_app():
    app = ClientApp()
    app.train()(lambda message, context: pytest.fail("trained"))
    return app


@pytest.mark.parametrize(
    "begin",
    [
        lambda model, grid: run(FedAvg(), grid, model, 1),
        lambda model, grid: own_strategy().start(grid, model),
        lambda model, grid: Strategy.start(own_strategy(), grid, model),
        lambda model, grid: DynamicAveraging(0.1, num_learners=K).start(grid, model),
    ],
    ids=["run", "CoLearn", "a foreign loop", "dynamic averaging"],
)
def test_nan_in_the_initial_model_is_refused_before_anybody_trains(begin):
    model = record_of({"w": np.array([1.0, np.nan])})
    with pytest.raises(ColearnError, match="initial model, array 'w': expected no NaN"):
        begin(model, InProcessGrid(untrained_app(), K))


def own_strategy():
    return CoLearn(K, local_epochs=2, learning_rate=0.1, fraction_evaluate=0.0)
