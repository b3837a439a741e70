import os

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from flwr_colearn import ColearnError, InProcessGrid
from flwr_colearn.grids.devices import cores, environment_of
from tests.flwr_colearn.grids.workers_app import reporting

VISIBLE = "CUDA_VISIBLE_DEVICES"
THREADS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch):
    for name in (VISIBLE, *THREADS):
        monkeypatch.delenv(name, raising=False)


def seen_by_workers(k, **kwargs):
    """Return for each participant its worker's process, and the variables that the worker sees."""
    content = RecordDict({"config": ConfigRecord({"names": [VISIBLE, *THREADS]})})
    with InProcessGrid(reporting, k, **kwargs) as grid:
        messages = [Message(content, node, "train") for node in grid.get_node_ids()]
        replies = [reply.content["config"] for reply in grid.send_and_receive(messages)]
    return [(reply["pid"], [str(reply[n]) for n in (VISIBLE, *THREADS)]) for reply in replies]


def test_workers_take_turns_in_the_devices_and_share_them(monkeypatch):
    monkeypatch.setenv(VISIBLE, "4,6")
    before = dict(os.environ)
    seen = seen_by_workers(4, processes=3, devices=["cuda:1", "cuda:0"])
    assert dict(os.environ) == before
    threads = str(max(1, cores() // 3))
    # The fourth participant belongs to one of the three workers.
    assert [values for _, values in seen[:3]] == [[gpu, threads, threads] for gpu in "646"]
    assert len({pid for pid, _ in seen}) == 3
    assert seen[3] in seen[:3]
    assert os.getpid() not in {pid for pid, _ in seen}


def test_one_device_is_one_worker_process_and_threads_that_are_set_stay(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    seen = seen_by_workers(2, devices=["cpu"])
    assert [values for _, values in seen] == [["", "7", str(cores())]] * 2
    assert len({pid for pid, _ in seen} - {os.getpid()}) == 1


@pytest.mark.parametrize(
    ("outer", "device", "expected"),
    [
        (None, "cuda", "0"),
        (None, "cuda:3", "3"),
        (None, "GPU:1", "1"),
        (None, "cpu", ""),
        (None, "CPU:0", ""),
        ("2,5", "cuda:0", "2"),
        (" 2 , 5,", "gpu:1", "5"),
        ("GPU-8932f937,MIG-3eb87630/1/0", "cuda:1", "MIG-3eb87630/1/0"),
        ("2,5", "cpu", ""),
    ],
)
def test_a_device_is_one_of_those_that_this_process_sees(outer, device, expected, monkeypatch):
    if outer is not None:
        monkeypatch.setenv(VISIBLE, outer)
    assert environment_of(device, processes=1)[VISIBLE] == expected


def test_without_devices_a_worker_sees_those_of_this_process():
    assert VISIBLE not in environment_of(None, processes=2)


@pytest.mark.parametrize("processes", [1, 2, 1000])
def test_the_cores_are_divided_among_the_workers(processes):
    threads = str(max(1, cores() // processes))
    assert environment_of(None, processes) == dict.fromkeys(THREADS, threads)


@pytest.mark.parametrize(
    ("outer", "device"),
    [
        (None, "tpu:0"),
        (None, "cuda:"),
        (None, "cuda:-1"),
        (None, "cuda:x"),
        (None, "cuda:0 "),
        (None, "cpu:first"),
        (None, ""),
        ("", "cuda:0"),
        ("2,5", "cuda:2"),
        # CUDA ignores all that follows a device that does not exist.
        ("-1", "cuda:0"),
        ("2,-1,5", "cuda:1"),
        ("NoDevFiles", "cuda:0"),
    ],
)
def test_a_device_that_does_not_exist_is_refused(outer, device, monkeypatch):
    if outer is not None:
        monkeypatch.setenv(VISIBLE, outer)
    with pytest.raises(ColearnError, match=r"devices: expected 'cpu' or a visible GPU") as caught:
        InProcessGrid(reporting, 2, processes=2, devices=["cpu", device])
    assert repr(device) in str(caught.value)


@pytest.mark.parametrize("devices", [[], "cuda:0", 1, [0], ["cpu", None]])
def test_devices_are_a_list(devices):
    with pytest.raises(ColearnError, match=r"devices: expected a list of devices such as"):
        InProcessGrid(reporting, 2, devices=devices)


def test_every_device_needs_a_worker():
    with pytest.raises(ColearnError, match="devices: expected at most one for each of 1 processes"):
        InProcessGrid(reporting, 2, processes=1, devices=["cpu", "cpu"])
