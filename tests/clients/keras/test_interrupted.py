"""A round of KerasTrainer that is interrupted goes on after its last finished epoch."""

import numpy as np
import pytest

from clients.data import Examples
from clients.keras.trainer import KerasTrainer
from clients.tensorflow.setup import keras, tf
from tests.clients.interrupted import check
from tests.flwr_colearn.keras.network import network


def jitter(inputs, training, seed):
    return inputs + 0.1 * tf.random.stateless_normal(tf.shape(inputs), seed) if training else inputs


def make(seed=9, **options):
    labels = np.arange(50) % 3
    noise = np.random.default_rng(0).standard_normal((50, 4))
    data = Examples((noise + 2 * labels[:, None]).astype(np.float32), labels)
    return KerasTrainer(
        network(seed, dropout=0.5), data, batch_size=16, transform=jitter, **options
    )


def overflowing(targets, outputs):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return 3 * loss(targets, outputs)


@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.9}, {"momentum": 0.0}, {"precision": "float16", "loss": overflowing}],
    ids=["SGD", "no momentum", "float16"],
)
def test_an_interrupted_round_has_the_bits_of_an_uninterrupted_one(options, tmp_path):
    check(lambda: make(**options), make(seed=0).get_weights(), tmp_path)
