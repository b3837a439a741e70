from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from flwr_colearn import (
    CheckpointFolder,
    ColearnError,
    Compression,
    ExponentialRate,
    InProcessGrid,
    Int8,
    LocalBN,
    LocalPlan,
    Recovery,
    SynchronousSGD,
    participant_mod,
)
from flwr_colearn.aggregation import SGD

K = 3


def record(**arrays):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def quadratic(sizes, configs=None):
    """Participant k has sizes[k] examples of loss (w - k)^2 / 2, and a layer with statistics."""
    app = ClientApp(mods=[participant_mod])

    @app.train()
    def _(message, context):
        k = context.node_config["partition-id"]
        config = message.content["config"]
        if configs is not None:
            configs.append((k, dict(config)))
        arrays = {n: a.numpy() for n, a in message.content["arrays"].items()}
        for name in config["gradients"]:
            arrays[name] = arrays[name] - arrays[name].dtype.type(k)
        for name in ("bn.running_mean", "bn.running_var"):
            if name in arrays:
                arrays[name] = np.full_like(arrays[name], k + 1)
        content = {"arrays": record(**arrays), "metrics": MetricRecord({"num-examples": sizes[k]})}
        return FlowerMessage(RecordDict(content), reply_to=message)

    return app


def run(strategy, sizes, steps, configs=None, **arrays):
    arrays = arrays or {"w": np.array([4.0])}
    grid = InProcessGrid(quadratic(sizes, configs), K)
    result = strategy.start(grid, record(**arrays), num_rounds=steps)
    return {name: array.numpy() for name, array in result.arrays.items()}


def test_a_step_by_hand():
    # g = (1 * 4 + 2 * 3 + 5 * 2) / 8 = 2.5; w = 4 - 0.1 * 2.5
    assert run(SynchronousSGD(K, learning_rate=0.1), [1, 2, 5], 1)["w"] == pytest.approx(3.75)


def test_momentum_and_weight_decay_by_hand():
    strategy = SynchronousSGD(K, learning_rate=0.1, momentum=0.9, weight_decay=0.5)
    w, v = 4.0, 0.0
    for _ in range(3):
        v = 0.9 * v + (w - 1.5 + 0.5 * w)  # the mean of 0, 1, 2 with weights 1, 2, 5 is 1.5
        w -= 0.1 * v
    assert run(strategy, [1, 2, 5], 3)["w"] == pytest.approx(w, rel=1e-12)


def test_a_second_run_begins_without_velocity():
    strategy = SynchronousSGD(K, learning_rate=0.1, momentum=0.9)
    assert run(strategy, [1] * K, 3) == run(strategy, [1] * K, 3)


def test_the_rate_of_every_step_comes_from_the_schedule():
    rate = ExponentialRate(0.1, decay=0.25, total_epochs=2)
    w = 4.0
    for factor in (0.5, 0.25):
        w -= 0.1 * factor * (w - 1.0)
    strategy = SynchronousSGD(K, learning_rate=rate, total_steps=2)
    assert run(strategy, [1] * K, None)["w"] == pytest.approx(w, rel=1e-12)
    assert [record.learning_rate for record in strategy.history] == [0.1, 0.1]


def test_statistics_are_pooled_and_not_stepped():
    model = {
        "w": np.array([4.0]),
        "bn.weight": np.array([1.0]),
        "bn.running_mean": np.array([0.0]),
        "bn.running_var": np.array([1.0]),
        "bn.num_batches_tracked": np.asarray(7),
    }
    configs = []
    new = run(SynchronousSGD(K, learning_rate=0.1), [1] * K, 1, configs, **model)
    assert new["bn.running_mean"] == 2.0  # of 1, 2, 3
    assert new["bn.running_var"] == pytest.approx(2.0 + 2 / 3)
    assert new["bn.num_batches_tracked"] == 7
    assert configs[0][1]["gradients"] == ["w", "bn.weight"]
    assert LocalPlan.from_config(configs[0][1]).local_epochs == 1


def test_layers_that_stay_take_their_own_steps_with_their_own_momentum():
    model = {
        "w": np.array([4.0]),
        "bn.weight": np.array([1.0], np.float32),
        "bn.running_mean": np.array([0.0]),
        "bn.running_var": np.array([1.0]),
    }
    strategy = SynchronousSGD(K, learning_rate=0.1, momentum=0.9, normalization=LocalBN())
    grid = InProcessGrid(quadratic([1] * K), K)
    strategy.start(grid, record(**model), num_rounds=4)
    for k in range(K):
        gamma, v = np.float32(1.0), 0.0
        for _ in range(4):
            v = 0.9 * v + (gamma - np.float32(k))
            gamma = np.float32(gamma - 0.1 * v)
        kept = grid.contexts[k + 1].state["normalization.after"]
        assert kept["bn.weight"].numpy() == pytest.approx(gamma)
        assert kept["bn.weight"].numpy().dtype == np.float32


def test_a_gradient_with_nan_is_refused():
    app = ClientApp()

    @app.train()
    def _(message, context):
        content = {"a": record(w=np.array([np.nan])), "m": MetricRecord({"num-examples": 1})}
        return FlowerMessage(RecordDict(content), reply_to=message)

    strategy = SynchronousSGD(K, learning_rate=0.1, recovery=Recovery(max_restarts=0))
    with pytest.raises(ColearnError, match="array 'w': expected finite"):
        strategy.start(InProcessGrid(app, K), record(w=np.ones(1)), num_rounds=1)


@pytest.mark.parametrize(("name", "value"), [("momentum", -0.1), ("weight_decay", -1)])
def test_arguments_are_checked(name, value):
    with pytest.raises(ColearnError, match=f"{name}: expected a number of at least 0.*{value}"):
        SGD(**{name: value})


class Killed(BaseException):
    """The server's process ends here."""


def checkpointed(folder, steps, resume="auto", kill_in=None, momentum=0.9):
    """Run a server of its own, which may be killed while participants train."""
    app = quadratic([1, 2, 5])

    def call(message, context):
        if message.content["config"]["server-round"] == kill_in:
            raise Killed
        return app(message, context)

    strategy = SynchronousSGD(
        K, learning_rate=0.1, momentum=momentum, weight_decay=0.01, checkpoints=folder
    )
    model = record(
        w=np.random.default_rng(0).normal(size=5),
        v=np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32),
    )
    result = strategy.start(InProcessGrid(call, K), model, num_rounds=steps, resume=resume)
    return {name: (array.numpy().dtype, array.data) for name, array in result.arrays.items()}


@pytest.mark.parametrize("kill_in", [1, 2, 4, 6])
def test_a_resumed_run_goes_on_with_its_momentum_to_the_same_bits(tmp_path, kill_in):
    wanted = checkpointed(tmp_path / "whole", 6)
    with pytest.raises(Killed):
        checkpointed(tmp_path / "killed", 6, kill_in=kill_in)
    assert checkpointed(tmp_path / "killed", 6) == wanted
    # What the velocity is worth: without it the run ends elsewhere.
    checkpointed(tmp_path / "cut", 3)
    folder = CheckpointFolder(tmp_path / "cut")
    saved = folder.latest()
    assert {name: array.dtype for name, array in saved.extra.items()} == dict.fromkeys(
        ("0/w", "0/v"), np.float64
    )
    folder.save(replace(saved, extra={}))
    assert checkpointed(tmp_path / "cut", 6) != wanted


def test_a_run_is_not_resumed_with_another_momentum(tmp_path):
    checkpointed(tmp_path, 2)
    with pytest.raises(ColearnError, match=r"another optimizer: SGD\(momentum=0.9.*momentum=0.5"):
        checkpointed(tmp_path, 3, momentum=0.5)


def test_gradients_are_not_sent_as_differences_to_the_model():
    with pytest.raises(ColearnError, match="compression of SynchronousSGD: expected one without"):
        SynchronousSGD(K, learning_rate=0.1, compression=Compression(up=Int8()))
