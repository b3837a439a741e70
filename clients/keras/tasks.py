"""The models and trainers of the tasks in Keras on TensorFlow."""

from clients.data import Task
from clients.keras.models import densenet40, resnet8, resnet152, small_cnn, vgg19
from clients.keras.trainer import KerasTrainer
from clients.settings import ParticipantSettings
from clients.tasks.kit import OWN, Kit, check_arrays, check_model, kit_for
from clients.tensorflow.setup import keras
from clients.tensorflow.transforms import augment, no_transform, normalise
from flwr_colearn.keras import convert

KITS = {
    "digits": Kit({"cnn": small_cnn}, no_transform, no_transform),
    "cifar10": Kit(
        {"resnet8": resnet8, "densenet40": densenet40, "vgg19": vgg19, "resnet152": resnet152},
        normalise,
        augment,
    ),
    OWN: Kit({}, no_transform, no_transform),
}


def build_model(settings: ParticipantSettings, task: Task) -> keras.Model:
    """Return the model, initialised from the settings' seed and converted to their scheme.

    Raises
    ------
    ColearnError
        If the task has no such model, or the user's function returns no Keras model.
    """
    build = kit_for(KITS, settings).model(settings)
    # Seeded, so that the initial weights do not depend on what the process drew before.
    keras.utils.set_random_seed(settings.seed)
    model = build(**task.model_options)
    check_model(model, keras.Model, settings)
    return convert(model, settings.scheme)


def participant_trainer(settings: ParticipantSettings, task: Task) -> KerasTrainer:
    """Return a participant's trainer, on the device of its settings."""
    return _trainer(settings, task, device=settings.devices or None)


def server_trainer(settings: ParticipantSettings, task: Task) -> KerasTrainer:
    """Return the server's trainer, on the default device: `devices` is for participants."""
    return _trainer(settings, task)


def _trainer(settings: ParticipantSettings, task: Task, device: str | None = None) -> KerasTrainer:
    settings.refuse("channels_last", "workers", "image_size")
    check_arrays(task, settings)
    return KerasTrainer(
        build_model(settings, task),
        task.train_set,
        task.test_set,
        **kit_for(KITS, settings).options(settings, task),
        precision=settings.precision,
        jit_compile=settings.jit_compile,
        device=device,
    )
