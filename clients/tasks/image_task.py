"""What every image-classification task is made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.data import TensorDataset

from clients.torch_trainer import Transform


def no_transform(inputs: Tensor, training: bool) -> Tensor:
    """Return the inputs unchanged."""
    return inputs


@dataclass(frozen=True)
class ImageTask:
    """A data set in memory and the models for it.

    Attributes
    ----------
    train_set, test_set : TensorDataset
        Images [N, C, H, W] and labels [N].
    models : mapping
        Constructors by name; the first is the default.
    transform, augmentation : callable
        ``(inputs, training) -> inputs`` on the device, without and with augmentation.
    """

    train_set: TensorDataset
    test_set: TensorDataset
    models: Mapping[str, Callable[[], nn.Module]]
    transform: Transform = no_transform
    augmentation: Transform = no_transform

    @property
    def train_labels(self) -> Tensor:
        """Labels of the training set, [N]."""
        return self.train_set.tensors[1]
