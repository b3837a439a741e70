import numpy as np
import pytest

from clients.tasks.words import most_frequent, numbered, sequences, tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", ["hello", ",", "world", "!"]),
        ("don't 'quote' it's", ["don't", "'", "quote", "'", "it's"]),
        ("a\n\nb\tc  d", ["a", "b", "c", "d"]),
        ("ÜBER straße 漢字", ["über", "straße", "漢字"]),
        ("f*** 10.5%", ["f", "*", "*", "*", "10", ".", "5", "%"]),
        ("", []),
        (" \n", []),
    ],
)
def test_tokens_are_lower_case_words_and_single_punctuation_marks(text, expected):
    assert tokens(text) == expected


def test_the_vocabulary_is_the_most_frequent_words_ties_in_alphabetical_order():
    texts = ["b a b", "C c b", "e d"]  # b 3, c 2, a d e 1
    assert most_frequent(texts, 4) == ["b", "c", "a", "d"]
    assert most_frequent(reversed(texts), 4) == ["b", "c", "a", "d"]
    assert most_frequent(texts, 99) == ["b", "c", "a", "d", "e"]


def test_sequences_are_padded_cut_and_know_unknown_words():
    numbers = numbered(["b", "c"])
    assert numbers == {"b": 2, "c": 3}
    found = sequences(["c b x", "", "b b b b c"], numbers, 4)
    assert found.dtype == np.int64
    assert found.tolist() == [[3, 2, 1, 0], [0, 0, 0, 0], [2, 2, 2, 2]]
