"""An app in the shape of Flower's quickstart-pytorch, with FedAvg and with CoLearn."""

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from sklearn.datasets import load_digits
from torch import nn

from flwr_colearn import CoLearn, CyclicalRate, IncreasingEpochs, InProcessGrid, LocalPlan


def load_data(partition_id, num_partitions):
    images, labels = load_digits(return_X_y=True)
    data = torch.tensor(images[partition_id::num_partitions] / 16, dtype=torch.float32)
    labels = torch.tensor(labels[partition_id::num_partitions])
    return torch.utils.data.TensorDataset(data[60:], labels[60:]), (data[:60], labels[:60])


def train_fn(model, train_set, epochs, lr):
    """The project's own training function, which makes its own optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    loader = torch.utils.data.DataLoader(train_set, batch_size=32, shuffle=True)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
    return loss.item()


def client_app(colearn):
    app = ClientApp()

    @app.train()
    def train(msg, context):
        model = nn.Linear(64, 10)
        model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
        train_set, _ = load_data(
            context.node_config["partition-id"], context.node_config["num-partitions"]
        )
        if colearn:  # the two lines of the README's diff
            for epoch in LocalPlan.from_config(msg.content["config"]):
                train_loss = train_fn(model, train_set, 1, epoch.learning_rate)
        else:
            train_loss = train_fn(model, train_set, 2, msg.content["config"]["lr"])
        metrics = MetricRecord({"train_loss": train_loss, "num-examples": len(train_set)})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content=content, reply_to=msg)

    @app.evaluate()
    def evaluate(msg, context):
        model = nn.Linear(64, 10)
        model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
        _, (images, labels) = load_data(
            context.node_config["partition-id"], context.node_config["num-partitions"]
        )
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
        metrics = MetricRecord({"eval_acc": accuracy, "num-examples": len(labels)})
        return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)

    return app


@pytest.mark.parametrize("colearn", [False, True])
def test_the_same_app_learns_with_fedavg_and_with_colearn(colearn):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    strategy = (
        CoLearn(
            5,
            local_epochs=IncreasingEpochs(1, epsilon=0.3),
            learning_rate=CyclicalRate(0.2),
            fraction_evaluate=1.0,
        )
        if colearn
        else FedAvg(fraction_evaluate=1.0)
    )
    result = strategy.start(
        grid=InProcessGrid(client_app(colearn), num_supernodes=5),
        initial_arrays=ArrayRecord(nn.Linear(64, 10).state_dict()),
        train_config=ConfigRecord({"lr": 0.05}),
        num_rounds=6,
    )
    assert result.evaluate_metrics_clientapp[6]["eval_acc"] > 0.85
    if colearn:
        assert strategy.history.epochs_path[-1] > 1
