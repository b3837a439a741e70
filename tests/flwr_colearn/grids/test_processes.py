import errno
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from flwr_colearn import (
    ColearnError,
    Compression,
    InProcessGrid,
    Int8,
    Quorum,
    Recovery,
    ThreadedGrid,
)
from flwr_colearn.compression import BFloat16
from tests.faults import MODEL, K, outcome, participants, record_of, strategy_of
from tests.flwr_colearn.grids.workers_app import (
    counting,
    dies_always,
    dies_and_leaves_a_child,
    dies_at_start,
    dies_in_training,
    enlarging,
    fails_in_round_2,
    hanging,
    pausing,
    raising,
)

# Numbers that int8 cannot hold exactly: those of MODEL's weights are all the same.
UNEVEN = {**MODEL, "fc.weight": np.geomspace(0.1, 5.0, 6, dtype=np.float32).reshape(2, 3)}


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


def kept_by(context):
    """Return what a participant keeps; of configs the keys only, since the session is random."""
    return {
        key: {name: (array.shape, array.stype, array.data) for name, array in record.items()}
        if isinstance(record, ArrayRecord)
        else sorted(record)
        for key, record in context.state.items()
    }


def trained(app, processes, rounds=4, timeout=3600.0, **kwargs):
    strategy = strategy_of(**kwargs)
    with InProcessGrid(app, K, processes=processes) as grid:
        result = strategy.start(grid, record_of(UNEVEN), num_rounds=rounds, timeout=timeout)
        kept = {node: kept_by(context) for node, context in grid.contexts.items()}
        counts = [c.state["count"]["n"] for c in grid.contexts.values() if "count" in c.state]
    return outcome(strategy, result), kept, counts


@pytest.mark.parametrize("processes", [2, 3, 7])
@pytest.mark.parametrize("compression", [Compression(), Compression(up=Int8())], ids=["", "int8"])
def test_any_number_of_processes_gives_the_same_bits(processes, compression):
    one = trained(counting, 1, compression=compression)
    assert trained(counting, processes, compression=compression) == one


@pytest.mark.parametrize("trained_before", [False, True], ids=["before", "after"])
def test_a_worker_that_is_killed_costs_nothing(tmp_path, trained_before):
    """The model has the same bits, and so have the rounding errors that participants keep."""
    int8 = Compression(up=Int8())
    one = trained(participants, 1, compression=int8)
    app = partial(dies_in_training, tmp_path, trained_before)
    assert trained(app, 2, compression=int8) == one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    for kept in one[1].values():
        residual = ArrayRecord(
            {name: Array("float32", *each) for name, each in kept["colearn.residual.after"].items()}
        )
        # Without rounding errors nothing would be compared.
        assert np.abs(BFloat16().decode(residual)["fc.weight"]).max() > 1e-4


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fails", ["dies", "hangs"])
def test_a_round_completes_without_a_lost_participant_under_a_quorum(tmp_path, fails):
    """As in one process, in which it raises: the same bits, and the same participants."""
    quorum = Recovery(max_restarts=0, policy=Quorum(3))
    one, *_ = trained(partial(fails_in_round_2, tmp_path, "raises"), 1, recovery=quorum)
    two, *_ = trained(partial(fails_in_round_2, tmp_path, fails), 2, timeout=4.0, recovery=quorum)
    for _, records, _ in (one, two):
        absent = [[each.pop("participant") for each in r.pop("absences")] for r in records]
        assert absent == [[], ["partition-1"], [], []]
        assert [len(record["participants"]) for record in records] == [4, 3, 4, 4]
    assert two == one


@pytest.mark.timeout(120)
def test_a_participant_that_exceeds_its_time_limit_is_trained_again_and_counts_once(tmp_path):
    one = trained(participants, 1)
    app = partial(fails_in_round_2, tmp_path, "hangs", times=1)
    assert trained(app, 2, timeout=4.0, recovery=Recovery(pause=0.0, policy=Quorum(3))) == one
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.timeout(60)
def test_a_reply_in_time_counts_though_the_server_looks_for_it_late(tmp_path):
    with InProcessGrid(partial(pausing, tmp_path, 0.0), 3, processes=2) as grid:
        grid.send_and_receive(messages([1, 2, 3]))
        before = len(list(tmp_path.iterdir()))
        # The third message waits at a worker that has another one.
        ids = grid.push_messages(messages([1, 2, 3], **{"server-round": 1, "time-limit": 1.0}))
        while len(list(tmp_path.iterdir())) < before + 3:
            time.sleep(0.1)
        time.sleep(2.0)
        replies = []
        while len(replies) < 3:
            replies += grid.pull_messages(ids)
        assert not any(reply.has_error() for reply in replies)
        assert grid.pull_messages(ids) == []


@pytest.mark.timeout(60)
def test_replies_that_nobody_takes_neither_end_a_wait_nor_get_lost(tmp_path, monkeypatch):
    """They are there after a run that was interrupted, on whose grid another one starts."""
    with InProcessGrid(partial(pausing, tmp_path, 1.0), 2, processes=2) as grid:
        left = grid.push_messages(messages([1, 2]))
        pull, pulled = grid.pull_messages, []
        monkeypatch.setattr(grid, "pull_messages", lambda ids: pulled.append(ids) or pull(ids))
        for _ in range(2):
            replies = grid.send_and_receive(messages([1, 2]))
            assert len({reply.metadata.reply_to_message_id for reply in replies}) == 2
        assert len(pulled) < 20
        replies = grid.pull_messages(left)
        assert sorted(reply.metadata.reply_to_message_id for reply in replies) == sorted(left)


def test_a_run_after_one_that_failed_is_like_the_first_on_a_grid(tmp_path):
    one, *_ = trained(participants, 1)
    with InProcessGrid(partial(fails_in_round_2, tmp_path, "dies", 3), K, processes=2) as grid:
        with pytest.raises(ColearnError, match=r"was ended by SIGKILL.* 3 times"):
            strategy_of().start(grid, record_of(UNEVEN), num_rounds=4)
        strategy = strategy_of()
        result = strategy.start(grid, record_of(UNEVEN), num_rounds=4)
        assert outcome(strategy, result) == one


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


def test_a_grid_that_is_closed_has_no_replies_to_wait_for(tmp_path):
    grid = InProcessGrid(partial(hanging, tmp_path, [1]), 2, processes=2)
    ids = grid.push_messages(messages([1]))
    grid.close()
    with pytest.raises(ColearnError, match="expected an open grid, found it closed"):
        grid.pull_messages(ids)


def test_a_grid_that_is_deleted_leaves_nothing(tmp_path):
    grid = InProcessGrid(partial(hanging, tmp_path, [1]), 2, processes=2)
    grid.send_and_receive(messages([2]))
    grid.push_messages(messages([1]))
    assert segments(os.getpid())
    del grid
    gc.collect()
    assert not segments(os.getpid())


def test_a_grid_that_is_closed_while_participants_train_leaves_nothing(tmp_path):
    with InProcessGrid(partial(hanging, tmp_path, [1, 2]), 2, processes=2) as grid:
        grid.send_and_receive(messages([1, 2], **{"server-round": 1, "time-limit": 0.1}))
        grid.push_messages(messages([1, 2]))
        assert segments(os.getpid())


PROGRAM = """
import signal
import sys
from functools import partial
from flwr.app import Message, RecordDict
from flwr_colearn import InProcessGrid
from tests.flwr_colearn.grids.workers_app import hanging

def messages(*nodes):
    return [Message(RecordDict(), node, "train") for node in nodes]

if __name__ == "__main__":
    # As in a terminal: a program that is started in the background ignores the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    app = partial(hanging, sys.argv[1], [1, 2])
"""
IN_WITH = """
    with InProcessGrid(app, 2, processes=2) as grid:
        grid.send_and_receive(messages(1, 2))
"""
NEVER_CLOSED = """
    grid = InProcessGrid(app, 4, processes=2)
    grid.myself = grid  # no count of references reaches zero
    assert len(grid.send_and_receive(messages(3, 4))) == 2
"""


@pytest.fixture
def start(tmp_path):
    """A function that starts a program, which is killed at the end of the test."""
    marks, program, started = tmp_path / "marks", tmp_path / "program.py", []
    marks.mkdir()

    def start_it(body):
        program.write_text(PROGRAM + body)
        started.append(
            subprocess.Popen(
                [sys.executable, str(program), str(marks)],
                env={**os.environ, "PYTHONPATH": os.getcwd()},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )
        return started[0]

    yield start_it
    for server in started:
        server.kill()


def family_of(server, marks, training):
    """Return a program's processes as soon as so many participants train."""
    while len(list(marks.iterdir())) < training:
        assert server.poll() is None
        time.sleep(0.1)
    assert segments(server.pid)
    return psutil.Process(server.pid).children(recursive=True)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_program_that_is_interrupted_or_killed(start, tmp_path, end):
    server = start(IN_WITH)
    family = family_of(server, tmp_path / "marks", training=2)
    if end == signal.SIGINT:
        os.killpg(server.pid, end)  # as a terminal does
    else:
        server.kill()
    assert server.wait(60) != 0
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert not segments(server.pid)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("end", "code"),
    [("sys.stdin.readline()", 0), ("sys.stdin.readline(); raise ValueError", 1)],
    ids=["its last line", "an exception"],
)
@pytest.mark.parametrize("training", [0, 2])
def test_a_program_that_never_closes_its_grid_ends_by_itself_and_leaves_nothing(
    start, tmp_path, end, code, training
):
    begin = "    grid.push_messages(messages(1, 2))\n" if training else ""
    server = start(f"{NEVER_CLOSED}{begin}    print(flush=True)\n    {end}\n")
    server.stdout.readline()
    family = family_of(server, tmp_path / "marks", training)
    assert len(family) >= 2
    server.stdin.close()
    assert server.wait(60) == code
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert not segments(server.pid)


def test_an_app_that_is_in_no_module_is_refused():
    with pytest.raises(ColearnError, match="found a ClientApp that is in no module"):
        InProcessGrid(participants(), K, processes=2)


def test_an_app_that_cannot_be_imported_is_an_error_with_its_traceback():
    with (
        InProcessGrid("tests.nowhere:app", K, processes=2) as grid,
        pytest.raises(ColearnError, match="No module named 'tests"),
    ):
        strategy_of().start(grid, record_of(UNEVEN), num_rounds=1)


def test_threads_need_one_process():
    with pytest.raises(ColearnError, match="ThreadedGrid: expected one process"):
        ThreadedGrid(participants, K, processes=2)
