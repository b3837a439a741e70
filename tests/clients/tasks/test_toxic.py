import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clients.settings import ParticipantSettings
from clients.tasks import toxic
from clients.tasks.registry import load_task, participant_trainer, server_trainer, shards
from flwr_colearn import ColearnError

COLUMNS = ["id", "comment_text", *toxic.LABELS]
CLEAN = [0] * 6

needs_data = pytest.mark.skipif(
    not Path(os.environ.get("COLEARN_DATA", ""), "jigsaw", "train.csv").is_file(),
    reason="set COLEARN_DATA to the folder that holds jigsaw/train.csv",
)


def write(path, rows, columns=COLUMNS):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def comments(n=40, natural=None):
    """Comment i is the word i; it has label 0 if i is odd, and label 5 if it is a multiple of 3."""
    rows = [[f"{i:04x}", f"w{i}", i % 2, 0, 0, 0, 0, int(i % 3 == 0)] for i in range(n)]
    return rows if natural is None else [[*row, int(natural(i))] for i, row in enumerate(rows)]


@pytest.fixture
def folder(tmp_path):
    toxic.load.cache_clear()
    (tmp_path / "jigsaw").mkdir()
    return tmp_path / "jigsaw"


def warnings(flower_log):
    return [r.getMessage() for r in flower_log.records if r.levelname == "WARNING"]


def words_of(inputs):
    return {int(number) for number in inputs[:, 0]}


# Reading


def test_quotes_commas_and_newlines_stay_in_the_comment(tmp_path, flower_log):
    texts = ['say "hi", you\n\nthere\r\n', "", "plain, 'quoted'"]
    rows = [[str(i), text, 0, 1, 0, 0, 1, 0] for i, text in enumerate(texts)]
    read = toxic.read_comments(write(tmp_path / "train.csv", rows))
    assert read.texts == texts
    assert read.labels.dtype == np.float32
    assert read.labels.tolist() == [[0, 1, 0, 0, 1, 0]] * 3
    assert read.natural.all()
    assert not warnings(flower_log)


def test_columns_are_found_by_name(tmp_path):
    columns = ["natural", *reversed(COLUMNS), "more"]
    rows = [[0, 6, 5, 4, 3, 2, 1, "text", "a", "x"]]
    rows[0][1:7] = [1, 0, 0, 0, 0, 0]  # the last label comes first
    read = toxic.read_comments(write(tmp_path / "train.csv", rows, columns))
    assert (read.texts, read.labels.tolist()) == (["text"], [[0, 0, 0, 0, 0, 1]])
    assert read.natural.tolist() == [False]


def test_malformed_rows_are_named_counted_and_left_out(tmp_path, flower_log):
    rows = [
        ["a", "good\nnews", *CLEAN],
        ["b", "short", 0, 0],
        ["c", "label", *CLEAN[1:], 2],
        ["d", "empty label", *CLEAN[1:], ""],
        ["e", "test label", *CLEAN[1:], -1],
        ["f", "good", *CLEAN],
    ]
    assert toxic.read_comments(write(tmp_path / "train.csv", rows)).texts == ["good\nnews", "good"]
    (message,) = warnings(flower_log)
    assert "train.csv: left out 4 malformed rows: " in message
    assert "line 4, id ['b']: 4 columns in place of 8" in message
    assert "line 5, id ['c']: '0, 0, 0, 0, 0, 2' in place of 0s and 1s" in message
    assert "id ['d']" in message
    assert "id ['e']" in message


def test_a_file_without_the_columns_is_refused(folder):
    write(folder / "train.csv", [["a", "text", 0]], ["id", "comment_text", "toxic"])
    with pytest.raises(ColearnError, match=r"train.csv: expected columns .*found no severe_toxic"):
        toxic.load(str(folder))
    (folder / "train.csv").write_bytes(b"")
    with pytest.raises(ColearnError, match=r"found no id, comment_text, .* among none"):
        toxic.load(str(folder))
    (folder / "train.csv").write_bytes(",".join(COLUMNS).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ColearnError, match=r"train.csv: expected a csv file in UTF-8, found"):
        toxic.load(str(folder))


def test_an_absent_file_is_said_with_the_key_to_set(tmp_path):
    with pytest.raises(ColearnError, match=r"'data-dir': expected a folder that holds train.csv"):
        toxic.load(str(tmp_path))
    write(tmp_path / "train.csv", comments())
    with pytest.raises(ColearnError, match=r"'vectors': expected a fastText .vec file"):
        toxic.load(str(tmp_path), vectors="absent.vec")
    with pytest.raises(ColearnError, match="'vocabulary': expected at least 1, found 0"):
        toxic.load(str(tmp_path), vocabulary=0)


# Training and test set


@pytest.mark.parametrize("data_dir", ["jigsaw", "."])
def test_a_tenth_is_held_out_and_nothing_is_lost(folder, data_dir):
    write(folder / "train.csv", comments())
    task = toxic.load(str(folder.parent / data_dir))
    assert task.train_set.inputs.shape == (36, 150)
    assert task.test_set.inputs.shape == (4, 150)
    assert (task.train_set.inputs.dtype, task.train_set.labels.dtype) == (np.int64, np.float32)
    # The 36 training words are known, those of the test are not.
    assert words_of(task.train_set.inputs) == set(range(2, 38))
    assert words_of(task.test_set.inputs) == {1}
    assert task.model_options == {"vocabulary": 38, "vectors": None, "num_labels": 6}
    odd = np.concatenate([task.train_set.labels, task.test_set.labels]).sum(0)
    assert odd.tolist() == [20, 0, 0, 0, 0, 14]


def test_labels_stay_with_their_comments_in_a_random_order(folder):
    write(folder / "train.csv", comments())
    train = toxic.load(str(folder)).train_set
    # All words are equally frequent, so they are numbered in alphabetical order.
    order = np.random.default_rng(0).permutation(40)[4:]
    order = np.random.default_rng(1).permutation(order)
    numbers = {word: n for n, word in enumerate(sorted(f"w{i}" for i in order), 2)}
    assert train.inputs[:, 0].tolist() == [numbers[f"w{i}"] for i in order]
    assert train.labels[:, 0].tolist() == [i % 2 for i in order]
    assert train.labels[:, 5].tolist() == [i % 3 == 0 for i in order]


def test_only_natural_rows_are_held_out(folder):
    write(folder / "train.csv", comments(60, natural=lambda i: i % 2), [*COLUMNS, "natural"])
    task = toxic.load(str(folder))
    assert task.test_set.labels[:, 0].tolist() == [1] * 6  # the odd ones
    assert task.train_set.labels[:, 0].sum() == 24
    assert len(task.train_set) == 54


def test_the_first_training_rows_are_like_the_others(folder):
    write(folder / "train.csv", comments(2000, natural=lambda i: i % 2), [*COLUMNS, "natural"])
    train = toxic.load(str(folder)).train_set  # 1,000 rows of 0, 800 of 1 in their first label
    assert 0.36 < train.labels[:400, 0].mean() < 0.53


def test_the_official_test_files_are_the_test_set_without_unscored_rows(folder, flower_log):
    write(folder / "train.csv", comments())
    texts = [["a", "w1"], ["b", "w2"], ["c", "w3"], ["d", "w4"], ["e", "w5 w6"]]
    labels = [["e", *CLEAN[1:], 1], ["b", *[-1] * 6], ["a", 1, *CLEAN[1:]], ["d", *CLEAN[1:], 7]]
    write(folder / "test.csv", texts, COLUMNS[:2])
    write(folder / "test_labels.csv", labels, ["id", *toxic.LABELS])
    task = toxic.load(str(folder))
    assert len(task.train_set) == 40
    assert task.test_set.labels.tolist() == [[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert ((task.test_set.inputs != 0).sum(1)).tolist() == [1, 2]
    assert "2 rows to test on, 1 are not scored" in flower_log.text
    labels_message, texts_message = warnings(flower_log)
    assert "test_labels.csv: left out 1 malformed rows: line 5, id ['d']" in labels_message
    assert "test.csv: left out 2 malformed rows: line 4, id ['c']: no usable" in texts_message


def test_one_of_the_test_files_alone_is_not_used_and_that_is_said(folder, flower_log):
    write(folder / "train.csv", comments())
    write(folder / "test.csv", [["a", "w1"]], COLUMNS[:2])
    assert len(toxic.load(str(folder)).test_set) == 4
    assert "expected test.csv and test_labels.csv together" in flower_log.text


def test_too_few_rows_are_refused(folder):
    write(folder / "train.csv", comments(9))
    with pytest.raises(ColearnError, match=r"train.csv: expected rows to train and to test on"):
        toxic.load(str(folder))


# Vocabulary, vectors, cache


def test_a_vectors_file_is_the_vocabulary(folder):
    write(folder / "train.csv", comments())
    path = folder / "some.vec"
    path.write_text("3 2\nw7 1 2\nw8 3 4\nelsewhere 5 6\n")
    task = toxic.load(str(folder), str(path), vocabulary=3)
    assert task.model_options["vocabulary"] == 5
    assert task.model_options["vectors"].tolist() == [[0, 0], [3, 4], [1, 2], [3, 4], [5, 6]]
    together = np.concatenate([task.train_set.inputs, task.test_set.inputs])
    assert sorted(together[:, 0])[-3:] == [1, 2, 3]
    settings = ParticipantSettings(
        task="toxic", data_dir=str(folder), vectors=str(path), vocabulary=2
    )
    assert load_task(settings).model_options["vectors"].shape == (4, 2)


def test_the_vocabulary_has_no_more_words_than_asked_for(folder):
    write(folder / "train.csv", [*comments(), *comments(3)])
    task = toxic.load(str(folder), vocabulary=2)
    assert task.model_options["vocabulary"] == 4
    assert words_of(task.train_set.inputs) == {1, 2, 3}


def test_prepared_data_is_kept_until_the_file_changes(folder, monkeypatch):
    write(folder / "train.csv", comments())
    first = toxic.load(str(folder))
    toxic.load.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(toxic, "read_comments", lambda path: pytest.fail("read again"))
        again = toxic.load(str(folder))
    np.testing.assert_array_equal(again.train_set.inputs, first.train_set.inputs)
    np.testing.assert_array_equal(again.test_set.labels, first.test_set.labels)
    assert again.model_options == first.model_options
    toxic.load.cache_clear()
    write(folder / "train.csv", comments(50))
    assert len(toxic.load(str(folder)).train_set) == 45


# In the registry


@pytest.fixture
def settings(folder):
    write(folder / "train.csv", comments(60))
    return ParticipantSettings(task="toxic", data_dir=str(folder), model="bigru-small")


def test_equal_shards_cover_the_examples(settings):
    dealt = shards(settings, 5)
    assert [len(shard) for shard in dealt] == [11, 11, 11, 11, 10]
    assert sorted(np.concatenate(dealt)) == list(range(54))


@pytest.mark.parametrize("partition", ["dirichlet", "classes"])
def test_partitions_by_class_are_refused(settings, partition):
    with pytest.raises(ColearnError, match=f"'partition': expected 'iid' .* found '{partition}'"):
        shards(replace(settings, partition=partition), 5)


@pytest.mark.parametrize("model", ["bigru", "capsule", "bigru-small", ""])
def test_every_model_trains_and_is_judged_by_roc_auc(settings, model):
    named = replace(settings, model=model)
    result = participant_trainer(named, 0, 5).train_epoch(0.1, seed=0)
    assert result.num_examples == 11
    assert np.isfinite(result.loss)
    found = server_trainer(named).evaluate()
    assert found["num-examples"] == 6
    assert 0 <= found["roc-auc"] <= 1
    assert found["labels-evaluated"] == 2


@needs_data
@pytest.mark.slow
def test_the_real_comments(tmp_path):
    real = Path(os.environ["COLEARN_DATA"], "jigsaw", "train.csv")
    (tmp_path / "train.csv").symlink_to(real)  # so that prepared arrays stay out of its folder
    with real.open(newline="", encoding="utf-8") as file:
        count = sum(1 for _ in csv.reader(file)) - 1
    task = toxic.load(str(tmp_path))
    assert len(task.test_set) == count // 10
    assert len(task.train_set) + len(task.test_set) == count
    words = task.train_set.inputs[task.train_set.inputs != 0]
    assert (words != 1).mean() > 0.95
    # Published counts of the official 159,571 rows: 15,294 toxic, 1,595 severe, 8,449 obscene,
    # 478 threats, 7,877 insults, 1,405 of identity hate.
    rates = np.array([15294, 1595, 8449, 478, 7877, 1405]) / 159571
    deviation = np.sqrt(rates * (1 - rates) / len(task.test_set))
    assert np.all(np.abs(task.test_set.labels.mean(0) - rates) < 5 * deviation)
