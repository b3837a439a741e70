"""A project with transformers, in the shape of quickstart-huggingface: a small BERT of its own."""

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

app = ClientApp()
server = ServerApp()
OUTCOME = {}


def get_model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=2,
    )
    return BertForSequenceClassification(config)


def load_data(seed):
    """Sentences of eight words; the label says whether word 3 is among them."""
    tokens = torch.randint(4, 16, (160, 8), generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(160) % 2
    tokens[labels == 1, seed % 8] = 3
    rows = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
    return DataLoader(rows[:120], batch_size=16, shuffle=True), DataLoader(rows[120:], 40)


def train_fn(net, trainloader, epochs, device):
    optimizer = AdamW(net.parameters(), lr=5e-5)
    net.train()
    for _ in range(epochs):
        for batch in trainloader:
            batch = {k: v.to(device) for k, v in batch.items()}
            outputs = net(**batch)
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@app.train()
def train(msg, context):
    trainloader, _ = load_data(context.node_config["partition-id"])
    model = get_model()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict(), strict=True)
    device = torch.device("cpu")

    # Train the model on local data
    train_fn(model, trainloader, epochs=1, device=device)

    metrics = MetricRecord({"num-examples": len(trainloader)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg, context):
    _, testloader = load_data(context.node_config["partition-id"])
    model = get_model()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict(), strict=True)
    model.eval()
    [batch] = testloader
    accuracy = (model(**batch).logits.argmax(-1) == batch["labels"]).float().mean().item()
    metrics = MetricRecord({"accuracy": accuracy, "num-examples": len(testloader)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)


@server.main()
def main(grid, context):
    fraction_train = fraction_evaluate = 1.0
    strategy = FedAvg(
        fraction_train=fraction_train,
        fraction_evaluate=fraction_evaluate,
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_model().state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
    )
    OUTCOME.update(strategy=strategy, metrics=result.evaluate_metrics_clientapp)
