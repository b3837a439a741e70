"""``clients.app``: the participant of this repository's Flower app, on the digits."""

import dataclasses

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients.app import app, build
from clients.settings import ParticipantSettings
from clients.tasks import digits
from clients.tasks.registry import server_trainer, shards
from clients.torch import tasks as torch_tasks
from flwr_colearn import ColearnError, InProcessGrid, LocalPlan
from simulations.server_app import to_record

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

K = 5


@pytest.fixture(autouse=True, scope="module")
def _cpu():
    """Without a GPU, runs repeat themselves bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def context_of(k, run_config, **node_config):
    node_config = {"partition-id": k, "num-partitions": K, **node_config}
    return Context(1, k + 1, node_config, RecordDict(), run_config)


def test_run_config_and_node_config_describe_the_trainer():
    settings = ParticipantSettings(batch_size=8, partition="classes")
    trainer = build(context_of(2, settings.to_config()))
    assert trainer.batch_size == 8
    assert len(trainer.train_set) == len(shards(settings, K)[2])


def test_what_a_site_sets_goes_before_the_runs_config():
    assert build(context_of(0, {"batch-size": 8}, **{"batch-size": 4})).batch_size == 4


@pytest.mark.parametrize("partitions", [{}, {"num-partitions": 5}])
def test_a_sites_own_data_beside_a_partition_is_refused_with_both_keys(partitions):
    config = {"partition-id": 0, "data-dir": "/srv/data", **partitions}
    with pytest.raises(ColearnError, match=r"'data-dir' or 'partition-id', found both.*/srv/data"):
        build(Context(1, 1, config, RecordDict(), {}))


@pytest.mark.parametrize("partition", ["iid", "classes"])
def test_a_participant_trains_on_its_own_shard_only_and_on_all_of_it(partition, monkeypatch):
    seen = []

    def record(inputs, training):
        assert training
        seen.extend(image.tobytes() for image in inputs.numpy())
        return inputs

    kit = dataclasses.replace(torch_tasks.KITS["digits"], plain=record)
    monkeypatch.setitem(torch_tasks.KITS, "digits", kit)
    # A seed that no other test uses: participants are kept for the rest of the process.
    settings = ParticipantSettings(seed=991, partition=partition, batch_size=1000)
    grid = InProcessGrid(app, K, run_config=settings.to_config())
    arrays = to_record(server_trainer(settings))
    plan = ConfigRecord(LocalPlan(1, 2, 0.01).to_config())
    images = digits.load().train_set.inputs
    together = []
    for k, shard in enumerate(shards(settings, K)):
        seen.clear()
        content = RecordDict({"arrays": arrays, "config": plan})
        [reply] = grid.send_and_receive([Message(content, k + 1, "train")])
        assert not reply.has_error()
        assert sorted(seen) == sorted([images[index].tobytes() for index in shard] * 2)
        together.extend(shard)
    assert np.array_equal(np.sort(together), np.arange(1297))


def test_a_participant_evaluates_on_its_own_shard():
    grid = InProcessGrid(app, K)
    arrays = to_record(server_trainer(ParticipantSettings()))
    [reply] = grid.send_and_receive([Message(RecordDict({"arrays": arrays}), 1, "evaluate")])
    assert reply.content["metrics"]["num-examples"] == 260  # 1,297 over five: 260, 260, 259 ...


@pytest.mark.parametrize("permission", [{}, {"class-counts": False}, {"class-counts": True}])
def test_counts_by_class_leave_a_site_only_if_its_own_node_config_permits_it(tmp_path, permission):
    labels = np.array([0] * 7 + [2] * 4)
    np.savez(tmp_path / "train.npz", x=np.zeros((11, 8, 8)), y=labels)
    # The run config, which the server's operator writes, is no permission.
    config = {**ParticipantSettings(held_out=0.0).to_config(), "class-counts": True}
    grid = InProcessGrid(app, 1, run_config=config)
    grid.contexts[1].node_config = {"data-dir": str(tmp_path), **permission}
    arrays = to_record(server_trainer(ParticipantSettings()))
    plan = ConfigRecord(LocalPlan(1, 1, 0.05).to_config())
    for kind in ("train", "evaluate"):
        content = RecordDict({"arrays": arrays, "config": plan})
        [reply] = grid.send_and_receive([Message(content, 1, kind)])
        metrics = reply.content["metrics"]
        assert metrics["num-examples"] == 11
        counts = {name: n for name, n in metrics.items() if name.startswith("examples:")}
        permitted = kind == "evaluate" and permission == {"class-counts": True}
        assert counts == ({"examples:0": 7, "examples:2": 4} if permitted else {})


def test_the_runs_seed_and_keep_optimizer_reach_the_training():
    def rounds(*numbers, **settings):
        """One participant has all data, whatever the seed, and starts each round from one model."""
        config = ParticipantSettings(examples=100, **settings).to_config()
        grid = InProcessGrid(app, 1, run_config=config)
        arrays = to_record(server_trainer(ParticipantSettings()))
        plans = [ConfigRecord(LocalPlan(number, 1, 0.05).to_config()) for number in numbers]
        contents = [RecordDict({"arrays": arrays, "config": plan}) for plan in plans]
        replies = [grid.send_and_receive([Message(c, 1, "train")])[0] for c in contents]
        return [reply.content["arrays"]["0.weight"].numpy() for reply in replies]

    first, second, again = rounds(1, 2, 2)
    assert not np.array_equal(first, rounds(1, seed=1)[0])
    kept, carried, repeated = rounds(1, 2, 2, keep_optimizer=True)
    assert np.array_equal(first, kept)
    assert not np.array_equal(second, carried)
    assert np.array_equal(second, again)
    assert np.array_equal(carried, repeated)
