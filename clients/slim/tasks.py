"""The models and trainers of the tasks in TF-slim."""

from clients.data import Task
from clients.settings import ParticipantSettings
from clients.slim.models import resnet8, resnet_152, small_cnn, vgg_19
from clients.slim.trainer import SlimTrainer
from clients.tasks.kit import OWN, Kit, check_arrays, kit_for
from clients.tensorflow.transforms import augment, no_transform, normalise
from flwr_colearn import Average, ColearnError, LocalBN, LocalStatistics, Pooled

KITS = {
    "digits": Kit({"cnn": small_cnn}, no_transform, no_transform),
    "cifar10": Kit(
        {"resnet8": resnet8, "vgg19": vgg_19, "resnet152": resnet_152}, normalise, augment
    ),
    OWN: Kit({}, no_transform, no_transform),
}


def participant_trainer(settings: ParticipantSettings, task: Task) -> SlimTrainer:
    """Return a participant's trainer, on the device of its settings."""
    return _trainer(settings, task, device=settings.devices or None)


def server_trainer(settings: ParticipantSettings, task: Task) -> SlimTrainer:
    """Return the server's trainer, on the default device: `devices` is for participants."""
    return _trainer(settings, task)


def _trainer(settings: ParticipantSettings, task: Task, device: str | None = None) -> SlimTrainer:
    settings.refuse("precision", "jit_compile", "channels_last", "workers", "image_size")
    check_arrays(task, settings)
    _check_scheme(settings)
    kit = kit_for(KITS, settings)
    return SlimTrainer(
        kit.model(settings),
        task.train_set,
        task.test_set,
        **kit.options(settings, task),
        seed=settings.seed,
        device=device,
    )


def _check_scheme(settings: ParticipantSettings) -> None:
    """Raise a ColearnError if the scheme changes how layers compute, which a graph fixes."""
    possible = (Average, Pooled, LocalStatistics, LocalBN)
    if not isinstance(settings.scheme, possible):
        raise ColearnError(
            f"run config 'normalization': expected {', '.join(each.name for each in possible)} "
            f"with framework 'slim', whose layers cannot be converted, found "
            f"{settings.normalization!r}"
        )
