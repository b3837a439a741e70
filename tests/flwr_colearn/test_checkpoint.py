import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flwr_colearn import CheckpointFolder, ColearnError, Role
from flwr_colearn import checkpoint as module
from flwr_colearn.checkpoint import (
    Checkpoint,
    UnreadableError,
    check_same_configuration,
    describe_arrays,
    describe_roles,
    read,
)
from tests.faults import EXPLOSIONS, Bomb, fsync_of_cifs, serialised

STATE = {"rule": {"T": 4, "rate": 0.1, "none": None, "list": [1, "zwei", 3.5]}, "text": "π/2\n"}


def bits(arrays):
    return [(name, a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()]


def model(round_):
    return {"layer/w:0": np.full((2, 3), round_, np.float32), "b.ias": np.array(round_ / 3)}


def save(folder, *rounds):
    return [folder.save(Checkpoint(round_, model(round_), {"r": round_})) for round_ in rounds]


def check_is(checkpoint, round_):
    assert checkpoint.round == round_
    assert bits(checkpoint.arrays) == bits(model(round_))
    assert checkpoint.state == {"r": round_}


def names(folder):
    return sorted(path.name for path in folder.path.iterdir())


def warnings_of(log):
    return [record.getMessage() for record in log.records if record.levelno == logging.WARNING]


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "deep" / "run")


# Round trip -------------------------------------------------------------------------------------

DTYPES = [np.float16, np.float32, np.float64, ">f4", np.int8, np.int64, np.uint8, np.uint64, bool]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4)])
def test_a_checkpoint_comes_back_bit_by_bit(dtype, shape, folder):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    arrays = {
        "a/b:0": array,
        "../../etc": array[...],
        "": array,
        "state": array,
        "array-0": np.asfortranarray(array),
        "κ\n.weight": array[..., None][..., ::-1],
    }
    folder.save(Checkpoint(7, arrays, STATE))
    found = folder.latest()
    assert (found.round, found.state) == (7, STATE)
    assert bits(found.arrays) == bits(arrays)


def test_numbers_that_are_not_finite_come_back_too(folder):
    arrays = {"w": np.array([np.nan, -0.0, np.inf, -np.inf, 5e-324])}
    folder.save(Checkpoint(1, arrays, {}))
    assert bits(folder.latest().arrays) == bits(arrays)


def test_a_model_without_arrays_comes_back(folder):
    folder.save(Checkpoint(0, {}, {}))
    assert folder.latest() == Checkpoint(0, {}, {})


ARRAYS = st.dictionaries(
    st.text(max_size=8),
    hnp.arrays(
        st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
    ),
    max_size=3,
)


@given(ARRAYS, st.integers(0, 10**7))
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
def test_any_model_comes_back(tmp_path_factory, arrays, round_):
    path = CheckpointFolder(tmp_path_factory.mktemp("any")).save(Checkpoint(round_, arrays, {}))
    found = read(path)
    assert (found.round, found.state) == (round_, {})
    assert bits(found.arrays) == bits(arrays)


# The folder -------------------------------------------------------------------------------------


def test_an_empty_or_missing_folder_has_no_checkpoint(folder):
    assert folder.latest() is None
    folder.path.mkdir(parents=True)
    assert folder.latest() is None


@pytest.mark.parametrize("keep", [1, 2, 3, 10])
def test_the_newest_are_kept(keep, tmp_path):
    folder = CheckpointFolder(tmp_path, keep)
    for round_ in range(12):
        save(folder, round_)
        check_is(folder.latest(), round_)
    kept = [f"round-{round_:06d}" for round_ in range(12 - keep, 12)]
    assert [name[:12] for name in names(folder)] == kept[-12:]


def test_rounds_beyond_six_digits_are_still_in_order(folder):
    save(folder, 999_999, 1_000_000)
    check_is(folder.latest(), 1_000_000)


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_an_impossible_number_to_keep_is_refused(keep, tmp_path):
    with pytest.raises(ColearnError, match="keep of CheckpointFolder: expected a whole number"):
        CheckpointFolder(tmp_path, keep)


def test_other_files_are_left_alone(folder):
    folder.path.mkdir(parents=True)
    strangers = ["notes.txt", "round-000009.npz", "round-9-0123456789abcdef.npz", "model.npz"]
    for name in strangers:
        (folder.path / name).write_text("mine")
    save(folder, *range(5))
    check_is(folder.latest(), 4)
    assert set(strangers) < set(names(folder))
    assert len(names(folder)) == len(strangers) + 3


def test_a_run_that_goes_back_replaces_the_rounds_that_it_went_back_over(folder):
    save(folder, 1, 2, 3)
    save(folder, 1)
    check_is(folder.latest(), 1)
    assert len(names(folder)) == 1


# Crashes ----------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def kill(*args, **kwargs):
    raise Killed


WHERE = {
    "os.fsync": "os.fsync",
    "np.savez": "numpy.savez",
    "hashlib.file_digest": "hashlib.file_digest",
    "Path.replace": "pathlib.Path.replace",
    "Path.unlink": "pathlib.Path.unlink",
    "Path.mkdir": "pathlib.Path.mkdir",
    "flush_folder": "flwr_colearn.checkpoint.flush_folder",
}


@pytest.mark.parametrize("point", ["os.fsync", "np.savez", "hashlib.file_digest", "Path.replace"])
def test_a_crash_while_saving_leaves_the_checkpoint_before(point, folder, monkeypatch):
    save(folder, 1, 2)
    before = names(folder)
    with monkeypatch.context() as patch:
        patch.setattr(WHERE[point], kill)
        with pytest.raises(Killed):
            save(folder, 3)
    assert [name for name in names(folder) if name.endswith(".npz")] == before
    check_is(folder.latest(), 2)
    save(folder, 3)
    check_is(folder.latest(), 3)
    assert not [name for name in names(folder) if name.endswith(".tmp")]


@pytest.mark.parametrize("point", ["flush_folder", "Path.unlink"])
def test_a_crash_after_the_renaming_has_the_new_checkpoint(point, folder, monkeypatch):
    save(folder, 1, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(WHERE[point], kill)
        with pytest.raises(Killed):
            save(folder, 4)
    check_is(folder.latest(), 4)


def test_half_a_file_left_aside_is_no_checkpoint(folder):
    [path] = save(folder, 1)
    (folder.path / ".round-000002.tmp").write_bytes(path.read_bytes()[:100])
    check_is(folder.latest(), 1)


@pytest.mark.parametrize("point", ["os.fsync", "np.savez", "Path.replace", "Path.mkdir"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(point, folder, monkeypatch, flower_log):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    save(folder, 1)
    with monkeypatch.context() as patch:
        patch.setattr(WHERE[point], full)
        assert save(folder, 2) == [None]
    [warning] = warnings_of(flower_log)
    assert "Checkpoint of round 2 not written: [Errno 28] No space left on device" in warning
    assert len(names(folder)) == 1  # the half-written one does not fill the disk any further
    check_is(folder.latest(), 1)
    save(folder, 3)
    check_is(folder.latest(), 3)


def test_a_folder_that_cannot_be_is_told(tmp_path, flower_log):
    (tmp_path / "file").write_text("")
    folder = CheckpointFolder(tmp_path / "file")
    assert save(folder, 1) == [None]
    assert "Checkpoint of round 1 not written" in flower_log.text


# Damage -----------------------------------------------------------------------------------------

DAMAGE = {
    "flipped": lambda data: data[:90] + bytes([data[90] ^ 1]) + data[91:],
    "cut": lambda data: data[:-1],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
}


def damage(path, how):
    path.write_bytes(DAMAGE[how](path.read_bytes()))


@pytest.mark.parametrize("how", DAMAGE)
def test_instead_of_a_damaged_checkpoint_the_one_before_is_used(how, folder, flower_log):
    _, _, newest = save(folder, 1, 2, 3)
    damage(newest, how)
    check_is(folder.latest(), 2)
    [warning] = warnings_of(flower_log)
    assert newest.name in warning
    assert "expected an undamaged file" in warning
    assert warning.endswith("the one before it is used")


@pytest.mark.parametrize("how", DAMAGE)
def test_two_may_be_damaged_of_three_but_not_all(how, folder):
    paths = save(folder, 1, 2, 3)
    damage(paths[2], how)
    damage(paths[1], how)
    check_is(folder.latest(), 1)
    damage(paths[0], how)
    with pytest.raises(ColearnError, match="expected an undamaged one, found only") as error:
        folder.latest()
    assert all(path.name in str(error.value) for path in paths)


def test_a_run_goes_on_after_a_damaged_checkpoint(folder):
    *_, newest = save(folder, 1, 2, 3)
    damage(newest, "cut")
    check_is(folder.latest(), 2)
    save(folder, 3)
    check_is(folder.latest(), 3)


def with_true_digest(folder, data, round_=5):
    folder.path.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(data).hexdigest()[:16]
    path = folder.path / f"round-{round_:06d}-{digest}.npz"
    path.write_bytes(data)
    return path


def archive(tmp_path, **members):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return (tmp_path / "a.zip").read_bytes()


def state_of(value):
    return serialised(np.frombuffer(json.dumps(value).encode(), np.uint8))


BOMB = serialised(np.array([Bomb()]), allow_pickle=True)


@pytest.mark.parametrize(
    "members",
    [
        {"state": BOMB},
        {"state": state_of({"names": ["w"]}), "array-0": BOMB},
        {"state": state_of({"names": ["w"]})},
        {"state": state_of({})},
        {"state": state_of([])},
        {"state": serialised(np.zeros(3, np.uint8))},
        {"array-0": serialised(np.zeros(3))},
        {},
    ],
    ids=["bomb", "bomb in an array", "no array", "no names", "no dict", "no JSON", "no state", "-"],
)
def test_what_is_no_checkpoint_is_refused_and_nothing_is_unpickled(members, folder, tmp_path):
    path = with_true_digest(folder, archive(tmp_path, **members))
    with pytest.raises(ColearnError, match="expected an undamaged file, found"):
        read(path)
    with pytest.raises(ColearnError, match="found only"):
        folder.latest()
    assert EXPLOSIONS == []


@pytest.mark.parametrize("data", [BOMB, serialised(np.zeros(3)), b"", b"PK\x03\x04", b"no zip"])
def test_another_file_of_the_right_name_is_refused(data, folder):
    with pytest.raises(ColearnError, match="expected an undamaged file, found"):
        read(with_true_digest(folder, data))
    assert EXPLOSIONS == []


def test_a_missing_file_and_one_of_another_name_are_refused(folder):
    with pytest.raises(UnreadableError, match=r"expected a file that can be read, found .*No such"):
        read(folder.path / "round-000001-0123456789abcdef.npz")
    with pytest.raises(ColearnError, match="expected a file named round-NNNNNN-DIGEST"):
        read(folder.path / "model.npz")


def spoiled(data, steps):
    for kind, where, junk in steps:
        at = int(where * len(data))
        if kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + junk + data[at:]
        else:
            data = data[:at] + bytes(b ^ junk[0] for b in data[at : at + 1]) + data[at + 1 :]
    return data


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "cut", "insert"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = CheckpointFolder(tmp_path_factory.mktemp("two"))
    _, path = save(folder, 1, 2)
    return folder, path, path.read_bytes()


FUZZ = {"suppress_health_check": list(HealthCheck), "phases": [Phase.explicit, Phase.generate]}


@pytest.mark.slow
@given(steps=STEPS)
@settings(max_examples=800, **FUZZ)
def test_damage_never_gives_a_wrong_array(two, steps):
    folder, path, data = two
    path.write_bytes(spoiled(data, steps))
    check_is(folder.latest(), 2 if path.read_bytes() == data else 1)


@pytest.mark.slow
@given(steps=STEPS)
@settings(max_examples=800, **FUZZ)
def test_nothing_in_a_file_makes_the_reader_raise_anything_but_a_colearn_error(two, steps):
    """Not even in one that was made to have the right digest."""
    _, path, data = two
    digest = module._digest
    module._digest = lambda path: path.name[13:29]
    try:
        path.write_bytes(spoiled(data, steps))
        found = read(path)
    except ColearnError:
        return
    finally:
        module._digest = digest
    assert all(array.dtype.hasobject is False for array in found.arrays.values())


def test_a_file_of_another_round_than_its_name_is_refused(folder):
    [path] = save(folder, 1)
    path.rename(path.with_name(path.name.replace("000001", "000009")))
    with pytest.raises(ColearnError, match="found the checkpoint of round 1; was the file renamed"):
        read(folder.path / path.name.replace("000001", "000009"))


# What is no damage -------------------------------------------------------------------------------


def test_what_could_not_be_read_once_is_neither_passed_over_nor_deleted(folder, monkeypatch):
    """A run from an older checkpoint would delete it."""
    save(folder, 1, 2, 3)
    before = names(folder)

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_digest", fail)
        with pytest.raises(UnreadableError, match="Input/output error"):
            folder.latest()
    assert names(folder) == before
    check_is(folder.latest(), 3)


def test_too_little_memory_is_no_damage(folder, monkeypatch):
    save(folder, 1, 2)

    def fail(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(np, "load", fail)
        with pytest.raises(UnreadableError, match="found MemoryError"):
            folder.latest()
    check_is(folder.latest(), 2)


def test_a_link_that_leads_nowhere_is_said(folder):
    [path] = save(folder, 1)
    link = path.with_name("round-000002-0123456789abcdef.npz")
    link.symlink_to(folder.path / "nowhere")
    with pytest.raises(UnreadableError, match="round-000002"):
        folder.latest()


def test_a_folder_that_cannot_be_listed_is_said(folder, monkeypatch):
    save(folder, 1)

    def fail(self):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.iterdir", fail)
    with pytest.raises(ColearnError, match=r"expected a folder that can be read, found .*denied"):
        folder.latest()
    assert save(folder, 2) != [None]  # though nothing old can be removed


def test_a_folder_that_cannot_be_flushed_is_written_pruned_and_warned_of_once(
    folder, monkeypatch, flower_log
):
    monkeypatch.setattr(os, "fsync", fsync_of_cifs)
    save(folder, *range(6))
    check_is(folder.latest(), 5)
    assert len(names(folder)) == 3
    assert len(warnings_of(flower_log)) == 1


class Disk:
    """A disk with room for so many checkpoints."""

    def __init__(self, folder, room, monkeypatch):
        self.folder, self.room = folder, room
        savez = np.savez

        def limited(file, **arrays):
            if len(list(folder.path.glob("round-*.npz"))) >= self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            savez(file, **arrays)

        monkeypatch.setattr(np, "savez", limited)


@pytest.mark.parametrize("room", [2, 3])
def test_room_for_fewer_files_is_used_for_the_newest(room, folder, monkeypatch, flower_log):
    disk = Disk(folder, 9, monkeypatch)
    save(folder, 1, 2, 3)
    disk.room = room
    assert None not in save(folder, 4, 5, 6)
    check_is(folder.latest(), 6)
    kept = [f"round-{round_:06d}" for round_ in range(7 - room, 7)]
    assert [name[:12] for name in names(folder)] == kept
    assert "is removed, to make room" in flower_log.text


def test_no_room_at_all_never_costs_the_last_checkpoint(folder, monkeypatch):
    disk = Disk(folder, 9, monkeypatch)
    save(folder, 1, 2, 3)
    disk.room = 0
    assert save(folder, 4) == [None]
    check_is(folder.latest(), 3)


def test_room_is_not_made_at_the_cost_of_the_checkpoint_that_was_resumed(folder, monkeypatch):
    """The newer one is damaged."""
    *_, newest = save(folder, 1, 2, 3)
    damage(newest, "cut")
    again = CheckpointFolder(folder.path)
    check_is(again.latest(), 2)
    Disk(folder, 0, monkeypatch)
    assert save(again, 3) == [None]
    check_is(CheckpointFolder(folder.path).latest(), 2)


def test_of_one_round_the_last_is_used_whatever_the_clock_and_the_names_say(folder, monkeypatch):
    """A crash between writing and pruning leaves both."""
    monkeypatch.setattr(CheckpointFolder, "_prune", lambda self, newest: None)
    for serial in range(8):  # the names are digests, in no order
        path = folder.save(Checkpoint(5, model(serial), {"r": serial}))
        os.utime(path, (10**9 - serial, 10**9 - serial))  # the clock goes backwards
        assert CheckpointFolder(folder.path).latest().state == {"r": serial}


def test_a_resumed_run_counts_on(folder, monkeypatch):
    monkeypatch.setattr(CheckpointFolder, "_prune", lambda self, newest: None)
    save(folder, 4, 5)
    again = CheckpointFolder(folder.path)
    again.latest()
    again.save(Checkpoint(5, model(7), {"r": 7}))
    assert CheckpointFolder(folder.path).latest().state == {"r": 7}


def test_only_the_owner_may_read_what_is_in_the_folder(folder):
    before = os.umask(0)
    try:
        folder.open()
        save(folder, 1)
        folder.note_nodes(2, [1, 2])
        folder.close()
    finally:
        os.umask(before)
    assert len(names(folder)) == 3
    assert {path.stat().st_mode & 0o777 for path in folder.path.iterdir()} == {0o600}


# One run at a time -------------------------------------------------------------------------------


def test_a_folder_is_for_one_run_at_a_time(folder):
    other = CheckpointFolder(folder.path)
    folder.open()
    for _ in range(2):
        with pytest.raises(ColearnError, match=f"is used by process {os.getpid()} on "):
            other.open()
    with pytest.raises(ColearnError, match="is used by process"):
        folder.open()
    folder.close()
    other.open()
    other.close()


def test_a_process_that_was_killed_has_left_no_lock(folder):
    """And one that it had forked does not keep the lock either."""
    script = (
        "import os, sys, time; from flwr_colearn import CheckpointFolder\n"
        f"CheckpointFolder({str(folder.path)!r}).open()\n"
        "if os.fork() == 0: print('open', flush=True)\n"
        "time.sleep(60)"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert server.stdout.readline() == b"open\n"
        with pytest.raises(ColearnError, match=f"is used by process {server.pid} on "):
            folder.open()
        server.kill()
        server.wait()
        folder.open()
        folder.close()
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # the forked process
        server.stdout.close()


def test_a_file_system_without_locks_is_a_warning(folder, monkeypatch, flower_log):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    folder.open()
    save(folder, 1)
    folder.close()
    [warning] = warnings_of(flower_log)
    assert "cannot be locked" in warning


def test_half_written_files_of_a_killed_run_are_removed_by_the_next(folder):
    folder.path.mkdir(parents=True)
    (folder.path / ".round-000002.abc.tmp").write_bytes(b"half")
    folder.open()
    folder.close()
    assert names(folder) == [".lock"]


def test_a_full_disk_at_the_start_is_a_warning(folder, monkeypatch, flower_log):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "TemporaryFile", full)
    folder.open()
    folder.close()
    assert "no room in" in flower_log.text


def test_a_folder_that_is_read_only_is_an_error_at_the_start(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(module, "TemporaryFile", refuse)
        with pytest.raises(ColearnError, match="expected a folder that can be written, found"):
            folder.open()
    folder.open()  # and the lock was given back
    folder.close()


# Configurations ---------------------------------------------------------------------------------


def test_the_same_configuration_passes():
    check_same_configuration({"a": "1", "b": "2"}, {"b": "2", "a": "1"})


@pytest.mark.parametrize(
    ("current", "match"),
    [
        ({"a": "1", "b": "3"}, "found another b: 2 there, 3 now"),
        ({"a": "1"}, "found another b: 2 there, None now"),
        ({"a": "1", "b": "2", "c": "4"}, "found another c: None there, 4 now"),
    ],
)
def test_another_configuration_is_refused_with_the_difference(current, match):
    with pytest.raises(ColearnError, match=match):
        check_same_configuration({"a": "1", "b": "2"}, current)


def test_every_difference_is_named():
    with pytest.raises(ColearnError, match="expected one of the same configuration") as error:
        check_same_configuration({"a": "1", "b": "2", "c": "3"}, {"a": "4", "b": "2", "c": "5"})
    assert "found another a: 1 there, 4 now; another c: 3 there, 5 now;" in str(error.value)
    assert "another b" not in str(error.value)


@pytest.mark.parametrize(
    ("saved", "current", "passes"),
    [
        ("9", "10", True),
        ("9", "None", True),
        ("10", "9", False),
        ("None", "9", False),
        ("9", "many", False),
        (None, "9", False),
        ("9", None, False),
    ],
)
def test_a_setting_that_may_grow_may_not_shrink(saved, current, passes):
    configurations = {"a": saved} if saved else {}, {"a": current} if current else {}
    if passes:
        check_same_configuration(*configurations, may_grow=["a"])
    else:
        with pytest.raises(ColearnError, match="found another a: "):
            check_same_configuration(*configurations, may_grow=["a"])
    with pytest.raises(ColearnError, match="found another a: "):
        check_same_configuration(*configurations, may_grow=["b"])


def test_a_description_of_roles_differs_for_another_role_of_an_array():
    one, other = Role.TRAINABLE, Role.BUFFER
    models = [{"w": one, "b": other}, {"w": other, "b": one}, {"w": one, "b": one}, {"w": one}]
    assert len({describe_roles(roles) for roles in models}) == len(models)


def test_a_description_differs_for_other_names_shapes_and_types():
    a = np.zeros((2, 3), np.float32)
    models = [
        {"w": a},
        {"v": a},
        {"w": a.T},
        {"w": a.astype(np.float64)},
        {"w": a.astype(">f4")},
        {"w": a, "b": a},
        {"b": a, "w": a},
        {},
    ]
    described = [describe_arrays(each) for each in models]
    assert len(set(described)) == len(models)
    assert describe_arrays({"w": a + 1}) == described[0]
    assert described[0].startswith("1 arrays of 6 elements")
