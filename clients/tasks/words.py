"""The conversion of text to numbers: tokens, a vocabulary, and sequences of equal length."""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tqdm import tqdm

from clients.trainer import NDArray

PAD, UNKNOWN = 0, 1
FIRST_WORD = 2

_TOKEN = re.compile(r"\w+(?:'\w+)*|[^\w\s]")


def tokens(text: str) -> list[str]:
    """Return the words in lower case, with the apostrophes inside, and all punctuation marks.

    Examples
    --------
    >>> tokens("D'aww! He's 21, 'really'.")
    ["d'aww", '!', "he's", '21', ',', "'", 'really', "'", '.']
    """
    return _TOKEN.findall(text.lower())


def most_frequent(texts: Iterable[str], size: int) -> list[str]:
    """Return the `size` most frequent tokens, those of equal frequency in alphabetical order."""
    counts: Counter[str] = Counter()
    for text in tqdm(texts, desc="counting words", disable=None, leave=False):
        counts.update(tokens(text))
    # Ties in alphabetical order: the same text gives every process the same vocabulary.
    return sorted(counts, key=lambda word: (-counts[word], word))[:size]


def numbered(words: Sequence[str]) -> dict[str, int]:
    """Return the number of every word; 0 is padding and 1 any word outside the vocabulary."""
    return {word: number for number, word in enumerate(words, FIRST_WORD)}


class Numbers(Protocol):
    """The number of every word, a mapping or `HashedNumbers`."""

    def get(self, word: str, default: int, /) -> int:
        """Return the number of a word, or the default for a word without one."""


@dataclass(frozen=True)
class HashedNumbers:
    """Numbers of words by a hash, the same at every site without any exchange of words.

    Different words may have the same number (feature hashing, Weinberger et al., 2009).

    Attributes
    ----------
    size : int
        The number of different hash values.
    """

    size: int

    def get(self, word: str, default: int, /) -> int:
        """Return the number of a word, from 2; every word has one."""
        # Not hash(), which differs from process to process.
        return FIRST_WORD + zlib.crc32(word.encode()) % self.size


def sequences(texts: Sequence[str], numbers: Numbers, length: int) -> NDArray:
    """Return the texts as numbers, int64 [N, length], cut or padded with 0 at the end."""
    result = np.full((len(texts), length), PAD, np.int64)
    progress = tqdm(texts, "numbering words", disable=None, leave=False)
    for row, text in zip(result, progress, strict=True):
        found = [numbers.get(token, UNKNOWN) for token in tokens(text)[:length]]
        row[: len(found)] = found
    return result
