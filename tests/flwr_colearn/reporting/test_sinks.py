"""Sinks of a history: who gets which record, and the event files as TensorFlow reads them."""

import logging
import math

import pytest

from flwr_colearn import ColearnError, DynamicHistory, DynamicRecord, History, RoundRecord
from flwr_colearn.reporting import TensorBoard, scalars


def record(number, **values):
    return RoundRecord(number, 2, 0.1, 2 * number, **values)


class Kept:
    def __init__(self):
        self.rounds = []

    def write(self, record):
        self.rounds.append(record.round)


class Broken:
    def write(self, record):
        raise OSError(f"no tracker in round {record.round}")


def test_every_sink_gets_every_new_round_even_beside_one_that_raises(tmp_path, caplog):
    kept = Kept()
    history = History(tmp_path / "history.jsonl", sinks=[Broken(), kept])
    with caplog.at_level(logging.WARNING, "flwr"):
        for number in (1, 2, 3):
            history.append(record(number))
    assert kept.rounds == [1, 2, 3]
    assert len(History.read(tmp_path / "history.jsonl")) == 3
    [warning] = [each.getMessage() for each in caplog.records if "Broken" in each.getMessage()]
    assert "no tracker in round 1" in warning


def test_rounds_that_a_resumed_run_restores_are_not_written_again():
    first, kept = History(), Kept()
    for number in (1, 2):
        first.append(record(number))
    resumed = History(sinks=[kept])
    resumed.restore(first.lines)
    resumed.append(record(3))
    assert kept.rounds == [3]


def test_a_history_of_dynamic_averaging_has_sinks_too():
    kept = Kept()
    DynamicHistory(sinks=[kept]).append(DynamicRecord(1, 10))
    assert kept.rounds == [1]


def test_the_numbers_of_a_record():
    found = scalars(
        record(
            1,
            relative_change=math.inf,
            bytes_up=7,
            refusals=[{"participant": "a", "reason": "b"}],
            learning_rates=[0.1, 0.05, 0.025],
            site_metrics={"a": {"accuracy": 0.5, "word": "x"}},
            contributions={"a": {"norm": None, "weight": 1.0}},
        )
    )
    assert found["relative_change"] == math.inf
    assert (found["local_epochs"], found["bytes_up"], found["refusals"]) == (2, 7, 1)
    assert (found["learning_rates/first"], found["learning_rates/last"]) == (0.1, 0.025)
    assert found["site_metrics/a/accuracy"] == 0.5
    assert found["contributions/a/weight"] == 1
    absent = {"bytes_down", "site_metrics/a/word", "contributions/a/norm", "stopped"}
    assert not absent & set(found)


def test_without_tensorboardx_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(ColearnError, match=r"pip install 'flwr-colearn\[tensorboard\]'"):
        TensorBoard(tmp_path)


def events(folder):
    """Return the scalars of a folder's event files by (tag, step), and the starts of files."""
    iterator = pytest.importorskip("tensorflow").compat.v1.train.summary_iterator
    found, starts = {}, []
    for path in sorted(folder.iterdir()):
        for event in iterator(str(path)):
            if event.HasField("session_log"):
                starts.append(event.step)
            for value in event.summary.value:
                found.setdefault((value.tag, event.step), []).append(value.simple_value)
    return found, starts


@pytest.mark.slow
def test_the_event_files_have_the_numbers_of_every_round(tmp_path):
    pytest.importorskip("tensorboardX")
    history = History(sinks=[TensorBoard(tmp_path)])
    for number in (1, 2):
        sites = {"utrecht": {"accuracy": 0.25 * number}, "<b> x": {"accuracy": 0.5}}
        history.append(record(number, relative_change=0.5 / number, site_metrics=sites))
    found, starts = events(tmp_path)
    assert starts == [1, 2]
    assert found["relative_change", 1] == [0.5]
    assert found["relative_change", 2] == [0.25]
    assert found["local_epochs", 2] == [2]
    assert found["site_metrics/utrecht/accuracy", 2] == [0.5]
    # A round that is run again, and a new run: TensorBoard drops what is from their steps on.
    History(sinks=[TensorBoard(tmp_path)]).append(record(2))
    history.sinks[0].write(record(1))
    assert events(tmp_path)[1] == [1, 2, 2, 1]
