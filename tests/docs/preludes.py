"""What the examples of the pages take as given: the project's own names, one function a page.

An example of a page is run with the names of `common` and those of its page, so a reader sees only
what is new; `SHORTER` has what is replaced in it so that it takes seconds and stays in a folder.
"""

import itertools
import sys
from types import ModuleType

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg

import flwr_colearn
from flwr_colearn import InProcessGrid, LocalPlan, participant_mod
from tests.dropin.shapes import INITIAL, answer, record_of

SHORTER = {
    "/var/lib/flower/": "var/",  # in the folder of the test
    "num_rounds=500": "num_rounds=8",
    "num_rounds=20": "num_rounds=2",
    "total_epochs=120": "total_epochs=12",
    "my_app.client:app": f"{__name__}:adding",  # which worker processes can import
}


def common():
    """Names of a Flower project with five participants, and the public names of the plugin."""
    public = {name: getattr(flwr_colearn, name) for name in flwr_colearn.__all__}
    return {
        **public,
        "ArrayRecord": ArrayRecord,
        "Array": Array,
        "ClientApp": ClientApp,
        "FedAdam": FedAdam,
        "FedAvg": FedAvg,
        "Message": Message,
        "MetricRecord": MetricRecord,
        "NumPyClient": NumPyClient,
        "RecordDict": RecordDict,
        "ServerApp": ServerApp,
        "app": ClientApp(mods=[participant_mod]),
        "client_fn": lambda context: Learner().to_client(),
        "grid": InProcessGrid(app_adding([1, 2, 3, 4, 5]), 5),
        "initial_arrays": record_of(INITIAL),
        "model": torch.nn.Linear(3, 2),
        "strategy": FedAvg(min_train_nodes=5, min_available_nodes=5),
        "evaluate": lambda number, arrays: MetricRecord({"accuracy": 1 - 1 / (2 + number)}),
    }


def app_adding(steps):
    """Return an app in which participant k adds steps[k] to every number, once an epoch."""
    app = ClientApp(mods=[participant_mod])

    @app.train()
    def train(message, context):
        step = steps[context.node_config["partition-id"]]
        epochs = message.content["config"].get("local-epochs", 1)  # one under Flower's strategies
        arrays = {n: a.numpy() for n, a in message.content["arrays"].items()}
        return answer(message, {n: a + np.float32(epochs * step) for n, a in arrays.items()})

    @app.evaluate()
    def evaluate(message, context):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), message)

    return app


adding = app_adding([1, 2, 3, 4, 5])


class Learner(NumPyClient):
    """A participant of the legacy API that adds 1 to every number."""

    def get_parameters(self, config):
        return [np.zeros(3, np.float32)]

    def fit(self, parameters, config):
        return [array + 1 for array in parameters], 1, {}


def plan_message():
    """A message that a participant is sent: two local epochs, and a model of Keras by name."""
    config = LocalPlan.of(flwr_colearn.CyclicalRate(0.1), 1, 2).to_config()
    return Message(
        RecordDict({"config": ConfigRecord(config)}), dst_node_id=1, message_type="train"
    )


def drop_in():
    import keras

    from flwr_colearn.keras import get_arrays

    torch_model = torch.nn.Linear(3, 2)
    built = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    msg, rates = plan_message(), []
    msg.content["arrays"] = ArrayRecord({n: Array(a + 1) for n, a in get_arrays(built).items()})
    optimizer = torch.optim.SGD(torch_model.parameters(), lr=1.0)

    def train_one_epoch(model, trainloader, optimizer):
        rates.append(optimizer.param_groups[0]["lr"])

    return locals() | {"model": built, "trainloader": [], "message": msg}


def choosing():
    steps = []

    def train(model, batches, rate):
        steps.append(len(list(batches)))

    return {
        "message": plan_message(),
        "batches": list(range(10)),
        "train": train,
        "itertools": itertools,
        "steps": steps,
    }


def operations():
    plan = LocalPlan.of(flwr_colearn.CyclicalRate(0.1), 1, 2)
    return {"plan": plan, "batches": [1, 2], "train": lambda model, batch, rate: None}


def dynamic():
    def stream(first, number):
        return range(first, first + number)

    def sgd_step(model, batch):
        with torch.no_grad():
            model.weight += 0.1
        return 1.0

    return {"stream": stream, "sgd_step": sgd_step, "batch_size": 10, "grid": learners()}


def learners():
    """Five learners, each of which adds its number to its model."""
    app = ClientApp(mods=[participant_mod])

    @flwr_colearn.learner(app)
    def train(message, context):
        k = context.node_config["partition-id"]
        arrays = {n: Array(a.numpy() + k) for n, a in message.content["arrays"].items()}
        metrics = MetricRecord({"num-examples": 10, "loss": 1.0})
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
        return Message(content, reply_to=message)

    return InProcessGrid(app, 5)


def privacy():
    hundred = InProcessGrid(app_adding([0.1] * 100), 100)
    weights = {name: array for name, array in INITIAL.items() if name.startswith("fc")}
    return {
        "grid": hundred,
        "initial_arrays": record_of(weights),
        "initial_parameters": ndarrays_to_parameters(list(weights.values())),
        "secaggplus_mod": secaggplus_mod,
        "train_and_reply": lambda message, context: Message(RecordDict(), reply_to=message),
        "train_one_epoch": lambda parameters, rate: [array + rate for array in parameters],
    }


def secure():
    return {"grid": InProcessGrid(app_adding([1, 2, 3]), 3), "strategy": three_averaged()}


def three_averaged():
    return FedAvg(min_train_nodes=3, min_available_nodes=3, fraction_evaluate=0.0)


def report():
    """A strategy that has run, and MLflow's function, which is not installed here."""
    mlflow = ModuleType("mlflow")
    logged = []
    mlflow.log_metrics = lambda metrics, step: logged.append((step, metrics))
    sys.modules["mlflow"] = mlflow
    strategy = flwr_colearn.CoLearn(5, local_epochs=1, learning_rate=0.1, fraction_evaluate=0.0)
    strategy.start(InProcessGrid(app_adding([1] * 5), 5), record_of(INITIAL), num_rounds=2)
    return {"strategy": strategy, "logged": logged}


PRELUDES = {
    "docs/drop-in.md": drop_in,
    "docs/choosing.md": choosing,
    "docs/dynamic.md": dynamic,
    "docs/operations.md": operations,
    "docs/privacy.md": privacy,
    "docs/report.md": report,
}
SECTIONS = {("docs/privacy.md", "Secure aggregation"): secure}
"""Sections whose examples need other names than the rest of their page."""
