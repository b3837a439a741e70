"""A project with PyTorch Lightning, in the shape of quickstart-pytorch-lightning."""

import lightning.pytorch as pl
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from tests.dropin.digits import part

app = ClientApp()
server = ServerApp()
OUTCOME = {}


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        images, labels = batch
        self.log("test_accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def load_data(context):
    data = part(context.node_config["partition-id"], context.node_config["num-partitions"])
    x_train, y_train, x_test, y_test = map(torch.as_tensor, data)
    sets = torch.utils.data.TensorDataset
    return (
        torch.utils.data.DataLoader(sets(x_train, y_train), batch_size=16, shuffle=True),
        torch.utils.data.DataLoader(sets(x_test, y_test), batch_size=60),
    )


@app.train()
def train(msg, context):
    model = Classifier()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    train_loader, _ = load_data(context)

    # Train the model on local data
    max_epochs = context.run_config["max-epochs"]
    trainer = pl.Trainer(max_epochs=max_epochs, enable_progress_bar=False)
    trainer.fit(model, train_loader)

    loss = float(trainer.callback_metrics["train_loss"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(train_loader.dataset)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg, context):
    model = Classifier()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    _, test_loader = load_data(context)
    trainer = pl.Trainer(enable_progress_bar=False)
    [results] = trainer.test(model, test_loader, verbose=False)
    metrics = {"accuracy": results["test_accuracy"], "num-examples": len(test_loader.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)


@server.main()
def main(grid, context):
    strategy = FedAvg(fraction_train=0.5, fraction_evaluate=0.5)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Classifier().state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
    )
    OUTCOME.update(strategy=strategy, metrics=result.evaluate_metrics_clientapp)
