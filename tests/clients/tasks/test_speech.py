import csv
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from clients.objective import CLASSES
from clients.settings import ParticipantSettings
from clients.tasks import registry, speech
from clients.tasks.spectrogram import log_mel
from clients.torch.tasks import tensors_of
from flwr_colearn import ColearnError

REAL = Path(os.environ.get("COLEARN_DATA", "/nowhere"), "SpeechCommands")
needs_data = pytest.mark.skipif(
    not REAL.is_dir(), reason="set COLEARN_DATA to the folder that holds SpeechCommands"
)
SPEAKERS = [f"{index:08x}" for index in range(40)]
WORDS = ["no", "yes"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    speech.load.cache_clear()


def sound(seed, samples=16000):
    return np.random.default_rng(seed).integers(-3000, 3000, samples).astype(np.int16)


def write(path, samples, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, samples)


@pytest.fixture
def data(tmp_path):
    """Two words by forty speakers, and background noise."""
    folder = tmp_path / "SpeechCommands"
    for label, word in enumerate(WORDS):
        for index, speaker in enumerate(SPEAKERS):
            write(folder / word / f"{speaker}_nohash_{index % 3}.wav", sound(2 * index + label))
    write(folder / "_background_noise_" / "hum.wav", sound(99, 48000))
    (folder / "README.md").write_text("text")
    return tmp_path


def load(data, split="speaker"):
    speech.load.cache_clear()
    return speech.load(str(data), split)


def as_input(samples):
    return (log_mel(samples) - speech.MEAN) / speech.STD


def place_of(examples, samples):
    """Return where in the examples a clip is."""
    close = np.abs(examples.inputs - as_input(samples)).max(axis=(1, 2, 3)) < 1e-4
    return np.flatnonzero(close).tolist()


# The parts


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("00f0204f_nohash_1.wav", "training"),
        ("01b4757a_nohash_0.wav", "training"),
        ("0e17f595_nohash_1.wav", "validation"),
        ("171b56dc_nohash_0.wav", "validation"),
        ("1528225c_nohash_1.wav", "testing"),
        ("1cb788bc_nohash_0.wav", "testing"),
    ],
)
def test_the_official_part_is_that_of_the_published_lists(name, part):
    assert speech.which_set(name) == part


@pytest.mark.parametrize("part_of", speech.SPLITS.values())
def test_a_speakers_clips_stay_together_and_parts_have_their_sizes(part_of):
    speakers = [hashlib.md5(str(i).encode()).hexdigest()[:8] for i in range(4000)]
    parts = [part_of(f"{speaker}_nohash_0.wav") for speaker in speakers]
    assert parts == [part_of(f"{speaker}_nohash_12.wav") for speaker in speakers]
    shares = {part: parts.count(part) / 4000 for part in set(parts)}
    assert shares == pytest.approx({"training": 0.8, "validation": 0.1, "testing": 0.1}, abs=0.02)


@pytest.mark.parametrize("split", speech.SPLITS)
def test_clips_go_where_their_part_is_with_their_words_label(data, split):
    task = load(data, split)
    part_of = speech.SPLITS[split]
    sizes = task.objective.metrics.keywords
    assert sizes["validation"] + sizes["test"] == len(task.test_set)
    assert len(task.train_set) + len(task.test_set) == 80
    for index, speaker in enumerate(SPEAKERS):
        part = part_of(f"{speaker}_nohash_0.wav")
        for label in (0, 1):
            samples = sound(2 * index + label)
            examples = task.train_set if part == "training" else task.test_set
            [place] = place_of(examples, samples)
            assert examples.labels[place] == label
            if part != "training":
                assert (place < sizes["validation"]) == (part == "validation")


def test_the_task_as_the_trainers_see_it(data):
    task = load(data)
    assert task.train_set.inputs.shape[1:] == (98, 40, 1)
    assert (task.train_set.inputs.dtype, task.train_set.labels.dtype) == (np.float32, np.int64)
    assert task.model_options == {"num_classes": 2}
    assert (task.objective.headline, task.objective.multi_label) == ("accuracy", False)
    labels = task.train_set.labels
    assert 0 < np.abs(np.diff(labels)).sum() > 5  # mixed, not word by word
    np.testing.assert_array_equal(labels, load(data).train_set.labels)
    images = tensors_of(task.train_set).tensors[0].numpy()
    np.testing.assert_array_equal(images[:, 0], task.train_set.inputs[..., 0])
    pickle.dumps(task.objective)  # to the processes of several devices


def test_the_speakers_are_those_of_the_training_clips_in_their_order(data):
    task, names = load(data), speech.training_speakers(str(data), "speaker")
    assert len(names) == len(task.train_set)
    assert {speech.speaker_set(name) for name in names} == {"training"}
    by_input = {}
    for label, word in enumerate(WORDS):
        for index, name in enumerate(SPEAKERS):
            by_input[as_input(sound(2 * index + label)).tobytes()] = (name, label, word)
    for name, inputs, label in zip(
        names, task.train_set.inputs, task.train_set.labels, strict=True
    ):
        assert by_input[inputs[..., 0].astype(np.float32).tobytes()][:2] == (name, label)


def test_the_data_folder_may_be_the_data_sets_own(data):
    inner = load(data / "SpeechCommands")
    np.testing.assert_array_equal(inner.train_set.inputs, load(data).train_set.inputs)


def test_the_server_judges_both_parts_and_a_participant_its_shard(data):
    task = load(data)
    sizes = task.objective.metrics.keywords
    where = {"data_dir": str(data), "split": "speaker", "devices": "cpu"}
    settings = ParticipantSettings(task="speech", model="cnn-small", **where)
    evaluator = registry.server_trainer(settings)
    outputs, targets = evaluator.predict()
    right = outputs.argmax(1) == targets
    metrics = evaluator.evaluate()
    assert metrics["validation-accuracy"] == pytest.approx(right[: sizes["validation"]].mean())
    assert metrics["accuracy"] == pytest.approx(right[sizes["validation"] :].mean())
    participant = registry.participant_trainer(settings, 0, 5)
    outputs, targets = participant.predict()
    metrics = participant.evaluate()
    assert len(targets) == -(-len(task.train_set) // 5)
    assert metrics["accuracy"] == pytest.approx((outputs.argmax(1) == targets).mean())
    assert "validation-accuracy" not in metrics
    assert participant.objective is CLASSES


# Files


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (sound(0, 20000), sound(0, 20000)[:16000]),
        (sound(0, 9000), np.pad(sound(0, 9000), (0, 7000))),
        (sound(0), sound(0)),
    ],
    ids=["long", "short", "one second"],
)
def test_a_clip_is_cut_or_padded_to_a_second(tmp_path, samples, expected):
    write(tmp_path / "a.wav", samples)
    np.testing.assert_array_equal(speech.read_clip(tmp_path / "a.wav"), expected)


def test_bad_files_are_named_counted_and_left_out_every_time(data, flower_log):
    good, folder = load(data), data / "SpeechCommands" / "yes"
    name = f"{SPEAKERS[0]}_nohash"
    write(folder / f"{name}_10.wav", sound(0), rate=8000)
    write(folder / f"{name}_11.wav", np.stack([sound(0)] * 2, 1))
    write(folder / f"{name}_12.wav", sound(0).astype(np.int32))
    write(folder / f"{name}_13.wav", sound(0)[:0])
    (folder / f"{name}_14.wav").write_bytes(b"not a WAV file, but some text")
    (folder / f"{name}_15.wav").touch()
    whole = (folder / f"{name}_0.wav").read_bytes()
    (folder / f"{name}_16.wav").write_bytes(whole[:20000])
    (folder / f"{name}_17.wav").write_bytes(whole.replace(b"data", b"atad"))
    (folder / f"{name}_18.wav").symlink_to(folder / "nowhere")
    assert not flower_log.text
    for _ in range(2):  # the second time from what was kept
        flower_log.clear()
        task = load(data)
        np.testing.assert_array_equal(task.train_set.inputs, good.train_set.inputs)
        assert len(task.test_set) == len(good.test_set)
        assert "9 of 89 clips are left out" in flower_log.text
        for index in range(10, 19):
            assert flower_log.text.count(f"{name}_{index}.wav") == 1
    for reason in (
        "found 8000 Hz",
        r"[16000, 2]",
        "int32",
        "samples [0]",
        "expected a WAV file that scipy reads",
    ):
        assert reason in flower_log.text


# What was prepared


def test_spectrograms_are_kept_and_made_anew_when_a_file_changes(data, monkeypatch):
    first, folder = load(data), data / "SpeechCommands"
    assert (folder / "log-mel.npz").is_file()
    read = []
    original = speech.read_clip
    monkeypatch.setattr(speech, "read_clip", lambda path: read.append(path) or original(path))
    again = load(data)
    assert not read
    np.testing.assert_array_equal(again.test_set.inputs, first.test_set.inputs)
    np.testing.assert_array_equal(again.train_set.labels, first.train_set.labels)
    load(data, "official")
    assert not read  # the split does not matter to them
    changed = folder / "no" / f"{SPEAKERS[0]}_nohash_0.wav"
    write(changed, sound(1000))
    os.utime(changed, ns=(0, 0))
    task = load(data)
    assert len(read) == 80
    assert place_of(task.train_set, sound(1000)) or place_of(task.test_set, sound(1000))
    write(folder / "no" / f"{SPEAKERS[1]}_nohash_9.wav", sound(1001))
    load(data)
    assert len(read) == 161
    monkeypatch.setattr(speech.spectrogram, "FLOOR", 1e-5)
    load(data)
    assert len(read) == 242


def test_where_the_folder_cannot_be_written_the_users_cache_is_used(data, tmp_path, monkeypatch):
    (data / "SpeechCommands" / "log-mel.npz").mkdir()  # in the way, even of root
    load(data)
    assert len(list((tmp_path / "user-cache" / "flwr-colearn").glob("log-mel-*.npz"))) == 1
    monkeypatch.setattr(speech, "read_clip", None)
    load(data)


# What cannot be loaded


def test_a_folder_without_clips_an_unknown_split_and_an_empty_part_are_refused(tmp_path):
    with pytest.raises(ColearnError, match=r"'data-dir': expected a folder that holds Speech"):
        load(tmp_path)
    with pytest.raises(ColearnError, match="'split': expected official or speaker, found 'clip'"):
        load(tmp_path, "clip")
    write(tmp_path / "yes" / "00f0204f_nohash_1.wav", sound(0))
    with pytest.raises(ColearnError, match="found 1 training, 0 validation, 0 testing; set run"):
        load(tmp_path, "official")


# The real data


@needs_data
def test_the_official_parts_of_the_real_clips():
    with (REAL / "index.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) > 1000
    assert [speech.which_set(row["file"]) for row in rows] == [r["official_split"] for r in rows]


@needs_data
def test_some_real_clips(tmp_path):
    for word in ("bed", "cat", "yes"):
        (tmp_path / word).mkdir()
        for path in sorted((REAL / word).glob("*.wav")):
            (tmp_path / word / path.name).symlink_to(path)
    task = load(tmp_path)
    assert task.model_options == {"num_classes": 3}
    for labels in (task.train_set.labels, task.test_set.labels):
        assert set(labels) == {0, 1, 2}
    inputs = task.train_set.inputs
    assert np.isfinite(inputs).all()
    # MEAN and STD are those of all clips.
    assert abs(inputs.mean()) < 0.1
    assert inputs.std() == pytest.approx(1, abs=0.1)


@needs_data
def test_split_by_speaker_every_real_word_has_all_parts_and_no_speaker_has_two():
    parts = {}
    for path in REAL.glob("*/*.wav"):
        part = speech.speaker_set(path.name)
        parts.setdefault(path.parent.name, set()).add(part)
        assert parts.setdefault(speech.speaker(path.name), {part}) == {part}
    assert all(len(parts[word.name]) == 3 for word in REAL.iterdir() if word.is_dir())
