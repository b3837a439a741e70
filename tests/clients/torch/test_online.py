"""Online learners in PyTorch and Keras under the strategies that keep models where they are."""

import os

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from clients.torch.online import dump, learn, load, make_online_app
from clients.torch.streams import Drifting, Interleaved
from flwr_colearn import DynamicAveraging, InProcessGrid, ModelAveraging, learner
from flwr_colearn.dynamic import Continuous, Never, Periodic, Serial

M, FEATURES = 3, 6
STREAMS = [Drifting((), FEATURES, 10, concept_seed=1, seed=seed) for seed in range(M)]


def network(norm=False):
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 2))


def run(operator, rounds, model=None, streams=STREAMS, rate=0.1):
    model = model or network()
    app = make_online_app(
        lambda context: (model, streams[context.node_config["partition-id"]]), rate
    )
    strategy = ModelAveraging(operator, len(streams), seed=0)
    result = strategy.start(InProcessGrid(app, len(streams)), dump(model), num_rounds=rounds)
    return strategy.history, {name: array.numpy() for name, array in result.arrays.items()}


def test_learning_is_torchs_sgd_and_the_loss_is_that_before_each_step():
    ours, theirs = network(), network()
    loss, examples = learn(ours, STREAMS[0], range(5, 9), 0.1)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    losses = []
    for number in range(5, 9):
        x, y = STREAMS[0].batch(number)
        each = nn.functional.cross_entropy(theirs(x), y)
        losses.append(each.item())
        optimizer.zero_grad()
        each.backward()
        optimizer.step()
    assert (loss, examples) == (pytest.approx(np.mean(losses)), 40)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_load_undoes_dump():
    one, other = network(norm=True), network(norm=True)
    learn(one, STREAMS[0], range(3), 0.1)
    load(other, dump(one))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=0)


def test_continuous_averaging_is_serial_sgd_on_the_m_fold_batch():
    _, arrays = run(Continuous(), 15)
    model = network().double()
    for index in range(15):
        parts = [stream.batch(index) for stream in STREAMS]
        x, y = torch.cat([p[0] for p in parts]).double(), torch.cat([p[1] for p in parts])
        gradients = torch.autograd.grad(
            nn.functional.cross_entropy(model(x), y), model.parameters()
        )
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(arrays[name], tensor, rtol=1e-4, atol=1e-6)


def test_serial_learning_takes_all_mini_batches_in_turn():
    history, arrays = run(Serial(M), 4, streams=[Interleaved(tuple(STREAMS))])
    model = network()
    for index in range(4):
        for stream in STREAMS:
            learn(model, stream, range(index, index + 1), 0.1)
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(arrays[name], tensor, rtol=1e-5, atol=1e-7)
    assert history.records[-1].examples == 10 * M


def test_batch_norm_counters_stay_whole_and_learners_have_statistics_of_their_own():
    _, arrays = run(Periodic(2), 3, model=network(norm=True))
    assert arrays["1.num_batches_tracked"] == 6
    assert arrays["1.num_batches_tracked"].dtype == np.int64
    assert (arrays["1.running_var"] > 0).all()


def test_dynamic_averaging_learns_for_less():
    """On one concept: less loss than everybody alone, fewer bytes than averaging every step."""
    model = network()

    def app():
        return make_online_app(
            lambda context: (model, STREAMS[context.node_config["partition-id"]]), 0.3
        )

    strategy = DynamicAveraging(0.3, num_learners=M, seed=0)
    strategy.start(InProcessGrid(app(), M), dump(network()), num_rounds=60)
    alone, _ = run(Never(), 60, rate=0.3)
    always, _ = run(Periodic(1), 60, rate=0.3)
    dynamic = strategy.history
    assert always.cumulative_loss < dynamic.cumulative_loss < alone.cumulative_loss
    models = [h.transfers.models_up + h.transfers.models_down for h in (dynamic, always)]
    assert 0 < models[0] < models[1] / 3


def test_a_keras_model_is_a_learner_too():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    keras = pytest.importorskip("keras", reason="needs Keras")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((FEATURES,)),
            keras.layers.Dense(4, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(2),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss)
    names = [variable.path for variable in model.weights]
    app = ClientApp()

    def record():
        return ArrayRecord({n: Array(w) for n, w in zip(names, model.get_weights(), strict=True)})

    @learner(app)
    def train(message, context):
        stream = STREAMS[context.node_config["partition-id"]]
        config = message.content["config"]
        model.set_weights([array.numpy() for array in message.content["arrays"].values()])
        losses = []
        first = config["batches-done"]
        for number in range(first, first + config["mini-batches"]):
            x, y = (tensor.numpy() for tensor in stream.batch(number))
            losses.append(float(model.train_on_batch(x, y)))
        metrics = MetricRecord({"num-examples": 10 * len(losses), "loss": float(np.mean(losses))})
        return Message(RecordDict({"arrays": record(), "metrics": metrics}), reply_to=message)

    strategy = DynamicAveraging(1e-3, check_every=2, num_learners=M, seed=0)
    initial = record()
    result = strategy.start(InProcessGrid(app, M), initial, num_rounds=3)
    records = strategy.history.records
    assert [entry.examples for entry in records] == [20 * M] * 3
    assert records[-1].cumulative_loss > 0
    assert any(entry.synchronised == "full" for entry in records)
    left = {name for name in names if "moving" in name}
    assert len(left) == 2
    assert list(result.arrays) == names
