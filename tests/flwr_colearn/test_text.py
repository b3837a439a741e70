import pytest

from flwr_colearn import ColearnError
from flwr_colearn.errors import MissingExtraError, expected
from flwr_colearn.text import printable
from flwr_colearn.traffic import Event

FORGED = "done\n2026-01-01 ERROR: \x1b[31mforged\r\u2028\ud800"


def test_nothing_in_a_printable_text_moves_to_another_line_or_changes_the_terminal():
    shown = printable(FORGED, 100)
    assert shown == r"done\n2026-01-01 ERROR: \x1b[31mforged\r\u2028\ud800"
    assert printable("Krankenhaus Süd, 東京", 100) == "Krankenhaus Süd, 東京"


@pytest.mark.parametrize("length", [99, 100, 101, 102, 5_000_000])
def test_of_a_long_text_both_ends_are_shown(length):
    text = "a" * (length - 10) + "b" * 10
    shown = printable(text, 100)
    assert len(shown) == min(length, 100)
    assert shown.startswith("aaa")
    assert shown.endswith("b" * 10)
    assert (shown == text) == (length <= 100)


def test_errors_and_events_are_printable_and_bounded():
    for error in (ColearnError(FORGED * 10_000), expected("name", "a short one", FORGED * 10_000)):
        assert str(error).isprintable()
        assert len(str(error)) < 30_000
        assert len(Event("refusal", "a", str(error)).reason) <= 1000
    # What belongs to the error's other base class stays.
    missing = MissingExtraError.of("p", "torch", ModuleNotFoundError(name="torch"))
    assert missing.name == "torch"
    assert "pip install 'flwr-colearn[torch]'" in str(missing)
