import math

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from flwr_colearn import ColearnError, InProcessGrid
from flwr_colearn.dynamic.messages import Ask, Report, report_of


@given(
    st.integers(1, 9),
    st.none() | st.integers(0, 9),
    st.sampled_from(["train", "fetch", "set"]),
    st.integers(1, 9),
    st.sampled_from([-1.0, 0.0, 0.5, math.inf]),
    st.lists(st.text(min_size=1), max_size=3),
)
def test_a_question_survives_the_journey(server_round, reference, action, b, bound, left_out):
    ask = Ask("s", server_round, reference, action, b, b * server_round, bound, tuple(left_out))
    assert Ask.from_config(ConfigRecord({**ask.to_config(), "lr": 0.1})) == ask


@pytest.fixture
def reply():
    InProcessGrid(None, 1)  # so that messages can be made outside a run
    question = Message(RecordDict(), 1, "train")
    question.metadata.__dict__["_message_id"] = "1"
    return lambda **entries: Message(
        RecordDict({"learner": ConfigRecord(entries)} if entries else {}), reply_to=question
    )


@pytest.mark.parametrize("report", [Report(10, 0.5), Report(2.5, 0.0), Report(lost="it is gone")])
def test_a_report_survives_the_journey(reply, report):
    assert report_of(reply(**report.to_config())) == report


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({}, r"'learner' in the reply: expected a learner's report.* found \[\]"),
        ({"examples": 1}, "'distance' in the reply: expected .*found None"),
        (
            {"examples": 0, "distance": 1.0},
            "'examples' in the reply: expected a positive .*found 0",
        ),
        ({"examples": -1, "distance": 1.0}, "'examples' in the reply: expected .*found -1"),
        ({"examples": 1, "distance": -1.0}, "'distance' in the reply: expected .*found -1.0"),
        ({"examples": 1, "distance": math.nan}, "'distance' in the reply: expected .*found nan"),
        ({"examples": math.inf, "distance": 1.0}, "'examples' in the reply: expected .*found inf"),
        ({"examples": "1", "distance": 1.0}, "'examples' in the reply: expected .*found '1'"),
    ],
)
def test_a_malformed_report_is_refused(reply, entries, match):
    with pytest.raises(ColearnError, match=match):
        report_of(reply(**entries))


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("\ud800", r"\ud800"),
        ("a\nb", r"a\nb"),
        ("\x1b[31mé", r"\x1b[31mé"),
        ("x" * 9999, "x" * 500),
    ],
)
def test_a_reason_is_text_that_a_log_can_show(reply, said, shown):
    reason = report_of(reply(lost=said)).lost
    assert reason == shown
    reason.encode()
