"""Keras's own networks as participants train them; small ones are in test_trainer.py."""

import numpy as np
import pytest

from clients.keras.models import resnet152, vgg19
from clients.tensorflow.setup import keras
from flwr_colearn import Role
from flwr_colearn.keras import roles as roles_of


def built(build):
    keras.utils.set_random_seed(0)
    return build()


@pytest.fixture(scope="module")
def vgg():
    return built(vgg19)


@pytest.fixture(scope="module")
def resnet():
    return built(resnet152)


def trained(model):
    return sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)


def outputs(model):
    images = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype(np.float32)
    return keras.ops.convert_to_numpy(model(images, training=True))


def test_vgg19_has_pytorchs_parameters_without_batch_norm(vgg):
    assert trained(vgg) == 20_040_522 - 2 * 5_504  # scale and shift of 5,504 channels
    assert set(roles_of(vgg).values()) == {Role.TRAINABLE}


def test_vgg19_starts_with_outputs_that_it_can_learn_from(vgg):
    logits = outputs(vgg)
    assert logits.shape == (4, 10)
    assert 0.1 < logits.std() < 10  # 0.0004 from Keras's own initial weights


def test_resnet152_has_pytorchs_parameters(resnet):
    assert trained(resnet) == 58_164_298
    norms = [each for each in resnet.layers if isinstance(each, keras.layers.BatchNormalization)]
    assert {(norm.momentum, norm.epsilon) for norm in norms} == {(0.9, 1e-5)}
    roles = list(roles_of(resnet).values())
    assert roles.count(Role.MEAN) == roles.count(Role.VARIANCE) == len(norms) == 155
    assert roles.count(Role.TRAINABLE) == len(roles) - 2 * len(norms)


def test_resnet152_works_on_32_to_4_pixels_and_gives_logits(resnet):
    stages = [resnet.get_layer(f"conv{stage}_block1_out").output.shape for stage in (2, 3, 4, 5)]
    assert [shape[1] for shape in stages] == [32, 16, 8, 4]
    logits = outputs(resnet)
    assert logits.shape == (4, 10)
    assert np.isfinite(logits).all()


def test_the_number_of_classes_can_be_chosen():
    assert vgg19(num_classes=7).output_shape == (None, 7)
