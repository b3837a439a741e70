"""Networks for the tests of trainers."""

import torch
from torch import nn


def small_convnet(seed=0, dropout=0.0):
    """Images [N, 3, 6, 6] to three classes, with batch norm."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(64, 3),
    )
