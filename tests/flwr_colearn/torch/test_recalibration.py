"""A user's own ClientApp, without this repository's participants, under `Recalibrated`."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flwr_colearn import (
    CoLearn,
    ColearnError,
    Compression,
    Float16,
    InProcessGrid,
    LocalPlan,
    Recalibrated,
    Recovery,
    participant_mod,
)
from flwr_colearn.torch import recalibrate

SIZES = (24, 33, 50)  # the second has a batch of a single example
BATCH = 16


def new_model():
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)
    return nn.Sequential(*layers).double()


def load_data(context):
    k = context.node_config["partition-id"]
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(SIZES[k], 4, generator=generator, dtype=torch.float64) * (k + 1) + 3 * k
    return list(zip(x.split(BATCH), (torch.arange(SIZES[k]) % 3).split(BATCH), strict=True))


def own_app(*mods):
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message, context):
        model = new_model()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        model.train()
        loader = [(x, y) for x, y in load_data(context) if len(x) > 1]
        for epoch in LocalPlan.from_config(message.content["config"]):
            optimizer = torch.optim.SGD(model.parameters(), epoch.learning_rate)
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        metrics = MetricRecord({"num-examples": sum(len(x) for x, _ in loader)})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def co_learn(app, **options):
    strategy = CoLearn(
        3,
        local_epochs=1,
        learning_rate=0.05,
        fraction_evaluate=0.0,
        normalization=Recalibrated(),
        recovery=Recovery(max_restarts=0),
        **options,
    )
    grid = InProcessGrid(app, 3)
    initial = ArrayRecord(new_model().state_dict())
    result = strategy.start(grid, initial, num_rounds=2)
    return {name: array.numpy() for name, array in result.arrays.items()}, strategy.history


def inputs_of(k):
    """Return all of a participant's inputs but the one that is alone in its batch."""
    context = type("Context", (), {"node_config": {"partition-id": k}})
    return np.concatenate([x.numpy() for x, _ in load_data(context) if len(x) > 1])


def pooled(found, weights):
    """Return the moments that the first batch norm sees, each participant with its weight."""
    weight, bias = found["0.weight"], found["0.bias"]
    values = [inputs_of(k) @ weight.T + bias for k in range(3)]
    shares = np.array(weights) / sum(weights)
    mean = sum(share * v.mean(0) for share, v in zip(shares, values, strict=True))
    square = sum(share * (v**2).mean(0) for share, v in zip(shares, values, strict=True))
    return mean, square - mean**2


@pytest.mark.parametrize("mods", [[participant_mod], []], ids=["mod", "no mod"])
@pytest.mark.parametrize("weighting", ["uniform", "weighted"])
def test_the_statistics_are_those_of_all_data_under_the_average(mods, weighting):
    app = own_app(*mods)

    @recalibrate(app)
    def model_and_batches(context):
        return new_model().eval(), (x for x, _ in load_data(context))

    found, history = co_learn(app, weighting=weighting)
    mean, variance = pooled(found, [1, 1, 1] if weighting == "uniform" else [24, 32, 50])
    np.testing.assert_allclose(found["1.running_mean"], mean, rtol=1e-10)
    np.testing.assert_allclose(found["1.running_var"], variance, rtol=1e-10)
    assert not any(record.refusals for record in history)


def test_a_compressed_model_is_recalibrated_too():
    app = own_app(participant_mod)

    @recalibrate(app)
    def model_and_batches(context):
        return new_model(), [torch.cat([x for x, _ in load_data(context)])]

    found, _ = co_learn(app, compression=Compression(up=Float16(), down=Float16()))
    whole, _ = co_learn(app)
    np.testing.assert_allclose(found["1.running_mean"], whole["1.running_mean"], rtol=2e-2)


def test_the_decorated_function_is_still_the_users_own():
    def model_and_batches(context):
        return new_model(), []

    assert recalibrate(own_app())(model_and_batches) is model_and_batches


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (lambda: (new_model(), []), "at least one batch of data, found none"),
        (lambda: (nn.BatchNorm1d(4), [torch.ones(2, 4)]), "this participant's BatchNorm1d"),
        (lambda: new_model(), r"expected \(model, batches of inputs\) in return, found .*Sequent"),
    ],
)
def test_what_the_function_must_return_is_said(returned, reason):
    app = own_app(participant_mod)
    recalibrate(app)(lambda context: returned())
    with pytest.raises(ColearnError, match=reason):
        co_learn(app)


def test_an_app_without_the_function_is_told_which_one_is_missing():
    with pytest.raises(ColearnError, match=r"needs a function .* flwr_colearn.torch.recalibrate"):
        co_learn(own_app(participant_mod))
