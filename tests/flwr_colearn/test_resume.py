import hashlib
import logging
import math
import os
import socket
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from flwr.app import MetricRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flwr_colearn import (
    CheckpointFolder,
    ColearnError,
    Compression,
    ConstantRate,
    CyclicalRate,
    FixedEpochs,
    Float16,
    History,
    IncreasingEpochs,
    LocalStatistics,
    Quorum,
    Recovery,
)
from flwr_colearn import checkpoint as checkpoint_module
from flwr_colearn import history as history_module
from flwr_colearn.checkpoint import Checkpoint
from tests.faults import (
    MODEL,
    FaultyGrid,
    bits,
    is_query,
    random_faults,
    record_of,
    strategy_of,
    train,
)

ROUNDS = 5


class Killed(BaseException):
    """The server's process ends here."""


@pytest.fixture(autouse=True)
def quiet_log(monkeypatch):
    monkeypatch.setattr(logging.getLogger("flwr"), "level", logging.CRITICAL)


class Server:
    """One server process after the other, each with new objects, on the same disk.

    ``start(kill)`` runs until `kill`, a (point, round), or to the end.
    """

    def __init__(self, path, clock, faults=None, nodes=4, **arguments):
        self.path, self.clock, self.faults, self.nodes = path, clock, faults, nodes
        self.arguments = arguments
        self.attempts = []
        self.kill = None
        self.saving = None

    def reach(self, point, round_):
        if (point, round_) == self.kill:
            raise Killed

    def start(self, kill=None, rounds=ROUNDS, resume="auto", model=MODEL, seed=None, **changed):
        self.kill = kill
        grid = WatchedGrid(self, self.clock, self.faults, k=self.nodes, train=self._train)
        grid.seconds_per_epoch = 10.0
        arguments = {
            "local_epochs": IncreasingEpochs(1, epsilon=0.12),
            "history": self.path / "history.jsonl",
            "checkpoints": self.path / "checkpoints",
            "train_metrics_aggr_fn": self._aggregate,
        }
        self.strategy = strategy_of(**{**arguments, **self.arguments, **changed})
        self.strategy.random.seed(seed)
        try:
            self.result = self.strategy.start(
                grid,
                record_of(model),
                rounds,
                timeout=60.0,
                evaluate_fn=self.evaluate,
                resume=resume,
            )
        finally:
            self.attempts += grid.attempts
        return self.outcome()

    def outcome(self):
        """All of a run but the seconds, having checked that the history file has it all too."""
        history = self.strategy.history
        lines = [record.to_json() for record in history]
        assert history.path.read_text().splitlines() == lines
        metrics = (
            self.result.train_metrics_clientapp,
            self.result.evaluate_metrics_clientapp,
            self.result.evaluate_metrics_serverapp,
        )
        return (
            bits(self.result.arrays),
            [{**asdict(record), "seconds": 0} for record in history],
            [{i: dict(by_round[i]) for i in by_round if i > 0} for by_round in metrics],
        )

    def evaluate(self, server_round, arrays):
        self.reach("server's evaluation", server_round)
        return MetricRecord({"norm": float(np.linalg.norm(arrays["fc.weight"].numpy()))})

    def _train(self, k, plan, arrays):
        self.reach(f"participant {k}", plan.round)
        return train(k, plan, arrays)

    def _aggregate(self, contents, key):
        self.reach("aggregation", 1 + len(self.strategy.history))
        return MetricRecord({"loss": sum(each["metrics"]["loss"] for each in contents)})


class WatchedGrid(FaultyGrid):
    """A grid that tells its server which rounds it comes to."""

    def __init__(self, server, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.server = server

    def push_messages(self, messages):
        if not messages or is_query(messages[0]):
            return super().push_messages(messages)
        round_ = messages[0].content["config"]["server-round"]
        kind = messages[0].metadata.message_type
        self.server.reach(f"before {kind}", round_)
        ids = super().push_messages(messages)
        self.server.reach(f"after {kind}", round_)
        return ids


WRITING = {  # what saving a checkpoint calls, in this order
    "np.savez": np,
    "os.fsync": os,
    "hashlib.file_digest": hashlib,
    "Path.replace": Path,
    "flush_folder": checkpoint_module,
    "Path.unlink": Path,
}
POINTS = [
    "before train",
    "participant 0",
    "participant 3",
    "after train",
    "aggregation",
    "before evaluate",
    "after evaluate",
    "server's evaluation",
    "half a line of history",
    "history",
    *WRITING,
]


def tapped(server, monkeypatch):
    """Let the server be killed while it writes, too."""
    append, save = History.append, CheckpointFolder.save

    def killed_append(self, record):
        if ("half a line of history", record.round) == server.kill:
            with self.path.open("a") as file:
                file.write(record.to_json()[:40])
            raise Killed
        append(self, record)
        server.reach("history", record.round)

    def noted_save(self, checkpoint, records=()):
        server.saving = checkpoint.round
        try:
            return save(self, checkpoint, records)
        finally:
            server.saving = None

    def killed(point, function):
        def call(*args, **kwargs):
            server.reach(point, server.saving)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(History, "append", killed_append)
    monkeypatch.setattr(CheckpointFolder, "save", noted_save)
    for point, owner in WRITING.items():
        name = point.rpartition(".")[2]
        monkeypatch.setattr(owner, name, killed(point, getattr(owner, name)))
    return server


@pytest.fixture
def server(tmp_path, clock, monkeypatch):
    return tapped(Server(tmp_path / "run", clock), monkeypatch)


@pytest.fixture
def uninterrupted(tmp_path, clock):
    return Server(tmp_path / "uninterrupted", clock).start()


# Killed anywhere ---------------------------------------------------------------------------------


def test_the_runs_below_have_something_to_go_on_with(uninterrupted):
    _, records, _ = uninterrupted
    path = [record["local_epochs"] for record in records]
    assert path == sorted(path)
    assert len(set(path)) > 2
    assert len({record["relative_change"] for record in records}) == ROUNDS


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(
    "round_",
    [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(ROUNDS, marks=pytest.mark.slow)],
)
def test_a_run_killed_anywhere_and_resumed_is_the_run(point, round_, server, uninterrupted):
    if point == "Path.unlink" and round_ < 3:
        pytest.skip("nothing is removed before the fourth checkpoint")
    with pytest.raises(Killed):
        server.start(kill=(point, round_))
    assert server.start() == uninterrupted


@pytest.mark.parametrize("point", ["server's evaluation", *list(WRITING)[:-1]])
def test_a_run_killed_before_its_first_round_is_begun_again(point, server, uninterrupted):
    with pytest.raises(Killed):
        server.start(kill=(point, 0))
    assert server.start() == uninterrupted


@pytest.mark.slow
@given(kills=st.lists(st.tuples(st.sampled_from(POINTS), st.integers(1, ROUNDS)), max_size=4))
@example(kills=[("os.fsync", 3), ("os.fsync", 3), ("flush_folder", 3), ("history", 4)])
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_a_run_may_be_killed_again_and_again(tmp_path_factory, clock, uninterrupted, kills):
    with pytest.MonkeyPatch.context() as monkeypatch:
        server = tapped(Server(tmp_path_factory.mktemp("run"), clock), monkeypatch)
        for kill in kills:
            try:
                server.start(kill=kill)
            except Killed:
                continue
        assert server.start() == uninterrupted


def test_a_run_killed_while_it_was_resuming_is_resumed(server, uninterrupted, monkeypatch):
    with pytest.raises(Killed):
        server.start(kill=("participant 0", 4))
    with monkeypatch.context() as patch:

        def truncated(path, length):
            truncate(path, length)
            raise Killed

        truncate = os.truncate
        patch.setattr(os, "truncate", truncated)
        with pytest.raises(Killed):
            server.start()
    assert server.start() == uninterrupted


def test_only_the_round_under_way_is_trained_again(server):
    with pytest.raises(Killed):
        server.start(kill=("participant 3", 3))
    server.attempts = []
    server.start()
    assert [each.round for each in server.attempts] == [3] * 4 + [4] * 4 + [5] * 4


def test_the_clocks_go_on_too(server, tmp_path, clock):
    def limits(attempts):
        return {each.round: each.time_limit for each in attempts}

    whole = Server(tmp_path / "whole", clock)
    whole.start()
    with pytest.raises(Killed):
        server.start(kill=("before train", 4))
    server.start()
    assert limits(server.attempts) == pytest.approx(limits(whole.attempts), rel=0.1)
    assert limits(whole.attempts)[5] > limits(whole.attempts)[2] > 60


def test_a_damaged_checkpoint_costs_a_round(server, uninterrupted):
    with pytest.raises(Killed):
        server.start(kill=("participant 0", 4))
    newest = max((server.path / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-7])
    assert server.start() == uninterrupted
    assert [each.round for each in server.attempts].count(3) == 2 * 4


@pytest.mark.parametrize("seed", range(3))
def test_faults_and_kills_together_change_nothing(seed, tmp_path, clock, uninterrupted):
    server = Server(tmp_path / "faulty", clock, faults=random_faults(seed, ROUNDS))
    for round_ in (2, 4):
        with pytest.raises(Killed):
            server.start(kill=("server's evaluation", round_))
    arrays, records, metrics = server.start()
    assert arrays == uninterrupted[0]
    assert metrics == uninterrupted[2]
    assert [each["relative_change"] for each in records] == [
        each["relative_change"] for each in uninterrupted[1]
    ]
    assert sum(len(each["restarts"]) for each in records) > 0


def test_a_run_that_lost_a_participant_is_resumed_when_it_is_back(server, uninterrupted):
    server.faults = {(3, 1, attempt): "code 5" for attempt in range(9)}
    with pytest.raises(ColearnError, match="lost participant partition-1"):
        server.start()
    server.faults = None
    assert server.start() == uninterrupted


def test_a_full_disk_does_not_end_the_run(server, uninterrupted, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flwr_colearn.files.os.fsync", full)
    assert server.start() == uninterrupted
    assert not list((server.path / "checkpoints").glob("*round*"))


def test_two_runs_on_one_folder_are_refused_and_the_second_names_the_first(server, tmp_path, clock):
    second = Server(server.path, clock)
    refused = []

    def evaluate(server_round, arrays):
        if server_round == 2 and not refused:
            with pytest.raises(ColearnError, match="is used by process") as error:
                second.start()
            refused.append(str(error.value))
        return MetricRecord({})

    server.evaluate = evaluate
    server.start()
    assert second.attempts == []
    assert f"process {os.getpid()} on {socket.gethostname()}, since " in refused[0]
    assert str(server.path / "checkpoints") in refused[0]
    server.attempts = []
    second.start()  # the first one is over, and has left nothing to do


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("bad", ["a file", "a link that leads nowhere", "below a file"])
def test_a_folder_that_cannot_be_written_is_found_before_the_first_round(bad, resume, server):
    (server.path / "file").parent.mkdir(parents=True)
    (server.path / "file").write_text("")
    (server.path / "link").symlink_to(server.path / "nowhere")
    folder = {"a file": "file", "a link that leads nowhere": "link", "below a file": "file/below"}
    with pytest.raises(ColearnError, match="checkpoints: expected a folder that can be written"):
        server.start(checkpoints=server.path / folder[bad], resume=resume)
    assert server.attempts == []


@pytest.mark.parametrize("checkpoints", [None, "elsewhere"])
def test_auto_says_that_it_begins_anew(checkpoints, server, tmp_path, monkeypatch, flower_log):
    monkeypatch.setattr(logging.getLogger("flwr"), "level", logging.INFO)
    folder = None if checkpoints is None else tmp_path / checkpoints
    server.start(rounds=1, checkpoints=folder)
    where = "no `checkpoints`" if folder is None else f"no checkpoint in {folder}"
    assert f"nothing to resume, so a new run begins: {where}" in flower_log.text


def test_a_checkpoint_does_not_grow_with_the_run(server):
    """Else every round takes longer than the one before."""
    sizes = {}

    def evaluate(server_round, arrays):
        paths = (server.path / "checkpoints").glob("round-*.npz")
        sizes.update({int(path.name[6:12]): path.stat().st_size for path in paths})
        return MetricRecord({"norm": 1.0})

    server.evaluate = evaluate
    server.start(rounds=40, local_epochs=FixedEpochs(1))
    # Only numbers have more digits; a record is some 800 bytes. What an epoch rule sees is full
    # after the first 20 rounds.
    assert abs(sizes[39] - sizes[23]) < 200
    assert sizes[39] - sizes[3] < 2000


@pytest.mark.parametrize("how", ["missing", "damaged", "cut"])
def test_the_history_s_file_stands_in_for_lost_records(how, server, uninterrupted):
    with pytest.raises(Killed):
        server.start(kill=("participant 0", 4))
    spoil(server.path / "checkpoints" / "records.jsonl", how)
    assert server.start() == uninterrupted


@pytest.mark.parametrize("how", ["missing", "damaged", "cut"])
def test_lost_records_cost_no_model_and_are_said(
    how, server, uninterrupted, monkeypatch, flower_log
):
    monkeypatch.setattr(logging.getLogger("flwr"), "level", logging.INFO)
    with pytest.raises(Killed):
        server.start(kill=("participant 0", 4))
    for name in ("checkpoints/records.jsonl", "history.jsonl"):
        spoil(server.path / name, how)
    arrays, records, _ = server.start()
    assert arrays == uninterrupted[0]
    assert [record["round"] for record in records] == [4, 5]
    assert "the run goes on without the records up to round 3" in flower_log.text
    # What is left of the old ones is not overwritten.
    assert (server.path / "history.jsonl.1").exists() == (how != "missing")


def spoil(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(
            data[:-600] if how == "cut" else data.replace(b'"round": 2', b'"round": 9')
        )


@pytest.mark.parametrize("checkpoints", [None, "elsewhere"])
def test_a_run_that_begins_anew_never_overwrites_a_history(checkpoints, server, tmp_path):
    server.start(rounds=2)
    before = (server.path / "history.jsonl").read_bytes()
    folder = None if checkpoints is None else tmp_path / checkpoints
    server.start(checkpoints=folder)
    assert (server.path / "history.jsonl.1").read_bytes() == before


@pytest.mark.parametrize(
    "history", ["/dev/full", "file/history.jsonl", "link/history.jsonl", "dir"]
)
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_history_that_cannot_be_written_is_found_before_the_first_round(resume, history, server):
    server.path.mkdir()
    (server.path / "file").write_text("")
    (server.path / "link").symlink_to(server.path / "nowhere")
    (server.path / "dir").mkdir()
    evaluated = []
    server.evaluate = lambda server_round, arrays: evaluated.append(server_round)
    with pytest.raises(ColearnError, match=r"history .*: expected a file that can be written"):
        server.start(history=server.path / history, resume=resume)
    # Nor does the server wait for participants, which may take a day.
    assert server.attempts == evaluated == []


def test_a_history_that_fails_during_a_run_costs_lines_and_not_the_run(
    server, uninterrupted, monkeypatch, flower_log
):
    monkeypatch.setattr(logging.getLogger("flwr"), "level", logging.INFO)
    append, failing = history_module.append_to, []

    def full(path, data, **kwargs):
        if data != b"\n" and len(server.strategy.history) in (2, 3):
            failing.append(path)
            raise OSError(28, "No space left on device")
        append(path, data, **kwargs)

    monkeypatch.setattr(history_module, "append_to", full)
    assert server.start() == uninterrupted  # which compares the lines in the file too
    assert len(failing) == 2
    assert "No space left on device" in flower_log.text


# What is restored besides -----------------------------------------------------------------------


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_metrics_that_are_not_finite_are_restored(loss, server):
    metrics = {"loss": loss, "list": [1.0, loss]}
    server.evaluate = lambda server_round, arrays: MetricRecord(metrics)
    with pytest.raises(Killed):
        server.start(kill=("participant 0", 3))
    _, records, (*_, restored) = server.start()
    np.testing.assert_equal(records[0]["server_metrics"], metrics)
    np.testing.assert_equal(restored[1], metrics)


def test_the_participants_to_evaluate_are_drawn_as_they_would_have_been(tmp_path, clock):
    arguments = {"fraction_evaluate": 0.5, "min_evaluate_nodes": 1}
    expected = Server(tmp_path / "whole", clock, **arguments).start(seed=1)
    accuracies = [record["evaluate_metrics"]["accuracy"] for record in expected[1]]
    assert len(set(accuracies)) > 1
    server = Server(tmp_path / "run", clock, **arguments)
    with pytest.raises(Killed):
        server.start(seed=1, kill=("participant 0", 3))
    assert server.start(seed=2) == expected


def test_the_same_participants_go_on_where_there_are_more_nodes(tmp_path, clock):
    def trained(attempts):
        return [{each.k for each in attempts if each.round == r} for r in range(1, ROUNDS + 1)]

    for run in range(4):
        server = Server(tmp_path / str(run), clock, nodes=8, fraction_evaluate=0.0)
        with pytest.raises(Killed):
            server.start(kill=("before train", 3))
        server.start()
        assert len(set(map(frozenset, trained(server.attempts)))) == 1


# The end of a run --------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{}, {"rounds": None, "total_epochs": 9}])
def test_resuming_a_finished_run_returns_at_once(limits, server):
    finished = server.start(**limits)
    history = server.strategy.history.path.read_text()
    server.attempts = []
    assert server.start(**limits) == finished
    assert server.attempts == []
    assert server.strategy.history.path.read_text() == history


def test_a_finished_run_may_be_given_more_rounds(server, uninterrupted):
    server.start(rounds=2)
    assert server.start(rounds=ROUNDS) == uninterrupted


def test_a_run_that_has_more_rounds_than_asked_for_returns_at_once(server):
    finished = server.start(rounds=4)
    server.attempts = []
    assert server.start(kill=("before train", 5), rounds=2) == finished
    assert server.attempts == []


def test_the_last_rounds_epochs_are_cut_to_the_budget_after_a_resume_too(server, tmp_path, clock):
    budget = {"rounds": None, "total_epochs": 12}
    expected = Server(tmp_path / "whole", clock).start(**budget)
    with pytest.raises(Killed):
        server.start(kill=("participant 2", 4), **budget)
    assert server.start(**budget) == expected
    assert expected[1][-1]["epochs_done"] == 12


# Refusals ----------------------------------------------------------------------------------------


def test_never_does_not_begin_where_there_are_checkpoints(server):
    server.start(rounds=2)
    server.attempts = []
    with pytest.raises(ColearnError, match="expected none, since resume='never', found round 2"):
        server.start(resume="never")
    assert server.attempts == []
    server.start(rounds=2)  # and nothing was lost


def test_never_begins_where_there_are_none(server, uninterrupted):
    assert server.start(resume="never") == uninterrupted


@pytest.mark.parametrize("checkpoints", [None, "elsewhere"])
def test_auto_begins_where_there_are_none(checkpoints, server, uninterrupted, tmp_path):
    server.start(rounds=2)
    folder = None if checkpoints is None else tmp_path / checkpoints
    assert server.start(checkpoints=folder) == uninterrupted


@pytest.mark.parametrize("resume", ["always", True, None])
def test_another_word_than_never_or_auto_is_refused(resume, server):
    with pytest.raises(ColearnError, match="resume: expected 'never' or 'auto'"):
        server.start(resume=resume)


OTHERS = {
    "another T": ({"local_epochs": FixedEpochs(3)}, "local epochs"),
    "another epsilon": ({"local_epochs": IncreasingEpochs(1, epsilon=0.11)}, "local epochs"),
    "another rate": ({"learning_rate": CyclicalRate(0.21)}, "learning rate"),
    "another schedule": ({"learning_rate": ConstantRate(0.2)}, "learning rate"),
    "a rate by round": ({"learning_rate": CyclicalRate(lambda i: 0.2 / (i + 1))}, "learning rate"),
    "weights": ({"weighting": "weighted"}, "weighting"),
    "a budget": ({"total_epochs": 99}, "total epochs"),
    "more participants": ({"k": 5}, "number of participants"),
    "another shape": ({"model": {**MODEL, "fc.bias": np.zeros(4)}}, "model"),
    "another type": ({"model": {**MODEL, "fc.bias": np.zeros(3, np.float32)}}, "model"),
    "another name": ({"model": {**MODEL, "more": np.zeros(3)}}, "model"),
    "another role": ({"roles": {"fc.bias": "buffer"}}, "roles"),
    "another wire": ({"compression": Compression(up=Float16())}, "compression"),
    "another wire down": ({"compression": Compression(down=Float16())}, "compression"),
    "another scheme": ({"normalization": LocalStatistics()}, "normalization"),
}


@pytest.mark.parametrize(("changed", "what"), OTHERS.values(), ids=OTHERS)
def test_another_configuration_is_refused_with_the_difference(changed, what, server, uninterrupted):
    with pytest.raises(Killed):
        server.start(kill=("participant 0", 3))
    server.attempts, server.nodes = [], 5
    with pytest.raises(ColearnError, match=f"of the same configuration, found another {what}: "):
        server.start(**changed)
    assert server.attempts == []
    server.nodes = 4
    assert server.start() == uninterrupted  # the checkpoints are as they were


def test_all_that_differs_is_named(server):
    server.start(rounds=2)
    with pytest.raises(ColearnError, match="of the same configuration, found another") as error:
        server.start(learning_rate=ConstantRate(0.2), weighting="weighted", total_epochs=99)
    for what in ("learning rate", "weighting", "total epochs"):
        assert f"another {what}: " in str(error.value)


def test_a_spent_budget_may_be_raised(server):
    budget = {"rounds": None, "local_epochs": FixedEpochs(2)}
    _, records, _ = server.start(total_epochs=5, **budget)
    assert [record["local_epochs"] for record in records] == [2, 2, 1]
    _, records, _ = server.start(total_epochs=8, **budget)
    assert [record["local_epochs"] for record in records] == [2, 2, 1, 2, 1]
    assert records[-1]["epochs_done"] == 8
    with pytest.raises(ColearnError, match="another total epochs: 8 there, 7 now"):
        server.start(total_epochs=7, **budget)


def test_a_run_with_a_function_as_its_schedule_is_resumed(server):
    """Another process has another function object, at another address."""

    def rate():
        return lambda progress: 0.2 * (1 - progress)

    limits = {"rounds": None, "total_epochs": 9}
    with pytest.raises(Killed):
        server.start(("after train", 3), learning_rate=rate(), **limits)
    server.start(learning_rate=rate(), **limits)
    assert [record.round for record in server.strategy.history][-1] > 3
    with pytest.raises(ColearnError, match="another learning rate"):
        server.start(learning_rate=lambda progress: 0.1, **limits)


def test_what_does_not_change_the_model_may_be_changed(server, uninterrupted):
    with pytest.raises(Killed):
        server.start(kill=("participant 0", 3))
    assert server.start(recovery=Recovery(9, policy=Quorum(3))) == uninterrupted


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({}, "expected one of this version of flwr-colearn, found KeyError: 'configuration'"),
        ({"configuration": {}}, "expected one of the same configuration, found another .*: None"),
        ({"configuration": 3}, "expected one of this version of flwr-colearn, found TypeError"),
    ],
)
def test_a_checkpoint_of_another_program_is_refused(state, match, server):
    folder = CheckpointFolder(server.path / "checkpoints")
    folder.save(Checkpoint(3, MODEL, state))
    with pytest.raises(ColearnError, match=match):
        server.start()


def private(strategy):
    return DifferentialPrivacyServerSideFixedClipping(
        strategy, noise_multiplier=0.0, clipping_norm=1e6, num_sampled_clients=4
    )


@pytest.mark.parametrize("what", ["checkpoints", "total_epochs"])
def test_a_wrapper_with_flowers_own_loop_is_refused_what_it_cannot_keep(what, tmp_path, clock):
    grid = FaultyGrid(clock)
    dp = private(strategy_of(**{what: tmp_path if what == "checkpoints" else 9}))
    with pytest.raises(ColearnError, match=f"{what} under a wrapper .* expected None") as error:
        dp.start(grid, record_of(MODEL), num_rounds=2)
    assert "neither a budget nor checkpoints" in str(error.value)
    assert grid.attempts == []
    assert list(tmp_path.iterdir()) == []
