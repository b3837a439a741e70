"""The reader of pre-trained word vectors in fastText's text format, ``.vec``."""

from collections.abc import Iterator
from itertools import islice
from logging import WARNING
from pathlib import Path
from typing import BinaryIO

import numpy as np
from flwr.common import log
from tqdm import tqdm

from clients.tasks.words import FIRST_WORD, UNKNOWN, tokens
from clients.trainer import NDArray
from flwr_colearn import ColearnError

_NAMED = 10  # the most malformed lines to list in the log


def read_vectors(path: Path, size: int) -> tuple[list[str], NDArray]:
    """Read the first `size` words that the tokenizer can produce, and their vectors.

    Such files are sorted by frequency, so these are the most frequent words; the rest of the file
    is not read. Words that the tokenizer never returns as a single token, such as those with
    capitals, are skipped, as are repetitions of a word. Malformed lines are logged and left out.

    Parameters
    ----------
    path : Path
        The file, in UTF-8: a first line ``words dimension``, then a word and its numbers in every
        line, separated by single spaces.
    size : int
        The largest number of words to read.

    Returns
    -------
    words : list of str, [W]
        The words in the file's order, at most `size`.
    matrix : array of float32, [W + 2, dimension]
        The vectors: row 0 (padding) is zero, row 1 (an unknown word) the mean of all vectors.

    Raises
    ------
    ColearnError
        If the file cannot be read, has another format, or has no usable word.
    """
    vectors: dict[str, NDArray] = {}
    malformed: list[str] = []
    try:
        with path.open("rb") as file:
            announced, dimension = _header(path, file.readline())
            for word, vector in _entries(file, announced, dimension, malformed):
                if word not in vectors and tokens(word) == [word]:
                    vectors[word] = vector
                if len(vectors) == size:
                    break
    except OSError as error:
        raise ColearnError(
            f"run config 'vectors': expected a fastText .vec file, found {error}"
        ) from error
    if malformed:
        log(
            WARNING,
            "%s: left out %d malformed lines: %s%s",
            path,
            len(malformed),
            "; ".join(malformed[:_NAMED]),
            "; ..." if len(malformed) > _NAMED else "",
        )
    if not vectors:
        raise ColearnError(f"{path}: expected words and their vectors, found none that is usable")
    matrix = np.zeros((FIRST_WORD + len(vectors), dimension), np.float32)
    matrix[FIRST_WORD:] = list(vectors.values())
    matrix[UNKNOWN] = matrix[FIRST_WORD:].mean(axis=0)
    return list(vectors), matrix


def _header(path: Path, line: bytes) -> tuple[int, int]:
    """Return the number of words that the file's first line announces, and their dimension."""
    fields = line.split()
    if len(fields) != 2 or not all(field.isdigit() and int(field) > 0 for field in fields):
        raise ColearnError(
            f"{path}: expected fastText's first line, 'words dimension', found "
            f"{line[:60].decode(errors='replace')!r}"
        )
    return int(fields[0]), int(fields[1])


def _entries(
    file: BinaryIO, announced: int, dimension: int, malformed: list[str]
) -> Iterator[tuple[str, NDArray]]:
    """Yield words and vectors; append the faults of malformed lines to `malformed`."""
    number = 1
    lines = tqdm(file, desc="reading vectors", total=announced, disable=None, leave=False)
    for number, line in enumerate(islice(lines, announced), 2):
        try:
            # Single spaces only: split() would also split words that contain other white space.
            word, *numbers = line.decode().rstrip(" \r\n").split(" ")
            vector = np.array(numbers, np.float32)
        except ValueError as error:
            malformed.append(f"line {number}: {error}")
            continue
        if len(vector) != dimension:
            malformed.append(f"line {number}: {len(vector)} numbers in place of {dimension}")
        elif not np.isfinite(vector).all():
            malformed.append(f"line {number}: a number that is not finite")
        else:
            yield word, vector
    if number - 1 < announced:
        malformed.append(f"the file ends after {number - 1} of {announced} words")
