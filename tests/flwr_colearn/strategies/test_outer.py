"""Averaging and CoLearn with an outer optimizer, in whole runs."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from flwr_colearn import (
    Averaging,
    ColearnError,
    Compression,
    DynamicAveraging,
    Float16,
    Guard,
    InProcessGrid,
    Int8,
    LocalPlan,
    Nesterov,
    Quorum,
    Recalibrated,
    Recovery,
    RunningMean,
    ServerRate,
    SynchronousSGD,
    Uncompressed,
    relative_change,
)
from tests.faults import (
    EXAMPLES,
    MODEL,
    FaultyGrid,
    K,
    bits,
    numpy_of,
    participants,
    random_faults,
    record_of,
    strategy_of,
    train,
)

ROUNDS = 4
WEIGHTS = ("fc.weight", "fc.bias")
OTHERS = tuple(name for name in MODEL if name not in WEIGHTS)


def run(strategy=None, grid=None, rounds=ROUNDS, model=MODEL, **arguments):
    """Return the strategy, the result and all shared models, the initial one first."""
    strategy = strategy or strategy_of(**arguments)
    models = []
    result = strategy.start(
        grid or InProcessGrid(participants(), K),
        record_of(model),
        rounds,
        evaluate_fn=lambda _, arrays: models.append(numpy_of(arrays)),
    )
    return strategy, result, models


def mean_of(start, plan, members=range(K)):
    """The mean of what the participants make of a model, computed a second time."""
    mean = RunningMean(start)
    for k in members:
        mean.add(train(k, plan, start))
    return mean.mean()


def plans_of(strategy):
    """The plans of the rounds of a run, made anew from its record."""
    plans, done = [], 0
    for record in strategy.history:
        rate = strategy.algorithm.learning_rate
        plans.append(LocalPlan.of(rate, record.round, record.local_epochs, done))
        done = record.epochs_done
    return plans


def by_reference(optimizer, start, mean, velocity):
    """Nesterov's step in its textbook form: one line of numpy for each equation, in float64."""
    new = dict(mean)
    for name in WEIGHTS:
        gradient = start[name].astype(np.float64) - mean[name]
        velocity[name] = optimizer.momentum * velocity.get(name, 0.0) + gradient
        step = optimizer.rate * (gradient + optimizer.momentum * velocity[name])
        new[name] = (start[name] - step).astype(start[name].dtype)
    return new


def test_every_shared_model_is_the_step_of_nesterov_from_the_one_before():
    optimizer = Nesterov(0.7, 0.9)
    strategy, result, models = run(outer=optimizer)
    velocity = {}
    for start, found, plan in zip(models, models[1:], plans_of(strategy), strict=False):
        expected = by_reference(optimizer, start, mean_of(start, plan), velocity)
        for name in WEIGHTS:
            assert found[name].dtype == MODEL[name].dtype
            assert found[name] == pytest.approx(expected[name], rel=1e-6)
        for name in OTHERS:
            assert found[name].dtype == MODEL[name].dtype
            assert found[name].tobytes() == expected[name].tobytes()
    assert bits(result.arrays) == bits(record_of(models[-1]))
    plain = run()[2]
    assert not np.array_equal(models[-1]["fc.weight"], plain[-1]["fc.weight"])


@pytest.mark.parametrize("outer", [Nesterov(1.0, 0.0), ServerRate(1.0)], ids=str)
def test_a_rate_of_1_without_momentum_is_the_plain_mean(outer):
    assert bits(run(outer=outer)[1].arrays) == bits(run()[1].arrays)


def test_the_relative_change_is_that_of_the_new_shared_model():
    strategy, _, models = run(outer=ServerRate(0.5))
    pairs = itertools.pairwise(models)
    expected = [
        relative_change({n: new[n] for n in WEIGHTS}, {n: old[n] for n in WEIGHTS})
        for old, new in pairs
    ]
    assert [record.relative_change for record in strategy.history] == pytest.approx(expected)


def test_federated_averaging_has_it_too():
    config = ConfigRecord({"local-epochs": 1, "learning-rate": 0.1})
    shared = {}
    for outer in (None, ServerRate(0.5)):
        grid = InProcessGrid(_averaging_app(), K)
        result = Averaging(K, outer=outer).start(grid, record_of(MODEL), 1, train_config=config)
        shared[outer] = numpy_of(result.arrays)
    halfway = (MODEL["fc.weight"] + shared[None]["fc.weight"]) / 2
    assert shared[ServerRate(0.5)]["fc.weight"] == pytest.approx(halfway, rel=1e-6)
    assert shared[ServerRate(0.5)]["bn.running_var"] == pytest.approx(
        shared[None]["bn.running_var"]
    )


def _averaging_app():
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def _(message, context):
        k = context.node_config["partition-id"]
        model = {
            name: (array + k + 1).astype(array.dtype)
            for name, array in numpy_of(message.content["arrays"]).items()
        }
        metrics = MetricRecord({"num-examples": EXAMPLES[k]})
        content = RecordDict({"arrays": record_of(model), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def test_a_second_run_of_a_strategy_begins_without_momentum():
    strategy, first, _ = run(outer=Nesterov())
    assert bits(run(strategy)[1].arrays) == bits(first.arrays)


@pytest.mark.parametrize("seed", range(2))
def test_faults_from_which_a_run_recovers_change_nothing(seed, clock):
    grid = FaultyGrid(clock, random_faults(seed, ROUNDS))
    strategy, result, _ = run(grid=grid, outer=Nesterov(), guard=Guard())
    assert sum(len(record.restarts) for record in strategy.history) > 0
    undisturbed = run(grid=FaultyGrid(clock), outer=Nesterov())[1]
    assert bits(result.arrays) == bits(undisturbed.arrays)


def test_with_a_quorum_the_mean_is_that_of_those_that_are_there(clock):
    grid = FaultyGrid(clock, {(2, 1, attempt): "code 8" for attempt in range(9)})
    optimizer = Nesterov()
    strategy, _, models = run(grid=grid, outer=optimizer, recovery=Recovery(policy=Quorum(3)))
    assert [len(record.participants) for record in strategy.history] == [4, 3, 4, 4]
    velocity = {}
    for index, plan in enumerate(plans_of(strategy)):
        members = [0, 2, 3] if index == 1 else range(K)
        mean = mean_of(models[index], plan, members)
        expected = by_reference(optimizer, models[index], mean, velocity)
        for name in WEIGHTS:
            assert models[index + 1][name] == pytest.approx(expected[name], rel=1e-6)


def test_a_reply_that_the_guard_refuses_is_not_in_the_step(clock):
    class Wild(FaultyGrid):
        def _in_transit(self, message, reply):
            round_, k = message.content["config"]["server-round"], self._partition_of(message)
            if reply.has_content() and (round_, k) == (3, 2):
                grown = {n: a * 10_000 for n, a in numpy_of(reply.content["arrays"]).items()}
                grown["bn.num_batches_tracked"] = MODEL["bn.num_batches_tracked"]
                reply.content["arrays"] = record_of(grown)
            return super()._in_transit(message, reply)

        def _partition_of(self, message):
            return self.partitions[message.metadata.dst_node_id]

    strategy, _, models = run(
        grid=Wild(clock), outer=Nesterov(), recovery=Recovery(policy=Quorum(3))
    )
    record = list(strategy.history)[2]
    assert [entry["participant"] for entry in record.refusals][:1] == ["partition-2"]
    assert len(record.participants) == 3
    assert np.abs(models[-1]["fc.weight"]).max() < 100


@pytest.mark.parametrize("down", [Float16(), Uncompressed()], ids=str)
def test_compressed_participants_start_from_the_step(down):
    received = {}

    def noted(k, plan, arrays):
        received[plan.round, k] = arrays
        return train(k, plan, arrays)

    compression = Compression(up=Int8(), down=down)
    grid = InProcessGrid(participants(noted), K)
    _, _, models = run(grid=grid, outer=Nesterov(), compression=compression)
    assert len(received) == ROUNDS * K
    for (round_, _), arrays in received.items():
        decoded = compression.received(models[round_ - 1])
        for name in WEIGHTS:
            assert np.array_equal(arrays[name], decoded[name])


def test_statistics_are_recalibrated_under_the_step():
    asked = []
    app = participants()

    @app.train("recalibrate")
    def _(message, context):
        model = numpy_of(message.content["arrays"])
        asked.append(model["fc.weight"].copy())
        model["bn.running_mean"] = model["fc.weight"][:, 0].copy()
        content = RecordDict(
            {"arrays": record_of(model), "metrics": MetricRecord({"num-examples": 1})}
        )
        return Message(content, reply_to=message)

    grid = InProcessGrid(app, K)
    _, _, models = run(grid=grid, outer=ServerRate(0.5), normalization=Recalibrated(), rounds=2)
    assert len(asked) == 2 * K
    for index, weight in enumerate(asked):
        assert np.array_equal(weight, models[1 + index // K]["fc.weight"])
    assert models[-1]["bn.running_mean"] == pytest.approx(models[-1]["fc.weight"][:, 0])


def test_the_vectors_of_spectral_normalization_are_those_of_the_step():
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(3, 4))
    u, v = np.ones(3) / np.sqrt(3), np.ones(4) / 2
    model = {"fc.weight_orig": weight, "fc.weight_u": u, "fc.weight_v": v}

    def turned(k, plan, arrays):
        own = np.random.default_rng(k).normal(size=(3, 4))
        return {**arrays, "fc.weight_orig": own}

    _, _, models = run(
        grid=InProcessGrid(participants(turned), K), model=model, outer=Nesterov(1.3, 0.5), rounds=2
    )
    for found in models[1:]:
        largest = np.linalg.svd(found["fc.weight_orig"], compute_uv=False)[0]
        value = found["fc.weight_u"] @ found["fc.weight_orig"] @ found["fc.weight_v"]
        assert value == pytest.approx(largest, rel=1e-5)


def test_weights_that_have_no_mean_take_no_step():
    mask = np.array([0.0, -np.inf])
    model = {"w": np.ones(2, np.float32), "mask": mask}

    def up(k, plan, arrays):
        return {"w": arrays["w"] + np.float32(1), "mask": arrays["mask"]}

    grid = InProcessGrid(participants(up), K)
    roles = {"mask": "trainable"}
    _, result, _ = run(grid=grid, model=model, roles=roles, outer=Nesterov(0.5, 0.5), rounds=1)
    assert numpy_of(result.arrays)["mask"].tolist() == mask.tolist()
    assert numpy_of(result.arrays)["w"].tolist() == [1.75, 1.75]


def test_a_step_out_of_range_ends_the_run_with_the_model_before():
    model = {"w": np.full(2, 40_000, np.float16)}

    def up(k, plan, arrays):
        return {"w": arrays["w"] + np.float16(20_000)}

    with pytest.raises(ColearnError, match="array 'w'; lower its rate or its momentum") as caught:
        run(grid=InProcessGrid(participants(up), K), model=model, outer=Nesterov(), rounds=3)
    assert bits(caught.value.result.arrays) == bits(record_of(model))


@dataclass(frozen=True)
class SignStep:
    """An outer optimizer of a user's own."""

    length: float
    keeps_momentum: bool = False

    def step(self, change, momentum):
        assert momentum.size == 0
        return self.length * np.sign(change)


def test_an_optimizer_of_ones_own_needs_no_class_of_ours():
    _, _, models = run(outer=SignStep(0.25))
    for old, new in itertools.pairwise(models):
        assert np.abs(new["fc.weight"] - old["fc.weight"]) == pytest.approx(0.25)


def test_a_resumed_run_must_have_the_same_optimizer(tmp_path):
    run(outer=Nesterov(), checkpoints=tmp_path)
    for other in (Nesterov(0.5), ServerRate(0.5), None):
        with pytest.raises(ColearnError, match="another outer optimizer"):
            strategy_of(outer=other, checkpoints=tmp_path).start(
                InProcessGrid(participants(), K), record_of(MODEL), ROUNDS + 1, resume="auto"
            )


def test_a_subclass_with_arrays_of_its_own_is_resumed(tmp_path):
    class Counting(Averaging):
        def strategy_state(self):
            state, arrays = super().strategy_state()
            return state, {**arrays, "control": np.arange(3)}

        def restore_strategy_state(self, state, arrays):
            super().restore_strategy_state(state, arrays)
            self.control = arrays["control"]

    def start(rounds):
        config = ConfigRecord({"local-epochs": 1, "learning-rate": 0.1})
        strategy = Counting(K, outer=Nesterov(), checkpoints=tmp_path)
        grid = InProcessGrid(_averaging_app(), K)
        result = strategy.start(grid, record_of(MODEL), rounds, train_config=config, resume="auto")
        return strategy, result

    start(2)
    strategy, _ = start(3)
    assert strategy.control.tolist() == [0, 1, 2]
    assert set(strategy.strategy_state()[1]) == {f"momentum/{n}" for n in WEIGHTS} | {"control"}


def test_the_summary_names_it(flower_log):
    run(outer=Nesterov(), rounds=1)
    assert "Outer optimizer: Nesterov(rate=0.7, momentum=0.9)" in flower_log.text


def test_it_is_refused_where_there_is_no_step_of_a_shared_model():
    with pytest.raises(ColearnError, match="outer of SynchronousSGD: expected"):
        SynchronousSGD(3, learning_rate=0.1, outer=Nesterov())
    with pytest.raises(TypeError, match="outer"):
        DynamicAveraging(0.1, num_learners=3, outer=Nesterov())
