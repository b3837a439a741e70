import numpy as np
import pytest

from clients.tasks.array_cache import cache_places, cached_arrays


class Maker:
    """Makes other arrays every time, and counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"a": np.full(3, self.calls, np.float32), "names": np.array(["x", "yz"])}


def test_arrays_are_made_once_for_a_key_and_anew_for_another(tmp_path):
    make, places = Maker(), [tmp_path / "new" / "kept.npz"]
    first = cached_arrays(places, "one", make)
    again = cached_arrays(places, "one", make)
    assert make.calls == 1
    assert (again["a"].tolist(), again["a"].dtype) == ([1, 1, 1], np.float32)
    assert again["names"].tolist() == first["names"].tolist() == ["x", "yz"]
    assert again.keys() == {"a", "names"}
    assert cached_arrays(places, "two", make)["a"].tolist() == [2, 2, 2]
    assert cached_arrays(places, "two", make)["a"].tolist() == [2, 2, 2]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kept.npz"]


@pytest.mark.parametrize("size", [0, 100, -10])
def test_a_damaged_file_is_said_and_made_anew(tmp_path, flower_log, size):
    make, path = Maker(), tmp_path / "kept.npz"
    cached_arrays([path], "one", make)
    path.write_bytes(path.read_bytes()[:size])
    assert cached_arrays([path], "one", make)["a"].tolist() == [2, 2, 2]
    assert f"{path} cannot be read and is prepared again" in flower_log.text
    assert cached_arrays([path], "one", make)["a"].tolist() == [2, 2, 2]


def test_where_the_first_place_cannot_be_written_the_next_is(tmp_path):
    (tmp_path / "file").touch()
    make, places = Maker(), [tmp_path / "file" / "kept.npz", tmp_path / "kept.npz"]
    cached_arrays(places, "one", make)
    cached_arrays(places, "one", make)
    assert make.calls == 1
    assert places[1].is_file()


def test_where_no_place_can_be_written_it_is_said(tmp_path, flower_log):
    (tmp_path / "file").touch()
    arrays = cached_arrays([tmp_path / "file" / "kept.npz"], "one", Maker())
    assert arrays["a"].tolist() == [1, 1, 1]
    assert "Prepared data is not cached for the next run" in flower_log.text


def test_the_places_are_the_folder_and_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    beside, user = cache_places(tmp_path / "a", "log-mel")
    assert beside == tmp_path / "a" / "log-mel.npz"
    assert user.parent == tmp_path / "cache" / "flwr-colearn"
    assert user != cache_places(tmp_path / "b", "log-mel")[1]
