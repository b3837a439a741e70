import numpy as np
import pytest

from clients.settings import ParticipantSettings
from clients.tasks import digits, registry
from clients.tasks.registry import load_task, participant_trainer, server_trainer, shards
from flwr_colearn import ColearnError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ParticipantSettings(task="mnist"), "'task': expected digits or cifar10, found 'mnist'"),
        (
            ParticipantSettings(model="vgg"),
            "'model': expected one of cnn for task digits with torch, found 'vgg'",
        ),
        (
            ParticipantSettings(partition="uneven"),
            "'partition': expected iid, dirichlet or classes, found 'uneven'",
        ),
        (
            ParticipantSettings(framework="jax"),
            "'framework': expected one of torch, keras, slim, found 'jax'",
        ),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(settings, message):
    with pytest.raises(ColearnError, match=message):
        participant_trainer(settings, 0, 5)


@pytest.mark.parametrize(
    ("name", "extra"), [("torch", "torch"), ("keras", "tensorflow"), ("slim", "slim")]
)
def test_a_framework_that_is_not_installed_is_named_with_its_extra(name, extra, monkeypatch):
    def missing(module):
        raise ModuleNotFoundError("No module named 'framework'", name="framework")

    monkeypatch.setattr(registry, "import_module", missing)
    with pytest.raises(ColearnError, match=rf"no module 'framework'; .*\[{extra}\]"):
        server_trainer(ParticipantSettings(framework=name))


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "classes"])
def test_every_partition_deals_all_examples_by_the_settings_seed(partition):
    settings = ParticipantSettings(partition=partition, dirichlet_alpha=1.0, seed=1)
    dealt = shards(settings, 5)
    assert np.array_equal(np.sort(np.concatenate(dealt)), np.arange(1297))
    other = shards(ParticipantSettings(partition=partition, dirichlet_alpha=1.0, seed=2), 5)
    assert not np.array_equal(dealt[0], other[0])


def test_settings_of_the_partition_count():
    labels = load_task(ParticipantSettings()).train_set.labels
    three = shards(ParticipantSettings(partition="classes", classes_each=3), 5)
    assert [len(set(labels[shard])) for shard in three] == [3] * 5
    even = shards(ParticipantSettings(partition="dirichlet", dirichlet_alpha=1e9), 5)
    assert max(len(shard) for shard in even) - min(len(shard) for shard in even) <= 10


def test_fewer_examples_are_the_first_ones():
    dealt = shards(ParticipantSettings(examples=300), 5)
    assert np.array_equal(np.sort(np.concatenate(dealt)), np.arange(300))


class Recorder:
    """A framework that returns what it is given in place of a trainer."""

    @staticmethod
    def participant_trainer(settings, shard):
        return settings, shard

    @staticmethod
    def server_trainer(settings, test_set):
        return settings, test_set


@pytest.mark.parametrize("name", ["torch", "keras", "slim"])
def test_every_framework_gets_the_settings_and_the_same_shards_and_test_set(name, monkeypatch):
    asked = []
    monkeypatch.setattr(registry, "import_module", lambda name: asked.append(name) or Recorder)
    settings = ParticipantSettings(framework=name, partition="classes")
    given, shard = participant_trainer(settings, 3, 5)
    assert given is settings
    indices = shards(ParticipantSettings(partition="classes"), 5)[3]
    data = digits.load()
    np.testing.assert_array_equal(shard.inputs, data.train_set.inputs[indices])
    np.testing.assert_array_equal(shard.labels, data.train_set.labels[indices])
    assert server_trainer(settings) == (settings, data.test_set)
    assert asked == [f"clients.{name}_tasks"] * 2
