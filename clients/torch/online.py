"""A ClientApp of online learners in PyTorch, which train on streams."""

from collections.abc import Callable

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from clients.torch.streams import Stream
from flwr_colearn import learner, participant_mod
from flwr_colearn.torch import get_arrays


def make_online_app(
    build: Callable[[Context], tuple[nn.Module, Stream]], learning_rate: float
) -> ClientApp:
    """Return a ClientApp for `flwr_colearn.DynamicAveraging` and other `ModelAveraging`.

    Parameters
    ----------
    build : callable
        ``Context -> (model, stream)`` of a participant. The model's weights are overwritten, so
        participants in one process may share it.
    learning_rate : float
        The learning rate of plain SGD.
    """
    app = ClientApp(mods=[participant_mod])

    @learner(app)
    def train(message: Message, context: Context) -> Message:
        model, stream = build(context)
        load(model, message.content.array_records["arrays"])
        config = message.content.config_records["config"]
        # The server counts the mini-batches, so a restarted learner continues at the right one.
        first, number = int(config["batches-done"]), int(config["mini-batches"])  # type: ignore[arg-type]
        loss, examples = learn(model, stream, range(first, first + number), learning_rate)
        metrics = MetricRecord({"num-examples": examples, "loss": loss})
        return Message(RecordDict({"arrays": dump(model), "metrics": metrics}), reply_to=message)

    return app


def learn(
    model: nn.Module, stream: Stream, numbers: range, learning_rate: float
) -> tuple[float, int]:
    """Take one SGD step for each mini-batch.

    Returns
    -------
    loss : float
        The mean loss over the examples, each measured before the step that learns from it.
    examples : int
        The number of examples.
    """
    parameters = list(model.parameters())
    model.train()
    total, examples = 0.0, 0
    for number in numbers:
        inputs, targets = stream.batch(number)
        loss = nn.functional.cross_entropy(model(inputs), targets)
        gradients = torch.autograd.grad(loss, parameters)
        # Plain SGD has no state, so that a learner needs no reset when it gets another model.
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=learning_rate)
        total += float(loss.detach()) * len(targets)
        examples += len(targets)
    return total / examples, examples


@torch.no_grad()
def load(model: nn.Module, arrays: ArrayRecord) -> None:
    """Copy arrays into the model."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.from_numpy(np.asarray(arrays[name].numpy())))


def dump(model: nn.Module) -> ArrayRecord:
    """Return the model's arrays as Flower sends them."""
    return ArrayRecord({name: Array(array) for name, array in get_arrays(model).items()})
