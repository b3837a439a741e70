"""Secure aggregation in runs: the average of those that stayed, and what is refused."""

import logging
import re

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedXgbBagging,
    Krum,
    MultiKrum,
    QFedAvg,
)

from flwr_colearn import (
    Averaging,
    BFloat16,
    CoLearn,
    ColearnError,
    Compression,
    DynamicAveraging,
    Float16,
    Guard,
    History,
    IncreasingEpochs,
    InProcessGrid,
    Int8,
    LocalStatistics,
    Quorum,
    Recalibrated,
    Recovery,
    Role,
    RunningMean,
    SecureAggregation,
    SynchronousSGD,
    Transport,
    run,
)
from flwr_colearn._flwr import copied, set_message_id, state_from_bytes, state_to_bytes
from flwr_colearn.records import view
from tests.flwr_colearn.secure.secure_faults import (
    EXAMPLES,
    MODEL,
    DroppingGrid,
    K,
    app_of,
    record_of,
    stage_of,
    step,
)

INITIAL = record_of(MODEL)
QUICK = Recovery(max_restarts=2, pause=0.0)
NODES = {"min_train_nodes": K, "min_available_nodes": K, "fraction_evaluate": 0.0}


def secured(**kwargs):
    return Transport(
        recovery=kwargs.pop("recovery", QUICK),
        normalization=kwargs.pop("normalization", Transport().normalization),
        compression=kwargs.pop("compression", Compression()),
        roles=kwargs.pop("roles", None),
        secure=SecureAggregation(**{"timeout": 0.2, **kwargs}),
    )


def colearn(**kwargs):
    settings = {"local_epochs": 1, "learning_rate": 0.1, "fraction_evaluate": 0.0, **kwargs}
    return CoLearn(K, **settings)


def start(grid=None, rounds=1, transport=None, strategy=None):
    strategy = strategy or colearn()
    grid = grid or DroppingGrid(app_of())
    result = run(strategy, grid, INITIAL, rounds, transport=transport or secured())
    return result, strategy, grid


def mean_of(participants, server_round=1, model=MODEL, weights=None):
    """The mean of these participants' models, by the package's own mean without masks."""
    mean = RunningMean(model)
    for index, k in enumerate(participants):
        mean.add(step(k, server_round, model), 1 if weights is None else weights[index])
    return mean.mean()


def check_close(found, expected, tolerance=1e-6):
    found = view(found)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        if array.dtype.kind != "f":
            assert np.array_equal(found[name], array), name
            continue
        error = np.abs(found[name].astype(np.float64) - array.astype(np.float64))
        assert error.max() <= tolerance + np.finfo(array.dtype).eps, name


def test_the_model_is_the_mean_in_the_types_that_were_sent():
    result, strategy, grid = start(rounds=2)
    first = mean_of(range(K))
    check_close(result.arrays, mean_of(range(K), 2, first))
    record = strategy.history.records[0]
    assert record.participants == [f"partition-{k}" for k in range(K)]
    assert record.secure["participants"] == record.secure["weight"] == K
    assert record.secure["clipped"] == 0
    assert grid.stages == [(r, s, 0) for r in (1, 2) for s in ("train", "share", "mask", "unmask")]


def test_the_strategy_gets_the_average_from_everybody_with_weight_1():
    class Watching(CoLearn):
        def aggregate_train(self, server_round, replies):
            self.seen = list(replies)
            return super().aggregate_train(server_round, self.seen)

    strategy = Watching(K, local_epochs=1, learning_rate=0.1, fraction_evaluate=0.0)
    start(strategy=strategy)
    assert len(strategy.seen) == K
    models = [view(reply.content["arrays"]) for reply in strategy.seen]
    for model in models:
        assert all(np.array_equal(model[name], array) for name, array in models[0].items())
    assert [reply.content["metrics"]["num-examples"] for reply in strategy.seen] == [1] * K
    assert sorted(reply.content["metrics"]["loss"] for reply in strategy.seen) == [
        k / 4 for k in range(K)
    ]


@pytest.mark.parametrize("how", ["error", "silence", "late"])
@pytest.mark.parametrize(
    ("drops", "summed", "absent"),
    [
        ({(1, "share", 0): [1]}, [0, 2, 3, 4], [1]),
        ({(1, "mask", 0): [1]}, [0, 2, 3, 4], [1]),
        ({(1, "unmask", 0): [1]}, [0, 1, 2, 3, 4], [1]),
        ({(1, "share", 0): [0], (1, "mask", 0): [3]}, [1, 2, 4], [0, 3]),
        ({(1, "mask", 0): [2], (1, "unmask", 0): [4]}, [0, 1, 3, 4], [2, 4]),
        ({(1, "unmask", 0): [0, 1]}, [0, 1, 2, 3, 4], [0, 1]),
    ],
)
def test_those_that_drop_out_are_out_of_the_sum_and_named(how, drops, summed, absent):
    grid = DroppingGrid(app_of(), drops=drops, how=how)
    result, strategy, _ = start(grid)
    check_close(result.arrays, mean_of(summed))
    [record] = strategy.history
    assert record.participants == [f"partition-{k}" for k in summed]
    assert sorted(e["participant"] for e in record.absences) == [f"partition-{k}" for k in absent]
    assert all("secure aggregation" in entry["reason"] for entry in record.absences)


def test_a_vector_that_arrives_late_is_never_pulled_and_its_sender_tells_no_shares():
    grid = DroppingGrid(app_of(), drops={(1, "mask", 0): [2]}, how="late")
    start(grid)
    [late] = grid.late_replies()
    assert "colearn.secure.words" in late.content
    assert late.metadata.message_id not in {reply.message_id for reply in grid.received}
    asked = [m.metadata.dst_node_id for m in grid.sent if stage_of(m) == "unmask"]
    assert asked == [1, 2, 4, 5]


def test_below_the_threshold_the_round_is_repeated_with_new_keys_and_nobody_trains_again():
    app = app_of()
    grid = DroppingGrid(app, drops={(1, "mask", 0): [0, 1, 2]})
    result, strategy, _ = start(grid)
    check_close(result.arrays, mean_of(range(K)))
    [record] = strategy.history
    assert record.secure["attempts"] == 2
    assert len(record.restarts) == 3
    assert "repeated with new keys" in record.restarts[0]["reason"]
    assert sorted(app.trainings) == [(1, k) for k in range(K)]
    keys = {
        (m.content["colearn.secure"]["attempt"], key)
        for m in grid.sent
        if stage_of(m) == "share"
        for key in m.content["colearn.secure"]["keys"]
    }
    assert len({key for _, key in keys}) == len(keys) == 2 * K


def test_a_site_that_lost_its_model_trains_again_in_the_repeated_attempt():
    app = app_of()
    grid = DroppingGrid(app, drops={(1, "mask", 0): [0, 1, 2]})
    forget = grid._drops

    def drop_and_forget(message):
        dropped = forget(message)
        if dropped:
            grid.contexts[message.metadata.dst_node_id].state.clear()
        return dropped

    grid._drops = drop_and_forget
    result, _, _ = start(grid)
    check_close(result.arrays, mean_of(range(K)))
    assert sorted(app.trainings) == sorted([(1, k) for k in range(K)] + [(1, k) for k in range(3)])


def test_if_too_few_are_left_each_time_the_run_ends_and_names_them():
    drops = {(1, "mask", number): [0, 1, 2] for number in range(9)}
    with pytest.raises(ColearnError, match=r"at least 3 participants in the sum.*found 2") as error:
        start(DroppingGrid(app_of(), drops=drops))
    for k in range(3):
        assert f"partition-{k}: " in str(error.value)


def test_a_quorum_of_more_than_the_threshold_is_kept():
    drops = {(1, "mask", 0): [0, 1]}
    strategy = colearn(recovery=Recovery(max_restarts=1, pause=0.0, policy=Quorum(4)))
    result, _, _ = start(
        DroppingGrid(app_of(), drops=drops),
        strategy=strategy,
        transport=secured(recovery=Recovery()),
    )
    assert strategy.history.records[0].secure["attempts"] == 2
    check_close(result.arrays, mean_of(range(K)))


def test_once_shares_were_asked_for_no_second_sum_is_tried():
    drops = {(1, "unmask", 0): [0, 1, 2]}
    grid = DroppingGrid(app_of(), drops=drops)
    with pytest.raises(ColearnError, match="expected shares of 3 participants to unmask the sum"):
        start(grid)
    assert {number for _, _, number in grid.stages} == {0}


class Killed(CoLearn):
    """A server that is killed after the sum of its first round was unmasked."""

    def aggregate_train(self, server_round, replies):
        raise KeyboardInterrupt


def killed_after_the_sum(folder, app):
    grid = DroppingGrid(app)
    strategy = Killed(K, local_epochs=1, learning_rate=0.1, fraction_evaluate=0.0)
    with pytest.raises(KeyboardInterrupt):
        run(strategy, grid, INITIAL, 1, transport=secured(), checkpoints=folder)
    return grid


def resumed(folder, grid):
    return run(colearn(), grid, INITIAL, 1, transport=secured(), checkpoints=folder, resume="auto")


def test_a_site_tells_shares_of_one_sum_in_a_round_only(tmp_path):
    """The resumed server lacks a participant: both sums would tell that one's model."""
    grid = killed_after_the_sum(tmp_path, app_of())
    grid.drops = {(1, "mask", number): [2] for number in range(9)}
    with pytest.raises(ColearnError, match=r"participants of the sum of round 1.*whose sum was"):
        resumed(tmp_path, grid)


def test_the_same_participants_may_repeat_the_round_of_a_killed_server(tmp_path):
    app = app_of()
    grid = killed_after_the_sum(tmp_path, app)
    check_close(resumed(tmp_path, grid).arrays, mean_of(range(K)))
    assert len(app.trainings) == 2 * K


def test_two_runs_with_the_same_dropouts_give_the_same_bits():
    drops = {(1, "mask", 0): [3], (2, "share", 0): [0]}
    one, other = (start(DroppingGrid(app_of(), drops=drops), rounds=2)[0].arrays for _ in range(2))
    assert all(one[name].data == other[name].data for name in one)


def test_without_recovery_those_that_fail_are_left_out_and_nothing_is_repeated():
    grid = DroppingGrid(app_of(), drops={(1, "train", 0): [1]})
    strategy = colearn(recovery=None)
    result, _, _ = start(grid, strategy=strategy, transport=secured(recovery=Recovery()))
    check_close(result.arrays, mean_of([0, 2, 3, 4]))
    [record] = strategy.history
    assert [entry["participant"] for entry in record.absences] == ["2"]
    drops = {(1, "mask", 0): [0, 1, 2]}
    with pytest.raises(ColearnError, match="at least 3 participants in the sum"):
        start(
            DroppingGrid(app_of(), drops=drops),
            strategy=colearn(recovery=None),
            transport=secured(recovery=Recovery()),
        )


def test_the_time_of_a_training_is_not_that_of_a_repeated_attempt(clock):
    drops = {(1, "mask", 0): [0, 1, 2]}
    grid = DroppingGrid(app_of(), drops=drops)
    before = grid._call

    def slow(message):
        trained = len(app_trainings)
        reply = before(message)
        clock.now += 100.0 * (len(app_trainings) - trained)
        return reply

    app_trainings, grid._call = grid.client_app.trainings, slow
    connected = secured().connect(grid)
    taken = []
    take = type(connected).take

    class Watching(CoLearn):
        def _account(self):
            self._grid.take = lambda: taken.append(take(self._grid)) or taken[-1]
            super()._account()

    run(
        Watching(K, local_epochs=1, learning_rate=0.1, fraction_evaluate=0.0), connected, INITIAL, 1
    )
    assert taken[0].secure["attempts"] == 2
    assert taken[0].seconds >= 100.0


# The mean -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FedAvg, Averaging])
def test_a_weighted_mean_does_not_tell_the_server_who_has_how_many(kind):
    strategy = kind(**NODES)
    result, _, grid = start(strategy=strategy, rounds=2)
    first = mean_of(range(K), weights=EXAMPLES)
    check_close(result.arrays, mean_of(range(K), 2, first, EXAMPLES), 2e-6)
    for reply in grid.received:
        for metrics in reply.content.metric_records.values():
            assert "num-examples" not in metrics


def test_words_have_32_bits_once_the_number_of_examples_is_known():
    strategy = Averaging(K, fraction_evaluate=0.0)
    _, strategy, _ = start(strategy=strategy, rounds=2)
    first, second = strategy.history
    floats = 600 + 7 + 1
    assert first.bytes_up - second.bytes_up == pytest.approx(4 * K * floats, abs=K * 32)


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: FedProx(proximal_mu=0.1, **NODES),
        lambda: FedAdam(eta=0.01, tau=0.1, **NODES),
        lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.9, **NODES),
    ],
)
def test_strategies_that_use_the_mean_get_the_same_as_without_masks(strategy):
    masked, _, _ = start(strategy=strategy(), rounds=2)
    plain = run(
        strategy(), InProcessGrid(app_of(), K), INITIAL, 2, transport=Transport(recovery=QUICK)
    )
    check_close(masked.arrays, dict(view(plain.arrays)), 1e-5)


def test_a_users_subclass_works_and_is_warned_of(flower_log):
    class Mine(FedAvg):
        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, replies)

    result, _, _ = start(strategy=Mine(**NODES))
    check_close(result.arrays, mean_of(range(K), weights=EXAMPLES), 2e-6)
    assert "Mine.aggregate_train receives the average" in flower_log.text


def test_known_strategies_are_not_warned_of(flower_log):
    start()
    start(strategy=FedAvg(**NODES))
    assert "receives the average" not in flower_log.text


def test_it_works_in_flowers_own_loop():
    grid = DroppingGrid(app_of())
    transport = Transport(recovery=QUICK, secure=SecureAggregation(timeout=0.2))
    result = FedAvg(**NODES).start(transport.connect(grid), INITIAL, 1)
    expected = mean_of(range(K), weights=EXAMPLES)
    found = result.arrays["fc.weight"].numpy()
    assert np.abs(found - expected["fc.weight"]).max() < 2e-6


def test_epochs_follow_equation_4_of_the_averages():
    def halving(k, server_round, arrays):
        moved = step(k, server_round, arrays)
        scale = 0.3 ** (server_round - 1)
        return {
            n: np.asarray(a + scale * (moved[n] - a), a.dtype) if a.dtype.kind == "f" else a
            for n, a in arrays.items()
        }

    paths = []
    for transport in (secured(), Transport(recovery=QUICK)):
        strategy = colearn(local_epochs=IncreasingEpochs(1, epsilon=0.02))
        run(strategy, DroppingGrid(app_of(halving)), INITIAL, 5, transport=transport)
        paths.append(strategy.history.epochs_path)
        changes = [record.relative_change for record in strategy.history]
        assert all(change is not None for change in changes)
    assert paths[0] == paths[1]
    assert len(set(paths[0])) > 1


@pytest.mark.parametrize("down", [Float16(), BFloat16()])
def test_models_may_be_compressed_downwards(down):
    result, _, _ = start(transport=secured(compression=Compression(down=down)))
    received = Compression(down=down).received(MODEL)
    check_close(result.arrays, mean_of(range(K), model=received), 1e-6)


def test_local_statistics_stay_at_the_sites():
    result, strategy, grid = start(transport=secured(normalization=LocalStatistics()), rounds=3)
    found = view(result.arrays)
    for name in ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"):
        assert np.array_equal(found[name], MODEL[name])
    first = mean_of(range(K))
    assert np.abs(found["fc.weight"] - first["fc.weight"]).max() > 1e-3
    names = {
        name
        for reply in grid.received
        for record in reply.content.array_records.values()
        for name in record
    }
    assert names == {"fc.weight", "fc.bias", "scalar", "totals"}
    # They are sent down once, and then the sites are known to have their own.
    sizes = [record.bytes_down for record in strategy.history]
    assert sizes[1] == sizes[2] < sizes[0]


def test_metrics_may_be_under_the_masks():
    _, strategy, grid = start(transport=secured(masked_metrics=True))
    assert strategy.history.records[0].train_metrics["loss"] == pytest.approx(0.5, abs=1e-6)
    for reply in grid.received:
        for metrics in reply.content.metric_records.values():
            assert not metrics


class SerialisingGrid(DroppingGrid):
    """A grid on which messages, replies and client states travel as Flower serialises them."""

    def _call(self, message):
        context = self.contexts[message.metadata.dst_node_id]
        context.state = _carried(context.state)
        arrived = copied(message, _carried(message.content))
        set_message_id(arrived, message.metadata.message_id)
        reply = super()._call(arrived)
        if reply.has_content():
            reply.content = _carried(reply.content)
        return reply


def _carried(content):
    return state_from_bytes(state_to_bytes(content))


def test_everything_is_serialisable_by_flower():
    drops = {(1, "mask", 0): [1], (2, "mask", 0): [0, 1, 2]}
    results = []
    for kind in (DroppingGrid, SerialisingGrid):
        grid = kind(app_of(), drops=drops)
        results.append(start(grid, rounds=2, transport=secured(masked_metrics=True))[0].arrays)
    assert all(results[0][name].data == results[1][name].data for name in results[0])


# Clipping -----------------------------------------------------------------------------------------


def growing(k, server_round, arrays):
    """Steps of 0.5, in round 2 of 300: beyond 8 times the last mean."""
    size = 300.0 if server_round == 2 else 0.5
    return {
        n: np.asarray(a + size, a.dtype) if a.dtype.kind == "f" and n == "fc.weight" else a
        for n, a in arrays.items()
    }


def test_the_range_follows_the_updates_and_is_doubled_where_they_were_clipped():
    _, strategy, _ = start(DroppingGrid(app_of(growing)), rounds=4)
    ranges = [record.secure["clipping-range"] for record in strategy.history]
    clipped = [record.secure["clipped"] for record in strategy.history]
    assert ranges[0] == 8.0
    assert ranges[1] == pytest.approx(8 * 0.5, rel=1e-6)
    assert clipped == [0, K * 600, 0, 0]
    assert ranges[2] == pytest.approx(8 * ranges[1], rel=1e-6)  # more than twice
    assert ranges[3] == pytest.approx(8 * 0.5, rel=1e-6)


def test_a_fixed_range_stays():
    _, strategy, _ = start(
        DroppingGrid(app_of(growing)), rounds=3, transport=secured(clipping_range=1.0)
    )
    assert [record.secure["clipping-range"] for record in strategy.history] == [1.0] * 3
    assert strategy.history.records[1].secure["clipped"] == K * 600


# At the sites -------------------------------------------------------------------------------------


def spoiled(value, k=2, only_once=True):
    done = []

    def train(site, server_round, arrays):
        trained = step(site, server_round, arrays)
        if site == k and not (only_once and done):
            done.append(site)
            trained["fc.weight"] = np.full((20, 30), value, np.float32)
        return trained

    return train


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_is_refused_at_the_site_which_is_restarted(value):
    result, strategy, _ = start(DroppingGrid(app_of(spoiled(value))))
    check_close(result.arrays, mean_of(range(K)))
    [restart] = strategy.history.records[0].restarts
    assert restart["participant"] == "partition-2"
    assert "expected finite numbers, found NaN or Inf" in restart["reason"]


def test_a_site_that_diverges_again_ends_the_run_by_name():
    with pytest.raises(ColearnError, match=r"lost participant partition-2.*NaN or Inf"):
        start(DroppingGrid(app_of(spoiled(np.nan, only_once=False))))


def test_a_site_without_the_mod_is_named():
    from flwr.app import Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def _(message, context):
        metrics = MetricRecord({"num-examples": 1})
        content = {"arrays": message.content["arrays"], "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    with pytest.raises(ColearnError, match="add participant_mod"):
        start(InProcessGrid(app, K))


def test_a_fraction_of_an_example_is_refused_where_it_is_a_weight():
    app = app_of()
    before = EXAMPLES[0]
    import tests.flwr_colearn.secure.secure_faults as faults

    faults.EXAMPLES = (before + 0.5, *EXAMPLES[1:])
    try:
        with pytest.raises(ColearnError, match="expected a whole number"):
            start(DroppingGrid(app), strategy=FedAvg(**NODES))
    finally:
        faults.EXAMPLES = EXAMPLES


def test_the_model_is_not_kept_longer_than_it_is_needed():
    _, _, grid = start()
    for context in grid.contexts.values():
        assert not any(isinstance(each, ArrayRecord) for each in context.state.values())


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"secure": True}, "secure: expected a SecureAggregation, or None, found True"),
        ({"compression": Compression(up=Int8())}, "compression under secure aggregation"),
        ({"compression": Compression(up=Float16())}, "compression under secure aggregation"),
        ({"normalization": Recalibrated()}, "normalization under secure aggregation"),
        ({"guard": Guard()}, "guard under secure aggregation"),
        ({"guard": Guard(largest_share=0.5)}, "guard under secure aggregation"),
    ],
)
def test_features_that_need_single_models_are_refused(arguments, match):
    with pytest.raises(ColearnError, match=match):
        Transport(**{"secure": SecureAggregation(), **arguments})


def test_a_guard_of_the_strategy_is_refused_too_and_the_default_one_is_off(flower_log):
    with pytest.raises(ColearnError, match="guard under secure aggregation"):
        start(strategy=colearn(guard=Guard()))
    start(strategy=colearn(guard=None))
    start()
    assert "Guard: off under secure aggregation" in flower_log.text


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"threshold": 2}, "threshold"),
        ({"clipping_range": 0.0}, "clipping_range of SecureAggregation: expected a number above 0"),
        ({"clipping_range": "wide"}, "clipping_range"),
        ({"first_range": float("nan")}, "first_range"),
        ({"largest_weight": 0}, "largest_weight"),
        ({"timeout": -1}, "timeout"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_settings_are_checked(arguments, match):
    with pytest.raises(ColearnError, match=match):
        SecureAggregation(**arguments)


@pytest.mark.parametrize("k", [1, 2, 51])
def test_fewer_than_three_participants_are_refused_before_anybody_trains(k):
    app = app_of()
    strategy = CoLearn(k, local_epochs=1, learning_rate=0.1, fraction_evaluate=0.0)
    with pytest.raises(ColearnError, match="participants under secure aggregation: expected 3"):
        run(strategy, InProcessGrid(app, k), INITIAL, 1, transport=secured())
    assert app.trainings == []


@pytest.mark.parametrize(("threshold", "k", "good"), [(3, 6, False), (4, 6, True), (6, 5, False)])
def test_the_threshold_is_more_than_half_and_at_most_all(threshold, k, good):
    secure = SecureAggregation(threshold=threshold)
    if good:
        assert secure.threshold_of(k) == threshold
        return
    with pytest.raises(ColearnError, match="threshold of SecureAggregation"):
        secure.threshold_of(k)


def test_three_participants_can_be_summed_and_none_may_drop_out():
    strategy = CoLearn(3, local_epochs=1, learning_rate=0.1, fraction_evaluate=0.0)
    result, _, _ = start(DroppingGrid(app_of(), 3), strategy=strategy)
    check_close(result.arrays, mean_of(range(3)))
    drops = {(1, "mask", number): [0] for number in range(9)}
    strategy = CoLearn(3, local_epochs=1, learning_rate=0.1, fraction_evaluate=0.0)
    with pytest.raises(ColearnError, match="at least 3 participants in the sum"):
        start(DroppingGrid(app_of(), 3, drops), strategy=strategy)


REFUSED = {
    "FedMedian": lambda: FedMedian(**NODES),
    "FedTrimmedAvg": lambda: FedTrimmedAvg(**NODES),
    "Krum": lambda: Krum(**NODES),
    "MultiKrum": lambda: MultiKrum(**NODES),
    "Bulyan": lambda: Bulyan(**NODES),
    "QFedAvg": lambda: QFedAvg(client_learning_rate=0.1, **NODES),
    "FedXgbBagging": lambda: FedXgbBagging(**NODES),
    "subclass": lambda: type("Mine", (FedMedian,), {})(**NODES),
    "DifferentialPrivacy": lambda: DifferentialPrivacyServerSideFixedClipping(
        FedAvg(**NODES), noise_multiplier=0.1, clipping_norm=1.0, num_sampled_clients=K
    ),
    "SynchronousSGD": lambda: SynchronousSGD(K, learning_rate=0.1),
    "DynamicAveraging": lambda: DynamicAveraging(0.1, 1, num_learners=K),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_strategy_that_needs_single_models_is_refused_before_anybody_trains(name):
    app = app_of()
    with pytest.raises(ColearnError, match="strategy under secure aggregation"):
        run(REFUSED[name](), InProcessGrid(app, K), INITIAL, 1, transport=secured())
    assert app.trainings == []


@pytest.mark.parametrize("name", ["FedMedian", "Krum", "DifferentialPrivacy"])
def test_it_is_refused_in_flowers_own_loop_too(name):
    app = app_of()
    with pytest.raises(ColearnError, match="under secure aggregation"):
        REFUSED[name]().start(secured().connect(InProcessGrid(app, K)), INITIAL, 1)
    assert app.trainings == []


def test_an_extreme_is_refused_before_anybody_trains():
    app = app_of()
    with pytest.raises(ColearnError, match=r"role of array 'fc\.bias' under secure aggregation"):
        start(InProcessGrid(app, K), transport=secured(roles={"fc.bias": Role.MAXIMUM}))
    assert app.trainings == []


def test_a_training_outside_the_protocol_is_refused():
    from flwr.app import Message, RecordDict

    connected = secured().connect(InProcessGrid(app_of(), K))
    config = ConfigRecord({"server-round": 1})
    for kind in ("train", "train.own"):
        message = Message(RecordDict({"arrays": INITIAL, "config": config}), 1, kind)
        with pytest.raises(ColearnError, match="secure aggregation"):
            connected.push_messages([message])


# Checkpoints --------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_same_bits_as_one_that_was_not_interrupted(tmp_path):
    def run_to(rounds, folder, resume="never"):
        return run(
            colearn(),
            DroppingGrid(app_of()),
            INITIAL,
            rounds,
            transport=secured(),
            checkpoints=folder,
            resume=resume,
        )

    whole = run_to(4, tmp_path / "whole").arrays
    run_to(2, tmp_path / "parts")
    parts = run_to(4, tmp_path / "parts", "auto").arrays
    assert all(whole[name].data == parts[name].data for name in whole)


def test_a_run_is_not_resumed_without_it(tmp_path):
    run(colearn(), DroppingGrid(app_of()), INITIAL, 1, transport=secured(), checkpoints=tmp_path)
    with pytest.raises(ColearnError, match="another secure aggregation"):
        run(
            colearn(),
            DroppingGrid(app_of()),
            INITIAL,
            2,
            transport=Transport(recovery=QUICK),
            checkpoints=tmp_path,
            resume="auto",
        )


def test_the_figures_are_in_the_history(tmp_path):
    strategy = colearn(history=tmp_path / "history.jsonl")
    start(strategy=strategy)
    [record] = History.read(tmp_path / "history.jsonl")
    assert record.secure == {
        "participants": K,
        "attempts": 1,
        "clipping-range": 8.0,
        "clipped": 0,
        "weight": K,
    }
    assert all(entry["norm"] is None for entry in record.contributions.values())


def test_the_log_says_who_dropped_out(flower_log):
    start(DroppingGrid(app_of(), drops={(1, "mask", 0): [2]}))
    found = [r.getMessage() for r in flower_log.records if r.levelno >= logging.WARNING]
    assert any(re.search("participant partition-2 dropped out", text) for text in found)
