"""A round of SlimTrainer that is interrupted goes on after its last finished epoch."""

import numpy as np
import pytest

from clients.data import Examples
from clients.slim.compat import slim
from clients.slim.trainer import SlimTrainer
from tests.clients.interrupted import check


def network(inputs, is_training):
    norm = {"is_training": is_training, "decay": 0.9}
    net = slim.fully_connected(inputs, 6, normalizer_fn=slim.batch_norm, normalizer_params=norm)
    net = slim.dropout(net, 0.5, is_training=is_training)
    return slim.fully_connected(net, 3, activation_fn=None)


def make(seed=9, **options):
    labels = np.arange(50) % 3
    noise = np.random.default_rng(0).standard_normal((50, 4))
    data = Examples((noise + 2 * labels[:, None]).astype(np.float32), labels)
    return SlimTrainer(network, data, seed=seed, batch_size=16, **options)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_an_interrupted_round_has_the_bits_of_an_uninterrupted_one(momentum, tmp_path):
    check(lambda: make(momentum=momentum), make(seed=0).get_weights(), tmp_path)
