"""Subclasses as real projects have them: they drop, walk, sort and change what arrives."""

import functools

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import DifferentialPrivacyServerSideFixedClipping
from flwr.serverapp.strategy import FedAvg, FedAvgM

from flwr_colearn import (
    Averaging,
    CoLearn,
    ColearnError,
    Compression,
    Float16,
    InProcessGrid,
    LocalStatistics,
    Quorum,
    Recovery,
    legacy,
    run,
)
from tests.dropin import shapes
from tests.dropin.shapes import INITIAL, answer, app_of, filled, record_of, run_legacy

RULES = {"local_epochs": 1, "learning_rate": 0.1}


def first_number(arrays):
    return float(arrays["fc.weight"].numpy()[0, 0])


# Legacy: results that a subclass drops


class DropsStragglers(legacy.CoLearn):
    """The filter of baselines/fedprox."""

    averages: list

    def aggregate_fit(self, server_round, results, failures):
        kept = [(client, fit) for client, fit in results if not fit.metrics["is_straggler"]]
        average, metrics = super().aggregate_fit(server_round, kept, failures)
        if average is not None:
            self.averages = [*getattr(self, "averages", []), parameters_to_ndarrays(average)]
        return average, metrics


class DropsStragglersAndFailures(DropsStragglers):
    def aggregate_fit(self, server_round, results, failures):
        return super().aggregate_fit(server_round, results, [])


class Mixin:
    def aggregate_fit(self, server_round, results, failures):
        kept = [(client, fit) for client, fit in results if not fit.metrics["is_straggler"]]
        return DropsStragglers.aggregate_fit(self, server_round, kept, failures)


class DropsInAMixin(Mixin, DropsStragglers):
    pass


LEGACY = [DropsStragglers, DropsStragglersAndFailures, DropsInAMixin]


@pytest.mark.parametrize("kind", LEGACY)
@pytest.mark.parametrize("guard", [True, False])
def test_a_result_that_a_legacy_subclass_drops_is_not_asked_for_again(kind, guard):
    strategy = kind(3, fraction_evaluate=0.0, **RULES, **({} if guard else {"guard": None}))
    called = run_legacy(strategy, [1, 1, 100])
    assert sorted(called) == [0, 1, 2]
    np.testing.assert_array_equal(strategy.averages[0][0], filled(1)["fc.weight"])


@pytest.mark.parametrize("kind", LEGACY)
def test_a_participant_that_fails_is_restarted_and_passes_the_filter_of_a_legacy_subclass(kind):
    def fails_and_straggles(calls):
        if calls <= 3:
            raise OSError("disk")
        return 100

    recovery = Recovery(pause=0.0, max_restarts=5)
    strategy = kind(3, fraction_evaluate=0.0, recovery=recovery, **RULES)
    called = run_legacy(strategy, [1, 1, fails_and_straggles])
    assert called.count(0) == called.count(1) == 1
    assert called.count(2) > 1
    np.testing.assert_array_equal(strategy.averages[0][0], filled(1)["fc.weight"])


def test_a_result_that_is_dropped_is_recorded_and_no_lost_participant():
    strategy = DropsStragglers(3, fraction_evaluate=0.0, **RULES)
    run_legacy(strategy, [1, 1, 100], num_rounds=2)
    for record in strategy.history:
        assert record.participants == ["1", "2"]
        assert [entry["participant"] for entry in record.absences] == ["3"]
        assert not record.restarts


def test_a_round_whose_results_are_all_dropped_keeps_the_model():
    strategy = DropsStragglers(2, fraction_evaluate=0.0, **RULES)
    assert sorted(run_legacy(strategy, [100, 100], num_rounds=2)) == [0, 0, 1, 1]
    assert [record.relative_change for record in strategy.history] == [None, None]


def test_a_lost_participant_still_ends_the_run_of_a_subclass_that_drops_failures():
    def fails(calls):
        raise OSError("disk")

    recovery = Recovery(pause=0.0, max_restarts=1)
    strategy = DropsStragglersAndFailures(3, fraction_evaluate=0.0, recovery=recovery, **RULES)
    with pytest.raises(ColearnError, match=r"lost \['3'\].*disk"):
        run_legacy(strategy, [1, 1, fails])


def test_a_restart_sends_the_config_that_a_subclass_made(monkeypatch):
    configs = []

    class Proximal(legacy.CoLearn):
        def configure_fit(self, server_round, parameters, client_manager):
            asked = super().configure_fit(server_round, parameters, client_manager)
            return [(c, FitIns(i.parameters, {**i.config, "proximal_mu": 0.5})) for c, i in asked]

        def aggregate_fit(self, server_round, results, failures):
            return super().aggregate_fit(server_round, results, failures)

    def fails_once(calls):
        if calls == 1:
            raise OSError("disk")
        return 1

    class Recording(shapes.Participant):
        def fit(self, parameters, config):
            configs.append(config["proximal_mu"])
            return super().fit(parameters, config)

    monkeypatch.setattr(shapes, "Participant", Recording)
    strategy = Proximal(1, fraction_evaluate=0.0, recovery=Recovery(pause=0.0), **RULES)
    run_legacy(strategy, [fails_once])
    assert configs == [0.5, 0.5]


def test_a_restarted_result_is_clipped_by_a_wrapper_as_the_others_are():
    def fails_once(calls):
        if calls <= 2:
            raise OSError("disk")
        return 100

    inner = legacy.CoLearn(
        2, fraction_evaluate=0.0, guard=None, recovery=Recovery(pause=0.0), **RULES
    )
    clipping = 1.0
    wrapper = DifferentialPrivacyServerSideFixedClipping(inner, 1e-9, clipping, 2)
    shared = []
    inner.evaluate_fn = lambda _, arrays, config: shared.append(arrays)
    wrapper.initial_parameters = inner.initial_parameters
    inner.initial_parameters = ndarrays_to_parameters(list(INITIAL.values()))
    run_legacy(wrapper, [1, fails_once])
    norm = np.sqrt(sum(float(np.square(array).sum()) for array in shared[-1]))
    assert norm <= clipping + 1e-4


def test_an_aggregation_of_ones_own_in_the_legacy_api_is_measured_and_recorded():
    class Median(legacy.CoLearn):
        def aggregate_fit(self, server_round, results, failures):
            models = [parameters_to_ndarrays(fit.parameters) for _, fit in results]
            middle = [
                np.median(each, axis=0).astype(np.float32) for each in zip(*models, strict=True)
            ]
            return ndarrays_to_parameters(middle), {}

    strategy = Median(3, fraction_evaluate=0.0, **RULES)
    run_legacy(strategy, [1, 2, 100], num_rounds=2)
    assert [record.participants for record in strategy.history] == [["1", "2", "3"]] * 2
    assert strategy.history.records[1].relative_change == pytest.approx(1.0)


# Message API: replies that a subclass walks, drops, changes


def length_before(strategy, aggregate, server_round, replies):
    strategy.seen = [len(list(replies)), len(list(replies))]
    return aggregate(server_round, replies)


def walks_after(strategy, aggregate, server_round, replies):
    outcome = aggregate(server_round, replies)
    strategy.seen = [sum(1 for _ in replies), len(replies)]
    return outcome


def sorts_before(strategy, aggregate, server_round, replies):
    replies.sort(key=lambda reply: reply.metadata.src_node_id, reverse=True)
    strategy.seen = [len(replies), len(replies)]
    return aggregate(server_round, replies)


def passes_a_generator(strategy, aggregate, server_round, replies):
    strategy.seen = [len(replies), len(replies)]
    return aggregate(server_round, (reply for reply in replies))


WALKS = [length_before, walks_after, sorts_before, passes_a_generator]


def subclass(walk, base):
    class Own(base):
        def aggregate_train(self, server_round, replies):
            return walk(self, super().aggregate_train, server_round, replies)

    return Own


def mixin(walk, base):
    class First:
        def aggregate_train(self, server_round, replies):
            return walk(self, super().aggregate_train, server_round, replies)

    return type("Mixed", (First, base), {})


def decorated(walk, base):
    class Own(base):
        @functools.wraps(base.aggregate_train)
        def aggregate_train(self, server_round, replies):
            return walk(self, super().aggregate_train, server_round, replies)

    return type("OfDecorated", (Own,), {})


def of_the_instance(walk, base):
    def make(*args, **kwargs):
        strategy = base(*args, **kwargs)
        own = strategy.aggregate_train
        strategy.aggregate_train = lambda number, replies: walk(strategy, own, number, replies)
        return strategy

    return make


def bound_to_the_instance(walk, base):
    def make(*args, **kwargs):
        strategy = base(*args, **kwargs)
        own = strategy.aggregate_train

        @functools.wraps(own)
        def aggregate(self, server_round, replies):
            return walk(self, own, server_round, replies)

        strategy.aggregate_train = aggregate.__get__(strategy)
        return strategy

    return make


FORMS = [subclass, mixin, decorated, of_the_instance, bound_to_the_instance]
FEATURES = [
    {},
    {"guard": None},
    {"compression": Compression(up=Float16(), down=Float16())},
    {"normalization": LocalStatistics()},
    {"recovery": None},
]


def start(strategy, steps, num_rounds=1, **arguments):
    app = app_of(steps, **arguments)
    return strategy.start(InProcessGrid(app, len(steps)), record_of(INITIAL), num_rounds=num_rounds)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("walk", WALKS)
def test_a_subclass_that_walks_the_replies_gets_a_list(form, walk):
    strategy = form(walk, CoLearn)(3, fraction_evaluate=0.0, **RULES)
    result = start(strategy, [1, 2, 6])
    assert strategy.seen == [3, 3]
    assert first_number(result.arrays) == 3.0


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_it_gets_a_list_with_every_feature(features):
    strategy = subclass(length_before, CoLearn)(3, fraction_evaluate=0.0, **RULES, **features)
    assert first_number(start(strategy, [1, 2, 6]).arrays) == 3.0
    assert strategy.seen == [3, 3]


def test_the_list_is_in_the_order_of_the_participants_names():
    orders = []

    class Looks(CoLearn):
        def aggregate_train(self, server_round, replies):
            orders.append([reply.metadata.src_node_id for reply in replies])
            return super().aggregate_train(server_round, replies)

    class Shuffled(InProcessGrid):
        def get_node_ids(self):
            return super().get_node_ids()[::-1]

    strategy = Looks(3, fraction_evaluate=0.0, **RULES)
    strategy.start(Shuffled(app_of([1, 2, 3]), 3), record_of(INITIAL), num_rounds=2)
    assert orders == [[1, 2, 3]] * 2


def test_without_an_override_replies_are_still_streamed():
    class Named(CoLearn):
        def configure_train(self, *arguments):
            return super().configure_train(*arguments)

    strategy = Named(3, **RULES)
    assert strategy.streams
    assert CoLearn(3, **RULES).streams
    assert not subclass(length_before, CoLearn)(3, **RULES).streams


# Replies that a subclass drops


class Drops(CoLearn):
    def aggregate_train(self, server_round, replies):
        kept = [r for r in replies if not r.content["metrics"]["straggles"]]
        return super().aggregate_train(server_round, kept)


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_a_reply_that_a_subclass_drops_is_neither_averaged_nor_asked_for_again(features):
    called = []
    strategy = Drops(3, fraction_evaluate=0.0, **RULES, **features)
    assert first_number(start(strategy, [1, 1, 100], called=called).arrays) == 1.0
    assert called == [0, 1, 2]
    [record] = strategy.history
    # Without recovery nobody is asked for a name.
    names = [f"partition-{k}" for k in range(3)] if strategy.transport.recovery else list("123")
    assert record.participants == names[:2]
    assert [entry["participant"] for entry in record.absences] == names[2:]


def test_a_round_whose_replies_are_all_dropped_keeps_the_model():
    strategy = Drops(2, fraction_evaluate=0.0, **RULES)
    assert first_number(start(strategy, [100, 100], num_rounds=2).arrays) == 0.0
    assert [record.relative_change for record in strategy.history] == [None, None]


def test_a_quorum_counts_the_replies_that_a_subclass_drops():
    strategy = Drops(
        3, fraction_evaluate=0.0, recovery=Recovery(policy=Quorum(3), max_restarts=0), **RULES
    )
    assert first_number(start(strategy, [1, 1, 100]).arrays) == 1.0


def test_a_reply_that_is_refused_sent_again_and_then_dropped_is_no_lost_participant():
    app, replied = app_of([1, 1, 100]), []

    def spoils_the_first(message, context):
        reply = app(message, context)
        if context.node_id == 3 and "arrays" in message.content and not replied:
            replied.append(True)
            reply.content["arrays"] = record_of(filled(np.nan))
        return reply

    grid = InProcessGrid(app, 3)
    grid.client_app = spoils_the_first
    strategy = Drops(3, fraction_evaluate=0.0, recovery=Recovery(pause=0.0), **RULES)
    assert first_number(strategy.start(grid, record_of(INITIAL), num_rounds=1).arrays) == 1.0
    [record] = strategy.history
    assert [len(record.refusals), len(record.restarts), len(record.absences)] == [1, 1, 1]


def test_the_same_in_the_legacy_api():
    def spoils_the_first(calls):
        return np.nan if calls <= 3 and not spoiled.append(calls) and len(spoiled) == 1 else 100

    spoiled = []
    strategy = DropsStragglers(3, fraction_evaluate=0.0, recovery=Recovery(pause=0.0), **RULES)
    run_legacy(strategy, [1, 1, spoils_the_first])
    np.testing.assert_array_equal(strategy.averages[0][0], filled(1)["fc.weight"])
    [record] = strategy.history
    assert [len(record.refusals), len(record.restarts), len(record.absences)] == [1, 1, 1]


def test_an_aggregation_of_ones_own_is_measured_and_recorded():
    class Median(CoLearn):
        def aggregate_train(self, server_round, replies):
            models = [reply.content["arrays"].to_numpy_ndarrays() for reply in replies]
            middle = [
                np.median(each, axis=0).astype(np.float32) for each in zip(*models, strict=True)
            ]
            return record_of(dict(zip(INITIAL, middle, strict=True))), None

    strategy = Median(3, fraction_evaluate=0.0, **RULES)
    assert first_number(start(strategy, [1, 2, 100], num_rounds=2).arrays) == 4.0
    names = [f"partition-{k}" for k in range(3)]
    assert [record.participants for record in strategy.history] == [names] * 2
    assert strategy.history.records[1].relative_change == pytest.approx(1.0)
    assert all(record.bytes_up for record in strategy.history)


# Replies that a subclass changes


def clips_in_place(reply):
    reply.content["arrays"] = record_of(filled(1))
    return reply


def clips_each_array(reply):
    for name, array in record_of(filled(1)).items():
        reply.content["arrays"][name] = array
    return reply


def clips_in_another_message(reply):
    content = RecordDict({**reply.content, "arrays": record_of(filled(1))})
    sent = Message(RecordDict(), dst_node_id=reply.metadata.src_node_id, message_type="train")
    sent.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return Message(content, reply_to=sent)


CLIPS = [clips_in_place, clips_each_array, clips_in_another_message]


def changes(clip, only=None, generator=False):
    class Changes(CoLearn):
        def aggregate_train(self, server_round, replies):
            last = len(replies) - 1
            changed = (clip(r) if only is None or i == last else r for i, r in enumerate(replies))
            return super().aggregate_train(server_round, changed if generator else list(changed))

    return Changes


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("clip", CLIPS)
def test_the_reply_that_a_subclass_passes_on_is_averaged(clip, generator, features):
    strategy = changes(clip, generator=generator)(3, fraction_evaluate=0.0, **RULES, **features)
    assert first_number(start(strategy, [100, 200, 300]).arrays) == 1.0


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("clip", CLIPS)
def test_a_single_changed_reply_is_averaged_as_changed(clip, generator):
    strategy = changes(clip, "last", generator)(3, fraction_evaluate=0.0, **RULES)
    assert first_number(start(strategy, [4, 4, 300]).arrays) == 3.0


@pytest.mark.parametrize("generator", [False, True])
def test_a_reply_that_a_subclass_spoils_is_refused(generator):
    def spoils(reply):
        reply.content["arrays"] = record_of(filled(np.nan))
        return reply

    recovery = Recovery(policy=Quorum(1))
    strategy = changes(spoils, "last", generator)(
        3, fraction_evaluate=0.0, recovery=recovery, **RULES
    )
    assert first_number(start(strategy, [4, 4, 300]).arrays) == 4.0
    assert "NaN" in strategy.history.records[0].refusals[0]["reason"]


def test_the_number_of_examples_that_a_subclass_sets_is_the_weight():
    class Weighs(Averaging):
        def aggregate_train(self, server_round, replies):
            for reply, examples in zip(replies, ([1, 3], [3, 1])[server_round - 1], strict=True):
                reply.content["metrics"]["num-examples"] = examples
            return super().aggregate_train(server_round, replies)

    strategy, found = Weighs(2, fraction_evaluate=0.0), []
    app = ClientApp()

    @app.train()
    def _(message, context):
        return answer(message, filled([0, 4][context.node_config["partition-id"]]))

    result = strategy.start(
        InProcessGrid(app, 2),
        record_of(INITIAL),
        num_rounds=2,
        evaluate_fn=lambda _, arrays: found.append(first_number(arrays)),
    )
    assert found == [0.0, 3.0, 1.0]
    assert first_number(result.arrays) == 1.0


@pytest.mark.parametrize("clip", CLIPS[:2])
@pytest.mark.parametrize("base", [FedAvg, FedAvgM], ids=lambda kind: kind.__name__)
def test_statistics_that_a_subclass_of_flowers_strategies_changes_are_pooled_as_changed(clip, base):
    class Clips(base):
        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, [clip(reply) for reply in replies])

    strategy = Clips(min_train_nodes=3, min_available_nodes=3, fraction_evaluate=0.0)
    grid = InProcessGrid(app_of([100, 200, 300]), 3)
    config = ConfigRecord({"local-epochs": 1, "learning-rate": 0.1})
    arrays = run(strategy, grid, record_of(INITIAL), num_rounds=1, train_config=config).arrays
    for name, array in arrays.items():
        np.testing.assert_array_equal(array.numpy(), filled(1)[name], err_msg=name)
