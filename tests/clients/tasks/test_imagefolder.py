import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import top_k_accuracy_score

from clients.settings import ParticipantSettings
from clients.tasks import image_scan, imagefolder
from clients.tasks.registry import load_task
from flwr_colearn import ColearnError

CLASSES = ("cat", "dog", "owl")

needs_data = pytest.mark.skipif(
    not Path(os.environ.get("COLEARN_DATA", ""), "tiny-imagenet-20").is_dir(),
    reason="set COLEARN_DATA to the folder that holds tiny-imagenet-20",
)


def save(path, seed=0, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path):
    """Three classes of four training and two validation images, in three formats of name."""
    for part, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(CLASSES):
            for index in range(count):
                suffix = ("JPEG", "jpg", "png")[index % 3]
                save(tmp_path / part / name / f"{name}_{index}.{suffix}", seed=10 * number + index)
    return tmp_path


@pytest.fixture
def scanned(monkeypatch):
    """The paths that were read by scans, in their order."""
    paths = []
    read = image_scan._why_unreadable

    def record(path):
        paths.append(path)
        return read(path)

    monkeypatch.setattr(image_scan, "_why_unreadable", record)
    return paths


def load(root):
    return imagefolder.load.__wrapped__(str(root))


def names(examples):
    return {Path(path).name for path in examples.inputs}


def test_files_become_paths_and_the_numbers_of_their_sorted_class_folders(root):
    task = load(root)
    for examples, part, count in ((task.train_set, "train", 12), (task.test_set, "val", 6)):
        assert len(set(examples.inputs)) == count
        assert examples.labels.dtype == np.int64
        for path, label in zip(examples.inputs, examples.labels, strict=True):
            assert Path(path).is_file()
            assert Path(path).parent == root / part / CLASSES[label]
    assert task.model_options == {"num_classes": 3}
    assert task.objective.headline == "accuracy"
    assert load_task(ParticipantSettings(task="imagefolder", data_dir=str(root))).model_options


def test_training_examples_are_mixed_in_an_order_that_is_always_the_same(root):
    first, second = load(root), load(root)
    assert np.array_equal(first.train_set.inputs, second.train_set.inputs)
    assert sorted(first.train_set.inputs) != list(first.train_set.inputs)
    assert list(first.test_set.inputs) == sorted(first.test_set.inputs)


def test_files_that_are_no_images_are_named_counted_and_left_out(root, flower_log):
    whole = (root / "train/cat/cat_0.JPEG").read_bytes()
    save(root / "train/dog/large.JPEG", size=(300, 300))
    cut = (root / "train/dog/large.JPEG").read_bytes()
    (root / "train/dog/large.JPEG").write_bytes(cut[: len(cut) // 2])  # its head is intact
    (root / "train/owl/notes.txt").write_text("not an image")
    (root / "val/cat/empty.png").touch()
    (root / "val/cat/gone.png").symlink_to(root / "nowhere.png")
    (root / "val/cat/really_a_jpeg.png").write_bytes(whole)
    task = load(root)
    assert len(task.train_set) == 12
    assert names(task.test_set) >= {"really_a_jpeg.png"}
    assert len(task.test_set) == 7
    (record,) = [each for each in flower_log.records if each.levelno == logging.WARNING]
    message = record.getMessage()
    assert "4 of 23 files are not readable images and are left out" in message
    for name in ("train/dog/large.JPEG", "train/owl/notes.txt", "val/cat/empty.png"):
        assert f"{name} (" in message
    assert "truncated" in message
    flower_log.clear()
    load(root)  # from what was kept: said again
    assert "4 of 23 files" in flower_log.text


def test_many_bad_files_are_counted_and_the_first_ones_named(root, flower_log):
    for index in range(8):
        (root / f"val/cat/{index}.txt").touch()
    load(root)
    assert "val/cat/4.txt" in flower_log.text
    assert "val/cat/5.txt" not in flower_log.text
    assert "and 3 more" in flower_log.text


def test_the_scan_is_done_once_until_a_file_changes(root, scanned):
    load(root)
    assert len(scanned) == 18
    load(root)
    assert len(scanned) == 18
    # Another time of modification, another size, a new file, a file gone.
    os.utime(root / "val/cat/cat_0.JPEG", ns=(1, 1))
    load(root)
    assert len(scanned) == 36
    (root / "val/cat/cat_0.JPEG").write_text("no longer an image")
    assert "cat_0.JPEG" not in names(load(root).test_set)
    assert len(scanned) == 54
    save(root / "train/owl/new.png")
    assert "new.png" in names(load(root).train_set)
    assert len(scanned) == 73
    (root / "train/owl/new.png").unlink()
    assert "new.png" not in names(load(root).train_set)
    assert len(scanned) == 91


@pytest.mark.parametrize("content", ["", "{", "[]", '{"listing": 1}', '"text"'])
def test_a_damaged_result_of_a_scan_is_replaced(root, scanned, content):
    kept = root / image_scan.CACHE
    kept.write_text(content)
    assert len(load(root).train_set) == 12
    assert len(scanned) == 18
    assert json.loads(kept.read_text())["unreadable"] == {}


def test_what_is_kept_does_not_depend_on_how_the_folder_is_named(root, scanned, monkeypatch):
    (root / "val/cat/x.txt").touch()
    load(root)
    monkeypatch.chdir(root.parent)
    task = load(f"./{root.name}")
    assert len(scanned) == 19
    assert len(task.test_set) == 6


def test_a_folder_that_cannot_be_written_is_read_all_the_same(root, flower_log, monkeypatch):
    def refuse(self, text):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert len(load(root).train_set) == 12
    assert "colearn-scan.json: not written (read-only)" in flower_log.text


def test_classes_of_one_part_only_are_named(root):
    (root / "train/ant").mkdir()
    (root / "val/bee").mkdir()
    with pytest.raises(ColearnError, match=r"only in train: ant; only in val: bee"):
        load(root)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_part_is_refused(root, part):
    (root / part).rename(root / "elsewhere")
    with pytest.raises(ColearnError, match=rf"'data-dir': expected a folder that holds .*{part}"):
        load(root)


def test_a_part_without_images_is_refused(root):
    for path in (root / "val").glob("*/*"):
        path.write_text("x")
    with pytest.raises(ColearnError, match=r"val: expected images in its class folders, found"):
        load(root)


def test_top_5_is_scikit_learns():
    random = np.random.default_rng(0)
    outputs, targets = random.standard_normal((500, 12)), random.integers(0, 12, 500)
    metrics = imagefolder.top_metrics(outputs, targets)
    labels = range(12)
    for name, k in (("accuracy", 1), ("top-5", 5)):
        expected = top_k_accuracy_score(targets, outputs, k=k, labels=labels)
        assert metrics[name] == pytest.approx(expected)


def test_top_5_by_hand():
    outputs = np.array([[6, 5, 4, 3, 2, 1]] * 3, np.float32)
    metrics = imagefolder.top_metrics(outputs, np.array([0, 4, 5]))
    assert metrics == {"accuracy": pytest.approx(1 / 3), "top-5": pytest.approx(2 / 3)}
    few = imagefolder.top_metrics(outputs[:, :2], np.array([0, 1, 1]))
    assert few == {"accuracy": pytest.approx(1 / 3), "top-5": 1.0}


@needs_data
def test_real_images(tmp_path):
    (tmp_path / "tiny").mkdir()
    for part in ("train", "val"):
        folder = Path(os.environ["COLEARN_DATA"], "tiny-imagenet-20", part).absolute()
        (tmp_path / "tiny" / part).symlink_to(folder)
    task = load(tmp_path / "tiny")
    assert np.bincount(task.train_set.labels).tolist() == [500] * 20
    assert np.bincount(task.test_set.labels).tolist() == [50] * 20
    # The official file names begin with the class.
    folders = sorted(path.name for path in (tmp_path / "tiny/train").iterdir())
    for path, label in zip(task.train_set.inputs, task.train_set.labels, strict=True):
        assert Path(path).name.startswith(folders[label] + "_")
    assert np.ptp(np.bincount(task.train_set.labels[:2000], minlength=20)) < 60  # well mixed
