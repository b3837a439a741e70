"""The vocabulary on which sites with text of their own agree without an exchange of words."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from clients.settings import ParticipantSettings
from clients.tasks.word_vectors import read_vectors
from clients.tasks.words import FIRST_WORD, HashedNumbers, Numbers, numbered
from clients.trainer import NDArray
from flwr_colearn import ColearnError

APP = Path(__file__).resolve().parents[2]
"""The folder of the app, which Flower installs alike on the server and at every site."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The numbers of words, and their vectors.

    Attributes
    ----------
    numbers : mapping or HashedNumbers
        The number of every word, from 2; 0 is padding and 1 any other word.
    size : int
        The number of rows of an embedding of these numbers.
    vectors : array of float32, [size, dimension], or None
        The words' vectors, if they are not learned.
    digest : str
        A digest of words and vectors that were read from a file; empty without a file.
    """

    numbers: Numbers
    size: int
    vectors: NDArray | None = None
    digest: str = ""


def agreed_vocabulary(settings: ParticipantSettings) -> Vocabulary:
    """Return the vocabulary of the settings' `vectors` or `vocabulary_file`, or hashed numbers.

    Raises
    ------
    ColearnError
        If the settings name both files, or the file cannot be read.
    """
    if settings.vocabulary < 1:
        raise ColearnError(
            f"run config 'vocabulary': expected at least 1, found {settings.vocabulary}"
        )
    if settings.vectors and settings.vocabulary_file:
        raise ColearnError(
            "run config: expected 'vectors' or 'vocabulary-file', found both; a file of vectors "
            "has the words too"
        )
    return _vocabulary(settings.vectors, settings.vocabulary_file, settings.vocabulary)


@lru_cache(maxsize=2)
def _vocabulary(vectors: str, words_file: str, size: int) -> Vocabulary:
    if vectors:
        words, matrix = read_vectors(Path(vectors), size)
        digest = hashlib.sha256("\n".join(words).encode() + matrix.tobytes()).hexdigest()[:16]
        return Vocabulary(numbered(words), len(matrix), matrix, digest)
    if words_file:
        words = _words(APP / words_file, size)
        digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
        return Vocabulary(numbered(words), FIRST_WORD + len(words), digest=digest)
    return Vocabulary(HashedNumbers(size), FIRST_WORD + size)


def _words(path: Path, size: int) -> list[str]:
    try:
        words = [line.strip().lower() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ColearnError(
            "run config 'vocabulary-file': expected a file in UTF-8 with a word in every line, "
            f"found {error}"
        ) from error
    # dict.fromkeys keeps the order and drops repetitions.
    return list(dict.fromkeys(filter(None, words)))[:size]
