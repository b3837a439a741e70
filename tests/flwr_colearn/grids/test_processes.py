import multiprocessing
import os
from functools import partial
from pathlib import Path

import pytest

from flwr_colearn import ColearnError, Compression, InProcessGrid, Int8, Recovery, ThreadedGrid
from tests.faults import MODEL, K, outcome, participants, record_of, strategy_of
from tests.flwr_colearn.grids.workers_app import counting, dies_always, dies_once


def segments():
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}


@pytest.fixture(autouse=True)
def _nothing_is_left():
    before = segments()
    yield
    assert segments() <= before
    assert not multiprocessing.active_children()


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
