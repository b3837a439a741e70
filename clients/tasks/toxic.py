"""The task of Jigsaw's toxic comments: six labels for each of 159,571 comments on Wikipedia.

A comment is a sequence of 150 word numbers, cut or padded with 0 at the end; 1 is an unknown word.
All sites of a federation must give the same number to the same word. A vocabulary of pooled text
would reveal the sites' words. So sites with data of their own take it from a public file of word
vectors (run config ``vectors``) or of words (``vocabulary-file``), the same at every site, or else
number words by a hash. In a simulation, where one process has all of the text, the vocabulary is
made from the training text unless there is a file of word vectors.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from logging import INFO, WARNING
from pathlib import Path

import numpy as np
from flwr.common import log

from clients.data import Examples, Task
from clients.metrics import mean_roc_auc
from clients.objective import Objective
from clients.settings import ParticipantSettings
from clients.tasks.array_cache import cache_places, cached_arrays
from clients.tasks.vocabulary import agreed_vocabulary
from clients.tasks.word_vectors import read_vectors
from clients.tasks.words import FIRST_WORD, most_frequent, numbered, sequences
from clients.trainer import NDArray
from flwr_colearn import ColearnError

LABELS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
LENGTH = 150
"""The number of tokens of a comment; three in four comments are shorter than 90."""
VOCABULARY = 20_000
OBJECTIVE = Objective(metrics=mean_roc_auc, headline="roc-auc", multi_label=True)

_FORMAT = 2  # the version of the prepared arrays: raise it when their preparation changes
_NAMED = 10  # the most malformed rows to list in the log


@dataclass(frozen=True)
class Comments:
    """The comments of a table, row by row.

    Attributes
    ----------
    texts : list of str, [N]
        The comments.
    labels : array of float32, [N, 6]
        The labels, 0 or 1.
    natural : array of bool, [N]
        Whether the row was drawn at the real rates of the labels.
    """

    texts: list[str]
    labels: NDArray
    natural: NDArray

    def take(self, indices: NDArray) -> "Comments":
        """Return the rows at these indices."""
        texts = [self.texts[index] for index in indices]
        return Comments(texts, self.labels[indices], self.natural[indices])


@cache
def load(data_dir: str, vectors: str = "", vocabulary: int = VOCABULARY) -> Task:
    """Return the task: inputs int64 [N, 150], labels float32 [N, 6].

    The test set is the scored rows of ``test.csv`` and ``test_labels.csv``, if both files exist:
    63,978 of 153,164, since the others are labelled -1. Otherwise a tenth of the rows of
    ``train.csv``, always the same, are held out at random. If ``train.csv`` has a column
    ``natural``, only rows with 1 in it (drawn at the labels' real rates) are held out, so that the
    score is one at real rates; all others are trained on.

    Prepared arrays are cached on disk, see `clients.tasks.array_cache`.

    Parameters
    ----------
    data_dir : str
        The folder of Kaggle's ``train.csv``, or one that holds a folder ``jigsaw`` with it.
    vectors : str, optional
        A fastText ``.vec`` file. The vocabulary is its most frequent words, and the models look
        up its vectors, which are neither trained nor exchanged. By default the vocabulary is the
        most frequent words of the training text, and the vectors are learned.
    vocabulary : int, default 20,000
        The largest number of words in the vocabulary.

    Raises
    ------
    ColearnError
        If a file is absent or lacks a column, or there is nothing to train or test on. Malformed
        rows are logged and left out.
    """
    if vocabulary < 1:
        raise ColearnError(f"run config 'vocabulary': expected at least 1, found {vocabulary}")
    folder = _folder(data_dir)
    sources = [folder / "train.csv"]
    if _has_test_files(folder):
        sources += [folder / "test.csv", folder / "test_labels.csv"]
    if vectors and not Path(vectors).is_file():
        raise ColearnError(
            f"run config 'vectors': expected a fastText .vec file (fasttext.cc has some), found "
            f"none at {vectors!r}; leave it empty to learn the vectors"
        )
    made_from = [_stamp(path) for path in ([*sources, Path(vectors)] if vectors else sources)]
    arrays = cached_arrays(
        cache_places(folder, f"colearn-toxic-{vocabulary}"),
        json.dumps([_FORMAT, LENGTH, vocabulary, made_from]),
        lambda: _arrays(sources, vectors, vocabulary),
    )
    train, test = (
        Examples(arrays[f"{part}-inputs"].astype(np.int64), arrays[f"{part}-labels"])
        for part in ("train", "test")
    )
    options = {
        "vocabulary": int(arrays["vocabulary"]),
        "vectors": arrays.get("vectors"),
        "num_labels": len(LABELS),
    }
    return Task(train, test, OBJECTIVE, options)


def definition(settings: ParticipantSettings) -> Task:
    """Return the task without data, with the vocabulary that the run config describes."""
    vocabulary = agreed_vocabulary(settings)
    none = Examples(np.empty((0, LENGTH), np.int64), np.empty((0, len(LABELS)), np.float32))
    options = {
        "vocabulary": vocabulary.size,
        "vectors": vocabulary.vectors,
        "num_labels": len(LABELS),
    }
    return Task(none, objective=OBJECTIVE, model_options=options, agreement=vocabulary.digest)


def read(settings: ParticipantSettings, folder: Path, part: str) -> Examples | None:
    """Return a site's own comments, of ``train.csv``, or of ``test.csv`` and ``test_labels.csv``.

    Raises
    ------
    ColearnError
        If a file lacks a column. Malformed rows are logged and left out.
    """
    if part == "train":
        comments = read_comments(_folder(str(folder)) / "train.csv")
    elif _has_test_files(folder):
        comments = read_test(folder / "test.csv", folder / "test_labels.csv")
    else:
        return None
    numbers = agreed_vocabulary(settings).numbers
    return Examples(sequences(comments.texts, numbers, LENGTH), comments.labels)


def _folder(data_dir: str) -> Path:
    for folder in (Path(data_dir), Path(data_dir) / "jigsaw"):
        if (folder / "train.csv").is_file():
            return folder
    raise ColearnError(
        f"run config 'data-dir': expected a folder that holds train.csv of Kaggle's Toxic Comment "
        f"Classification Challenge, or one named jigsaw that does, found neither in {data_dir!r}"
    )


def _stamp(path: Path) -> tuple[str, int, int]:
    """Return a file's name, size and time of modification, to notice that it has changed."""
    stat = path.stat()
    return path.name, stat.st_size, stat.st_mtime_ns


def _has_test_files(folder: Path) -> bool:
    there = [(folder / name).is_file() for name in ("test.csv", "test_labels.csv")]
    if any(there) and not all(there):
        log(
            WARNING,
            "%s: expected test.csv and test_labels.csv together, found one; a tenth of train.csv "
            "is held out in their place",
            folder,
        )
    return all(there)


def _arrays(sources: Sequence[Path], vectors: str, vocabulary: int) -> dict[str, NDArray]:
    """Return the prepared arrays by name."""
    everything = read_comments(sources[0])
    order = np.random.default_rng(0).permutation(len(everything.texts))
    if len(sources) > 1:
        train, test = everything.take(order), read_test(*sources[1:])
    else:
        train, test = held_out(everything, order)
    for path, part in ((sources[0], train), (sources[-1], test)):
        if not part.texts:
            raise ColearnError(f"{path}: expected rows to train and to test on, found too few")
    # The vocabulary never comes from the test text, which a deployed model would not know.
    extra: dict[str, NDArray] = {}
    if vectors:
        words, extra["vectors"] = read_vectors(Path(vectors), vocabulary)
    else:
        words = most_frequent(train.texts, vocabulary)
    numbers = numbered(words)
    return {
        # int32 takes half of int64's space on disk.
        "train-inputs": sequences(train.texts, numbers, LENGTH).astype(np.int32),
        "train-labels": train.labels,
        "test-inputs": sequences(test.texts, numbers, LENGTH).astype(np.int32),
        "test-labels": test.labels,
        "vocabulary": np.array(FIRST_WORD + len(words)),
        **extra,
    }


def held_out(comments: Comments, order: NDArray) -> tuple[Comments, Comments]:
    """Return rows to train and to test on; the test rows are the first natural ones of `order`."""
    chosen = order[comments.natural[order]][: len(order) // 10]
    # Shuffled again: the test rows are taken from the beginning of `order`, so few natural rows
    # would remain among the first ones, which the run config's `examples` selects.
    rest = np.random.default_rng(1).permutation(order[~np.isin(order, chosen)])
    return comments.take(rest), comments.take(chosen)


def read_comments(path: Path) -> Comments:
    """Return the rows of a ``train.csv``; without a column ``natural``, all of them are natural."""
    table = Table(path, ("id", "comment_text", *LABELS), optional="natural")
    texts, labels, natural = [], [], []
    for where, (_, text, *values) in table.rows():
        numbers = [_BITS.get(value) for value in values]
        if None in numbers:
            table.malformed.append(f"{where}: {', '.join(values)!r} in place of 0s and 1s")
            continue
        texts.append(text)
        labels.append(numbers[: len(LABELS)])
        natural.append(all(numbers[len(LABELS) :]))
    table.report()
    return Comments(texts, _label_array(labels), np.array(natural, bool))


def read_test(texts_path: Path, labels_path: Path) -> Comments:
    """Return the rows of a ``test.csv`` that have labels in ``test_labels.csv``, in its order."""
    labels_of = _test_labels(labels_path)
    table = Table(texts_path, ("id", "comment_text"))
    texts, labels, unscored = [], [], 0
    for where, (name, text) in table.rows():
        if name not in labels_of:
            table.malformed.append(f"{where}: no usable labels in {labels_path.name}")
        elif -1 in labels_of[name]:  # Kaggle's mark of a row that no score counts
            unscored += 1
        else:
            texts.append(text)
            labels.append(labels_of[name])
    table.report()
    log(INFO, "%s: %d rows to test on, %d are not scored", texts_path, len(texts), unscored)
    return Comments(texts, _label_array(labels), np.ones(len(texts), bool))


def _test_labels(path: Path) -> dict[str, list[int]]:
    table = Table(path, ("id", *LABELS))
    labels = {}
    for where, (name, *values) in table.rows():
        if all(value in _BITS or value == "-1" for value in values):
            labels[name] = [int(value) for value in values]
        else:
            table.malformed.append(f"{where}: {', '.join(values)!r} in place of 0s, 1s and -1s")
    table.report()
    return labels


_BITS = {"0": 0, "1": 1}


def _label_array(labels: Sequence[Sequence[int | None]]) -> NDArray:
    return np.array(labels, np.float32).reshape(-1, len(LABELS))


@dataclass
class Table:
    """The reader of a csv file, which collects the faults of its rows.

    Attributes
    ----------
    path : Path
        The file.
    columns : sequence of str
        The required columns, the row's id first.
    optional : str
        The name of a column that may be absent.
    malformed : list of str
        The line, the id and the fault of each row that is left out.
    """

    path: Path
    columns: Sequence[str]
    optional: str = ""
    malformed: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the line and id of each row, for messages, and its columns, `optional` last.

        Raises
        ------
        ColearnError
            If the file is no csv file in UTF-8, or lacks a column.
        """
        try:
            # utf-8-sig: spreadsheet programs write a byte order mark before the first column name.
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.reader(file)
                header = next(reader, [])
                places = self._places(header)
                for row in filter(None, reader):
                    where = f"line {reader.line_num}, id {row[places[0] : places[0] + 1]}"
                    if len(row) == len(header):
                        yield where, [row[place] for place in places]
                    else:
                        self.malformed.append(
                            f"{where}: {len(row)} columns in place of {len(header)}"
                        )
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ColearnError(
                f"{self.path}: expected a csv file in UTF-8, found {error}"
            ) from error

    def _places(self, header: Sequence[str]) -> list[int]:
        missing = [column for column in self.columns if column not in header]
        if missing:
            raise ColearnError(
                f"{self.path}: expected columns {', '.join(self.columns)}, found no "
                f"{', '.join(missing)} among {', '.join(header) or 'none'}"
            )
        also = [self.optional] if self.optional in header else []
        return [header.index(column) for column in (*self.columns, *also)]

    def report(self) -> None:
        """Log the number of rows that were left out, and the faults of the first ones."""
        if self.malformed:
            log(
                WARNING,
                "%s: left out %d malformed rows: %s%s",
                self.path,
                len(self.malformed),
                "; ".join(self.malformed[:_NAMED]),
                "; ..." if len(self.malformed) > _NAMED else "",
            )
