import sys
from pathlib import Path

import numpy as np
import pytest

from clients.metrics import audio_tagging
from clients.tasks import audioset
from clients.torch.tasks import tensors_of
from flwr_colearn import ColearnError

CLASSES = 5


@pytest.fixture(autouse=True)
def _afresh():
    audioset.load.cache_clear()


def clips(n, seed):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, 240, 64)).astype(np.float32)
    y = generator.random((n, CLASSES)) < 0.4
    y[:, 0] = np.arange(n) % 2
    return {"x": x, "y": y}


def write(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        return
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


def folder_with(folder, train, evaluation, suffix="npz"):
    folder.mkdir(exist_ok=True)
    write(folder / f"train.{suffix}", train)
    write(folder / f"eval.{suffix}", evaluation)
    return str(folder)


def same(first, second):
    np.testing.assert_array_equal(first.inputs, second.inputs)
    np.testing.assert_array_equal(first.labels, second.labels)


@pytest.mark.parametrize("suffix", ["h5", "npz"])
def test_the_task_is_the_files_training_clips_in_random_order(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(audioset, "ROWS", 7)
    train, evaluation = clips(20, 0), clips(9, 1)
    task = audioset.load(folder_with(tmp_path, train, evaluation, suffix))
    order = [int(np.flatnonzero((train["x"] == x).all((1, 2)))[0]) for x in task.train_set.inputs]
    assert sorted(order) == list(range(20)) != order
    np.testing.assert_array_equal(task.train_set.labels, train["y"][order])
    np.testing.assert_array_equal(task.test_set.inputs, evaluation["x"])
    np.testing.assert_array_equal(task.test_set.labels, evaluation["y"])
    assert task.train_set.inputs.dtype == task.train_set.labels.dtype == np.float32
    assert task.model_options == {"num_classes": CLASSES}
    assert (task.objective.headline, task.objective.multi_label) == ("map", True)
    assert task.objective.metrics is audio_tagging
    np.testing.assert_array_equal(tensors_of(task.test_set).tensors[0], evaluation["x"])


def test_hdf5_and_npz_of_any_allowed_type_are_read_alike(tmp_path):
    train, evaluation = clips(20, 0), clips(9, 1)
    train["x"] = train["x"].astype(np.float16)
    ids = np.array([b"id"] * 20)
    first = audioset.load(folder_with(tmp_path / "a", train, evaluation))
    others = {"y": train["y"].astype(np.uint8), "video_id_list": ids}
    second = audioset.load(folder_with(tmp_path / "b", train | others, evaluation, "h5"))
    same(first.train_set, second.train_set)
    same(first.test_set, second.test_set)
    assert second.train_set.inputs.dtype == np.float32


@pytest.mark.parametrize("suffix", ["h5", "npz"])
def test_rows_that_are_not_finite_are_named_counted_and_left_out(tmp_path, flower_log, suffix):
    train, evaluation = clips(20, 0), clips(9, 1)
    evaluation["x"][3, 0, 0] = np.nan
    evaluation["x"][7, 239, 63] = np.inf
    task = audioset.load(folder_with(tmp_path, train, evaluation, suffix))
    rest = np.delete(np.arange(9), [3, 7])
    np.testing.assert_array_equal(task.test_set.inputs, evaluation["x"][rest])
    np.testing.assert_array_equal(task.test_set.labels, evaluation["y"][rest])
    assert len(task.train_set) == 20
    assert f"eval.{suffix}: 2 of 9 rows are left out, their x is not finite: 3, 7" in (
        flower_log.text
    )
    assert f"train.{suffix}" not in flower_log.text


def without(arrays, name):
    return {key: array for key, array in arrays.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: without(a, "x"), r"train.npz: expected arrays x and y, found no x among y"),
        (lambda a: without(a, "y"), r"expected arrays x and y, found no y among x"),
        (lambda a: {}, "found no x and y among none"),
        (lambda a: a | {"x": a["x"][:, :10]}, r"expected x \[N, 240, 64\].*found \[20, 10, 64\]"),
        (lambda a: a | {"x": np.zeros((20, 10, 128), np.uint8)}, r"\[20, 10, 128\] of uint8"),
        (lambda a: a | {"x": a["x"].astype(np.float64)}, "float16 or float32, found .* of float64"),
        (lambda a: {"x": a["x"][:0], "y": a["y"][:0]}, r"found \[0, 240, 64\]"),
        (lambda a: a | {"x": np.full_like(a["x"], np.nan)}, "rows of finite x, found none"),
        (lambda a: a | {"y": a["y"][:19]}, r"expected y \[20, classes\].*found \[19, 5\] of bool"),
        (lambda a: a | {"y": a["y"][:, 0]}, r"expected y \[20, classes\].*found \[20\] of bool"),
        (lambda a: a | {"y": a["y"] * 3}, r"of 0 and 1, found .* values \[0, 3\]"),
        (lambda a: a | {"y": a["y"][:, :4]}, "found 4 in train and 5 in eval"),
    ],
)
def test_arrays_that_are_not_as_described_are_refused(tmp_path, change, message):
    folder = folder_with(tmp_path, change(clips(20, 0)), clips(9, 1))
    with pytest.raises(ColearnError, match=message):
        audioset.load(folder)


def test_missing_and_unreadable_files_and_an_untagged_evaluation_set_are_refused(tmp_path):
    with pytest.raises(ColearnError, match=r"'data-dir': expected a folder that holds train\.h5"):
        audioset.load(str(tmp_path))
    folder = folder_with(tmp_path, clips(20, 0), clips(9, 1) | {"y": np.zeros((9, CLASSES), bool)})
    with pytest.raises(ColearnError, match="expected tags in y of the eval file"):
        audioset.load(folder)
    path = Path(folder, "eval.npz")
    for content in (b"", b"text", path.read_bytes()[:-100]):
        path.write_bytes(content)
        with pytest.raises(ColearnError, match=r"eval\.npz: expected a readable file, found"):
            audioset.load(folder)
    pytest.importorskip("h5py")
    path.with_suffix(".h5").write_bytes(b"text")
    with pytest.raises(ColearnError, match=r"eval\.h5: expected a readable file, found"):
        audioset.load(folder)


def test_without_h5py_its_extra_is_named(tmp_path, monkeypatch):
    folder = folder_with(tmp_path, clips(20, 0), clips(9, 1), "h5")
    monkeypatch.setitem(sys.modules, "h5py", None)  # as if it were not installed
    with pytest.raises(
        ColearnError, match=r"no module 'h5py'; pip install 'flwr-colearn\[study\]'"
    ):
        audioset.load(folder)
