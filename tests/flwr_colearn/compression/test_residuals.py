"""The residual when a model from the server replaces the participant's own."""

import pytest
from flwr.app import ConfigRecord, RecordDict

from flwr_colearn.compression import AVERAGE_OF
from flwr_colearn.compression.residuals import RESIDUAL, Residual


@pytest.mark.parametrize(
    ("request_round", "average_of", "session", "left"),
    [
        (3, 3, "s", {"settled": True}),  # the average of the last reply lacks its rounding error
        (4, 3, "s", {"settled": True}),
        (4, 2, "s", None),  # another model, in which the participant's own is not
        (4, 3, "other", None),
        (3, 2, "s", {"settled": False}),  # a repeated round, which begins as it did before
    ],
)
def test_a_model_of_the_server_settles_or_drops_the_residual(
    request_round, average_of, session, left, flower_log
):
    kept = {"round": 3, "session": "s", "settled": False}
    state = RecordDict({RESIDUAL: ConfigRecord(kept)})
    request = {"round": request_round, "session": session, AVERAGE_OF: average_of}
    Residual(state, ConfigRecord(request)).note_average()
    assert (dict(state[RESIDUAL]) if RESIDUAL in state else None) == (left and {**kept, **left})
    assert ("is dropped with the model" in flower_log.text) == (left is None)
