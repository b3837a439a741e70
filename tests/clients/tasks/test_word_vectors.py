import numpy as np
import pytest

from clients.tasks.word_vectors import read_vectors
from flwr_colearn import ColearnError

GOOD = "4 3\nthe 1 2 3\n, 4 5 6\nThe 9 9 9\ncat 1.5 -2e0 0 \n"


@pytest.fixture
def vec(tmp_path):
    def write(content):
        path = tmp_path / "small.vec"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_words_come_in_file_order_with_padding_and_the_mean_before_them(vec, flower_log):
    words, matrix = read_vectors(vec(GOOD), 10)
    assert words == ["the", ",", "cat"]  # no lower-case text holds "The"
    assert matrix.dtype == np.float32
    mean = [(1 + 4 + 1.5) / 3, (2 + 5 - 2) / 3, (3 + 6 + 0) / 3]
    expected = [[0, 0, 0], mean, [1, 2, 3], [4, 5, 6], [1.5, -2, 0]]
    np.testing.assert_allclose(matrix, expected, rtol=1e-6)
    assert not flower_log.records


def test_no_more_is_read_than_asked_for(vec, flower_log):
    words, matrix = read_vectors(vec(GOOD + "broken\n"), 2)
    assert (words, matrix.shape) == (["the", ","], (4, 3))
    assert not flower_log.records


def test_malformed_lines_are_named_counted_and_left_out(vec, flower_log):
    lines = [b"7 2", b"a 1 2", b"b 1", b"c 1 x", b"d 1 nan", b"\xff 1 2", b"e 1 2 3", b"f 3 4"]
    words, matrix = read_vectors(vec(b"\n".join(lines) + b"\n"), 10)
    assert words == ["a", "f"]
    assert matrix[2:].tolist() == [[1, 2], [3, 4]]
    (record,) = flower_log.records
    message = record.getMessage()
    assert record.levelname == "WARNING"
    assert "left out 5 malformed lines" in message
    for part in (
        "line 3: 1 numbers in place of 2",
        "line 4: could not convert",
        "line 5: a number",
    ):
        assert part in message
    assert "line 6: 'utf-8' codec" in message
    assert "line 7: 3 numbers in place of 2" in message


def test_a_file_that_ends_early_is_said(vec, flower_log):
    assert read_vectors(vec("9 1\na 1\nb 2\n"), 5)[0] == ["a", "b"]
    assert "the file ends after 2 of 9 words" in flower_log.text


def test_the_first_of_equal_words_counts(vec):
    words, matrix = read_vectors(vec("3 1\na 1\na 2\nb 3\n"), 5)
    assert words == ["a", "b"]
    assert matrix[2:].tolist() == [[1], [3]]


@pytest.mark.parametrize("content", ["the 1 2 3\n", "", "3 -1\n", "x 3\n", "0 300\n"])
def test_a_file_without_fasttexts_first_line_is_refused(vec, content):
    with pytest.raises(ColearnError, match=r"small.vec: expected fastText's first line"):
        read_vectors(vec(content), 5)


def test_a_file_without_usable_words_or_that_is_absent_is_refused(vec, tmp_path):
    with pytest.raises(ColearnError, match="expected words and their vectors, found none"):
        read_vectors(vec("1 1\nThe 1\n"), 5)
    with pytest.raises(ColearnError, match=r"'vectors': expected a fastText .vec file, found"):
        read_vectors(tmp_path / "absent.vec", 5)
