"""A project with Keras and Flower's Message API, in the shape of quickstart-tensorflow."""

import keras
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from tests.dropin.digits import part

app = ClientApp()
server = ServerApp()
OUTCOME = {}


def load_model(learning_rate=0.001):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10, "softmax")])
    optimizer = keras.optimizers.Adam(learning_rate)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


@app.train()
def train(msg, context):
    keras.backend.clear_session()
    x_train, y_train, _, _ = part(
        context.node_config["partition-id"], context.node_config["num-partitions"]
    )
    model = load_model(context.run_config["learning-rate"])
    model.set_weights(msg.content["arrays"].to_numpy_ndarrays())
    epochs = context.run_config["local-epochs"]
    batch_size = 32
    verbose = 0

    # Train the model
    history = model.fit(
        x_train,
        y_train,
        epochs=epochs,
        batch_size=batch_size,
        verbose=verbose,
    )

    metrics = {"num-examples": len(x_train), "train_loss": history.history["loss"][-1]}
    arrays = ArrayRecord(model.get_weights())
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg, context):
    keras.backend.clear_session()
    _, _, x_test, y_test = part(
        context.node_config["partition-id"], context.node_config["num-partitions"]
    )
    model = load_model()
    model.set_weights(msg.content["arrays"].to_numpy_ndarrays())
    _, accuracy = model.evaluate(x_test, y_test, verbose=0)
    metrics = MetricRecord({"accuracy": accuracy, "num-examples": len(x_test)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)


@server.main()
def main(grid, context):
    num_rounds = context.run_config["num-server-rounds"]
    fraction_train = 1.0
    arrays = ArrayRecord(load_model().get_weights())

    strategy = FedAvg(
        fraction_train=fraction_train,
    )

    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        num_rounds=num_rounds,
    )
    OUTCOME.update(strategy=strategy, metrics=result.evaluate_metrics_clientapp)
