import os

import numpy as np
import pytest

from clients import prepared as module
from clients.prepared import prepared


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "data" / "source.txt"
    path.parent.mkdir()
    path.write_text("one")
    return path


@pytest.fixture
def make():
    """A function that counts how often it was called, and returns that number."""

    def call():
        call.count += 1
        return {"x": np.array([call.count, 2])}

    call.count = 0
    return call


def test_arrays_are_made_once(source, make):
    first = prepared("p", [source], {"a": 1}, make)
    again = prepared("p", [source], {"a": 1}, make)
    assert first["x"].tolist() == again["x"].tolist() == [1, 2]
    assert make.count == 1
    assert [path.suffix for path in source.parent.iterdir() if path != source] == [".npz"]


def test_another_size_time_or_parameter_makes_them_anew(source, make):
    prepared("p", [source], {"a": 1}, make)
    assert prepared("p", [source], {"a": 2}, make)["x"][0] == 2
    stat = source.stat()
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert prepared("p", [source], {"a": 1}, make)["x"][0] == 3
    source.write_text("three")
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the size alone differs
    assert prepared("p", [source], {"a": 1}, make)["x"][0] == 4


def test_a_broken_file_is_said_and_made_anew(source, make, flower_log):
    prepared("p", [source], {}, make)
    (file,) = source.parent.glob("*.npz")
    file.write_bytes(file.read_bytes()[:50])
    assert prepared("p", [source], {}, make)["x"][0] == 2
    assert f"{file}: cannot be read" in flower_log.text
    assert prepared("p", [source], {}, make)["x"][0] == 2


def test_where_the_data_cannot_be_written_beside_the_users_cache_is_used(
    source, make, tmp_path, monkeypatch
):
    # As on a read-only disk; file modes would not stop root.
    write = module._written
    monkeypatch.setattr(
        module, "_written", lambda a, path: path.parent != source.parent and write(a, path)
    )
    prepared("p", [source], {}, make)
    assert prepared("p", [source], {}, make)["x"][0] == 1
    assert len(list((tmp_path / "cache" / "flwr-colearn").glob("p-*.npz"))) == 1
    assert [path.name for path in source.parent.iterdir()] == ["source.txt"]


def test_an_interrupted_write_leaves_no_file(source, make, monkeypatch, flower_log):
    def fail(file, **arrays):
        file.write(b"part")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    assert prepared("p", [source], {}, make)["x"][0] == 1
    assert [path.name for path in source.parent.iterdir()] == ["source.txt"]
    assert "no folder to keep the prepared data in" in flower_log.text
