from importlib import import_module

import numpy as np
import pytest

from clients.settings import ParticipantSettings
from clients.tasks import digits, registry
from clients.tasks.kit import kit_for
from clients.tasks.registry import (
    load_task,
    participant_trainer,
    server_task,
    server_trainer,
    shards,
)
from flwr_colearn import ColearnError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ParticipantSettings(task="emnist"),
            "'task': expected one of digits, mnist, cifar10.*, found 'emnist'",
        ),
        (
            ParticipantSettings(model="vgg"),
            "'model': expected cnn or package.module:function for task digits with torch",
        ),
        (
            ParticipantSettings(partition="uneven"),
            "'partition': expected iid, shares, dirichlet or classes, found 'uneven'",
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
        if module.endswith(".tasks"):
            raise ModuleNotFoundError("No module named 'framework'", name="framework")
        return import_module(module)

    monkeypatch.setattr(registry, "import_module", missing)
    with pytest.raises(ColearnError, match=rf"no module 'framework'; .*\[{extra}\]"):
        server_trainer(ParticipantSettings(framework=name))


def test_a_framework_without_a_kit_for_the_task_says_which_it_has():
    settings = ParticipantSettings(task="mnist", framework="keras")
    with pytest.raises(ColearnError, match="'task': expected digits or cifar10 with keras, found"):
        kit_for({"digits": None, "cifar10": None}, settings)


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


@pytest.mark.parametrize("load", [load_task, server_task])
def test_models_are_evaluated_on_the_last_training_examples_if_asked_for(load):
    whole, task = digits.load(), load(ParticipantSettings(validation_examples=100))
    np.testing.assert_array_equal(task.test_set.inputs, whole.train_set.inputs[-100:])
    np.testing.assert_array_equal(task.train_set.labels, whole.train_set.labels[:-100])


def test_fewer_examples_are_the_first_ones():
    dealt = shards(ParticipantSettings(examples=300), 5)
    assert np.array_equal(np.sort(np.concatenate(dealt)), np.arange(300))


class Recorder:
    """A framework that returns what it is given in place of a trainer."""

    @staticmethod
    def participant_trainer(settings, task):
        return settings, task

    @staticmethod
    def server_trainer(settings, task):
        return settings, task


@pytest.mark.parametrize("name", ["torch", "keras", "slim"])
def test_every_framework_gets_the_settings_and_the_same_shards_and_test_set(name, monkeypatch):
    asked = []

    def importing(module):
        if not module.endswith(".tasks"):
            return import_module(module)
        asked.append(module)
        return Recorder

    monkeypatch.setattr(registry, "import_module", importing)
    settings = ParticipantSettings(framework=name, partition="classes")
    given, task = participant_trainer(settings, 3, 5)
    assert given is settings
    indices = shards(ParticipantSettings(partition="classes"), 5)[3]
    data = digits.load()
    for examples in (task.train_set, task.test_set):
        np.testing.assert_array_equal(examples.inputs, data.train_set.inputs[indices])
        np.testing.assert_array_equal(examples.labels, data.train_set.labels[indices])
    _, task = server_trainer(settings)
    assert task.train_set is task.test_set is data.test_set
    assert asked == [f"clients.{name}.tasks"] * 2
