"""A small network that several files train, convert or take apart."""

import keras
from keras import layers


def network(seed=0, dropout=0.0):
    """Batch norm as in PyTorch, and a random layer."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6),
            layers.BatchNormalization(momentum=0.9, epsilon=1e-5),
            layers.ReLU(),
            layers.Dropout(dropout),
            layers.Dense(3),
        ]
    )
