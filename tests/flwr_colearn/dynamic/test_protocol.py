"""Hundreds of rounds of the product, replayed step by step by `protocol.Protocol`."""

import logging
from functools import partial

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from flwr_colearn import DynamicAveraging, InProcessGrid, Relative, learner, participant_mod
from tests.flwr_colearn.dynamic.divergence import divergence
from tests.flwr_colearn.dynamic.protocol import Protocol

N = 4
ROUNDS = 200

# A smaller example is no clearer, and takes hundreds of runs to find.
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    """Hundreds of rounds write thousands of lines."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.WARNING)
    yield
    logger.setLevel(before)


def train(seed, k, index, model):
    """One step towards a goal of the learner's own, which drifts, with noise; float64."""
    rng = np.random.default_rng((seed, k, index))
    concept = np.random.default_rng((seed, index // 60)).normal(size=N)
    own = np.random.default_rng((seed, k)).normal(size=N)
    step = 0.1 * (concept + 0.5 * own - model) + 0.05 * rng.normal(size=N)
    return model + step, int(rng.integers(1, 20))


def client_app(seed):
    app = ClientApp(mods=[participant_mod])

    @learner(app)
    def fit(message, context):
        k, config = context.node_config["partition-id"], message.content["config"]
        model = message.content["arrays"]["w"].numpy()
        first, examples = config["batches-done"], 0
        for index in range(first, first + config["mini-batches"]):
            model, more = train(seed, k, index, model)
            examples += more
        content = {
            "arrays": ArrayRecord({"w": Array(model)}),
            "metrics": MetricRecord({"num-examples": examples}),
        }
        return Message(RecordDict(content), reply_to=message)

    return app


def indices(names):
    return {int(name.removeprefix("partition-")) for name in names}


class Replay:
    """Follows a run round by round, and compares everything that the protocol determines."""

    def __init__(self, grid, strategy, protocol, seed, b):
        self.grid, self.strategy, self.protocol = grid, strategy, protocol
        self.seed, self.b, self.kinds, self.all_groups = seed, b, [], []

    def __call__(self, server_round, arrays):
        if not server_round:
            return
        self._learn(server_round)
        entry = self.strategy.log.record
        self.fetched, self.groups = list(entry.fetched), []
        mean = self.protocol.n @ self.protocol.f / self.protocol.n.sum()
        weights = self.protocol.n
        violators, members = self.protocol.synchronise(self._draw)
        assert indices(entry.reporters) == violators
        assert self.groups == entry.groups
        assert self.fetched == []
        assert entry.violations == self.protocol.v
        everybody = set(range(len(weights)))
        kind = "none" if not members else "full" if members == everybody else "partial"
        assert entry.synchronised == kind
        self.kinds.append(kind)
        self.all_groups.append(self.groups)
        self._compare_models()
        # Kamp et al.: averaging leaves the mean where it was.
        np.testing.assert_allclose(weights @ self.protocol.f / weights.sum(), mean, atol=1e-12)

    def _learn(self, server_round):
        models, examples = [], []
        for k, model in enumerate(self.protocol.f):
            seen = 0
            for index in range((server_round - 1) * self.b, server_round * self.b):
                model, more = train(self.seed, k, index, model)
                seen += more
            models.append(model)
            examples.append(seen)
        self.protocol.learn(models, np.array(examples))

    def _draw(self, size):
        """Return the next learners that the product fetched."""
        more, self.fetched = indices(self.fetched[:size]), self.fetched[size:]
        self.groups.append(size)
        return more

    def _compare_models(self):
        protocol = self.protocol
        for context in self.grid.contexts.values():
            k, state = context.node_config["partition-id"], context.state
            for name, ours in (("colearn.model", protocol.f[k]), ("colearn.reference", protocol.r)):
                theirs = state[name]["w"].numpy()
                np.testing.assert_allclose(theirs, ours, rtol=1e-10, atol=1e-12)
        assert divergence([{"w": f} for f in protocol.f]) <= protocol.delta(protocol.r) * (1 + 1e-9)


def replay(m, b, seed, threshold, delta, rounds=ROUNDS):
    common = np.random.default_rng(seed).normal(size=N)
    grid = InProcessGrid(client_app(seed), m)
    strategy = DynamicAveraging(threshold, b, num_learners=m, guard=None)
    follow = Replay(grid, strategy, Protocol(m, common, delta), seed, b)
    initial = ArrayRecord({"w": Array(common)})
    strategy.start(grid, initial, num_rounds=rounds, evaluate_fn=follow)
    assert len(follow.kinds) == rounds
    return follow


@settings(max_examples=4, deadline=None, phases=NO_SHRINKING)
@given(
    m=st.integers(2, 10),
    b=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    delta=st.floats(0.02, 2.0),
)
def test_hundreds_of_rounds_are_those_of_the_protocol(m, b, seed, delta):
    replay(m, b, seed, delta, lambda r: delta)


@settings(max_examples=2, deadline=None, phases=NO_SHRINKING)
@given(m=st.integers(2, 7), seed=st.integers(0, 10**6), fraction=st.floats(0.01, 0.5))
def test_a_relative_threshold_is_that_of_the_protocol_too(m, seed, fraction):
    replay(m, 1, seed, Relative(fraction), lambda r: fraction * (r @ r))


def test_the_runs_that_are_replayed_have_every_kind_of_round():
    run = replay(16, 1, 3, 0.2, lambda r: 0.2)
    assert min(run.kinds.count(kind) for kind in ("none", "partial", "full")) >= 20
    assert [1, 2, 4] in run.all_groups


@pytest.mark.parametrize("wrong", ["reference", "weights", "violations"])
def test_the_replay_notices_another_protocol(wrong, monkeypatch):
    """Partial averages that renew r, uniform weights, violations that are not counted."""
    synchronise = Protocol.synchronise

    def other(self, draw):
        if wrong == "weights":
            self.n = np.ones(len(self.n))
        violators, members = synchronise(self, draw)
        if wrong == "reference" and members:
            self.r = self.f[min(members)]
        if wrong == "violations":
            self.v = 0
        return violators, members

    monkeypatch.setattr(Protocol, "synchronise", other)
    with pytest.raises(AssertionError):
        replay(6, 1, 3, 0.2, partial(lambda value, r: value, 0.2))
