"""The tasks of the study of dynamic averaging: what learners see, and with which network."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from clients.partition import Shards, equal_shards, group_shards
from clients.tasks import cifar10, mnist, speech
from clients.torch.models.small import mnist_cnn, resnet8, speech_cnn
from clients.torch.streams import (
    Drifting,
    Passes,
    Relabelled,
    Stream,
    random_drifts,
    relabelled,
)
from clients.torch.tasks import tensors_of
from clients.torch.transforms import normalise
from clients.trainer import derive_seed

FEATURES, HIDDEN, CLASSES = 100, 64, 10
TEST_EXAMPLES = 2000


@dataclass(frozen=True)
class Setting:
    """What all operators of a study have in common.

    Attributes
    ----------
    task : str
        "mnist", "drift", "cifar10" or "speech" (the first ten words).
    learners : int
        m.
    steps : int
        Mini-batches of every learner.
    batch_size : int
        Examples in each.
    learning_rate : float
        Of plain SGD.
    examples : int
        Training examples used, all learners together; 0 for all. The graphical models of "drift"
        never run out.
    drifts : int
        How often the data changes: at random times in "drift", evenly spaced in the other tasks,
        whose classes are then numbered anew.
    by_speaker : bool
        Whether the learners of "speech" share no speaker; else examples are dealt at random.
    seed : int
        Of data, initial model and the operator's choices.
    """

    task: str
    learners: int
    steps: int
    batch_size: int
    learning_rate: float
    examples: int = 0
    drifts: int = 0
    by_speaker: bool = False
    seed: int = 0

    @property
    def drift_times(self) -> tuple[int, ...]:
        """Steps at which the data changes."""
        if self.task == "drift":
            return random_drifts(self.steps, self.drifts, self.seed)
        return tuple(self.steps * i // (self.drifts + 1) for i in range(1, self.drifts + 1))


def build_model(setting: Setting) -> nn.Module:
    """Return the task's network."""
    if setting.task == "mnist":
        return mnist_cnn()
    if setting.task == "cifar10":
        return resnet8()
    if setting.task == "speech":
        return speech_cnn(CLASSES)
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))


def build_streams(setting: Setting, data_dir: str) -> list[Stream]:
    """Return a stream for each learner."""
    seeds = [derive_seed(setting.seed, 1 + index) for index in range(setting.learners)]
    if setting.task == "drift":
        return [
            Drifting(setting.drift_times, FEATURES, setting.batch_size, setting.seed, seed)
            for seed in seeds
        ]
    inputs, targets = _data(setting.task, data_dir, train=True)
    inputs, targets = inputs[: setting.examples or None], targets[: setting.examples or None]
    streams: list[Stream] = []
    for shard, seed in zip(_shards(setting, data_dir, len(targets)), seeds, strict=True):
        own = torch.from_numpy(shard)
        passes = Passes(inputs[own], targets[own], setting.batch_size, seed)
        streams.append(Relabelled(passes, setting.drift_times, CLASSES, setting.seed))
    return streams


def held_out(setting: Setting, data_dir: str, step: int) -> tuple[Tensor, Tensor]:
    """Return test inputs and targets, of the concept of mini-batch number `step`."""
    if setting.task == "drift":
        seed = 2**32
        stream = Drifting(setting.drift_times, FEATURES, TEST_EXAMPLES, setting.seed, seed)
        return stream.batch(step)
    inputs, targets = _data(setting.task, data_dir, train=False)
    inputs, targets = inputs[:TEST_EXAMPLES], targets[:TEST_EXAMPLES]
    concept = sum(step >= drift for drift in setting.drift_times)
    return inputs, relabelled(targets, concept, CLASSES, setting.seed)


def _shards(setting: Setting, data_dir: str, examples: int) -> Shards:
    if not setting.by_speaker:
        return equal_shards(examples, setting.learners, setting.seed)
    _, targets = _loaded(setting.task, data_dir, train=True)
    speakers = speech.training_speakers(data_dir, "speaker")
    kept = [name for name, label in zip(speakers, targets.tolist(), strict=True) if label < CLASSES]
    return group_shards(kept[:examples], setting.learners, setting.seed)


@cache
def _data(task: str, data_dir: str, train: bool) -> tuple[Tensor, Tensor]:
    inputs, targets = _loaded(task, data_dir, train)
    if task == "cifar10":
        return normalise(inputs, False), targets
    kept = targets < CLASSES
    return inputs[kept], targets[kept]


def _loaded(task: str, data_dir: str, train: bool) -> tuple[Tensor, Tensor]:
    if task == "speech":
        loaded = speech.load(data_dir, "speaker")
    else:
        loaded = (mnist if task == "mnist" else cifar10).load(data_dir)
    inputs, targets = tensors_of(loaded.train_set if train else loaded.test_set).tensors
    return inputs, targets
