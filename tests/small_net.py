"""A small network in numpy, its data, and equation 4 written down a second time."""

from itertools import pairwise

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp

from flwr_colearn import LocalPlan

K = 5
NAMES = ("hidden.weight", "hidden.bias", "output.weight", "output.bias")


def points(count, seed):
    """Points of a ring (1) and of its inside (0), which no linear model tells apart."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    radius = 0.5 + 1.5 * labels + 0.1 * generator.normal(size=count)
    angle = generator.uniform(0, 2 * np.pi, count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), labels


def initial():
    generator = np.random.default_rng(0)
    shapes = (2, 16), (16,), (16, 1), (1,)
    return [generator.normal(0, 0.5, shape).astype(np.float32) for shape in shapes]


def forward(arrays, inputs):
    hidden = np.maximum(inputs @ arrays[0] + arrays[1], 0)
    return hidden, 1 / (1 + np.exp(-(hidden @ arrays[2] + arrays[3])))


def accuracy(arrays, seed=99):
    inputs, labels = points(500, seed)
    return float(np.mean((forward(arrays, inputs)[1][:, 0] > 0.5) == labels))


def train(k, plan, arrays):
    """Gradient descent on participant k's points, eight steps an epoch; float32 in and out."""
    inputs, labels = points(64, k)
    w, b, v, c = (array.astype(np.float64) for array in arrays)
    for epoch in plan:
        for _ in range(8):
            hidden, output = forward([w, b, v, c], inputs)
            error = (output - labels[:, None]) / len(labels)
            back = error @ v.T * (hidden > 0)
            v = v - epoch.learning_rate * hidden.T @ error
            c = c - epoch.learning_rate * error.sum(0)
            w = w - epoch.learning_rate * inputs.T @ back
            b = b - epoch.learning_rate * back.sum(0)
    return [array.astype(np.float32) for array in (w, b, v, c)]


def app_of(train, *mods):
    """A ClientApp that trains the arrays by name."""
    app = ClientApp()

    @app.train(mods=list(mods))
    def _(message, context):
        plan = LocalPlan.from_config(message.content["config"])
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        trained = train(context.node_config["partition-id"], plan, arrays)
        record = ArrayRecord({name: Array(array) for name, array in trained.items()})
        metrics = MetricRecord({"num-examples": 64})
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    return app


def message_app(*mods):
    return app_of(
        lambda k, plan, arrays: dict(zip(NAMES, train(k, plan, arrays.values()), strict=True)),
        *mods,
    )


def named(arrays):
    return ArrayRecord(dict(zip(NAMES, map(Array, arrays), strict=True)))


class Participant(NumPyClient):
    """The legacy participant; SecAgg+ wants it to state one example."""

    def __init__(self, k, train=train, examples=1):
        self.k, self.train, self.examples = k, train, examples

    def fit(self, parameters, config):
        return self.train(self.k, LocalPlan.from_config(config), parameters), self.examples, {}


def legacy_app(*mods, **arguments):
    return ClientApp(
        client_fn=lambda context: Participant(
            context.node_config["partition-id"], **arguments
        ).to_client(),
        mods=list(mods),
    )


def epochs_by_equation_4(first, epsilon, shared):
    """T of every round, from the shared models w^0, w^1, ... alone."""
    flat = [np.concatenate([np.ravel(a) for a in model]).astype(np.float64) for model in shared]
    path = [first]
    for old, new in pairwise(flat[:-1]):  # the last model plans no round
        change = np.linalg.norm(new - old) / np.linalg.norm(old)
        path.append(2 * path[-1] if change <= epsilon else path[-1])
    return path
