"""scikit-learn's 1,797 handwritten digits, 8x8 grey: the embedded default task."""

from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from clients.tasks.image_task import ImageTask

TEST_EXAMPLES = 500


@cache
def load() -> ImageTask:
    """Return the task: 1,297 training and 500 test images [1, 8, 8] in [0, 1], split for good."""
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images / 16.0, labels, test_size=TEST_EXAMPLES, stratify=labels, random_state=0
    )
    return ImageTask(
        _as_dataset(train_x, train_y), _as_dataset(test_x, test_y), models={"cnn": small_cnn}
    )


def small_cnn() -> nn.Module:
    """Return a CNN of two convolutions with batch norm and one linear layer (9,978 parameters)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def _as_dataset(images, labels) -> TensorDataset:  # type: ignore[no-untyped-def]
    inputs = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return TensorDataset(inputs, torch.tensor(labels, dtype=torch.int64))
