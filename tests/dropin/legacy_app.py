"""A project on Flower's legacy API, in the shape of quickstart-pytorch before Flower 1.22."""

import torch
from flwr import common
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Context
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp
from torch import nn

from tests.dropin.digits import part

OUTCOME = {"metrics": {}}


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def get_weights(net):
    return [val.cpu().numpy() for val in net.state_dict().values()]


def set_weights(net, parameters):
    net.load_state_dict(
        {name: torch.tensor(v) for name, v in zip(net.state_dict(), parameters, strict=True)}
    )


def train(net, trainloader, valloader, epochs, learning_rate, device):
    optimizer = torch.optim.SGD(net.to(device).parameters(), lr=learning_rate, momentum=0.9)
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
    return {"val_accuracy": test(net, valloader)}


def test(net, valloader):
    images, labels = valloader
    return (net(images).argmax(1) == labels).float().mean().item()


class FlowerClient(NumPyClient):
    def __init__(self, trainloader, valloader, local_epochs, learning_rate):
        self.net = new_model()
        self.trainloader = trainloader
        self.valloader = valloader
        self.local_epochs = local_epochs
        self.lr = learning_rate
        self.device = torch.device("cpu")

    def fit(self, parameters, config):
        set_weights(self.net, parameters)
        results = train(
            self.net,
            self.trainloader,
            self.valloader,
            self.local_epochs,
            self.lr,
            self.device,
        )
        return get_weights(self.net), len(self.trainloader.dataset), results

    def evaluate(self, parameters, config):
        set_weights(self.net, parameters)
        accuracy = test(self.net, self.valloader)
        return 1.0 - accuracy, len(self.valloader[1]), {"accuracy": accuracy}


def client_fn(context: Context):
    data = part(context.node_config["partition-id"], context.node_config["num-partitions"])
    x_train, y_train, x_test, y_test = map(torch.as_tensor, data)
    train_set = torch.utils.data.TensorDataset(x_train, y_train)
    trainloader = torch.utils.data.DataLoader(train_set, batch_size=32, shuffle=True)
    epochs = context.run_config["local-epochs"]
    return FlowerClient(trainloader, (x_test, y_test), epochs, 0.05).to_client()


def weighted_average(metrics):
    accuracies = [num_examples * m["accuracy"] for num_examples, m in metrics]
    average = {"accuracy": sum(accuracies) / sum(num_examples for num_examples, _ in metrics)}
    OUTCOME["metrics"][len(OUTCOME["metrics"]) + 1] = average
    return average


def server_fn(context: Context):
    num_rounds = context.run_config["num-server-rounds"]
    parameters = common.ndarrays_to_parameters(get_weights(new_model()))
    strategy = FedAvg(
        fraction_fit=1.0,
        fraction_evaluate=context.run_config["fraction-evaluate"],
        min_available_clients=2,
        evaluate_metrics_aggregation_fn=weighted_average,
        initial_parameters=parameters,
    )
    OUTCOME.update(strategy=strategy)
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=num_rounds))


app = ClientApp(client_fn=client_fn)
server = ServerApp(server_fn=server_fn)
