"""A NumPyClient around a torch model: Flower's legacy server and the Message API train alike."""

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.serverapp import ServerApp
from torch import nn
from torch.utils.data import TensorDataset

from clients.client_app import make_client_app
from clients.local_training import train_locally
from clients.torch.trainer import TorchTrainer
from flwr_colearn import (
    CoLearn,
    CyclicalRate,
    InProcessGrid,
    LocalPlan,
    legacy,
    numpy_client_app,
)
from flwr_colearn.torch import roles as roles_of
from simulations.server_app import to_record

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

SEED = 4
SETTINGS = {"local_epochs": 2, "learning_rate": CyclicalRate(0.1)}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def trainer_of(k, seed=0):
    """The trainer of participant k, with data of its own."""
    generator = torch.Generator().manual_seed(k)
    labels = torch.arange(20 + k) % 3
    data = TensorDataset(torch.randn(20 + k, 4, generator=generator) + labels[:, None], labels)
    return TorchTrainer(network(seed), data, data, batch_size=8, device="cpu")


def build(context):
    return trainer_of(context.node_config["partition-id"], seed=100)


class Client(NumPyClient):
    """A project's own."""

    def __init__(self, context, keep_optimizer):
        self.trainer, self.context, self.keep = build(context), context, keep_optimizer

    def fit(self, parameters, config):
        self.load(parameters)
        plan, session = LocalPlan.from_config(config), str(config.get("session", ""))
        metrics = train_locally(self.trainer, plan, self.context, SEED, self.keep, session)
        weights = list(self.trainer.get_weights().values())
        return weights, metrics.pop("num-examples"), metrics

    def evaluate(self, parameters, config):
        self.load(parameters)
        metrics = self.trainer.evaluate()
        return metrics.pop("loss"), metrics.pop("num-examples"), metrics

    def load(self, parameters):
        self.trainer.set_weights(dict(zip(self.trainer.get_weights(), parameters, strict=True)))


def same(first, second):
    return all(
        a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
        for a, b in zip(first, second, strict=True)
    )


def train_by_messages(app):
    roles = roles_of(network())
    strategy = CoLearn(3, **SETTINGS, roles=roles, fraction_evaluate=0.0)
    result = strategy.start(InProcessGrid(app, 3), to_record(trainer_of(0)), num_rounds=2)
    return result.arrays.to_numpy_ndarrays()


@pytest.mark.parametrize("keep", [False, True])
def test_three_ways_to_the_same_model(keep):
    shared = []
    strategy = legacy.CoLearn(
        3,
        **SETTINGS,
        roles=list(roles_of(network()).values()),
        initial_parameters=ndarrays_to_parameters(list(trainer_of(0).get_weights().values())),
        evaluate_fn=lambda round_, arrays, config: shared.append(arrays),
    )
    components = ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))
    legacy_app = ClientApp(client_fn=lambda context: Client(context, keep).to_client())
    ServerApp(server_fn=lambda context: components)(
        InProcessGrid(legacy_app, 3), Context(1, 0, {}, RecordDict(), {})
    )
    app = make_client_app(build, lambda context: SEED, keep_optimizer=lambda context: keep)
    weights = train_by_messages(app)
    assert same(shared[-1], weights)
    assert same(weights, train_by_messages(numpy_client_app(lambda c: Client(c, keep))))
    assert not same(shared[-1], shared[0])
