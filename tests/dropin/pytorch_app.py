"""A project with PyTorch and Flower's Message API, in the shape of quickstart-pytorch."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from tests.dropin.digits import part

app = ClientApp()
server = ServerApp()
OUTCOME = {}


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


def load_data(context):
    data = part(context.node_config["partition-id"], context.node_config["num-partitions"])
    x_train, y_train, x_test, y_test = map(torch.as_tensor, data)
    train_set = torch.utils.data.TensorDataset(x_train, y_train)
    return torch.utils.data.DataLoader(train_set, batch_size=32, shuffle=True), (x_test, y_test)


def train_fn(model, trainloader, epochs, lr, device):
    optimizer = torch.optim.SGD(model.to(device).parameters(), lr=lr, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
    return loss.item()


@app.train()
def train(msg, context):
    model = new_model()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    device = torch.device("cpu")
    trainloader, _ = load_data(context)

    train_loss = train_fn(
        model,
        trainloader,
        context.run_config["local-epochs"],
        msg.content["config"]["lr"],
        device,
    )

    metrics = MetricRecord({"train_loss": train_loss, "num-examples": len(trainloader.dataset)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg, context):
    model = new_model()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    model.eval()
    _, (images, labels) = load_data(context)
    accuracy = (model(images).argmax(1) == labels).float().mean().item()
    metrics = MetricRecord({"accuracy": accuracy, "num-examples": len(labels)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)


@server.main()
def main(grid, context):
    fraction_evaluate = 1.0
    strategy = FedAvg(fraction_evaluate=fraction_evaluate)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(new_model().state_dict()),
        train_config=ConfigRecord({"lr": 0.05}),
        num_rounds=context.run_config["num-server-rounds"],
    )
    OUTCOME.update(
        strategy=strategy, metrics=result.evaluate_metrics_clientapp, arrays=result.arrays
    )
