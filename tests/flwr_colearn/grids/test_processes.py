import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from flwr_colearn import ColearnError, Compression, InProcessGrid, Int8, Recovery, ThreadedGrid
from tests.faults import MODEL, K, outcome, participants, record_of, strategy_of
from tests.flwr_colearn.grids.workers_app import (
    counting,
    dies_always,
    dies_and_leaves_a_child,
    dies_at_start,
    dies_once,
    enlarging,
    hanging,
    raising,
)


def segments(pid):
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"colearn-{pid}-")]


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert not segments(os.getpid())
    assert not multiprocessing.active_children()


def messages(nodes, **config):
    content = RecordDict({"config": ConfigRecord(config)})
    return [Message(content, node, "train") for node in nodes]


def trained(app, processes, rounds=4, **kwargs):
    strategy = strategy_of(**kwargs)
    with InProcessGrid(app, K, processes=processes) as grid:
        result = strategy.start(grid, record_of(MODEL), num_rounds=rounds)
        # The keys of all that participants keep, since the session in it is random.
        kept = {node: sorted(context.state) for node, context in grid.contexts.items()}
        counts = [c.state["count"]["n"] for c in grid.contexts.values() if "count" in c.state]
    return outcome(strategy, result), kept, counts


@pytest.mark.parametrize("processes", [2, 3, 7])
@pytest.mark.parametrize("compression", [Compression(), Compression(up=Int8())], ids=["", "int8"])
def test_any_number_of_processes_gives_the_same_bits(processes, compression):
    one = trained(counting, 1, compression=compression)
    assert trained(counting, processes, compression=compression) == one


def test_a_worker_that_is_killed_costs_nothing(tmp_path):
    one = trained(participants, 1)
    assert trained(partial(dies_once, tmp_path), 2) == one
    assert (tmp_path / "died").exists()


def test_a_participant_that_always_kills_its_worker_ends_the_run_and_not_the_server():
    with pytest.raises(ColearnError, match=r"was ended by SIGKILL.* 3 times"):
        trained(dies_always, 2, recovery=Recovery(max_restarts=0))


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_worker_that_dies_at_its_start_is_replaced(tmp_path, deaths):
    one = trained(participants, 1)
    assert trained(partial(dies_at_start, tmp_path, deaths), 2) == one
    assert len(list(tmp_path.iterdir())) == deaths


def test_workers_that_always_die_at_their_start_end_the_run(tmp_path):
    with pytest.raises(ColearnError, match=r"expected worker processes to start, found.*3 times"):
        trained(partial(dies_at_start, tmp_path, 1000), 2)


@pytest.mark.timeout(60)
def test_a_worker_is_replaced_though_a_process_that_it_forked_holds_its_connection(tmp_path):
    try:
        with InProcessGrid(partial(dies_and_leaves_a_child, tmp_path), 2, processes=2) as grid:
            replies = grid.send_and_receive(messages([1]))
            assert not replies[0].has_error()
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


@pytest.mark.timeout(60)
def test_a_lack_of_shared_memory_is_an_error_every_time_and_loses_no_message(monkeypatch):
    with InProcessGrid(partial(enlarging, 10), 2, processes=2) as grid:
        ids = grid.push_messages(messages([1, 2]))
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", no_room)
            for _ in range(2):
                with pytest.raises(ColearnError, match=r"found no room.*--shm-size"):
                    grid.pull_messages(ids)
        replies = []
        while len(replies) < 2:
            replies += grid.pull_messages(ids)
        assert {reply.content["arrays"]["w"].numpy()[0] for reply in replies} == {1.0, 2.0}


def no_room(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_reply_larger_than_its_message_arrives_whole():
    with InProcessGrid(partial(enlarging, 100_000), 3, processes=2) as grid:
        for _ in range(3):
            replies = grid.send_and_receive(messages([1, 2, 3]))
            for node, reply in zip([1, 2, 3], replies, strict=True):
                array = reply.content["arrays"]["w"].numpy()
                np.testing.assert_array_equal(array, np.arange(100_000) + node)


def test_a_participant_that_hangs_is_ended_at_its_time_limit(tmp_path):
    with InProcessGrid(partial(hanging, tmp_path, [2]), 3, processes=2) as grid:
        assert not any(r.has_error() for r in grid.send_and_receive(messages([1, 3])))
        began = time.monotonic()
        replies = grid.send_and_receive(
            messages([1, 2, 3], **{"server-round": 1, "time-limit": 1.0})
        )
        assert time.monotonic() - began < 60
        assert [reply.has_error() for reply in replies] == [False, True, False]
        assert "no reply within 1 s" in replies[1].error.reason
        assert not any(r.has_error() for r in grid.send_and_receive(messages([1, 3])))


def test_exceptions_are_logged_by_the_server_with_one_traceback(flower_log):
    with InProcessGrid(raising, 3, processes=2) as grid:
        replies = grid.send_and_receive(messages([1, 2, 3]))
    assert [reply.error.reason for reply in replies] == ["ValueError: no data"] * 3
    assert flower_log.text.count("raised ValueError: no data") == 3
    assert flower_log.text.count("Traceback (most recent call last)") == 1


def test_a_closed_grid_says_so_and_can_be_closed_again():
    grid = InProcessGrid(raising, 2, processes=2)
    assert grid.send_and_receive([]) == []
    grid.close()
    grid.close()
    with pytest.raises(ColearnError, match="expected an open grid, found it closed"):
        grid.push_messages(messages([1]))


def test_a_grid_that_is_closed_while_participants_train_leaves_nothing(tmp_path):
    with InProcessGrid(partial(hanging, tmp_path, [1, 2]), 2, processes=2) as grid:
        grid.send_and_receive(messages([1, 2], **{"server-round": 1, "time-limit": 0.1}))
        grid.push_messages(messages([1, 2]))
        assert segments(os.getpid())


PROGRAM = """
import signal
from functools import partial
from flwr.app import Message, RecordDict
from flwr_colearn import InProcessGrid
from tests.flwr_colearn.grids.workers_app import hanging

if __name__ == "__main__":
    # As in a terminal: a program that is started in the background ignores the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with InProcessGrid(partial(hanging, {folder!r}, [1, 2]), 2, processes=2) as grid:
        grid.send_and_receive([Message(RecordDict(), node, "train") for node in (1, 2)])
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_program_that_is_interrupted_or_killed(tmp_path, end):
    (tmp_path / "marks").mkdir()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(folder=str(tmp_path / "marks")))
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    server = subprocess.Popen(
        [sys.executable, str(program)],
        env=environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while len(list((tmp_path / "marks").iterdir())) < 2:
            assert server.poll() is None
            time.sleep(0.1)
        started = psutil.Process(server.pid).children(recursive=True)
        assert segments(server.pid)
        if end == signal.SIGINT:
            os.killpg(server.pid, end)  # as a terminal does
        else:
            server.kill()
        assert server.wait(60) != 0
        _, alive = psutil.wait_procs(started, timeout=60)
        assert not alive
        assert not segments(server.pid)
    finally:
        server.kill()


def test_an_app_that_is_in_no_module_is_refused():
    with pytest.raises(ColearnError, match="found a ClientApp that is in no module"):
        InProcessGrid(participants(), K, processes=2)


def test_an_app_that_cannot_be_imported_is_an_error_with_its_traceback():
    with (
        InProcessGrid("tests.nowhere:app", K, processes=2) as grid,
        pytest.raises(ColearnError, match="No module named 'tests"),
    ):
        strategy_of().start(grid, record_of(MODEL), num_rounds=1)


def test_threads_need_one_process():
    with pytest.raises(ColearnError, match="ThreadedGrid: expected one process"):
        ThreadedGrid(participants, K, processes=2)


def test_an_unknown_device_is_refused():
    with pytest.raises(ColearnError, match="devices: expected"):
        InProcessGrid(participants, K, devices=["tpu:0"])
    assert Path("/dev/shm").is_dir()
