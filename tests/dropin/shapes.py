"""Strategies and participants in the shapes of real projects, with numbers that are easy to check.

Participant k trains by adding ``steps[k]`` to every number of a model of zeros, once an epoch.
"""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.serverapp import ServerApp

from flwr_colearn import InProcessGrid, LocalPlan, participant_mod

INITIAL = {
    "fc.weight": np.zeros((2, 2), np.float32),
    "fc.bias": np.zeros(2, np.float32),
    "bn.running_mean": np.zeros(2, np.float32),
    "bn.running_var": np.zeros(2, np.float32),
}


def record_of(arrays):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def filled(value):
    """A model in which every number is `value`."""
    return {name: np.full_like(array, value) for name, array in INITIAL.items()}


def answer(message, arrays, **metrics):
    """A train reply."""
    metrics = MetricRecord({"num-examples": 1, **metrics})
    return Message(RecordDict({"arrays": record_of(arrays), "metrics": metrics}), reply_to=message)


def app_of(steps, mod=True, evaluates=True, called=None):
    """A ClientApp of the Message API; `called` collects the participants that train."""
    app = ClientApp(mods=[participant_mod] if mod else [])

    @app.train()
    def train(message, context):
        k = context.node_config["partition-id"]
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        if called is not None:
            called.append(k)
        for _ in LocalPlan.from_config(message.content["config"]):
            arrays = {name: array + np.float32(steps[k]) for name, array in arrays.items()}
        return answer(message, arrays, straggles=float(steps[k] > 50))

    if evaluates:

        @app.evaluate()
        def evaluate(message, context):
            return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), message)

    return app


class Participant(NumPyClient):
    """A participant of the legacy API."""

    def __init__(self, k, steps, called):
        self.k, self.steps, self.called = k, steps, called

    def fit(self, parameters, config):
        self.called.append(self.k)
        step = self.steps[self.k](len(self.called)) if callable(self.steps[self.k]) else None
        step = self.steps[self.k] if step is None else step
        for _ in LocalPlan.from_config(config):
            parameters = [array + np.float32(step) for array in parameters]
        return parameters, 1, {"is_straggler": step > 50}


def run_legacy(strategy, steps, num_rounds=1, called=None):
    """Run Flower's legacy server; return the participants that were called, in order."""
    called = [] if called is None else called

    def client_fn(context):
        return Participant(context.node_config["partition-id"], steps, called).to_client()

    strategy.initial_parameters = ndarrays_to_parameters(list(INITIAL.values()))
    components = ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=num_rounds))
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    grid = InProcessGrid(ClientApp(client_fn=client_fn), len(steps))
    ServerApp(server_fn=lambda _: components)(grid, context)
    return called
