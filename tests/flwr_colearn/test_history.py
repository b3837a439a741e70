import json
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_colearn import ColearnError, History, RoundRecord
from flwr_colearn.history import RoundLog

records = st.builds(
    RoundRecord,
    round=st.integers(1, 10**6),
    local_epochs=st.integers(1, 10**6),
    learning_rate=st.floats(0, 1),
    epochs_done=st.integers(1, 10**6),
    relative_change=st.none() | st.floats(0, math.inf),
    bytes_down=st.integers(0, 2**62),
    bytes_up=st.integers(0, 2**62),
    participants=st.lists(st.text()),
    refusals=st.lists(st.fixed_dictionaries({"participant": st.text(), "reason": st.text()})),
    seconds=st.floats(0, 1e9),
    train_metrics=st.dictionaries(st.text(), st.floats(-1e300, 1e300) | st.lists(st.integers())),
)


def record(number, **values):
    return RoundRecord(number, local_epochs=5, learning_rate=0.01, epochs_done=5, **values)


@given(original=records)
def test_a_record_survives_its_line_of_json(original):
    line = original.to_json()
    assert "\n" not in line
    assert RoundRecord.from_json(line) == original


def strict_json(line):
    """Parse JSON as other languages do: without Python's NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=refuse)


def test_numbers_that_json_lacks_are_spelled_out():
    values = strict_json(
        record(
            1,
            relative_change=math.inf,
            train_metrics={"loss": math.nan, "norms": [1.0, -math.inf]},
        ).to_json()
    )
    assert values["relative_change"] == "inf"
    assert values["train_metrics"] == {"loss": "nan", "norms": [1.0, "-inf"]}


def test_metrics_of_the_legacy_api_never_break_the_history(tmp_path):
    # A NumPyClient's evaluate_fn often returns numpy numbers; Flower's Scalar may be bytes.
    history = History(tmp_path / "run.jsonl")
    metrics = {"loss": np.float32(0.5), "right": np.int64(7), "blob": b"\x00", "ok": np.bool_(True)}
    history.append(record(1, server_metrics=metrics))
    [read] = History.read(tmp_path / "run.jsonl")
    assert read.server_metrics["loss"] == 0.5
    assert read.server_metrics["right"] == 7


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense",
        "[]",
        "7",
        "null",
        '{"round": 1}',
        record(1).to_json()[:-9],
        record(1, relative_change=0.5).to_json().replace("0.5", '"half"'),
    ],
)
def test_a_line_that_is_no_record_is_refused(line):
    with pytest.raises(ColearnError, match="history: expected one RoundRecord a line, found"):
        RoundRecord.from_json(line)


def test_a_record_of_a_later_version_is_read_without_what_is_unknown():
    values = {**json.loads(record(1).to_json()), "invented-later": 7}
    assert RoundRecord.from_json(json.dumps(values)) == record(1)


def test_every_round_is_on_disk_as_soon_as_it_is_appended(tmp_path):
    history = History(tmp_path / "new" / "folder" / "run.jsonl")
    for number in (1, 2, 3):
        history.append(record(number))
        assert History.read(history.path).records == history.records
    assert [each.round for each in history] == [1, 2, 3]
    assert len(history.path.read_text().splitlines()) == len(history) == 3


def test_a_new_run_renames_the_file_of_an_earlier_one(tmp_path):
    path = tmp_path / "run.jsonl"
    for rounds in (1, 2, 3):
        history = History(path)
        for number in range(rounds):
            history.append(record(number + 1))
    assert len(History.read(path)) == 3
    assert len(History.read(tmp_path / "run.jsonl.1")) == 1
    assert len(History.read(tmp_path / "run.jsonl.2")) == 2
    history.clear()
    assert len(history) == 0
    assert len(History.read(path)) == 3  # until the next run begins
    history.append(record(1))
    assert len(History.read(path)) == 1


def test_a_torn_last_line_is_read_past_with_a_word(tmp_path, flower_log):
    path = tmp_path / "run.jsonl"
    lines = [record(number).to_json() for number in (1, 2)]
    path.write_text(f"{lines[0]}\n{lines[1][:-9]}")
    assert History.read(path).records == [record(1)]
    assert f"the last line of {path} is incomplete" in flower_log.text
    path.write_text("\n".join(lines))  # complete, but for its end
    assert History.read(path).records == [record(1), record(2)]


def test_a_torn_line_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(f"{record(1).to_json()[:-9]}\n{record(2).to_json()}\n")
    with pytest.raises(ColearnError, match="expected one RoundRecord a line"):
        History.read(path)


def test_half_a_line_of_a_full_disk_does_not_stay(tmp_path, monkeypatch):
    history = History(tmp_path / "run.jsonl")
    history.append(record(1))

    def half(file, data):
        file.write(data[:50])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("flwr_colearn.files.write_all", half)
        history.append(record(2))
    assert [each.round for each in History.read(history.path)] == [1]
    history.append(record(3))
    assert [each.round for each in History.read(history.path)] == [1, 2, 3]


def test_a_file_that_cannot_be_read_is_our_own_error(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ColearnError, match="history: expected a readable file"):
            History.read(path)


def test_only_the_owner_may_read_a_history(tmp_path):
    before = os.umask(0)
    try:
        History(tmp_path / "run.jsonl").append(record(1))
    finally:
        os.umask(before)
    assert (tmp_path / "run.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_history_sums_bytes_and_lists_epochs():
    history = History()
    for number, epochs in enumerate((5, 5, 10), start=1):
        history.append(RoundRecord(number, epochs, 0.1, 0, bytes_down=100, bytes_up=10 * number))
    assert history.bytes_total == 3 * 100 + 10 + 20 + 30
    assert history.epochs_path == [5, 5, 10]


def test_every_round_is_logged_with_what_a_user_chooses_epsilon_from(flower_log):
    History().append(record(3, relative_change=0.0123, participants=["1", "2"]))
    text = flower_log.text
    for part in ("round 3", "Local epochs: 5", "Relative change: 0.0123", "2 averaged, 0 refused"):
        assert part in text


@pytest.mark.parametrize(
    ("rates", "text"),
    [
        ([0.0378929, 0.025, 0.0125], "Learning rate: from 0.03789 to 0.0125"),
        ([0.0125], "Learning rate: 0.0125"),  # T=1: eta is 0.05, and no epoch has it
        ([], "Learning rate: 0.05"),
    ],
)
def test_the_log_has_the_rates_that_were_used(rates, text, flower_log):
    RoundRecord(1, 3, 0.05, 3, learning_rates=rates).log()
    assert f"{text}\n" in flower_log.text


@pytest.mark.parametrize(("change", "said"), [(0.0, True), (1e-300, False), (None, False)])
def test_a_relative_change_of_exactly_zero_is_said(change, said, flower_log):
    log = RoundLog()
    log.open(record(7))
    log.close(change)
    assert ("Round 7: the relative change is exactly 0" in flower_log.text) == said
