import contextlib
import logging
import math
import re
from collections import Counter

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import DEFAULT_TTL
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAdam, FedAvg
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flwr_colearn import (
    ColearnError,
    CyclicalRate,
    IncreasingEpochs,
    InProcessGrid,
    LocalPlan,
    Quorum,
    RecoveringGrid,
    Recovery,
    Transport,
)
from tests.faults import (
    BAD_REPLIES,
    EXAMPLES,
    FAILURES,
    FAULTS,
    MODEL,
    UNSEEN,
    FaultyGrid,
    bits,
    numpy_of,
    outcome,
    participants,
    random_faults,
    record_of,
    strategy_of,
    train,
)

K = 4
NAMES = [f"partition-{k}" for k in range(K)]


@pytest.fixture(autouse=True)
def quiet_log(monkeypatch):
    """Participants that fail to order are no news; thousands of rounds are logged faster so."""
    monkeypatch.setattr(logging.getLogger("flwr"), "level", logging.CRITICAL)


def run(grid, rounds=4, timeout=60.0, **kwargs):
    """Run co-learning, and return all of it that faults must not change, and its history."""
    strategy = strategy_of(len(grid.contexts), **kwargs)
    result = strategy.start(grid, record_of(MODEL), num_rounds=rounds, timeout=timeout)
    return outcome(strategy, result), strategy.history.records


def clean(clock, rounds=4, **kwargs):
    return run(FaultyGrid(clock), rounds, **kwargs)[0]


def failing(k, round_=2, attempts=range(2000), kind="raises"):
    """Participant k fails in one round for good."""
    return {(round_, k, attempt): kind for attempt in attempts}


def check_records(grid, records):
    """Every participant is in every round, and every fault that Flower shows is on record."""
    names = {str(node): f"partition-{k}" for node, k in grid.partitions.items()}

    def by_participant(entries):
        # In the first round nobody has said its name before it has replied.
        return Counter(names.get(each["participant"], each["participant"]) for each in entries)

    size = sum(len(array.data) for array in record_of(MODEL).values())
    for record in records:
        assert sorted(record.participants) == NAMES
        assert record.absences == []
        faults = [(k, kind) for round_, k, kind in grid.injected if round_ == record.round]
        restarts = Counter(NAMES[k] for k, kind in faults if kind not in UNSEEN)
        refusals = Counter(NAMES[k] for k, kind in faults if kind in BAD_REPLIES)
        assert by_participant(record.restarts) == restarts
        assert by_participant(record.refusals) == refusals
        rejected = sum(kind == "not accepted" for _, kind in faults)
        pushed = sum(each.round == record.round for each in grid.attempts) - rejected
        assert record.bytes_down == pushed * size
        evaluation = record.evaluation.get("bytes_up", 0)  # strays arrive while others evaluate
        assert record.bytes_up + evaluation == grid.bytes_up[record.round]


# A run with faults is the run without --------------------------------------------------------


@pytest.mark.parametrize("kind", FAULTS)
def test_a_run_with_a_fault_ends_with_the_same_bits_as_the_run_without(kind, clock):
    grid = FaultyGrid(clock, {(2, 1, 0): kind})
    found, records = run(grid)
    assert found == clean(clock)
    assert grid.injected == [(2, 1, kind)]
    check_records(grid, records)
    for entries, reasons in ((records[1].restarts, FAILURES), (records[1].refusals, BAD_REPLIES)):
        if kind in reasons:
            [entry] = entries
            assert entry["participant"] == "partition-1"
            reason = reasons[kind] if reasons is FAILURES else reasons[kind][1]
            assert re.search(reason, entry["reason"])


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("round_", [1, 2])
def test_all_participants_may_fail_at_once_and_again(kind, round_, clock):
    times = 1 if kind in BAD_REPLIES else 2
    faults = {(round_, k, attempt): kind for k in range(K) for attempt in range(times)}
    grid = FaultyGrid(clock, faults)
    found, records = run(grid)
    assert found == clean(clock)
    assert len(grid.injected) == K * (1 if kind in UNSEEN else times)
    check_records(grid, records)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_rounds_with_faults_of_every_kind_end_with_the_same_bits(seed, clock):
    grid = FaultyGrid(clock, random_faults(seed, rounds=100))
    found, records = run(grid, rounds=100)
    assert found == clean(clock, rounds=100)
    assert {kind for *_, kind in grid.injected} == set(FAULTS)
    assert len(records) == 100
    check_records(grid, records)


def test_the_log_sums_up_what_recovery_had_to_do(clock, flower_log):
    run(FaultyGrid(clock, {(1, 1, 0): "code 8", (2, 1, 0): "NaN", (3, 1, 0): "lost"}))
    assert "Run: 3 restarts ({'partition-1': 3})" in flower_log.text
    assert "Run: 1 refusals ({'partition-1': 1})" in flower_log.text


# Recovering any strategy ------------------------------------------------------------------------


def whole(k, plan, arrays):  # exact in float32, in whatever order FedAvg sums
    return {name: array + np.asarray(k + 1, array.dtype) for name, array in arrays.items()}


def fedavg(grid):
    config = ConfigRecord({"local-epochs": 1, "learning-rate": 0.1})
    strategy = FedAvg(min_train_nodes=K, min_available_nodes=K, min_evaluate_nodes=K)
    model = {"w": np.zeros(3, np.float32), "b": np.ones((), np.float32)}
    result = strategy.start(grid, record_of(model), num_rounds=3, train_config=config)
    metrics = result.train_metrics_clientapp
    return bits(result.arrays), {round_: dict(each) for round_, each in metrics.items()}


@pytest.mark.parametrize(
    "kind", ["raises", "code 5", "code 8", "comes back as another node", "not accepted"]
)
def test_fedavg_recovers_on_a_recovering_grid(kind, clock):
    faults = {(2, 1, 0): kind, (3, 0, 0): kind, (3, 0, 1): kind}
    grid = FaultyGrid(clock, faults, train=whole)
    recovering = RecoveringGrid(grid)
    assert fedavg(recovering) == fedavg(InProcessGrid(grid.client_app, K))
    assert grid.injected == [(2, 1, kind), (3, 0, kind), (3, 0, kind)]
    assert [(each.kind, each.participant) for each in recovering.take_events()] == [
        ("restart", "partition-1"),
        ("restart", "partition-0"),
        ("restart", "partition-0"),
    ]
    assert recovering.take_events() == []


def test_without_a_recovering_grid_fedavg_would_not_have(clock):
    faults = {(2, 1, 0): "code 5"}
    assert fedavg(FaultyGrid(clock, faults, train=whole)) != fedavg(FaultyGrid(clock, train=whole))


def private(strategy):
    return DifferentialPrivacyServerSideFixedClipping(
        strategy, noise_multiplier=0.0, clipping_norm=1e6, num_sampled_clients=K
    )


@pytest.mark.parametrize("kind", ["raises", "comes back as another node", "NaN", "no examples"])
def test_differential_privacy_recovers_on_a_recovering_grid(kind, clock):
    def start(faults):
        strategy, grid = strategy_of(), FaultyGrid(clock, faults)
        result = private(strategy).start(
            grid=Transport().connect(grid), initial_arrays=record_of(MODEL), num_rounds=3
        )
        return outcome(strategy, result), strategy.history.records, grid

    expected, *_ = start({})
    found, records, grid = start({(2, 1, 0): kind, (3, 2, 0): kind})
    assert found == expected
    check_records(grid, records)


def test_other_messages_pass_unchanged(clock):
    grid = FaultyGrid(clock)
    recovering = RecoveringGrid(grid)
    content = {"arrays": record_of(MODEL), "config": ConfigRecord({"server-round": 1})}
    messages = [Message(RecordDict({**content}), node, "evaluate") for node in (3, 1)]
    replies = recovering.send_and_receive(messages)
    names = [each.content["colearn"]["participant"] for each in replies]
    assert names == ["partition-2", "partition-0"]
    assert list(recovering.send_and_receive([])) == []
    assert recovering.take_events() == []


# Policies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [0, 1, 3])
@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind not in UNSEEN])
def test_fail_ends_the_run_with_the_model_of_the_last_completed_round(kind, restarts, clock):
    grid = FaultyGrid(clock, failing(k=1, round_=3, kind=kind))
    strategy = strategy_of(recovery=Recovery(restarts))
    reason = FAILURES.get(kind) or BAD_REPLIES[kind][1]
    if kind in BAD_REPLIES:  # which cannot differ the next time
        restarts = min(restarts, 1)
    match = rf"at least 4 of 4, lost participant partition-1: .*{reason}.*\(after {restarts} rest"
    with pytest.raises(ColearnError, match=match) as error:
        strategy.start(grid, record_of(MODEL), num_rounds=5, timeout=60.0)
    assert outcome(strategy, error.value.result) == clean(clock, rounds=2)
    assert Counter(each.k for each in grid.attempts if each.round == 3)[1] == restarts + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number"), [("raises", 1100), ("NaN", 1100), ("lost", 100), ("not accepted", 1100)]
)
def test_wait_outlasts_any_number_of_failures(kind, number, clock, monkeypatch):
    # An attempt that is lost is polled for until its time limit, an hour or more.
    monkeypatch.setattr("flwr_colearn.recovery.attempts.LONGEST_POLL", 1000.0)
    grid = FaultyGrid(clock, failing(k=2, attempts=range(number), kind=kind))
    found, records = run(grid, rounds=2, recovery=Recovery(policy="wait"))
    assert found == clean(clock, rounds=2)
    assert len(records[1].restarts) == number


def test_wait_waits_for_a_node_as_long_as_it_takes(clock):
    grid = FaultyGrid(clock, {(2, 2, 0): "leaves"})
    grid.away = 1e5
    found, _ = run(grid, recovery=Recovery(patience=600.0, policy="wait"))
    assert found == clean(clock)


@pytest.mark.parametrize("away", [500.0, math.inf])
def test_patience_ends_for_a_node_that_does_not_come_back(away, clock):
    grid = FaultyGrid(clock, {(2, 2, 0): "leaves"})
    grid.away = away
    began = clock.now
    if away < 600:
        assert run(grid, recovery=Recovery(patience=600.0))[0] == clean(clock)
    else:
        match = "partition-2: it left and did not come back within 600 s"
        with pytest.raises(ColearnError, match=match):
            run(grid, recovery=Recovery(patience=600.0))
        assert 600 <= clock.now - began < 610


def test_pauses_double_up_to_a_minute(clock, monkeypatch):
    monkeypatch.setattr("flwr_colearn.recovery.attempts.LONGEST_POLL", 0.01)
    grid = FaultyGrid(clock, failing(k=0, attempts=range(8)))
    run(grid, rounds=2, recovery=Recovery(max_restarts=8))
    times = [each.at for each in grid.attempts if (each.round, each.k) == (2, 0)]
    assert np.diff(times) == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60], abs=0.02)


def test_a_quorum_averages_exactly_those_that_replied(clock):
    grid = FaultyGrid(clock, failing(k=1))
    shared = []
    strategy = strategy_of(recovery=Recovery(policy=Quorum(3)), fraction_evaluate=0.0)
    strategy.start(
        grid,
        record_of(MODEL),
        num_rounds=3,
        evaluate_fn=lambda _, arrays: shared.append(numpy_of(arrays)),
    )
    first, second, third = strategy.history.records
    plan = LocalPlan.of(
        CyclicalRate(second.learning_rate, 0.25), 2, second.local_epochs, first.epochs_done
    )
    models = [train(k, plan, shared[1]) for k in (0, 2, 3)]
    for name in ("fc.weight", "fc.bias", "bn.running_mean"):
        mean = sum(model[name].astype(np.float64) for model in models) / 3
        np.testing.assert_array_equal(shared[2][name], mean.astype(MODEL[name].dtype))
    assert second.participants == ["partition-0", "partition-2", "partition-3"]
    assert second.train_metrics == {"loss": (EXAMPLES[2] * 2 + EXAMPLES[3] * 3) / 5}
    assert len(second.restarts) == 3
    [absence] = second.absences
    assert absence["participant"] == "partition-1"
    assert re.search(r"disk on fire \(after 3 restarts\)", absence["reason"])
    assert sorted(third.participants) == NAMES  # it is asked again
    assert third.absences == []


@pytest.mark.slow
@given(
    faults=st.dictionaries(
        st.tuples(st.integers(1, 3), st.integers(0, K - 1)),
        st.sampled_from([kind for kind in FAULTS if kind not in UNSEEN]),
    ),
    policy=st.sampled_from(["fail", *map(Quorum, range(1, K + 1))]),
)
@settings(
    max_examples=150,
    phases=[Phase.explicit, Phase.generate],  # shrinking is slow where a case is a whole run
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_round_averages_fewer_than_the_policy_allows(clock, faults, policy):
    """Participants that fail twice where one restart is allowed are lost in that round."""
    present = [
        [f"partition-{k}" for k in range(K) if (round_, k) not in faults] for round_ in (1, 2, 3)
    ]
    least = policy.least if isinstance(policy, Quorum) else K
    rounds = next((i for i in range(3) if len(present[i]) < least), 3)
    schedule = {(*key, attempt): kind for key, kind in faults.items() for attempt in range(2)}
    strategy = strategy_of(recovery=Recovery(1, policy=policy), fraction_evaluate=0.0)
    try:
        strategy.start(FaultyGrid(clock, schedule), record_of(MODEL), timeout=60.0)
    except ColearnError:
        assert len(strategy.history) == rounds < 3
    else:
        assert rounds == 3
    for record, names in zip(strategy.history, present, strict=False):
        assert sorted(record.participants) == names
        assert len(record.absences) == K - len(names)


def test_a_participant_that_stays_away_is_absent_from_every_round(clock):
    grid = FaultyGrid(clock, {(2, 2, 0): "leaves"})
    grid.away = math.inf
    found = run(grid, rounds=4, recovery=Recovery(policy=Quorum(3)))[1]
    for record in found[1:]:
        assert sorted(record.participants) == ["partition-0", "partition-1", "partition-3"]
        assert [absence["participant"] for absence in record.absences] == ["partition-2"]


class NotingGrid(FaultyGrid):
    """Notes when each round's evaluation on the server takes place."""

    def starts_of(self, strategy, rounds):
        times = []
        strategy.start(
            self,
            record_of(MODEL),
            num_rounds=rounds,
            evaluate_fn=lambda *_: times.append(self.clock.now),
        )
        return np.diff(times)


@pytest.mark.parametrize("when", ["in the round", "between rounds"])
def test_a_quorum_waits_once_for_a_participant_that_is_gone(when, clock, flower_log):
    """Patience is 600 s; nothing else takes time."""
    grid = NotingGrid(clock, {(2, 2, 0): "leaves"} if when == "in the round" else {})
    grid.away = math.inf
    if when == "between rounds":
        grid.leave(3, seconds=math.inf)
    strategy = strategy_of(recovery=Recovery(policy=Quorum(2)))
    took = grid.starts_of(strategy, rounds=5)
    waited = {"in the round": 1, "between rounds": 0}[when]
    assert [round(each, -2) for each in took] == [600 if i == waited else 0 for i in range(5)]
    for record in strategy.history.records[waited:]:
        assert record.participants == [NAMES[0], NAMES[1], NAMES[3]]
    # One line a minute at most while nodes are missing, and one for a participant of the round.
    lines = [each.getMessage() for each in flower_log.records if "aiting for" in each.getMessage()]
    assert len(lines) <= 11


def test_a_participant_that_is_back_is_waited_for_again(clock):
    grid = NotingGrid(clock, {(2, 2, 0): "leaves", (5, 2, 0): "leaves"})
    grid.away = 700.0
    strategy = strategy_of(recovery=Recovery(policy=Quorum(2)))
    found = []

    def look(server_round, arrays):
        found.append(clock.now)
        clock.now += 200.0

    strategy.start(grid, record_of(MODEL), num_rounds=7, evaluate_fn=look)
    present = [len(record.participants) for record in strategy.history]
    assert present == [4, 3, 4, 4, 3, 4, 4]
    assert [round(each, -2) - 200 for each in np.diff(found)] == [0, 600, 0, 0, 600, 0, 0]


def test_a_restart_is_recorded_when_it_takes_place_and_a_wait_is_logged_once(clock, flower_log):
    grid = FaultyGrid(clock, {(2, 2, 0): "leaves"})
    grid.away = math.inf
    _, records = run(grid, recovery=Recovery(policy=Quorum(3)))
    assert records[1].restarts == []
    [absence] = records[1].absences
    assert re.search(r"did not come back within 600 s: .*code 5", absence["reason"])
    lines = warnings_of(flower_log)
    [line] = [each for each in lines if "waiting for" in each]
    assert "waiting for participant partition-2 to reconnect, at most 600 s: " in line
    assert not [each for each in lines if "restart of" in each]


def test_one_that_always_replies_just_in_time_does_not_stretch_the_limits(clock):
    """The limit is 100 s at first; T stays 1, so no honest reason to grow beyond 3 times 2."""
    grid = FaultyGrid(clock)
    grid.seconds_per_epoch = 30.0
    push = grid._push

    def just_in_time(message):
        limit = message.content.get("config", {}).get("time-limit")
        if message.metadata.dst_node_id == 1 and limit is not None:
            grid.seconds_per_epoch = 90.0 if limit == 100.0 else 0.95 * limit
        else:
            grid.seconds_per_epoch = 30.0
        return push(message)

    grid._push = just_in_time
    run(grid, rounds=8, timeout=100.0, local_epochs=1)
    limits = {each.round: each.time_limit for each in grid.attempts}
    # 90 s in the first round, of which twice counts, and three times that.
    assert limits[8] == pytest.approx(3 * 2 * 90, rel=0.1)
    assert limits[8] == limits[4]


BEYOND_THE_SUM = {  # kind: array of participant 2's first reply, its number of examples
    "integer": ("n", np.array(2**63 - 1), 1),
    "least integer": ("n", np.array(-(2**63)), 1),
    "integer that two others would not fit beside": ("n", np.array(2**61), 1),
    "float64": ("d", np.full(3, 1e308), 1),
    "examples": ("n", np.array(1), 2**60),
}


@pytest.mark.parametrize("policy", ["fail", Quorum(1)])
@pytest.mark.parametrize("kind", BEYOND_THE_SUM)
def test_a_reply_that_cannot_be_summed_is_refused_and_nobody_elses(kind, policy, clock):
    name, value, examples = BEYOND_THE_SUM[kind]
    initial = {"w": np.ones(2, np.float32), "n": np.array(1), "d": np.zeros(3)}
    sent = []

    def spoil(message, context, call_next):
        reply = call_next(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 2:
            if not sent:
                reply.content["arrays"][name] = Array(value)
                reply.content["metrics"]["num-examples"] = examples
            sent.append(1)
        return reply

    def add(k, plan, arrays):
        return {name: array + np.asarray(k, array.dtype) for name, array in arrays.items()}

    grid = FaultyGrid(clock, k=5, train=add)
    grid.client_app = participants(add, mods=[spoil])
    strategy = strategy_of(5, recovery=Recovery(policy=policy), weighting="weighted")
    result = strategy.start(grid, record_of(initial), num_rounds=1)
    (record,) = strategy.history
    assert record.participants == [f"partition-{k}" for k in range(5)]
    assert [entry["participant"] for entry in record.refusals] == ["partition-2"]
    assert [entry["participant"] for entry in record.restarts] == ["partition-2"]
    weights = [EXAMPLES[k % K] for k in range(5)]
    expected = 1 + np.average(range(5), weights=weights)
    np.testing.assert_allclose(result.arrays["w"].numpy(), expected, rtol=1e-6)


def test_one_registered_name_of_two_nodes_is_refused_at_the_second(clock):
    grid = FaultyGrid(clock, named=False)
    grid.registered = {1: "site-a", 2: "site-b", 3: "site-a", 4: "site-d"}
    strategy = strategy_of(recovery=Recovery(1, policy=Quorum(3)))
    strategy.start(grid, record_of(MODEL), num_rounds=1)
    (record,) = strategy.history
    assert record.participants == ["site-a", "site-b", "site-d"]
    assert all(entry["participant"] == "site-a" for entry in record.refusals)
    assert "node 3" in record.refusals[0]["reason"]
    assert "node 1 too" in record.refusals[0]["reason"]


@pytest.mark.parametrize("strategy", [FedAvg, FedAdam])
def test_stock_strategies_keep_the_types_that_were_sent_first(strategy):
    """Batch norm's counter comes back from FedAvg as float64, everything from FedAdam."""
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    app, seen = ClientApp(), []

    @app.train()
    def _(message, context):
        state = message.content["arrays"].to_torch_state_dict()
        seen.append({name: tensor.dtype for name, tensor in state.items()})
        net.load_state_dict(state)
        k = context.node_config["partition-id"]
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(k))
        net(inputs).square().mean().backward()
        optimizer.step()
        content = {"arrays": ArrayRecord(net.state_dict())}
        content["metrics"] = MetricRecord({"num-examples": 8 + k})
        return Message(RecordDict(content), reply_to=message)

    initial = ArrayRecord(net.state_dict())
    grid = RecoveringGrid(InProcessGrid(app, 3))
    wrapped = strategy(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    wrapped.start(grid, initial, num_rounds=3)
    assert len(seen) == 9
    assert all(types == {n: t.dtype for n, t in net.state_dict().items()} for types in seen)
    assert grid.take_events() == []


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Recovery(max_restarts=-1), "max_restarts: expected a whole number"),
        (lambda: Recovery(max_restarts=1.5), "max_restarts: expected a whole number"),
        (lambda: Recovery(pause=-1.0), "pause: expected a number of at least 0"),
        (lambda: Recovery(pause=math.nan), "pause: expected a finite number"),
        (lambda: Recovery(patience=-1.0), "patience: expected a number of at least 0"),
        (lambda: Recovery(policy="quorum"), "policy: expected 'fail', 'wait' or Quorum"),
        (lambda: Recovery(policy=3), "policy: expected 'fail', 'wait' or Quorum"),
        (lambda: Quorum(0), "quorum: expected a whole number of at least 1"),
    ],
)
def test_impossible_settings_are_refused(make, match):
    with pytest.raises(ColearnError, match=match):
        make()


# Who is who -------------------------------------------------------------------------------------


def nodes_of(grid, round_, k=None):
    return [each.node_id for each in grid.attempts if each.round == round_ and k in (None, each.k)]


def test_several_that_left_at_once_are_told_apart_by_name(clock):
    grid = FaultyGrid(clock, {(2, 0, 0): "leaves", (2, 2, 0): "leaves", (2, 3, 0): "leaves"})
    back = {1: (201, 50.0), 3: (200, 10.0), 4: (199, 30.0)}  # in another order than they left

    def leave(node, **kwargs):
        FaultyGrid.leave(grid, node, seconds=back[node][1], come_back_as=back[node][0])

    grid.leave = leave
    found, records = run(grid)
    assert found == clean(clock)
    assert [nodes_of(grid, 2, k) for k in range(K)] == [[1, 201], [2], [3, 200], [4, 199]]
    assert [each["participant"] for each in records[1].restarts] == [NAMES[2], NAMES[3], NAMES[0]]
    assert sorted(nodes_of(grid, 3)) == [2, 199, 200, 201]


@pytest.mark.parametrize("round_", [1, 2])  # in the first, the one that left has said no name
def test_a_newcomer_with_the_name_of_a_present_participant_is_not_taken(round_, clock):
    grid = FaultyGrid(clock, {(round_, 1, 0): "comes back as another node"})

    def leave(node, come_back_as):
        FaultyGrid.leave(grid, node, seconds=60.0, come_back_as=come_back_as)
        grid.join(50, **{"partition-id": 0})  # at once, and before the one that is missed

    grid.leave = leave
    found, _ = run(grid, rounds=round_, fraction_evaluate=0.0)
    assert found == clean(clock, rounds=round_, fraction_evaluate=0.0)
    assert nodes_of(grid, round_, 1) == [2, 100]
    assert 50 not in nodes_of(grid, round_)


def test_a_newcomer_with_a_name_of_its_own_is_not_taken_for_one_that_left(clock):
    grid = FaultyGrid(clock, {(2, 1, 0): "leaves"})

    def leave(node, **kwargs):
        FaultyGrid.leave(grid, node, seconds=math.inf)
        grid.join(50, **{"partition-id": 9})

    grid.leave = leave
    with pytest.raises(ColearnError, match="partition-1: it left and did not come back"):
        run(grid)
    assert 50 not in nodes_of(grid, 2)


def warnings_of(log):
    return [record.getMessage() for record in log.records if record.levelno == logging.WARNING]


def arrays_of(grid):
    return bits(strategy_of().start(grid, record_of(MODEL), num_rounds=4).arrays)


def test_without_names_a_newcomer_is_taken_and_the_log_says_that_this_is_assumed(clock, flower_log):
    grid = FaultyGrid(clock, {(2, 1, 0): "comes back as another node"}, named=False)
    assert arrays_of(grid) == arrays_of(FaultyGrid(clock, named=False))
    [warning] = [each for each in warnings_of(flower_log) if "assumption" in each]
    assert "participant 2 is back as node 100" in warning


def test_with_names_nothing_is_assumed(clock, flower_log):
    run(FaultyGrid(clock, {(2, 1, 0): "comes back as another node"}))
    assert not [each for each in warnings_of(flower_log) if "assumption" in each]
    assert "participant partition-1 is back as node 100" in flower_log.text


@pytest.mark.parametrize("name", ["partition-0", "a hospital"])
def test_two_sites_of_the_same_name_are_refused(name, clock):
    configs = [{"name": name} if k < 2 else {} for k in range(K)]
    grid = FaultyGrid(clock, node_configs=configs)
    strategy = strategy_of(recovery=Recovery(2))
    with pytest.raises(ColearnError, match=f"{name}, which is node 1 too; do two sites share"):
        strategy.start(grid, record_of(MODEL), num_rounds=1)
    assert nodes_of(grid, 1) == []  # before anybody trains


def ask(recovering, nodes, round_=1):
    config = ConfigRecord({"server-round": round_, "local-epochs": 1, "learning-rate": 0.1})
    content = RecordDict({"arrays": record_of(MODEL), "config": config})
    replies = recovering.send_and_receive(
        [Message(content, node, "train") for node in nodes], timeout=60.0
    )
    came_from = [reply.metadata.src_node_id for reply in replies]
    assert sorted(came_from) == sorted(recovering.node_ids)
    return recovering.node_ids


@pytest.mark.parametrize("named", [True, False])
def test_spare_nodes_that_were_there_never_take_a_place(named, clock):
    grid = FaultyGrid(clock, {(2, 1, 0): "leaves"}, named=named)
    grid.away = math.inf
    recovering = RecoveringGrid(grid)
    assert ask(recovering, [1, 2, 3], round_=1) == [1, 2, 3]
    with pytest.raises(ColearnError, match="it left and did not come back"):
        ask(recovering, [1, 2, 3], round_=2)
    assert {each.node_id for each in grid.attempts} == {1, 2, 3}


def test_one_that_is_back_before_its_old_node_is_given_up_is_found(clock):
    """A killed SuperNode is listed for a minute more; its successor is there by then."""
    grid = FaultyGrid(clock, {(2, 1, 0): "leaves"})
    grid.away = math.inf
    recovering = RecoveringGrid(grid)
    ask(recovering, [1, 2, 3, 4], round_=1)
    grid.join(100, **{"partition-id": 1})  # while node 2 is listed still
    assert ask(recovering, [1, 2, 3, 4], round_=2) == [1, 100, 3, 4]
    assert recovering.node_ids == [1, 100, 3, 4]


def register(grid, names):
    grid.registered.update(dict(zip(range(1, K + 1), names, strict=True)))


@pytest.mark.parametrize("named", [True, False])
def test_the_name_that_a_node_is_registered_with_decides(named, clock, flower_log):
    grid = FaultyGrid(clock, {(2, 1, 0): "leaves"}, named=named)
    register(grid, "abcd")
    grid.registered.update({50: "e", 100: "b"})

    def leave(node, **kwargs):
        FaultyGrid.leave(grid, node, seconds=60.0, come_back_as=100)
        grid.partitions[100] = 1
        grid.join(50, **{"partition-id": 1})  # a stranger, whatever it says of itself

    grid.leave = leave
    recovering = RecoveringGrid(grid)
    ask(recovering, [1, 2, 3, 4], round_=1)
    assert ask(recovering, [1, 2, 3, 4], round_=2) == [1, 100, 3, 4]
    assert not [each for each in warnings_of(flower_log) if "assumption" in each]


def test_one_that_comes_back_between_rounds_as_another_node_keeps_its_place_in_the_sum(clock):
    grid = FaultyGrid(clock)

    def evaluate(server_round, arrays):
        if server_round == 2:
            grid.leave(1, seconds=0.0, come_back_as=100)

    strategy = strategy_of()
    result = strategy.start(grid, record_of(MODEL), num_rounds=6, evaluate_fn=evaluate)
    grid.partitions[100] = 0
    assert bits(result.arrays) == clean(clock, rounds=6)[0]


# Clocks -----------------------------------------------------------------------------------------


def test_the_time_limit_grows_with_the_local_epochs_and_the_log_says_so(clock, flower_log):
    grid = FaultyGrid(clock, {(3, 1, 0): "raises"})
    grid.seconds_per_epoch = 10.0
    rule = IncreasingEpochs(1, epsilon=1e9, maximum=16)  # 1, 2, 4, 8, 16
    run(grid, rounds=5, timeout=100.0, local_epochs=rule)
    limits = {each.round: each.time_limit for each in grid.attempts}
    # Three times what the epochs are expected to take, to which the clock's polls add a little.
    assert limits == pytest.approx({1: 100, 2: 100, 3: 120, 4: 240, 5: 480}, rel=0.3)
    assert limits[2] == 100.0
    assert 0.0 < limits[3] - 120 < 36
    warnings = [each for each in warnings_of(flower_log) if "local epochs take about" in each]
    assert [int(each.split()[1]) for each in warnings] == [4, 8, 16]
    assert all("Raise `timeout`" in each and "`maximum` of the" in each for each in warnings)


def test_the_duration_of_a_round_is_that_of_its_longest_reply(clock):
    def duration(faults, nodes=range(1, K + 1)):
        bottom = FaultyGrid(clock, faults)
        bottom.seconds_per_epoch = 10.0
        grid = RecoveringGrid(bottom, Recovery(max_restarts=0, policy=Quorum(2)))
        plan = ConfigRecord(LocalPlan(1, 2, 0.1).to_config())
        content = RecordDict({"arrays": record_of(MODEL), "config": plan})
        messages = [Message(content, node, "train") for node in nodes]
        with contextlib.suppress(ColearnError):
            grid.send_and_receive(messages, timeout=100.0)
        return grid.seconds

    assert duration({}) == pytest.approx(20, rel=0.1)
    # A participant that never replied took 100 seconds, which say nothing about its speed.
    assert duration({(1, 0, 0): "lost"}) == pytest.approx(20, rel=0.1)
    for fault in ("lost", "raises"):
        assert duration({(1, k, 0): fault for k in range(K)}) == 0.0


def test_messages_live_twice_as_long_as_an_attempt_may_take(clock):
    grid = FaultyGrid(clock, {(1, 1, 0): "raises", (2, 1, 0): "lost"})
    run(grid, rounds=2, timeout=60.0)
    assert {each.ttl for each in grid.attempts} == {DEFAULT_TTL}
    grid = FaultyGrid(clock, {(1, 1, 0): "raises", (2, 1, 0): "lost"})
    run(grid, rounds=2, timeout=1e6)
    assert len(grid.attempts) == 2 * K + 2
    # Twice the wait for a reply, of restarts too; the end of a process is reported within 120 s.
    assert {each.ttl for each in grid.attempts} == {2 * (1e6 + 120)}


def test_without_a_limit_nobody_is_given_up(clock):
    grid = FaultyGrid(clock)
    grid.seconds_per_epoch = 1e5
    run(grid, rounds=2, timeout=math.inf)
    assert {each.time_limit for each in grid.attempts} == {None}
    # A round of weeks: Flower's 12 hours would drop its replies.
    assert {each.ttl for each in grid.attempts} == {365 * 86_400.0}
    assert len(grid.attempts) == 2 * K


@pytest.mark.parametrize(("seconds", "warned"), [(790.0, 0), (810.0, 4), (990.0, 4)])
def test_the_log_warns_once_before_a_limit_is_met(seconds, warned, clock, flower_log):
    grid = FaultyGrid(clock)
    grid.seconds_per_epoch = seconds
    run(grid, rounds=1, timeout=880.0)  # and two minutes for Flower to report
    warnings = [each for each in warnings_of(flower_log) if "no reply from participant" in each]
    assert len(warnings) == warned
    assert all("raise `timeout`" in each and "maximum=" in each for each in warnings)


def test_one_that_is_too_slow_is_restarted(clock):
    grid = FaultyGrid(clock)
    grid.seconds_per_epoch = 1010.0
    with pytest.raises(ColearnError, match=r"no reply within 1000 s \(after 1 restarts\)"):
        run(grid, rounds=1, timeout=880.0, recovery=Recovery(1))
    assert len(grid.attempts) == 2 * K


class StrayGrid(FaultyGrid):
    """Delivers an error that belongs to no message of this round."""

    def pull_messages(self, message_ids):
        stray = Message(RecordDict(), 2, "train")
        stray.metadata.__dict__["_message_id"] = "of an earlier round"
        return [Message(Error(5, "stray"), reply_to=stray), *super().pull_messages(message_ids)]


class DoublingGrid(FaultyGrid):
    """Delivers everything twice, failures included."""

    def pull_messages(self, message_ids):
        before = self.bytes_up.copy()
        replies = super().pull_messages(message_ids)
        self.bytes_up += self.bytes_up - before
        return [reply for reply in replies for _ in range(2)]


@pytest.mark.parametrize("grid", [StrayGrid, DoublingGrid])
@pytest.mark.parametrize("kind", ["raises", "code 5", "NaN", "comes back as another node"])
def test_only_the_first_reply_to_the_message_under_way_counts(grid, kind, clock):
    grid = grid(clock, {(2, 1, 0): kind})
    found, records = run(grid)
    assert found == clean(clock)
    check_records(grid, records)
