"""Compressed models in dynamic averaging: server and learners hold the same to the last bit."""

import logging

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flwr_colearn import (
    BFloat16,
    ColearnError,
    Compression,
    DynamicAveraging,
    Float16,
    InProcessGrid,
    Int8,
    ModelAveraging,
    Quorum,
    Recovery,
    Uncompressed,
    learner,
    participant_mod,
)
from flwr_colearn.compression import AGREEMENT, AVERAGE_OF, LOCAL_REFERENCE
from flwr_colearn.compression.residuals import RESIDUAL
from flwr_colearn.dynamic import Dynamic, FractionAveraging, Never, Periodic
from flwr_colearn.dynamic.coordinator import Coordinator
from flwr_colearn.dynamic.messages import Ask, checksum
from flwr_colearn.records import view
from tests.flwr_colearn.dynamic.divergence import divergence

M = 4
MODS = (participant_mod,)
COMPRESSIONS = [
    Compression(Float16(), Float16()),
    Compression(BFloat16(), BFloat16()),
    Compression(Int8()),
    Compression(Int8(0), Float16()),
    Compression(Int8(-1), BFloat16()),
    Compression(down=Float16()),
]
each_compression = pytest.mark.parametrize("compression", COMPRESSIONS, ids=str)
QUICK = Recovery(max_restarts=2, pause=0.0, patience=0.0)


@pytest.fixture(autouse=True)
def quiet_log(monkeypatch, request):
    if "flower_log" not in request.fixturenames:
        monkeypatch.setattr(logging.getLogger("flwr"), "level", logging.CRITICAL)


def record(arrays):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def initial():
    rng = np.random.default_rng(7)
    return {
        "w": rng.normal(0, 0.5, (5, 4)).astype(np.float32),
        "b": np.zeros(4, np.float32),
        "bn.running_mean": np.zeros(4, np.float32),
        "bn.num_batches_tracked": np.array(0),
    }


def wander(k, index, arrays):
    """One step of learner k: towards a target of its own that moves, deterministic."""
    rng = np.random.default_rng((k, index))
    new = {
        name: (a + 0.1 * rng.normal(k / 4, 1, a.shape)).astype(a.dtype)
        for name, a in arrays.items()
        if a.dtype.kind == "f"
    }
    return {name: new.get(name, a + 1) for name, a in arrays.items()}


def client_app(step=wander, mods=MODS):
    app = ClientApp(mods=list(mods))

    @learner(app)
    def train(message, context):
        config = message.content["config"]
        arrays = {name: a.numpy() for name, a in message.content["arrays"].items()}
        for index in range(config["batches-done"], config["batches-done"] + config["mini-batches"]):
            arrays = step(context.node_config["partition-id"], index, arrays)
        metrics = MetricRecord({"num-examples": 5 * config["mini-batches"], "loss": 1.0})
        return Message(RecordDict({"arrays": record(arrays), "metrics": metrics}), reply_to=message)

    return app


def bits(arrays):
    return {name: np.asarray(a).tobytes() for name, a in arrays.items()}


def kept(grid, what="model"):
    """What the learners have in their state, by node."""
    return {node: view(c.state[f"colearn.{what}"]) for node, c in grid.contexts.items()}


def final(grid):
    return [bits(arrays) for arrays in kept(grid).values()]


def run(operator, rounds, compression, grid=None, model=None, **kwargs):
    grid = grid or InProcessGrid(client_app(), M)
    strategy = ModelAveraging(
        operator, len(grid.contexts), seed=0, compression=compression, **kwargs
    )
    arrays = record(initial() if model is None else model)
    return strategy, strategy.start(grid, arrays, num_rounds=rounds), grid


# Replicas ---------------------------------------------------------------------------------------


def watch(monkeypatch):
    """Compare, after each distribution, what the server holds with what learners do."""
    seen = []
    distribute = Coordinator.distribute

    def compare(self):
        pending = self.pending
        distribute(self)
        contexts = self.grid.bottom.contexts
        for node in pending.members:
            assert bits(view(contexts[node].state["colearn.model"])) == bits(view(pending.record))
        for context in contexts.values():
            assert bits(view(context.state["colearn.reference"])) == bits(self.reference.arrays)
        seen.append(self.record.synchronised)

    monkeypatch.setattr(Coordinator, "distribute", compare)
    return seen


@pytest.mark.slow
@settings(max_examples=25)
@given(
    compression=st.sampled_from(COMPRESSIONS),
    operator=st.sampled_from([0.5, 2.0, 4.0, 8.0]).map(Dynamic)
    | st.sampled_from([0.3, 0.5, 1.0]).map(lambda c: FractionAveraging(c, 2)),
    wiped=st.dictionaries(st.integers(1, 7), st.integers(1, M), max_size=2),
    offset=st.integers(0, 99),
)
def test_server_and_learners_hold_the_same_bits(compression, operator, wiped, offset):
    app = client_app(lambda k, index, arrays: wander(k + offset * M, index, arrays))
    grid = InProcessGrid(app, M)

    def wipe(server_round, arrays):
        if server_round in wiped:
            grid.contexts[wiped[server_round]].state = RecordDict()

    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch)
        strategy = ModelAveraging(operator, M, seed=offset, compression=compression)
        strategy.start(grid, record(initial()), num_rounds=8, evaluate_fn=wipe)
    assert len(seen) == sum(entry.synchronised != "none" for entry in strategy.history)
    assert not any(entry.refusals or entry.restarts for entry in strategy.history)
    assert sum(len(entry.lost) for entry in strategy.history) == len(wiped)


@each_compression
def test_there_are_partial_and_full_synchronisations_to_compare(compression, monkeypatch):
    seen = watch(monkeypatch)
    run(Dynamic(2.0), 15, compression)
    assert set(seen) == {"partial", "full"}


@pytest.mark.parametrize("codec", [Uncompressed(), Float16(), BFloat16()], ids=str)
@given(data=st.data())
def test_what_arrived_goes_down_again_as_it_is(codec, data):
    dtype = data.draw(st.sampled_from(["f2", "f4", "f8", "i8"]))
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(max_dims=3, max_side=4)))
    arrived = Compression(down=codec).received({"w": array})
    sent, again = (codec.encode(record(each))[0]["w"] for each in ({"w": array}, arrived))
    assert again.data == sent.data or np.isnan(array).any()


@each_compression
def test_the_divergence_never_exceeds_delta(compression):
    grid, seen = InProcessGrid(client_app(), M), []

    def look(server_round, arrays):
        if server_round:
            weights = [{n: m[n] for n in ("w", "b")} for m in kept(grid).values()]
            seen.append(divergence(weights))

    strategy = DynamicAveraging(2.0, num_learners=M, seed=0, compression=compression)
    strategy.start(grid, record(initial()), num_rounds=15, evaluate_fn=look)
    assert 0 < max(seen) <= 2.0


@pytest.mark.parametrize(
    ("compression", "members", "synchronised"),
    [(Compression(), 2, "partial"), (Compression(down=Float16()), 3, "full")],
)
def test_members_are_added_until_the_mean_as_it_arrives_is_within_delta(
    compression, members, synchronised
):
    # The mean of the violator, at 2.0014, and one more, at 0, is 1.0007; float16 has 1.00098 next.
    def step(k, index, arrays):
        return {"w": arrays["w"] + np.float32(2.0014 if k == 0 else 0.0)}

    grid = InProcessGrid(client_app(step), 3)
    strategy = ModelAveraging(Dynamic(1.0017), 3, compression=compression)
    strategy.start(grid, record({"w": np.zeros((1, 1), np.float32)}), 1)
    [only] = strategy.history
    assert len(only.reporters) + len(only.fetched) == members
    assert only.synchronised == synchronised


@each_compression
def test_without_delta_dynamic_averaging_is_periodic_averaging(compression):
    dynamic, _, grid = run(Dynamic(0.0, 2), 6, compression)
    periodic, _, other = run(Periodic(2), 6, compression)
    assert final(grid) == final(other)
    assert [entry.moved for entry in dynamic.history] == [entry.moved for entry in periodic.history]
    _, _, exact = run(Periodic(2), 6, Compression())
    assert final(exact) != final(grid)
    for name, wanted in kept(exact)[1].items():
        # Of numbers up to 2, bfloat16 rounds away 2**-8, once a round and direction.
        np.testing.assert_allclose(kept(grid)[1][name], wanted, atol=6 * 2 * 2**-8)


def test_without_compression_nothing_changes():
    _, _, plain = run(Dynamic(2.0), 10, Compression())
    app = client_app(mods=[participant_mod])
    without = DynamicAveraging(2.0, num_learners=M, seed=0)
    without.start(grid := InProcessGrid(app, M), record(initial()), num_rounds=10)
    explicit, _, other = run(Dynamic(2.0), 10, Compression(Uncompressed(), Uncompressed()))
    assert final(plain) == final(grid) == final(other)
    assert [e.moved for e in without.history] == [e.moved for e in explicit.history]


# Bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compression", "up", "down"),
    [
        (Compression(Float16(), Float16()), 4 + 2 * 20, 4 + 2 * 20),
        (Compression(Int8(), BFloat16()), 4 + 4 + 20, 4 + 2 * 20),
        (Compression(Int8(0), Float16()), 4 + 4 * 5 + 20, 4 + 2 * 20),
        (Compression(Int8(-1), Float16()), 4 + 4 * 4 + 20, 4 + 2 * 20),
    ],
    ids=str,
)
def test_bytes_are_those_counted_by_hand(compression, up, down):
    strategy, _, _ = run(Periodic(1), 3, compression)
    rest = (4 + 4 * 4) + (4 + 4 * 4) + (4 + 8)  # b, running mean and counter, as they are
    moved = [entry.moved for entry in strategy.history]
    assert [each["bytes_up"] for each in moved] == [M * (up + rest)] * 3
    assert [each["bytes_down"] for each in moved] == [M * (down + rest) * n for n in (2, 1, 1)]


@pytest.mark.parametrize("compression", [Compression(), Compression(Int8(), Float16())], ids=str)
def test_the_history_counts_what_travelled(compression):
    moved = {"down": 0, "up": 0}

    def measure(message, context, call_next):
        def size(content):
            return sum(len(a.data) for r in content.array_records.values() for a in r.values())

        moved["down"] += size(message.content)
        reply = call_next(message, context)
        moved["up"] += size(reply.content)
        return reply

    grid = InProcessGrid(client_app(mods=[measure, *MODS]), M)
    strategy, _, _ = run(Dynamic(2.0), 12, compression, grid=grid, evaluate_mean_every=4)
    for side in ("up", "down"):
        key = f"bytes_{side}"
        assert moved[side] == sum(e.moved[key] + e.collected[key] for e in strategy.history)


# Error feedback ---------------------------------------------------------------------------------

WEIGHTS = {"w": np.zeros((1, 3), np.float32)}
STEP = np.array([[1.0, 0.003, -0.001]], np.float32)  # beside 1.0, a step of int8 is 0.0079


def steady(k, index, arrays):
    return {"w": arrays["w"] + STEP}


def steady_run(operator, rounds, look=None):
    grid = InProcessGrid(client_app(steady), 1)
    strategy = ModelAveraging(operator, 1, compression=Compression(Int8()))
    result = strategy.start(
        grid, record(WEIGHTS), rounds, evaluate_fn=lambda t, a: look(t, grid, a) if look else None
    )
    return result.arrays["w"].numpy(), grid


def forget(server_round, grid, arrays):
    state = grid.contexts[1].state
    for key in [key for key in state if key.startswith(RESIDUAL)]:
        del state[key]


def test_what_is_rounded_away_is_made_up_for_and_may_be_lost():
    arrived, _ = steady_run(Periodic(1), 50)
    np.testing.assert_allclose(arrived, 50 * STEP, atol=1.01 / 127)
    lost, _ = steady_run(Periodic(1), 50, forget)
    np.testing.assert_allclose(lost, [[50, 0, 0]], atol=1e-4)  # safe, but standing still


class LosingSet(InProcessGrid):
    """Loses the message that sets the average of one full synchronisation."""

    lost, sets = 0, 0

    def push_messages(self, messages):
        kept = []
        for message in messages:
            if message.content["config"]["action"] == "set":
                self.sets += 1
                if self.sets == self.lost:
                    continue
            kept.append(message)
        return super().push_messages(kept)


@pytest.mark.parametrize("lost", [0, 2, 3])
def test_rounding_is_made_up_for_once_if_the_average_arrives_only_with_a_new_beginning(lost):
    grid = LosingSet(client_app(steady), 1)
    grid.lost = lost
    strategy = ModelAveraging(Periodic(1), 1, compression=Compression(Int8()), recovery=None)
    result = strategy.start(grid, record(WEIGHTS), 5)
    assert grid.sets >= 4
    assert sum(len(each.lost) for each in strategy.history) == bool(lost)
    left = BFloat16().decode(grid.contexts[1].state[f"{RESIDUAL}.after"])["w"]
    # What the model has and what is left over together are five steps, up to bfloat16's rounding.
    np.testing.assert_allclose(result.arrays["w"].numpy() + left, 5 * STEP, atol=1e-4)


def test_a_model_that_is_only_looked_at_leaves_nothing_over():
    grid = InProcessGrid(client_app(), M)
    run(Never(), 4, Compression(Int8()), grid=grid, evaluate_mean_every=1)
    assert not any(key.startswith(RESIDUAL) for c in grid.contexts.values() for key in c.state)
    _, _, looked_at = run(Dynamic(2.0), 12, Compression(Int8()), evaluate_mean_every=1)
    _, _, undisturbed = run(Dynamic(2.0), 12, Compression(Int8()))
    assert final(looked_at) == final(undisturbed)


class Talk:
    """One learner, and a server that asks it what the test says."""

    def __init__(self, **node_config):
        self.grid = InProcessGrid(client_app(steady), 1, node_configs=[node_config])
        self.session, self.compression = "a", Compression(Int8())

    def ask(self, action, server_round, arrays=None, **more):
        reference = None if action == "set" else 0
        ask = Ask(self.session, server_round, reference, action, bound=-1.0, **more)
        content = RecordDict({"config": ask.to_config()})
        said = {LOCAL_REFERENCE: 1, "session": self.session, "round": server_round}
        if arrays is not None:
            content["arrays"] = record(arrays)
            said[AVERAGE_OF] = server_round if action == "set" else 0
        content[AGREEMENT] = ConfigRecord({**self.compression.request(), **said})
        (reply,) = self.grid.send_and_receive([Message(content, 1, "train")])
        assert not reply.has_error(), reply.error
        return reply.content

    def train(self, server_round, anew=False):
        more = {"mini_batches": 1, "batches_done": server_round - 1}
        arrays = WEIGHTS if anew or server_round == 1 else None
        return self.decoded(self.ask("train", server_round, arrays, **more))

    def decoded(self, content):
        return self.compression.up.decode(content["arrays"], WEIGHTS)["w"]


def encoded(array):
    return Int8().encode(record({"w": array}), WEIGHTS)[1]["w"]


def test_rounding_is_made_up_for_only_once_the_average_has_replaced_the_model():
    one = Talk()
    first = one.train(1)
    np.testing.assert_array_equal(first, encoded(STEP))
    np.testing.assert_array_equal(one.decoded(one.ask("fetch", 1)), first)
    # No average came: the model is still the learner's own, and nothing is missing in it.
    np.testing.assert_array_equal(one.train(2), encoded(2 * STEP))
    for _ in range(2):  # delivered twice
        one.ask("set", 2, WEIGHTS)
    third = one.train(3)
    missing = 2 * STEP - encoded(2 * STEP)
    wanted = encoded(STEP + missing)
    np.testing.assert_allclose(third, wanted, atol=1e-4)  # what is missing is kept as bfloat16
    assert np.abs(wanted - encoded(STEP)).max() > 0.005
    np.testing.assert_array_equal(one.train(3), third)  # asked again


def test_rounding_of_another_training_is_not_made_up_for():
    one = Talk()
    one.train(1)
    one.ask("set", 1, WEIGHTS)
    one.session = "b"
    np.testing.assert_array_equal(one.train(2, anew=True), encoded(STEP))


# Loss and damage --------------------------------------------------------------------------------


@each_compression
def test_a_learner_whose_state_is_on_disk_only_has_its_reference(compression, tmp_path):
    configs = [{"state-dir": str(tmp_path / str(k))} for k in range(M)]
    grid = InProcessGrid(client_app(), M, node_configs=configs)

    def wipe(server_round, arrays):
        for context in grid.contexts.values():
            context.state = RecordDict()

    strategy = DynamicAveraging(2.0, num_learners=M, seed=0, compression=compression)
    strategy.start(grid, record(initial()), num_rounds=10, evaluate_fn=wipe)
    assert [entry.lost for entry in strategy.history] == [[]] * 10
    assert {entry.synchronised for entry in strategy.history} >= {"partial", "full"}
    if not compression.up.differential:
        clean, _, _ = run(Dynamic(2.0), 10, compression)
        assert [e.largest_distance for e in clean.history] == [
            e.largest_distance for e in strategy.history
        ]


def test_a_learner_that_was_restarted_compresses_what_it_is_asked_for(tmp_path):
    one = Talk(**{"state-dir": str(tmp_path)})
    trained = one.train(1)
    one.grid.contexts[1].state = RecordDict()
    content = one.ask("fetch", 1)
    assert content["arrays"]["w"].stype == "colearn.int8"
    np.testing.assert_array_equal(one.decoded(content), trained)


def test_a_reference_of_the_same_round_but_other_bits_is_given_anew():
    grid = InProcessGrid(client_app(), M)

    def alter(server_round, arrays):
        if server_round == 2:
            altered = {**kept(grid, "reference")[3], "b": np.full(4, 1e-30, np.float32)}
            grid.contexts[3].state["colearn.reference"] = record(altered)

    strategy = DynamicAveraging(1e6, num_learners=M, compression=Compression(Int8()))
    strategy.start(grid, record(initial()), num_rounds=4, evaluate_fn=alter)
    (lost,) = strategy.history.records[2].lost
    assert lost == {
        "participant": "partition-2",
        "reason": "its reference of round 0 is another one",
    }
    assert len({str(bits(arrays)) for arrays in kept(grid, "reference").values()}) == 1


def test_the_check_of_a_reference_is_zlibs_of_all_its_bytes():
    import zlib

    arrays = {**initial(), "none": np.zeros((0, 2)), "flag": np.array(True)}
    assert checksum(arrays) == zlib.crc32(b"".join(a.tobytes() for a in arrays.values()))


class Damaging(InProcessGrid):
    """Flips a bit of the first models that come up, on their way."""

    left = 2

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        for reply in replies:
            if self.left and reply.has_content() and "arrays" in reply.content:
                self.left -= 1
                array = reply.content["arrays"]["w"]
                array.data = array.data[:-1] + bytes([array.data[-1] ^ 1])
        return replies


@pytest.mark.parametrize("codec", [Float16(), BFloat16(), Int8(), Int8(0)], ids=str)
def test_a_damaged_payload_is_a_bad_reply_and_nothing_is_different(codec):
    compression = Compression(codec, Float16())
    _, _, clean = run(Dynamic(2.0), 8, compression)
    grid = Damaging(client_app(), M)
    grid.left = 1
    damaged, _, other = run(Dynamic(2.0), 8, compression, grid=grid, recovery=QUICK)
    assert final(clean) == final(other)
    reasons = [e["reason"] for entry in damaged.history for e in entry.restarts]
    assert len(reasons) == 1
    assert all(f"array 'w': expected one of the model, with its shape and type, as {codec}" in r
               for r in reasons)  # fmt: skip


def test_without_recovery_a_damaged_payload_is_refused_and_left_out():
    grid = Damaging(client_app(), M)
    strategy, _, _ = run(Periodic(1), 2, Compression(Int8()), grid=grid, recovery=None)
    assert [len(entry.refusals) for entry in strategy.history] == [2, 0]
    assert [len(entry.lost) for entry in strategy.history] == [0, 2]


def test_nan_is_refused_as_such():
    def spoil(k, index, arrays):
        return {**arrays, "w": arrays["w"] * np.float32(np.nan)} if k == 1 else arrays

    with pytest.raises(ColearnError, match="array 'w': expected finite numbers, found NaN or Inf"):
        run(
            Periodic(1), 1, Compression(Int8()), InProcessGrid(client_app(spoil), M), recovery=QUICK
        )


@each_compression
def test_a_learner_without_the_mod_is_refused_with_the_reason(compression):
    grid = InProcessGrid(client_app(mods=[]), M)
    match = r"one that flwr_colearn\.participant_mod has decoded.*mods=\[participant_mod\]"
    with pytest.raises(ColearnError, match=match):
        run(Never(), 1, compression, grid=grid, recovery=QUICK)


def test_a_reply_that_does_not_say_how_it_was_sent_is_refused():
    def swallow(message, context, call_next):
        del message.content[AGREEMENT]
        return call_next(message, context)

    grid = InProcessGrid(client_app(mods=[swallow, participant_mod]), M)
    match = r"as int8 by flwr_colearn\.participant_mod, found none"
    with pytest.raises(ColearnError, match=match):
        run(Never(), 1, Compression(Int8()), grid=grid, recovery=QUICK)


def test_an_absentee_under_a_quorum_begins_anew_with_the_same_bits(monkeypatch):
    left = [1]

    def fail(k, index, arrays):
        if (k, index) == (1, 2) and left:
            left.pop()
            raise RuntimeError("injected fault")
        return wander(k, index, arrays)

    recovery = Recovery(max_restarts=0, pause=0.0, patience=0.0, policy=Quorum(3))
    grid = InProcessGrid(client_app(fail), M)
    strategy, _, _ = run(
        Periodic(1), 6, Compression(Int8(), Float16()), grid=grid, recovery=recovery
    )
    assert [len(entry.lost) for entry in strategy.history] == [0, 0, 0, 1, 0, 0]
    assert len({str(each) for each in final(grid)}) == 1


# Resuming ---------------------------------------------------------------------------------------


class CrashError(Exception):
    pass


class Crashing(InProcessGrid):
    """A server that dies at message number `after`."""

    after = 10**9

    def push_messages(self, messages):
        for message in messages:
            self.after -= 1
            if self.after < 0:
                raise CrashError
            yield from super().push_messages([message])


@pytest.mark.parametrize("after", range(2, 52, 4))
def test_a_run_that_was_killed_at_any_message_resumes_to_the_same_end(tmp_path, after):
    compression = Compression(Int8(), Float16())
    clean, _, wanted = run(Dynamic(2.0), 8, compression, evaluate_mean_every=3)
    grid = Crashing(client_app(), M)
    grid.after = after
    arguments = {"grid": grid, "checkpoints": tmp_path, "evaluate_mean_every": 3}
    with pytest.raises(CrashError):
        run(Dynamic(2.0), 8, compression, **arguments)
    grid.after = 10**9
    strategy = DynamicAveraging(
        2.0,
        num_learners=M,
        seed=0,
        compression=compression,
        checkpoints=tmp_path,
        evaluate_mean_every=3,
    )
    strategy.start(grid, record(initial()), num_rounds=8, resume="auto")
    assert final(grid) == final(wanted)
    assert [entry.lost for entry in strategy.history] == [[]] * 8
    for one, other in zip(clean.history, strategy.history, strict=True):
        assert (one.reporters, one.synchronised) == (other.reporters, other.synchronised)


def test_a_run_is_not_resumed_with_another_wire(tmp_path):
    run(Never(), 1, Compression(Int8()), checkpoints=tmp_path)
    for compression in (Compression(), Compression(Float16())):
        strategy = ModelAveraging(Never(), M, compression=compression, checkpoints=tmp_path)
        with pytest.raises(
            ColearnError, match="found another compression: int8 up, float32 down there"
        ):
            strategy.start(InProcessGrid(client_app(), M), record(initial()), 2, resume="auto")


# Settings ---------------------------------------------------------------------------------------


def test_what_is_no_wire_is_refused():
    with pytest.raises(
        ColearnError, match=r"compression: expected a Compression, such as Compression\(up=Int8\(\)"
    ):
        DynamicAveraging(1.0, num_learners=2, compression=Int8())


def test_the_summary_says_what_learners_need(flower_log):
    DynamicAveraging(1.0, num_learners=2, compression=Compression(Int8(), Float16())).summary()
    assert "Compression: int8 up, float16 down; learners need participant_mod" in flower_log.text
    flower_log.clear()
    DynamicAveraging(1.0, num_learners=2).summary()
    assert "Compression" not in flower_log.text
