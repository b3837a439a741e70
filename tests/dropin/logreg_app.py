"""A project with scikit-learn and Flower's Message API: a model without a learning rate."""

import warnings

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from sklearn.linear_model import LogisticRegression

from tests.dropin.digits import part

app = ClientApp()
server = ServerApp()
OUTCOME = {}
UNIQUE_LABELS = list(range(10))


def new_model():
    model = LogisticRegression(max_iter=1, warm_start=True)
    model.classes_ = np.array(UNIQUE_LABELS)
    model.coef_ = np.full((10, 64), 0.01)
    model.intercept_ = np.zeros(10)
    return model


def get_model_params(model):
    return [model.coef_, model.intercept_]


def set_model_params(model, arrays):
    model.coef_, model.intercept_ = [array.copy() for array in arrays.to_numpy_ndarrays()]


@app.train()
def train(msg, context):
    model = new_model()
    set_model_params(model, msg.content["arrays"])
    X_train, y_train, _, _ = part(  # noqa: N806
        context.node_config["partition-id"], context.node_config["num-partitions"], "float64"
    )

    # Ignore convergence failure due to low local epochs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(X_train, y_train)

    metrics = MetricRecord({"num-examples": len(X_train)})
    arrays = ArrayRecord(get_model_params(model))
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg, context):
    model = new_model()
    set_model_params(model, msg.content["arrays"])
    _, _, images, labels = part(
        context.node_config["partition-id"], context.node_config["num-partitions"], "float64"
    )
    accuracy = model.score(images, labels)
    metrics = MetricRecord({"accuracy": accuracy, "num-examples": len(labels)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)


@server.main()
def main(grid, context):
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=1.0)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_model_params(new_model())),
        num_rounds=context.run_config["num-server-rounds"],
    )
    OUTCOME.update(strategy=strategy, metrics=result.evaluate_metrics_clientapp)
