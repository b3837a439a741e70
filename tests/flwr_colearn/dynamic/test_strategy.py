"""DynamicAveraging in process, against a plain numpy play of the same protocol."""

import itertools
import json
import math
from pathlib import Path
from random import Random

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_colearn import (
    ColearnError,
    DynamicAveraging,
    DynamicHistory,
    InProcessGrid,
    ModelAveraging,
    Quorum,
    RecoveringGrid,
    Recovery,
    Relative,
    __version__,
    learner,
    participant_mod,
)
from flwr_colearn.dynamic import (
    Continuous,
    Dynamic,
    FractionAveraging,
    Never,
    Periodic,
    Serial,
)
from tests.flwr_colearn.dynamic.divergence import divergence

M, BATCH, RATE = 4, 5, np.float32(0.05)
TRUTH = np.arange(1, 4, dtype=np.float32)


def record(**arrays):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def numpy_of(arrays):
    return {name: array.numpy() for name, array in arrays.items()}


def batch(k, index):
    """Mini-batch number `index` of learner k's stream: linear regression with noise."""
    rng = np.random.default_rng((k, index))
    x = rng.normal(size=(BATCH, 3)).astype(np.float32)
    return x, x @ TRUTH + rng.normal(size=BATCH).astype(np.float32)


def sgd(w, x, y):
    """One step on the mean squared error; return the new weights and the loss before."""
    error = x @ w - y
    return w - RATE * 2 * (error @ x) / np.float32(len(x)), float(np.mean(error**2))


def client_app(step=None, stream=batch, mods=(participant_mod,)):
    """An ordinary Flower training function over a stream, decorated."""
    app = ClientApp(mods=list(mods))

    @learner(app)
    def train(message, context):
        k = context.node_config["partition-id"]
        config = message.content["config"]
        arrays = numpy_of(message.content["arrays"])
        losses = []
        for index in range(config["batches-done"], config["batches-done"] + config["mini-batches"]):
            arrays["w"], loss = sgd(arrays["w"], *stream(k, index))
            losses.append(loss)
        if step is not None:
            arrays = step(k, config["server-round"], arrays)
        metrics = {"num-examples": BATCH * len(losses), "loss": float(np.mean(losses))}
        content = {"arrays": record(**arrays), "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=message)

    return app


def grid_of(m=M, **kwargs):
    return InProcessGrid(client_app(**kwargs), m)


def zeros():
    return record(w=np.zeros(3, np.float32))


def models(grid):
    """What the learners have in their state."""
    states = [context.state for context in grid.contexts.values()]
    return [numpy_of(state["colearn.model"]) for state in states]


def run(operator, rounds, m=M, grid=None, initial=None, **kwargs):
    strategy = ModelAveraging(operator, m, seed=0, **kwargs)
    grid = grid or grid_of(m)
    result = strategy.start(grid, initial or zeros(), num_rounds=rounds)
    return strategy, result, grid


# The protocol in plain numpy --------------------------------------------------------------------


def play(delta, b, rounds, m=M, seed=0):
    """Dynamic averaging as the specification tells it: no messages, no classes."""
    random = Random(seed)
    f = [np.zeros(3, np.float32) for _ in range(m)]
    r, v, cumulative, trace = np.zeros(3, np.float32), 0, 0.0, []

    def far(a):
        return float(np.sum((a.astype(np.float64) - r) ** 2)) > delta

    for t in range(rounds):
        for k in range(m):
            for i in range(t * b, t * b + b):
                f[k], loss = sgd(f[k], *batch(k, i))
                cumulative += loss * BATCH
        members = [k for k in range(m) if far(f[k])]
        violators, kind = len(members), "none"
        if members:
            v += len(members)
            others = [k for k in range(m) if k not in members]
            random.shuffle(others)
            mean = np.mean([f[k] for k in members], axis=0, dtype=np.float64).astype(np.float32)
            size = len(others) if v >= m else 1
            while others and (v >= m or far(mean)):
                members += others[:size]
                others, size = others[size:], 2 * size
                mean = np.mean([f[k] for k in members], axis=0, dtype=np.float64)
                mean = mean.astype(np.float32)
            for k in members:
                f[k] = mean
            kind = "partial" if others else "full"
            if not others:
                r, v = mean, 0
        trace.append((violators, len(members) - violators, kind, v, cumulative))
    return f, r, trace


@pytest.mark.parametrize(("delta", "b"), [(0.5, 1), (0.2, 2), (2.0, 1), (0.02, 3), (1e9, 1)])
def test_a_run_is_the_protocol_played_by_hand(delta, b):
    f, _, trace = play(delta, b, 25)
    strategy, result, grid = run(Dynamic(delta, b), 25)
    for row, entry in zip(trace, strategy.history, strict=True):
        assert row[:4] == (
            len(entry.reporters),
            len(entry.fetched),
            entry.synchronised,
            entry.violations,
        )
        assert row[4] == pytest.approx(entry.cumulative_loss, rel=1e-6)
    for ours, theirs in zip(models(grid), f, strict=True):
        np.testing.assert_allclose(ours["w"], theirs, rtol=1e-6)
    np.testing.assert_allclose(
        result.arrays["w"].numpy(), np.mean(f, axis=0, dtype=np.float64), rtol=1e-6
    )


def test_the_hand_played_runs_have_every_kind_of_round():
    kinds = {row[2] for delta, b in [(0.5, 1), (0.2, 2), (2.0, 1)] for row in play(delta, b, 25)[2]}
    assert kinds == {"none", "partial", "full"}


# What must hold ---------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.floats(0.01, 5), st.integers(1, 3), st.integers(2, 6), st.integers(0, 9))
def test_the_divergence_never_exceeds_delta_after_a_round(delta, b, m, seed):
    grid = grid_of(m)
    strategy = DynamicAveraging(delta, b, num_learners=m, seed=seed)
    seen = []
    strategy.start(
        grid,
        zeros(),
        num_rounds=8,
        evaluate_fn=lambda t, arrays: seen.append(divergence(models(grid))) if t else None,
    )
    assert max(seen) <= delta * (1 + 1e-5)


def test_without_delta_dynamic_averaging_is_periodic_averaging():
    for b in (1, 3):
        dynamic, _, grid = run(Dynamic(0.0, b), 6)
        periodic, _, other = run(Periodic(b), 6)
        for ours, theirs in zip(models(grid), models(other), strict=True):
            np.testing.assert_array_equal(ours["w"], theirs["w"])
        for one, two in zip(dynamic.history, periodic.history, strict=True):
            assert one.loss == two.loss
            assert one.moved == two.moved


def test_with_infinite_delta_nothing_is_sent_but_the_first_model():
    dynamic, _, grid = run(Dynamic(math.inf), 6)
    never, _, other = run(Never(), 6)
    for ours, theirs in zip(models(grid), models(other), strict=True):
        np.testing.assert_array_equal(ours["w"], theirs["w"])
    for strategy in (dynamic, never):
        moved = strategy.history.transfers
        assert (moved.models_down, moved.models_up) == (M, 0)
        assert [entry.synchronised for entry in strategy.history] == ["none"] * 6


def test_continuous_averaging_is_serial_sgd_on_the_m_fold_batch():
    _, result, _ = run(Continuous(), 30)
    w = np.zeros(3, np.float64)
    for index in range(30):
        parts = [batch(k, index) for k in range(M)]
        x, y = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
        w = w - float(RATE) * 2 * ((x @ w - y) @ x) / len(x)
    np.testing.assert_allclose(result.arrays["w"].numpy(), w, rtol=2e-5)


def test_serial_learning_is_one_learner_on_all_data():
    strategy, result, _ = run(Serial(2), 3, m=1)
    w = np.zeros(3, np.float32)
    for index in range(6):
        w, _ = sgd(w, *batch(0, index))
    np.testing.assert_array_equal(result.arrays["w"].numpy(), w)
    assert strategy.history.transfers.models_up == 0
    with pytest.raises(ColearnError, match="num_learners of Serial: expected 1"):
        ModelAveraging(Serial(), 2)


def test_a_fraction_averages_its_random_choice_and_leaves_the_rest():
    _, _, alone = run(Never(2), 1)
    strategy, _, grid = run(FractionAveraging(0.5, 2), 1)
    (entry,) = strategy.history
    assert (len(entry.reporters), entry.fetched, entry.synchronised) == (2, [], "partial")
    chosen = [int(name.removeprefix("partition-")) for name in entry.reporters]
    mean = np.mean([models(alone)[k]["w"] for k in chosen], axis=0, dtype=np.float64)
    for k in range(M):
        wanted = mean if k in chosen else models(alone)[k]["w"]
        np.testing.assert_allclose(models(grid)[k]["w"], wanted, rtol=1e-6)


def test_the_reference_changes_on_full_synchronisations_only():
    grid = grid_of()
    strategy = DynamicAveraging(0.5, num_learners=M, seed=0)
    references = []

    def look(server_round, arrays):
        if server_round:
            states = [context.state for context in grid.contexts.values()]
            references.append([numpy_of(state["colearn.reference"])["w"] for state in states])

    strategy.start(grid, zeros(), num_rounds=20, evaluate_fn=look)
    before, full = np.zeros(3), 0
    for entry, now in zip(strategy.history, references, strict=True):
        assert all(np.array_equal(each, now[0]) for each in now)
        assert np.array_equal(before, now[0]) == (entry.synchronised != "full")
        before, full = now[0], full + (entry.synchronised == "full")
    assert 0 < full < 20


def test_a_relative_threshold_follows_the_reference():
    strategy, _, _ = run(Dynamic(Relative(0.1)), 12, initial=record(w=np.ones(3, np.float32)))
    squares = [entry.delta for entry in strategy.history]
    assert squares[0] == pytest.approx(0.1 * 3.0)
    changed = [before.synchronised == "full" for before in strategy.history.records[:-1]]
    assert [a != b for a, b in itertools.pairwise(squares)] == changed
    assert any(changed)


# Statistics and weights -------------------------------------------------------------------------


def with_statistics(k, server_round, arrays):
    return {
        **arrays,
        "bn.running_mean": np.full(2, 4.0 * (k % 2), np.float32),
        "bn.running_var": np.ones(2, np.float32),
        "bn.num_batches_tracked": np.array(server_round * 1000),
    }


def test_statistics_are_pooled_and_do_not_count_in_the_distance():
    initial = record(**with_statistics(0, 0, {"w": np.zeros(3, np.float32)}))
    grid = grid_of(step=with_statistics)
    strategy, _, _ = run(Dynamic(1e6), 2, grid=grid, initial=initial)
    plain, _, _ = run(Dynamic(1e6), 2)
    distances = [[e.largest_distance for e in s.history] for s in (strategy, plain)]
    assert distances[0] == distances[1]
    run(Periodic(1), 1, grid=(grid := grid_of(step=with_statistics)), initial=initial)
    for model in models(grid):
        np.testing.assert_allclose(model["bn.running_mean"], 2.0)
        np.testing.assert_allclose(model["bn.running_var"], 1.0 + 4.0)  # within and between
        assert model["bn.num_batches_tracked"] == 1000
        assert model["bn.num_batches_tracked"].dtype.kind == "i"


def test_models_are_weighted_by_the_examples_since_the_last_full_synchronisation():
    app = ClientApp()

    @learner(app)
    def train(message, context):
        k = context.node_config["partition-id"]
        metrics = MetricRecord({"num-examples": (10, 30)[k]})
        arrays = record(w=np.full(3, k * 8.0, np.float32))
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    grid = InProcessGrid(app, 2)
    strategy, _, _ = run(Periodic(1), 1, m=2, grid=grid)
    np.testing.assert_array_equal(models(grid)[0]["w"], [6, 6, 6])  # (10 * 0 + 30 * 8) / 40
    assert strategy.history.records[0].loss is None


@pytest.mark.parametrize("third", [{}, {"loss": math.nan}, {"loss": math.inf}])
def test_a_learner_without_a_loss_counts_with_the_mean_loss_of_the_others(third, flower_log):
    app = ClientApp()

    @learner(app)
    def train(message, context):
        k = context.node_config["partition-id"]
        metrics = {"num-examples": (10, 30, 40)[k], **({"loss": (1.0, 3.0)[k]} if k < 2 else third)}
        content = {"arrays": message.content["arrays"], "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=message)

    strategy, result, _ = run(Never(), 2, m=3, grid=InProcessGrid(app, 3))
    mean = (10 * 1.0 + 30 * 3.0) / 40
    assert [entry.loss for entry in strategy.history] == [80 * mean] * 2
    assert strategy.history.cumulative_loss == 160 * mean
    assert result.train_metrics_clientapp[1]["loss"] == mean
    assert "expected the loss of 3 learners, found 2" in flower_log.text


# Bytes ------------------------------------------------------------------------------------------


def test_bytes_are_those_counted_by_hand():
    """Periodic averaging of two learners, two rounds; float32[3] is 128 + 12 bytes in .npy."""
    strategy, _, _ = run(Periodic(4), 2, m=2)
    first, second = (entry.moved for entry in strategy.history)
    model = 128 + 12
    assert (first["models_down"], first["models_up"]) == (4, 2)  # the first model, and the mean
    assert (second["models_down"], second["models_up"]) == (2, 2)
    assert (first["bytes_down"], first["bytes_up"]) == (4 * model, 2 * model)
    assert (second["bytes_down"], second["bytes_up"]) == (2 * model, 2 * model)
    common = len("session") + 16 + len("server-round") + 8 + len("reference-round") + 8
    common += len("colearn-version") + len(__version__) + len("action")
    question = (
        common + len("train") + len("mini-batches") + 8 + len("batches-done") + 8 + len("bound") + 8
    )
    question += len("time-limit") + 8
    echo = len("server-round") + 8 + len("participant") + len("partition-0")
    echo += len("version") + len(__version__) + len("mod") + 8
    described = len("model") + 8
    report = len("examples") + 8 + len("distance") + 8
    answer = echo + report + len("num-examples") + 8 + len("loss") + 8
    # Before the first round each learner is queried for its name.
    name = {"down": len("ask") + len("name"), "up": len("participant") + len("partition-0")}
    for moved, query in ((first, name), (second, {"down": 0, "up": 0})):
        assert moved["control_down"] == 2 * (question + common + len("set") + query["down"])
        assert moved["control_up"] == 2 * (answer + described + echo + report + query["up"])
    total = sum(sum(m[key] for key in m if not key.startswith("models")) for m in (first, second))
    assert strategy.history.records[-1].cumulative_bytes == total
    assert strategy.history.transfers.total == total


def test_models_that_move_in_dynamic_averaging_are_those_of_the_protocol():
    *_, trace = play(0.5, 1, 25)
    strategy, _, _ = run(Dynamic(0.5), 25)
    for index, (row, entry) in enumerate(zip(trace, strategy.history, strict=True)):
        violators, fetched, *_ = row
        assert entry.moved["models_up"] == violators + fetched
        assert entry.moved["models_down"] == violators + fetched + (M if index == 0 else 0)


def test_what_is_collected_is_counted_apart_and_is_the_mean():
    grid = grid_of()
    strategy = ModelAveraging(Never(), M, evaluate_mean_every=2)
    seen = {}

    def look(server_round, arrays):
        mean = np.mean([m["w"] for m in models(grid)], axis=0) if server_round else np.zeros(3)
        seen[server_round] = np.allclose(arrays["w"].numpy(), mean, rtol=1e-6)
        return MetricRecord({"error": 0.5})

    result = strategy.start(grid, zeros(), num_rounds=5, evaluate_fn=look)
    assert [entry.evaluated for entry in strategy.history] == [
        "reference of round 0",
        "mean of all learners",
        "reference of round 0",
        "mean of all learners",
        "mean of all learners",  # the last, for the result
    ]
    assert [seen[t] for t in range(1, 6)] == [False, True, False, True, True]
    assert [entry.collected["models_up"] for entry in strategy.history] == [0, M, 0, M, M]
    assert strategy.history.transfers.models_up == 0
    assert result.evaluate_metrics_serverapp[3] == MetricRecord({"error": 0.5})


def test_after_a_full_synchronisation_the_server_has_the_mean_for_nothing():
    strategy, _, _ = run(Periodic(1), 3, evaluate_mean_every=1)
    assert all(entry.evaluated == "mean of all learners" for entry in strategy.history)
    assert all(entry.collected["models_up"] == 0 for entry in strategy.history)


# History ----------------------------------------------------------------------------------------


def test_the_history_is_json_lines_and_reads_back(tmp_path):
    path = tmp_path / "history.jsonl"
    strategy, _, _ = run(Dynamic(math.inf), 3, history=path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert lines[0]["delta"] == "inf"
    assert DynamicHistory.read(path).records == strategy.history.records
    path.write_text("{}\n")
    with pytest.raises(ColearnError, match="expected one DynamicRecord a line"):
        DynamicHistory.read(path)


def test_the_log_tells_what_a_round_did(flower_log):
    run(Dynamic(0.0), 1)
    assert "Operator: Dynamic(threshold=Absolute(value=0.0), check_every=1)" in flower_log.text
    assert "4 reported, 0 fetched, synchronisation: full" in flower_log.text


GOLDEN = Path(__file__).parent / "golden" / "dynamic.json"
FIELDS = ("round", "reporters", "fetched", "groups", "synchronised", "violations", "moved")


def golden_trace():
    """Every round of one fixed run; golden/regenerate_dynamic.py writes it anew."""
    strategy, _, _ = run(Dynamic(0.3, 2), 30, m=6)
    return [{name: getattr(entry, name) for name in FIELDS} for entry in strategy.history]


def test_the_run_is_what_it_was():
    assert golden_trace() == json.loads(GOLDEN.read_text())


# Faults -----------------------------------------------------------------------------------------

QUICK = Recovery(max_restarts=2, pause=0.0, patience=0.0)


def final(grid):
    return [model["w"].tobytes() for model in models(grid)]


def failing(times, k=1, server_round=3, how=None):
    """A step that raises, or spoils the model, so many times."""
    left = [times]

    def step(index, t, arrays):
        if (index, t) == (k, server_round) and left[0]:
            left[0] -= 1
            if how is None:
                raise RuntimeError("injected fault")
            return how(arrays)
        return arrays

    return step


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (None, "RuntimeError: the text stays"),
        (lambda a: {"w": a["w"] * np.float32(np.nan)}, "found NaN or Inf"),
        (lambda a: {"w": a["w"][:2]}, "expected float32 of shape (3,)"),
        (lambda a: {"v": a["w"]}, "1 missing"),
    ],
)
def test_a_learner_that_fails_is_restarted_and_nothing_is_different(how, reason):
    clean, _, grid = run(Dynamic(0.3), 10)
    faulty, _, other = run(Dynamic(0.3), 10, grid=grid_of(step=failing(2, how=how)), recovery=QUICK)
    assert final(grid) == final(other)
    assert [e.cumulative_loss for e in clean.history] == [e.cumulative_loss for e in faulty.history]
    restarts = [entry.restarts for entry in faulty.history]
    assert [len(each) for each in restarts] == [0, 0, 2] + [0] * 7
    assert restarts[2][0]["participant"] == "partition-1"
    assert reason in restarts[2][0]["reason"]


def test_a_lost_learner_ends_the_run_with_what_was_reached():
    strategy = DynamicAveraging(0.3, num_learners=M, recovery=QUICK)
    with pytest.raises(ColearnError, match="partition-1") as caught:
        strategy.start(grid_of(step=failing(9)), zeros(), num_rounds=5)
    assert len(strategy.history) == 2
    assert caught.value.result.train_metrics_clientapp.keys() == {1, 2}


def test_under_a_quorum_the_round_goes_on_and_the_absentee_begins_anew():
    recovery = Recovery(max_restarts=0, pause=0.0, patience=0.0, policy=Quorum(3))
    strategy, _, grid = run(Periodic(1), 6, grid=grid_of(step=failing(1)), recovery=recovery)
    absent = [[e["participant"] for e in entry.absences] for entry in strategy.history]
    assert absent == [[], [], ["partition-1"], [], [], []]
    lost = [entry.lost for entry in strategy.history]
    assert [len(each) for each in lost] == [0, 0, 0, 1, 0, 0]
    assert lost[3][0]["reason"] == "its reference is of round 2, not of 3"
    assert len({model["w"].tobytes() for model in models(grid)}) == 1


def always(k):
    """A step that raises whenever learner k trains."""

    def step(index, t, arrays):
        if index == k:
            raise RuntimeError("broken for good")
        return arrays

    return step


QUORUM_OF_2 = Recovery(max_restarts=1, pause=0.0, patience=0.0, policy=Quorum(2))


def test_a_quorum_counts_the_learners_of_the_run_where_one_always_raises():
    """Its messages of a second exchange in a round are fewer than the quorum."""
    strategy, result, _ = run(
        Periodic(1), 4, m=5, grid=grid_of(5, step=always(1)), recovery=QUORUM_OF_2
    )
    absent = [{e["participant"] for e in entry.absences} for entry in strategy.history]
    assert absent == [{"partition-1"}] * 4
    w = np.zeros(3, np.float32)
    for index in range(4):
        steps = [sgd(w, *batch(k, index))[0] for k in (0, 2, 3, 4)]
        w = np.mean(np.asarray(steps, np.float64), axis=0).astype(np.float32)
    np.testing.assert_array_equal(result.arrays["w"].numpy(), w)


def refuse(action, k):
    """A mod with which learner k fails for messages of one action."""

    def mod(message, context, call_next):
        config = message.content.get("config", {})
        if context.node_config["partition-id"] == k and config.get("action") == action:
            raise RuntimeError(f"no {action}")
        return call_next(message, context)

    return mod


@pytest.mark.parametrize("action", ["fetch", "set"])
def test_a_quorum_counts_those_that_an_exchange_does_not_address(action):
    rounds = 12
    grid = grid_of(5, mods=(participant_mod, refuse(action, 1)))
    strategy, _, _ = run(Dynamic(0.3), rounds, m=5, grid=grid, recovery=QUORUM_OF_2)
    assert len(strategy.history) == rounds
    assert {e["participant"] for r in strategy.history for e in r.absences} == {"partition-1"}


def test_fewer_than_the_quorum_end_the_run_in_a_second_exchange_too():
    """Five of which three are lost: two train, and one of them does not send its model."""
    broken = {0, 3, 4}

    def step(index, t, arrays):
        if index in broken:
            raise RuntimeError("broken for good")
        return arrays

    grid = grid_of(5, step=step, mods=(participant_mod, refuse("fetch", 1)))
    with pytest.raises(ColearnError, match="at least 2 of 2, lost participant partition-1"):
        run(Dynamic(1e6), 1, m=5, grid=grid, recovery=QUORUM_OF_2)


def test_if_nobody_trained_the_error_has_the_reasons():
    def step(index, t, arrays):
        raise RuntimeError("no data")

    with pytest.raises(ColearnError, match="found none") as caught:
        run(Periodic(1), 1, m=2, grid=grid_of(2, step=step), recovery=None)
    failed = "the participant failed (code 2): ParticipantError: RuntimeError"
    for name in ("1", "2"):
        assert f"{name}: {failed}" in str(caught.value)


def foreign_app(**metrics):
    """A learner whose replies are not made by the decorator."""
    app = ClientApp(mods=[participant_mod])

    @app.train()
    def train(message, context):
        content = {
            "learner": ConfigRecord({"examples": 1, "distance": 0.0}),
            "metrics": MetricRecord(metrics),
        }
        return Message(RecordDict(content), reply_to=message)

    return app


@pytest.mark.parametrize("examples", [-40, 0, -1.0, math.nan, math.inf, 2**63 - 1])
def test_an_impossible_number_of_examples_is_a_bad_reply(examples):
    grid = InProcessGrid(foreign_app(**{"num-examples": examples, "loss": 1.0}), 1)
    with pytest.raises(ColearnError, match="'num-examples' in the reply's metrics: expected"):
        run(Never(), 1, m=1, grid=grid, recovery=QUICK)


def test_metrics_without_a_number_of_examples_are_a_bad_reply():
    with pytest.raises(ColearnError, match="'num-examples' in the reply's metrics: expected"):
        run(Never(), 1, m=1, grid=InProcessGrid(foreign_app(loss=1.0), 1), recovery=QUICK)


@pytest.mark.parametrize("losses", [(1e308, 1e308), (math.inf, -math.inf)])
def test_losses_beyond_numbers_are_no_loss_and_no_end(losses):
    app = ClientApp(mods=[participant_mod])

    @learner(app)
    def train(message, context):
        loss = losses[context.node_config["partition-id"]]
        metrics = MetricRecord({"num-examples": 1, "loss": loss})
        content = {"arrays": message.content["arrays"], "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    strategy, _, _ = run(Never(), 2, m=2, grid=InProcessGrid(app, 2))
    assert [entry.loss for entry in strategy.history] == [None, None]


def test_a_learner_that_lost_its_state_says_so_and_gets_it_anew(flower_log):
    grid = grid_of()
    strategy = DynamicAveraging(1e6, num_learners=M)

    def wipe(server_round, arrays):
        if server_round == 2:
            grid.contexts[3].state = RecordDict()

    strategy.start(grid, zeros(), num_rounds=4, evaluate_fn=wipe)
    lost = [entry.lost for entry in strategy.history]
    assert lost == [[], [], [{"participant": "partition-2", "reason": "it has no state"}], []]
    assert "learner partition-2 is reinitialised: it has no state" in flower_log.text
    assert strategy.history.records[2].moved["models_down"] == 1
    w = np.zeros(3, np.float32)  # from the reference, on the batches of rounds 3 and 4
    for index in (2, 3):
        w, _ = sgd(w, *batch(2, index))
    np.testing.assert_array_equal(models(grid)[2]["w"], w)


def test_a_state_dir_keeps_the_state_of_a_supernode_that_dies(tmp_path):
    clean, _, _ = run(Dynamic(0.3), 8)
    configs = [{"state-dir": str(tmp_path / str(k))} for k in range(M)]
    other = InProcessGrid(client_app(), M, node_configs=configs)
    strategy = DynamicAveraging(0.3, num_learners=M, seed=0)

    def wipe(server_round, arrays):
        for context in other.contexts.values():
            context.state = RecordDict()

    strategy.start(other, zeros(), num_rounds=8, evaluate_fn=wipe)
    assert [entry.lost for entry in strategy.history] == [[]] * 8
    assert [e.moved for e in strategy.history] == [e.moved for e in clean.history]
    assert strategy.history.cumulative_loss == clean.history.cumulative_loss


def test_a_damaged_state_on_disk_is_a_lost_one(tmp_path):
    configs = [{"state-dir": str(tmp_path)}]
    grid = InProcessGrid(client_app(), 1, node_configs=configs)
    strategy = DynamicAveraging(1e6, num_learners=1)

    def damage(server_round, arrays):
        grid.contexts[1].state = RecordDict()
        for path in tmp_path.rglob("*.state"):
            path.write_bytes(b"damaged")

    strategy.start(grid, zeros(), num_rounds=3, evaluate_fn=damage)
    assert [len(entry.lost) for entry in strategy.history] == [0, 1, 1]


class Repeating(InProcessGrid):
    """Delivers every message twice, as a restart after a lost reply does."""

    def push_messages(self, messages):
        batch = list(messages)
        for message in batch:
            again = Message(message.content, message.metadata.dst_node_id, "train")
            again.metadata.__dict__["_message_type"] = message.metadata.message_type
            super().push_messages([again])
        return super().push_messages(batch)


def test_a_repeated_message_changes_nothing():
    clean, _, grid = run(Dynamic(0.3), 12)
    strategy, _, other = run(Dynamic(0.3), 12, grid=Repeating(client_app(), M))
    assert final(grid) == final(other)
    assert [e.cumulative_loss for e in clean.history] == [
        e.cumulative_loss for e in strategy.history
    ]


def test_without_recovery_a_learner_that_fails_is_left_out_of_the_round():
    strategy, _, _ = run(Periodic(1), 4, grid=grid_of(step=failing(1)), recovery=None)
    refused = [[e["reason"] for e in entry.refusals] for entry in strategy.history]
    assert [len(each) for each in refused] == [0, 0, 1, 0]
    assert "RuntimeError: the text stays in the participant's log" in refused[2][0]
    assert [len(entry.lost) for entry in strategy.history] == [0, 0, 0, 1]


def test_a_client_without_the_decorator_is_told_what_to_do():
    app = ClientApp()

    @app.train()
    def train(message, context):
        return Message(RecordDict(), reply_to=message)

    strategy = DynamicAveraging(1.0, num_learners=1, recovery=QUICK)
    with pytest.raises(ColearnError, match=r"decorate the training function with @learner\(app\)"):
        strategy.start(InProcessGrid(app, 1), zeros())


def test_under_another_strategy_the_decorated_function_says_what_is_missing():
    grid = RecoveringGrid(grid_of(2), QUICK)
    with pytest.raises(ColearnError, match="is the strategy on the server DynamicAveraging"):
        FedAvg(fraction_evaluate=0.0).start(grid, zeros(), num_rounds=1)


# Checkpoint and resume --------------------------------------------------------------------------


class CrashError(Exception):
    pass


class Crashing(InProcessGrid):
    """A server that dies at message number `after`."""

    after = math.inf

    def push_messages(self, messages):
        for message in messages:
            self.after -= 1
            if self.after < 0:
                raise CrashError
            yield from super().push_messages([message])


@pytest.fixture(scope="module")
def uninterrupted():
    strategy, result, grid = run(Dynamic(0.3), 10)
    assert {entry.synchronised for entry in strategy.history} == {"none", "partial", "full"}
    return strategy, result, final(grid)


@pytest.mark.parametrize("after", range(1, 71, 3))
def test_a_run_that_was_killed_at_any_message_resumes_to_the_same_end(
    tmp_path, after, uninterrupted
):
    clean, clean_result, models_of_clean = uninterrupted
    history = tmp_path / "history.jsonl"

    def make():
        return DynamicAveraging(
            0.3, num_learners=M, seed=0, checkpoints=tmp_path / "c", history=history
        )

    grid = Crashing(client_app(), M)
    grid.after = after
    with pytest.raises(CrashError):
        make().start(grid, zeros(), num_rounds=10)
    grid.after = math.inf
    strategy = make()
    result = strategy.start(grid, zeros(), num_rounds=10, resume="auto")
    assert final(grid) == models_of_clean
    assert result.arrays["w"].data == clean_result.arrays["w"].data
    # And once more, when nothing is left to train.
    again = make().start(grid, zeros(), num_rounds=10, resume="auto")
    assert again.arrays["w"].data == clean_result.arrays["w"].data
    assert [entry.lost for entry in strategy.history] == [[]] * 10
    for one, other in zip(clean.history, strategy.history, strict=True):
        for name in ("cumulative_loss", "reporters", "synchronised", "violations"):
            assert getattr(one, name) == getattr(other, name), (one.round, name)
    assert DynamicHistory.read(history).records == strategy.history.records


def test_a_run_that_was_killed_while_it_evaluated_resumes_to_the_same_end(tmp_path, uninterrupted):
    def crash(server_round, arrays):
        if server_round == 5:
            raise CrashError

    grid = grid_of()
    arguments = {"num_learners": M, "seed": 0, "checkpoints": tmp_path}
    with pytest.raises(CrashError):
        DynamicAveraging(0.3, **arguments).start(grid, zeros(), 10, evaluate_fn=crash)
    DynamicAveraging(0.3, **arguments).start(grid, zeros(), 10, resume="auto")
    assert final(grid) == uninterrupted[2]


def test_a_finished_run_that_is_resumed_returns_the_mean_of_all_models(tmp_path):
    """And not the reference, which may be rounds old."""
    strategy = DynamicAveraging(1e6, num_learners=M, seed=0, checkpoints=tmp_path)
    result = strategy.start(grid_of(), zeros(), num_rounds=3)
    assert strategy.history.records[-1].synchronised == "none"
    again = DynamicAveraging(1e6, num_learners=M, seed=0, checkpoints=tmp_path)
    resumed = again.start(grid_of(), zeros(), num_rounds=3, resume="auto")
    assert resumed.arrays["w"].data == result.arrays["w"].data
    assert result.arrays["w"].numpy().any()  # the reference is still zero


def test_resuming_learners_without_state_begin_anew_from_the_reference(tmp_path):
    def make():
        return DynamicAveraging(1e6, num_learners=M, seed=0, checkpoints=tmp_path)

    make().start(grid_of(), zeros(), num_rounds=3)
    strategy = make()
    strategy.start(grid_of(), zeros(), num_rounds=5, resume="auto")
    assert [len(entry.lost) for entry in strategy.history] == [0, 0, 0, M, 0]


@pytest.mark.parametrize(
    ("initial", "roles", "what"),
    [
        (record(w=np.zeros(4, np.float32)), None, "model"),
        (record(v=np.zeros(3, np.float32)), None, "model"),
        (record(w=np.zeros(3)), None, "model"),
        (zeros(), {"w": "buffer"}, "roles"),
    ],
)
def test_another_model_or_role_is_not_resumed(initial, roles, what, tmp_path):
    arguments = {"num_learners": M, "checkpoints": tmp_path}
    DynamicAveraging(1.0, **arguments).start(grid_of(), zeros(), 1)
    strategy = DynamicAveraging(1.0, roles=roles, **arguments)
    with pytest.raises(ColearnError, match=f"found another {what}: "):
        strategy.start(grid_of(), initial, 2, resume="auto")


def test_checkpoints_are_refused_where_they_do_not_belong(tmp_path):
    DynamicAveraging(1.0, num_learners=M, checkpoints=tmp_path).start(grid_of(), zeros(), 1)
    with pytest.raises(ColearnError, match="expected none, since resume='never'"):
        DynamicAveraging(1.0, num_learners=M, checkpoints=tmp_path).start(grid_of(), zeros(), 2)
    with pytest.raises(ColearnError, match="found another operator"):
        DynamicAveraging(2.0, num_learners=M, checkpoints=tmp_path).start(
            grid_of(), zeros(), 2, resume="auto"
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", -1.0),
        ("num_learners", 0),
        ("check_every", 0),
        ("evaluate_mean_every", 0),
        ("wait_for_participants", -1),
    ],
)
def test_arguments_outside_their_range_are_refused(name, value):
    with pytest.raises(ColearnError, match=f"{name}: expected .* of at least .*, found {value}"):
        DynamicAveraging(**{"threshold": 1.0, "num_learners": 2, name: value})


def test_too_few_learners_are_said(tmp_path):
    strategy = DynamicAveraging(1.0, num_learners=5, wait_for_participants=0.0)
    with pytest.raises(ColearnError, match="participants: expected 5, found 4"):
        strategy.start(grid_of(), zeros())


def test_further_entries_of_the_train_config_reach_the_function():
    seen = []
    app = ClientApp()

    @learner(app)
    def train(message, context):
        seen.append(message.content["config"]["lr"])
        content = {
            "arrays": message.content["arrays"],
            "metrics": MetricRecord({"num-examples": 1}),
        }
        return Message(RecordDict(content), reply_to=message)

    strategy = DynamicAveraging(1.0, num_learners=1)
    strategy.start(InProcessGrid(app, 1), zeros(), 2, train_config=ConfigRecord({"lr": 0.5}))
    assert seen == [0.5, 0.5]


def test_the_loop_of_others_is_refused():
    strategy = DynamicAveraging(1.0, num_learners=1)
    with pytest.raises(ColearnError, match="expected to run in its own start"):
        strategy.configure_train(1, zeros(), ConfigRecord(), grid_of(1))
