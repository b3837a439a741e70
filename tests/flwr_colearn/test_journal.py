import errno
import os

import pytest

from flwr_colearn.journal import Journal

LINES = ["one", "two", "three", "four"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records.jsonl"


def test_every_reference_is_that_of_the_lines_so_far(path):
    journal = Journal(path)
    references = [journal.extend(LINES[:count]) for count in range(5)]
    assert path.read_text() == "one\ntwo\nthree\nfour\n"
    for count, reference in enumerate(references):
        assert Journal(path).restore(reference) == LINES[:count]


def test_a_resumed_run_overwrites_the_lines_after_its_checkpoint(path):
    """Whole ones and half ones, of rounds that are run again."""
    journal = Journal(path)
    reference = journal.extend(LINES[:2])
    journal.extend(LINES)
    with path.open("a") as file:
        file.write("half")
    again = Journal(path)
    assert again.restore(reference) == LINES[:2]
    again.extend([*LINES[:2], "other"])
    assert path.read_text() == "one\ntwo\nother\n"


def test_a_new_run_begins_the_file_anew(path):
    Journal(path).extend(LINES)
    Journal(path).extend(["other"])
    assert path.read_text() == "other\n"


def test_lines_that_could_not_be_written_are_written_with_the_next(path, monkeypatch):
    journal = Journal(path)
    journal.extend(LINES[:1])

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.extend(LINES[:2])
    reference = journal.extend(LINES[:3])
    assert path.read_text() == "one\ntwo\nthree\n"
    assert Journal(path).restore(reference) == LINES[:3]


@pytest.mark.parametrize("left", [None, b"", b"on"])
def test_a_file_that_was_removed_during_the_run_is_written_anew(left, path):
    journal = Journal(path)
    journal.extend(LINES[:2])
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    reference = journal.extend(LINES)
    assert Journal(path).restore(reference) == LINES


def test_lines_of_a_copy_are_written_to_the_file_itself(path, tmp_path):
    reference = Journal(tmp_path / "copy").extend(LINES[:2])
    path.write_text("one\ntwx\n")
    journal = Journal(path)
    assert journal.restore(reference) is None
    assert journal.restore(reference, [tmp_path / "none", tmp_path / "copy"]) == LINES[:2]
    journal.extend(LINES)
    assert path.read_text() == "one\ntwo\nthree\nfour\n"
