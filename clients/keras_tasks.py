"""The tasks with Keras on TensorFlow: models and trainers."""

from typing import Any

from clients.data import Examples
from clients.keras_models import densenet40, resnet8, small_cnn
from clients.keras_trainer import KerasTrainer
from clients.settings import ParticipantSettings
from clients.tasks.kit import Kit
from clients.tf_setup import keras
from clients.tf_transforms import augment, no_transform, normalise

KITS = {
    "digits": Kit({"cnn": small_cnn}, no_transform, no_transform),
    "cifar10": Kit({"resnet8": resnet8, "densenet40": densenet40}, normalise, augment),
}


def build_model(settings: ParticipantSettings) -> keras.Model:
    """Return the model, freshly initialised from the settings' seed.

    Raises
    ------
    ColearnError
        If the task has no such model.
    """
    build = KITS[settings.task].model(settings)
    keras.utils.set_random_seed(settings.seed)
    return build()


def participant_trainer(settings: ParticipantSettings, shard: Examples) -> KerasTrainer:
    """Return a participant's trainer, on the device that it names."""
    options = {**_options(settings), "device": settings.devices or None}
    return KerasTrainer(build_model(settings), shard, shard, **options)


def server_trainer(settings: ParticipantSettings, test_set: Examples) -> KerasTrainer:
    """Return the server's trainer, on a device of its own choice."""
    return KerasTrainer(build_model(settings), test_set, test_set, **_options(settings))


def _options(settings: ParticipantSettings) -> dict[str, Any]:
    settings.refuse("channels_last", "workers")
    return {
        "batch_size": settings.batch_size,
        "momentum": settings.momentum,
        "weight_decay": settings.weight_decay,
        "transform": KITS[settings.task].transform(settings),
        "precision": settings.precision,
        "jit_compile": settings.jit_compile,
        "clip_norm": settings.clip_norm or None,
    }
