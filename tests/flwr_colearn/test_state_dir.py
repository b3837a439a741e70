"""What participants keep between rounds outlives their SuperNode and the server's run."""

import errno
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import CoLearn, Compression, InProcessGrid, Int8, participant_mod
from flwr_colearn.state_dir import state_path
from tests.faults import MODEL, K, bits, fsync_of_cifs, participants, record_of, train


def uneven(k, plan, arrays):
    """Train so that rounding leaves something over."""
    model = train(k, plan, arrays)
    for name, array in model.items():
        if array.dtype.kind == "f":
            model[name] = array + np.linspace(0, 0.1 * (k + 1), array.size).reshape(array.shape)
    return {name: array.astype(MODEL[name].dtype) for name, array in model.items()}


def nodes(tmp_path):
    return [{"state-dir": str(tmp_path)}] * K


class Forgetful(InProcessGrid):
    """Every context is empty when the next round is evaluated, as after a power cut."""

    def forget(self, server_round, arrays):
        for context in self.contexts.values():
            context.state = RecordDict()


def run(grid, rounds=4, evaluate_fn=None, **kwargs):
    strategy = CoLearn(
        K,
        local_epochs=1,
        learning_rate=0.3,
        compression=Compression(up=Int8()),
        fraction_evaluate=0.0,
        **kwargs,
    )
    return strategy.start(grid, record_of(MODEL), rounds, evaluate_fn=evaluate_fn, resume="auto")


def test_what_rounding_left_over_survives(tmp_path, flower_log):
    whole = run(InProcessGrid(participants(uneven), K))
    grid = Forgetful(participants(uneven), K, node_configs=nodes(tmp_path))
    found = run(grid, evaluate_fn=grid.forget)
    assert bits(found.arrays) == bits(whole.arrays)
    assert "residual" not in flower_log.text
    assert [path.name[:12] for path in sorted(tmp_path.iterdir())] == [
        f"partition-{k}-" for k in range(K)
    ]


def test_without_it_the_loss_is_a_warning(flower_log):
    whole = run(InProcessGrid(participants(uneven), K))
    grid = Forgetful(participants(uneven), K)
    lost = run(grid, evaluate_fn=grid.forget)
    assert bits(lost.arrays) != bits(whole.arrays)
    assert "this participant has no residual of earlier rounds" in flower_log.text


def test_it_survives_a_server_that_is_run_again(tmp_path):
    """A second `flwr run` has a new run id, and every participant an empty state."""
    whole = run(InProcessGrid(participants(uneven), K), checkpoints=tmp_path / "whole")
    folder = tmp_path / "states"
    for rounds in (2, 4):
        grid = InProcessGrid(participants(uneven), K, node_configs=nodes(folder))
        found = run(grid, rounds, checkpoints=tmp_path / "server")
    assert bits(found.arrays) == bits(whole.arrays)


def test_another_training_begins_with_nothing(tmp_path):
    first = run(InProcessGrid(participants(uneven), K, node_configs=nodes(tmp_path)))
    again = run(InProcessGrid(participants(uneven), K, node_configs=nodes(tmp_path)))
    assert bits(first.arrays) == bits(again.arrays)


def counting_app():
    """An app with a state of its own."""
    app = ClientApp(mods=[participant_mod])

    @app.train()
    def train(message, context):
        count = context.state.get("mine", MetricRecord({"count": 0}))["count"] + 1
        context.state["mine"] = MetricRecord({"count": count})
        context.state["array"] = ArrayRecord([np.full(3, count)])
        return Message(RecordDict({"metrics": MetricRecord({"count": count})}), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        context.state["evaluated"] = MetricRecord({"count": 1})
        return Message(RecordDict({"metrics": MetricRecord({"count": 0})}), reply_to=message)

    return app


class Site:
    """One participant, and messages to it."""

    def __init__(self, folder, name="utrecht"):
        self.node = {"state-dir": str(folder), "name": name}
        self.begin()

    def begin(self):
        """Start its SuperNode anew."""
        self.grid = InProcessGrid(counting_app(), 1, node_configs=[self.node])

    def ask(self, session="a", kind="train", **config):
        if session is not None:
            config["session"] = session
        content = RecordDict({"config": ConfigRecord({"server-round": 1, **config})})
        (reply,) = self.grid.send_and_receive([Message(content, 1, kind)])
        assert not reply.has_error(), reply.error
        return reply.content["metrics"]["count"]


def test_an_apps_own_state_survives_too(tmp_path):
    site = Site(tmp_path)
    assert [site.ask(), site.ask()] == [1, 2]
    site.begin()
    assert site.ask() == 3
    np.testing.assert_array_equal(
        site.grid.contexts[1].state["array"].to_numpy_ndarrays(), [[3] * 3]
    )


def test_a_session_has_a_state_of_its_own(tmp_path):
    site = Site(tmp_path)
    site.ask("a")
    site.begin()
    assert [site.ask("b"), site.ask("b")] == [1, 2]
    site.begin()
    assert site.ask("b") == 3


def test_without_a_session_nothing_is_written(tmp_path):
    site = Site(tmp_path / "folder")
    site.ask(session=None)
    site.ask(kind="evaluate")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-1], lambda data: data + b"x", lambda data: b"x" * 99],
)
def test_a_damaged_file_is_a_lost_one(damage, tmp_path, flower_log):
    site = Site(tmp_path)
    site.ask()
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    site.begin()
    assert site.ask() == 1
    assert f"{path} is damaged" in flower_log.text


def test_a_process_that_is_killed_while_writing_leaves_the_file_before(tmp_path, monkeypatch):
    site = Site(tmp_path)
    site.ask()

    class Killed(BaseException):
        pass

    def kill(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", kill)
        with pytest.raises(Killed):
            site.ask()
    site.begin()
    assert site.ask() == 2


def test_the_state_is_on_the_disk_before_it_replaces_the_one_before(tmp_path, monkeypatch):
    """Else a power cut after the renaming leaves a file of zeros."""
    calls = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(fd):
        calls.append("fsync")
        fsync(fd)

    def noted_replace(self, target):
        calls.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    Site(tmp_path).ask()
    assert calls[:2] == ["fsync", "replace"]
    assert calls[2:] == ["fsync"]  # the folder's entry


def test_only_the_owner_may_read_a_state(tmp_path):
    before = os.umask(0)
    try:
        Site(tmp_path).ask()
    finally:
        os.umask(before)
    [path] = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_costs_the_state_and_not_the_training(
    code, tmp_path, monkeypatch, flower_log
):
    site = Site(tmp_path)

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert [site.ask(), site.ask()] == [1, 2]
    assert "State: not saved" in flower_log.text
    assert os.strerror(code) in flower_log.text
    assert list(tmp_path.iterdir()) == []  # nor does half a file fill the disk any further
    site.ask()
    site.begin()
    assert site.ask() == 4


def test_a_folder_that_is_a_file_costs_the_state_and_not_the_training(tmp_path, flower_log):
    (tmp_path / "file").write_text("")
    assert [Site(tmp_path / "file").ask()] == [1]
    assert "State: not read" in flower_log.text
    assert "State: not saved" in flower_log.text


def test_a_folder_that_cannot_be_flushed_is_used_all_the_same(tmp_path, monkeypatch, flower_log):
    monkeypatch.setattr(os, "fsync", fsync_of_cifs)
    site = Site(tmp_path)
    assert [site.ask(), site.ask()] == [1, 2]
    site.begin()
    assert site.ask() == 3
    assert flower_log.text.count("cannot be flushed") == 1


def test_two_runs_at_once_at_one_site_do_not_disturb_each_other(tmp_path):
    first, second = Site(tmp_path), Site(tmp_path)
    for count in (1, 2, 3):
        for site, session in ((first, "a"), (second, "b")):
            site.begin()
            assert site.ask(session) == count


def test_states_of_old_sessions_are_removed_and_those_of_others_are_not(tmp_path):
    other, site = Site(tmp_path, "other"), Site(tmp_path)
    other.ask("0")
    for number, session in enumerate("abcdefg"):
        site.begin()
        site.ask(session)
        for path in tmp_path.iterdir():  # a clock whose every tick is a session
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))
        assert len(list(tmp_path.iterdir())) == 1 + min(number + 1, 3)
    site.begin()
    assert [site.ask("g"), site.ask("f"), site.ask("e")] == [2, 2, 2]
    other.begin()
    assert other.ask("0") == 2


NAMES = ["../../x", "/etc/x", "a b", "..", "ü/é", "-", "x" * 300, "é" * 300, "*"]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_to_another_folder(name, tmp_path):
    site = Site(tmp_path / "states" / "here", name)
    site.ask()
    assert len(list(tmp_path.rglob("*.state"))) == 1
    assert len(list((tmp_path / "states" / "here").iterdir())) == 1
    assert len(list(tmp_path.iterdir())) == 1
    site.begin()
    assert site.ask() == 2


ALIKE = ["site 1", "site_1", "site-1", "Site 1", "a/b", "a_b", "a%2Fb", "x" * 300, "x" * 301]


def test_names_that_differ_have_files_that_differ(tmp_path):
    paths = [state_path(tmp_path, name, "a").name for name in ALIKE]
    # Some file systems ignore case.
    assert len({path.lower() for path in paths}) == len(ALIKE)
    assert all(len(path) < 100 for path in paths)
    for one, other in pairwise(ALIKE):
        first, second = Site(tmp_path / one[:8], one), Site(tmp_path / one[:8], other)
        first.ask()
        assert second.ask() == 1
        first.begin()
        assert first.ask() == 2
