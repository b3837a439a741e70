import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from hypothesis import given
from hypothesis import strategies as st

from flwr_colearn import (
    Average,
    BatchRenorm,
    CoLearn,
    ColearnError,
    Frozen,
    GroupNorm,
    InProcessGrid,
    LayerNorm,
    LocalBN,
    LocalPlan,
    LocalStatistics,
    Pooled,
    Recalibrated,
    RecoveringGrid,
    Recovery,
    RunningMean,
    participant_mod,
)
from flwr_colearn.normalization import (
    as_normalization,
    layer_arrays,
    scheme_named,
    statistics_of,
)
from flwr_colearn.normalization.local_arrays import LocalArrays
from flwr_colearn.roles import assign_roles
from tests.faults import is_query

K = 3
# torch's names as torchvision gives them: nothing is called "bn".
MODEL = {
    "conv.weight": np.ones((2, 2), np.float32),
    "downsample.1.weight": np.full(2, 1.5, np.float32),
    "downsample.1.bias": np.zeros(2, np.float32),
    "downsample.1.running_mean": np.zeros(2, np.float32),
    "downsample.1.running_var": np.ones(2, np.float32),
    "downsample.1.num_batches_tracked": np.asarray(0, np.int64),
    "bn_like_name.weight": np.ones(2, np.float32),
    "fc.bias": np.zeros(2, np.float32),
}
STATISTICS = [n for n in MODEL if n.startswith("downsample.1.") and n[13:] not in
              ("weight", "bias")]  # fmt: skip
LAYER = [n for n in MODEL if n.startswith("downsample.1.")]


def record(arrays):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


class SpyGrid(InProcessGrid):
    """Keeps the names of the arrays of every message that passes, by round, type and node."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.down, self.up = {}, {}

    def _call(self, message):
        if is_query(message):
            return super()._call(message)
        round_ = message.content["config"]["server-round"]
        key = round_, message.metadata.message_type, message.metadata.dst_node_id
        self.down[key] = list(message.content["arrays"])
        reply = super()._call(message)
        if reply.has_content():
            self.up[key] = [n for r in reply.content.array_records.values() for n in r]
        return reply


def client_app(seen=None, mods=(participant_mod,)):
    """A participant that adds k + 1 to every float and 1 to every counter."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def _(message, context):
        k = context.node_config["partition-id"]
        arrays = {n: a.numpy() for n, a in message.content["arrays"].items()}
        plan = LocalPlan.from_config(message.content["config"])
        if seen is not None:
            seen[plan.round, k] = arrays
        grown = {
            n: a + (a.dtype.type(k + 1) if a.dtype.kind == "f" else 1) for n, a in arrays.items()
        }
        metrics = MetricRecord({"num-examples": 1})
        return FlowerMessage(
            RecordDict({"arrays": record(grown), "metrics": metrics}), reply_to=message
        )

    @app.evaluate()
    def _(message, context):
        k = context.node_config["partition-id"]
        if seen is not None:
            arrays = {n: a.numpy() for n, a in message.content["arrays"].items()}
            seen["evaluate", message.content["config"]["server-round"], k] = arrays
        metrics = MetricRecord({"num-examples": 1, "k": float(k)})
        return FlowerMessage(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def strategy_of(scheme, **kwargs):
    return CoLearn(
        K,
        local_epochs=1,
        learning_rate=0.1,
        normalization=scheme,
        recovery=Recovery(pause=0.0),
        **kwargs,
    )


def run(scheme, rounds=3, grid=None, seen=None, **kwargs):
    strategy = strategy_of(scheme, **kwargs)
    grid = grid or SpyGrid(client_app(seen), K)
    result = strategy.start(grid, record(MODEL), num_rounds=rounds)
    return strategy, grid, {n: a.numpy() for n, a in result.arrays.items()}


# Which arrays -----------------------------------------------------------------------------------


def test_layers_are_found_by_their_statistics_and_not_by_their_name():
    roles = assign_roles(MODEL)
    assert layer_arrays(MODEL, roles) == LAYER
    assert statistics_of(MODEL, roles) == STATISTICS


@pytest.mark.parametrize(
    ("names", "layer"),
    [
        (["conv/kernel", "norm/gamma", "norm/beta", "norm/moving_mean", "norm/moving_variance"], 1),
        (["net/conv/weights:0", "net/conv/BatchNorm/beta:0", "net/conv/BatchNorm/moving_mean:0",
          "net/conv/BatchNorm/moving_variance:0"], 1),
    ],
)  # fmt: skip
def test_keras_and_slim_names(names, layer):
    arrays = {name: np.zeros(1) for name in names}
    assert layer_arrays(arrays, assign_roles(arrays)) == names[layer:]


# What the average does ---------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(2, 50), min_size=2, max_size=5))
def test_pooled_statistics_are_those_of_the_joint_data(seed, sizes):
    rng = np.random.default_rng(seed)
    data = [rng.normal(rng.normal(0, 3), rng.uniform(0.1, 3), (n, 2)) for n in sizes]
    like = {"1.running_mean": np.zeros(2), "1.running_var": np.ones(2)}
    mean = RunningMean(like, Pooled().roles(like, assign_roles(like)))
    for each in data:
        mean.add({"1.running_mean": each.mean(0), "1.running_var": each.var(0)}, len(each))
    joint = np.concatenate(data)
    np.testing.assert_allclose(mean.mean()["1.running_mean"], joint.mean(0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(mean.mean()["1.running_var"], joint.var(0), rtol=1e-10)


@pytest.mark.parametrize(("scheme", "variance"), [(Average(), 1.0), (Pooled(), 4.0)])
def test_the_example_in_which_the_naive_mean_is_wrong(scheme, variance):
    like = {"1.running_mean": np.zeros(1), "1.running_var": np.ones(1)}
    mean = RunningMean(like, scheme.roles(like, assign_roles(like)))
    mean.add({"1.running_mean": np.array([0.0]), "1.running_var": np.ones(1)}, 30_000)
    mean.add({"1.running_mean": np.array([4.0]), "1.running_var": np.ones(1)}, 10_000)
    assert mean.mean()["1.running_var"] == [variance]


def test_average_and_pooled_differ_in_the_variance_only_in_a_run():
    (_, _, averaged), (_, _, pooled) = run(Average(), rounds=1), run(Pooled(), rounds=1)
    assert averaged["downsample.1.running_var"].tolist() == [3.0, 3.0]  # mean of 2, 3, 4
    # and the variance of the means 1, 2, 3, which is 2/3
    assert pooled["downsample.1.running_var"] == pytest.approx([3.0 + 2 / 3] * 2)
    assert all(np.array_equal(averaged[n], pooled[n]) for n in MODEL if "running_var" not in n)


# What travels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "kept"), [(LocalStatistics(), STATISTICS), (LocalBN(), LAYER), (Pooled(), [])]
)
def test_what_stays_is_in_no_reply_and_down_in_the_first_round_only(scheme, kept):
    _, grid, _ = run(scheme, fraction_evaluate=1.0)
    travelling = [name for name in MODEL if name not in kept]
    trained = {key: names for key, names in grid.up.items() if key[1] == "train"}
    assert len(trained) == 3 * K
    assert all(names == travelling for names in trained.values())
    for (round_, kind, _), names in grid.down.items():
        assert names == (list(MODEL) if round_ == 1 and kind == "train" else travelling)


def test_participants_go_on_from_their_own_arrays_and_evaluate_with_them():
    seen = {}
    _, _, shared = run(LocalBN(), seen=seen, fraction_evaluate=1.0)
    for k in range(K):
        for round_ in (1, 2, 3):
            own = seen[round_, k]
            assert list(own) == list(MODEL)  # in the model's order
            grown = (round_ - 1) * (k + 1)
            assert own["downsample.1.weight"].tolist() == [1.5 + grown] * 2
            assert own["downsample.1.running_mean"].tolist() == [grown] * 2
            assert own["downsample.1.num_batches_tracked"] == round_ - 1
            assert own["fc.bias"].tolist() == [2.0 * (round_ - 1)] * 2  # the mean of 1, 2, 3
        evaluated = seen["evaluate", 3, k]
        assert evaluated["downsample.1.weight"].tolist() == [1.5 + 3 * (k + 1)] * 2
        assert evaluated["fc.bias"].tolist() == [6.0, 6.0]
    # The server's own copies never change.
    assert all(np.array_equal(shared[name], MODEL[name]) for name in LAYER)


def test_layers_that_stay_do_not_count_in_the_relative_change():
    strategy, *_ = run(LocalBN(), rounds=1)
    moved = ["conv.weight", "bn_like_name.weight", "fc.bias"]
    change = np.sqrt(sum(4.0 * MODEL[n].size for n in moved))
    size = np.sqrt(sum((MODEL[n] ** 2).sum() for n in moved))
    assert strategy.history.records[0].relative_change == pytest.approx(change / size)


def test_saved_bytes_are_in_the_history():
    def bytes_of(names):
        return sum(len(Array(MODEL[n]).data) for n in names)

    strategy, *_ = run(LocalStatistics(), rounds=2, fraction_evaluate=1.0)
    first, second = strategy.history.records
    assert first.bytes_down == K * bytes_of(MODEL)
    assert first.bytes_up == second.bytes_up == K * (bytes_of(MODEL) - bytes_of(STATISTICS))
    assert second.bytes_down == second.bytes_up
    assert second.normalization["scheme"] == "local-statistics"
    assert "participants" in second.normalization["shared-model"]


def test_a_client_without_the_mod_is_refused_before_its_arrays_are_averaged():
    grid = SpyGrid(client_app(mods=()), K)
    with pytest.raises(ColearnError, match="add participant_mod"):
        run(LocalBN(), grid=grid)


def test_a_client_that_does_not_return_its_local_arrays_is_told_which_are_missing():
    app = ClientApp(mods=[participant_mod])

    @app.train()
    def _(message, context):
        arrays = {n: a for n, a in message.content["arrays"].items() if n != LAYER[1]}
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
        return FlowerMessage(content, reply_to=message)

    missing = r"expected the local arrays too.* 1 missing \['downsample.1.bias'\]"
    with pytest.raises(ColearnError, match=missing):
        run(LocalBN(), grid=SpyGrid(app, K))


# Local state -------------------------------------------------------------------------------------


class Forgetful(SpyGrid):
    """The participant of node 2 loses its state before round 3."""

    def _call(self, message):
        round_ = message.content.get("config", {}).get("server-round")
        if round_ == 3 and not hasattr(self, "lost"):
            self.lost = True
            self.contexts[2].state = RecordDict()
        return super()._call(message)


def test_a_participant_that_lost_its_state_says_so_and_starts_from_the_shared_model(flower_log):
    seen = {}
    strategy, _, _ = run(LocalBN(), grid=Forgetful(client_app(seen), K))
    assert seen[3, 1]["downsample.1.weight"].tolist() == [1.5, 1.5]
    assert seen[3, 0]["downsample.1.weight"].tolist() == [3.5, 3.5]
    last = strategy.history.records[-1]
    assert last.normalization["reinitialised"] == ["partition-1"]
    assert [r["participant"] for r in last.restarts] == ["partition-1"]
    assert "lost its local normalization arrays" in last.restarts[0]["reason"]
    assert "the local arrays are lost" in flower_log.text
    assert "starting from the shared model's 5" in flower_log.text


def test_state_dir_outlives_the_context(tmp_path):
    seen = {}
    nodes = [{"state-dir": str(tmp_path)}] * K
    strategy, *_ = run(LocalBN(), grid=Forgetful(client_app(seen), K, node_configs=nodes))
    assert seen[3, 1]["downsample.1.weight"].tolist() == [1.5 + 2 * 2] * 2
    assert not strategy.history.records[-1].restarts
    assert len(list(tmp_path.iterdir())) == K


def test_what_an_earlier_run_left_is_no_part_of_a_new_one(tmp_path):
    nodes = [{"state-dir": str(tmp_path)}] * K
    run(LocalBN(), grid=SpyGrid(client_app(), K, node_configs=nodes))
    seen = {}
    run(LocalBN(), grid=SpyGrid(client_app(seen), K, node_configs=nodes), rounds=2)
    assert seen[1, 0]["downsample.1.weight"].tolist() == [1.5, 1.5]
    assert seen[2, 0]["downsample.1.weight"].tolist() == [2.5, 2.5]


def test_a_damaged_file_is_as_good_as_none(tmp_path):
    class Damaging(Forgetful):
        def _call(self, message):
            if message.content.get("config", {}).get("server-round") == 3:
                for path in tmp_path.glob("partition-1-*.state"):
                    path.write_bytes(b"not a state" * 9)
            return super()._call(message)

    seen = {}
    nodes = [{"state-dir": str(tmp_path)}] * K
    strategy, *_ = run(LocalBN(), grid=Damaging(client_app(seen), K, node_configs=nodes))
    assert seen[3, 1]["downsample.1.weight"].tolist() == [1.5, 1.5]
    last = strategy.history.records[-1]
    assert last.normalization["reinitialised"] == ["partition-1"]


class Repeating(SpyGrid):
    """The reply of node 2 is lost once, in round 2, after its training."""

    def _call(self, message):
        reply = super()._call(message)
        round_ = message.content.get("config", {}).get("server-round")
        if round_ == 2 and message.metadata.dst_node_id == 2 and not hasattr(self, "lost"):
            self.lost = True
            reply.content["metrics"] = MetricRecord({"num-examples": 0})
        return reply


def test_a_restarted_round_begins_from_the_same_local_arrays():
    seen, calm = {}, {}
    strategy, _, model = run(LocalBN(), grid=Repeating(client_app(seen), K))
    assert strategy.history.records[1].restarts
    _, _, wanted = run(LocalBN(), seen=calm)
    for key, arrays in calm.items():
        assert all(np.array_equal(arrays[n], seen[key][n]) for n in MODEL), key
    assert all(np.array_equal(model[n], wanted[n]) for n in MODEL)


def test_resumed_server_sends_everything_and_participants_keep_their_own(tmp_path):
    seen = {}
    grid = SpyGrid(client_app(seen), K)
    strategy_of(LocalBN(), checkpoints=tmp_path).start(grid, record(MODEL), num_rounds=2)
    grid.down.clear()
    again = strategy_of(LocalBN(), checkpoints=tmp_path)
    again.start(grid, record(MODEL), num_rounds=3, resume="auto")
    assert {round_ for round_, *_ in grid.down} == {3}
    assert all(grid.down[3, "train", node] == list(MODEL) for node in grid.contexts)
    assert seen[3, 2]["downsample.1.weight"].tolist() == [1.5 + 6] * 2
    with pytest.raises(ColearnError, match=r"another normalization: LocalBN.* there, Pooled"):
        strategy_of(Pooled(), checkpoints=tmp_path).start(grid, record(MODEL), 3, resume="auto")


def test_which_arrays_a_round_begins_with():
    arrays = LocalArrays("a", 3, {"w": "before"}, {"w": "after"})
    assert arrays.at("a", 4, training=True) == arrays.at("a", 9, training=True) == {"w": "after"}
    assert arrays.at("a", 3, training=True) == {"w": "before"}  # the round is repeated
    assert arrays.at("a", 2, training=True) == {}  # of a run that was further
    assert arrays.at("a", 3, training=False) == {"w": "after"}
    for training in (True, False):
        assert arrays.at("b", 4, training) == {}  # of another session
        assert LocalArrays().at("a", 5, training) == {}


# Frozen ------------------------------------------------------------------------------------------


def test_frozen_statistics_stay_as_they_were_and_do_not_travel_back():
    strategy, grid, model = run(Frozen(after=2), rounds=4)
    _, _, halfway = run(Pooled(), rounds=2)
    for name in STATISTICS:
        assert np.array_equal(model[name], halfway[name]), name
    assert model["downsample.1.weight"].tolist() == [1.5 + 8.0] * 2  # gamma goes on learning
    assert grid.up[2, "train", 1] == list(MODEL)
    assert grid.up[3, "train", 1] == [name for name in MODEL if name not in STATISTICS]
    sizes = [r.bytes_up for r in strategy.history]
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3]


def test_frozen_statistics_stay_even_if_a_client_sends_others():
    grid = SpyGrid(client_app(mods=()), K)  # nothing strips its replies
    _, _, model = run(Frozen(after=1), rounds=3, grid=grid)
    _, _, first = run(Pooled(), rounds=1)
    assert grid.up[3, "train", 1] == list(MODEL)
    assert all(np.array_equal(model[name], first[name]) for name in STATISTICS)


# Schemes as values -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [GroupNorm(), LayerNorm()])
def test_schemes_without_statistics_refuse_a_model_that_has_some(scheme):
    with pytest.raises(ColearnError, match="convert the model"):
        run(scheme)


@pytest.mark.parametrize(
    "scheme",
    [LocalBN(), LocalStatistics(), Recalibrated(), Frozen(1), BatchRenorm()],
)
def test_schemes_for_statistics_refuse_a_model_without_any(scheme):
    strategy = strategy_of(scheme)
    with pytest.raises(ColearnError, match="running means and variances"):
        strategy.start(SpyGrid(client_app(), K), record({"w": np.ones(2)}), num_rounds=1)


@pytest.mark.parametrize("value", [Pooled, "pooled", None])
def test_only_an_object_is_a_scheme(value):
    with pytest.raises(ColearnError, match="a scheme such as Pooled"):
        as_normalization(value)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("group-norm", {"wrong": 1}, r"group-norm: .*\(groups: int = 8\), found {'wrong': 1}"),
        ("pooled", {"every": 2}, r"pooled: expected parameters \(\), found {'every': 2}"),
        ("frozen", {}, r"frozen: expected parameters \(after: int\), found {}"),
        ("batchnorm", {}, r"one of average, pooled, .*, found 'batchnorm'"),
    ],
)
def test_a_name_with_other_parameters_is_no_scheme(name, parameters, message):
    with pytest.raises(ColearnError, match=message):
        scheme_named(name, **parameters)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Frozen(after=0), "after.*expected .* at least 1, found 0"),
        (lambda: GroupNorm(0), "groups.*expected .* at least 1, found 0"),
        (lambda: BatchRenorm(r_max=0.5), "r_max.*expected a number of at least 1, found 0.5"),
        (lambda: BatchRenorm(d_max=-1), "d_max.*expected a number of at least 0, found -1"),
        (lambda: BatchRenorm(warmup=-1), "warmup.*expected .* at least 0, found -1"),
    ],
)
def test_arguments_are_checked(make, match):
    with pytest.raises(ColearnError, match=match):
        make()


def test_the_least_arguments_are_accepted():
    assert (Frozen(after=1).after, GroupNorm(1).groups) == (1, 1)
    least = BatchRenorm(r_max=1, d_max=0, warmup=0)  # batch norm with the running statistics
    assert least.limits(0) == (1.0, 0.0)


@pytest.mark.parametrize(("channels", "groups"), [(16, 8), (12, 6), (7, 7), (13, 1), (1, 1)])
def test_groups_divide_the_channels(channels, groups):
    assert GroupNorm(8).groups_of(channels) == groups


def test_renorm_limits_open_after_the_warmup():
    scheme = BatchRenorm(r_max=3, d_max=5, warmup=100)
    assert scheme.limits(0) == scheme.limits(100) == (1.0, 0.0)
    assert scheme.limits(150) == (2.0, 2.5)
    assert scheme.limits(200) == scheme.limits(10**6) == (3.0, 5.0)
    assert BatchRenorm(warmup=0).limits(0) == (3.0, 5.0)


def test_config_of_evaluations_names_the_scheme_too():
    configs = []

    def spy(message, context, call_next):
        configs.append(ConfigRecord({**message.content["config"]}))
        return call_next(message, context)

    app = client_app(mods=(participant_mod, spy))
    run(LocalStatistics(), rounds=1, grid=InProcessGrid(app, K), fraction_evaluate=1.0)
    assert {config["normalization"] for config in configs} == {"local-statistics"}


def test_inside_a_recovering_grid_that_the_user_brings():
    inner = SpyGrid(client_app(), K)
    grid = RecoveringGrid(inner, Recovery(pause=0.0))
    strategy_of(LocalBN(), fraction_evaluate=0.0).start(grid, record(MODEL), num_rounds=2)
    assert all(not set(names) & set(LAYER) for names in inner.up.values())
    assert all(not set(inner.down[2, "train", node]) & set(LAYER) for node in inner.contexts)


def test_under_a_wrapper_with_a_loop_of_its_own_local_schemes_are_refused():
    wrapped = DifferentialPrivacyServerSideFixedClipping(strategy_of(LocalBN()), 0.1, 1.0, K)
    with pytest.raises(ColearnError, match=r"normalization under a wrapper.*Transport"):
        wrapped.start(SpyGrid(client_app(), K), record(MODEL), num_rounds=1)
    pooled = DifferentialPrivacyServerSideFixedClipping(strategy_of(Pooled()), 0.1, 1.0, K)
    pooled.start(SpyGrid(client_app(), K), record(MODEL), num_rounds=1)


def test_without_recovery_one_that_lost_its_state_misses_a_round_and_comes_back():
    seen = {}
    strategy = CoLearn(
        K, local_epochs=1, learning_rate=0.1, normalization=LocalBN(), recovery=None,
        fraction_evaluate=0.0,
    )  # fmt: skip
    strategy.start(Forgetful(client_app(seen), K), record(MODEL), num_rounds=4)
    third, fourth = strategy.history.records[2:]
    assert sorted(third.participants) == ["1", "3"]
    assert "lost its local" in third.refusals[0]["reason"]
    assert sorted(fourth.participants) == ["1", "2", "3"]
    assert fourth.normalization["reinitialised"] == ["2"]
    assert seen[4, 1]["downsample.1.weight"].tolist() == [1.5, 1.5]
