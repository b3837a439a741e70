"""Replies are folded as they arrive, and dropped: never more than one is in memory."""

import gc
import weakref

import numpy as np
import pytest
from flwr.app import ConfigRecord

from flwr_colearn import InProcessGrid, RecoveringGrid
from tests.faults import FaultyGrid, K, bits, outcome, record_of, strategy_of

MODEL = {"w": np.linspace(-1, 1, 6, dtype=np.float32), "step": np.array(3)}


class WatchedGrid(FaultyGrid):
    """Counts the replies that are alive whenever the next one is pulled."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alive, self.most = [], 0

    def pull_messages(self, message_ids):
        self.most = max(self.most, sum(ref() is not None for ref in self.alive))
        replies = InProcessGrid.pull_messages(self, message_ids)
        models = [reply.content["arrays"] for reply in replies if "arrays" in reply.content]
        self.alive += map(weakref.ref, models)
        return replies

    push_messages = InProcessGrid.push_messages


@pytest.fixture
def no_collector():
    """Only what is in no reference cycle is freed."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_no_reply_outlives_its_folding(clock):
    grid = WatchedGrid(clock)
    strategy = strategy_of(fraction_evaluate=0.0)
    strategy.start(grid, record_of(MODEL), num_rounds=3)
    assert len(grid.alive) == 3 * K
    assert grid.most == 0


def test_float64_models_wait_for_each_other_since_their_order_counts(clock):
    grid = WatchedGrid(clock)
    strategy_of(fraction_evaluate=0.0).start(grid, record_of({"w": np.ones(2)}), num_rounds=1)
    assert grid.most == K - 1


@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_the_order_of_arrival_changes_nothing(order, clock):
    class Shuffled(FaultyGrid):
        def _deliver(self, reply, seconds=0.0):
            late = reply.metadata.src_node_id * (1 if order == "forwards" else -1)
            return super()._deliver(reply, seconds + 10 + late)

    def run(kind):
        strategy = strategy_of(fraction_evaluate=0.0)
        return outcome(strategy, strategy.start(kind(clock), record_of(MODEL), num_rounds=4))

    assert run(Shuffled) == run(FaultyGrid)


def test_a_list_of_the_replies_works_as_well(clock):
    """What a wrapper around the strategy may make of them."""

    class Listing(RecoveringGrid):
        def stream(self, messages, *, timeout=None):
            return list(super().stream(messages, timeout=timeout))

    def run(kind):
        grid = FaultyGrid(clock, {(1, 2, 0): "raises", (2, 0, 0): "NaN"})
        strategy = strategy_of(fraction_evaluate=0.0)
        return bits(strategy.start(kind(grid), record_of(MODEL), num_rounds=3).arrays)

    assert run(Listing) == run(RecoveringGrid)


def test_other_strategies_may_iterate_the_replies_twice(clock):
    grid = RecoveringGrid(FaultyGrid(clock))
    messages = strategy_of().configure_train(1, record_of(MODEL), ConfigRecord(), grid)
    replies = grid.send_and_receive(messages, timeout=60.0)
    assert len(list(replies)) == len(list(replies)) == K


def test_participants_in_process_run_when_their_reply_is_asked_for():
    seen = []
    grid = InProcessGrid(lambda message, context: seen.append(context.node_id), 2)  # no reply
    strategy = strategy_of(2)
    messages = list(strategy.configure_train(1, record_of(MODEL), ConfigRecord(), grid))
    ids = grid.push_messages(messages)
    assert seen == []
    assert [reply.has_error() for reply in grid.pull_messages(ids[1:])] == [True]
    assert seen == [2]
    assert len(list(grid.pull_messages(ids))) == 1
    assert seen == [2, 1]
