"""A run that ends with an error: the last completed round's model is where the error says."""

import traceback

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg

from flwr_colearn import (
    CoLearn,
    ColearnError,
    InProcessGrid,
    Recovery,
    legacy,
    run,
)
from tests.dropin.shapes import INITIAL, app_of, record_of, run_legacy

RULES = {"local_epochs": 1, "learning_rate": 0.1}
NO_RESTARTS = Recovery(max_restarts=0)


def losing(after):
    """A grid on which a participant is lost after so many rounds."""
    app = app_of([1, 1])

    def mod(message, context, call_next):
        config = message.content.get("config", {})
        if config.get("server-round", 0) > after and message.metadata.message_type == "train":
            raise OSError("the disk is gone")
        return call_next(message, context)

    grid = InProcessGrid(app, 2)
    grid.client_app = lambda message, context: mod(message, context, app)
    return grid


CONFIG = {"local-epochs": 1, "learning-rate": 0.1}
LOST = "the disk is gone|the text stays"
START = {
    "CoLearn": lambda grid, **more: CoLearn(2, recovery=NO_RESTARTS, **RULES).start(
        grid, record_of(INITIAL), num_rounds=5, **more
    ),
    "any strategy": lambda grid, **more: run(
        FedAvg(fraction_evaluate=0.0),
        grid,
        record_of(INITIAL),
        num_rounds=5,
        train_config=ConfigRecord(CONFIG),
        **more,
    ),
}


def first_number(result):
    return float(result.arrays["fc.weight"].numpy()[0, 0])


@pytest.mark.parametrize("start", START)
def test_the_error_says_how_to_get_the_model_of_the_last_completed_round(start):
    with pytest.raises(ColearnError, match=LOST) as raised:
        START[start](losing(after=3))
    text = str(raised.value)
    assert "The model of round 3 is not lost" in text
    assert "error.result.arrays" in text
    assert text in "".join(traceback.format_exception(raised.value))
    assert first_number(raised.value.result) == 3.0


@pytest.mark.parametrize("start", START)
def test_what_the_error_says_is_code_that_saves_the_model(start, tmp_path):
    try:
        result = START[start](losing(after=2))
    except ColearnError as error:
        result = error.result
    np.savez(tmp_path / "model.npz", **{n: a.numpy() for n, a in result.arrays.items()})
    with np.load(tmp_path / "model.npz") as saved:
        assert float(saved["fc.weight"][0, 0]) == 2.0


def test_in_the_first_round_there_is_no_model_to_speak_of():
    with pytest.raises(ColearnError, match=LOST) as raised:
        START["CoLearn"](losing(after=0))
    assert "is not lost" not in str(raised.value)
    assert first_number(raised.value.result) == 0.0


def test_with_checkpoints_it_names_the_folder_too(tmp_path):
    strategy = CoLearn(2, recovery=NO_RESTARTS, checkpoints=tmp_path / "here", **RULES)
    with pytest.raises(ColearnError, match=LOST) as raised:
        strategy.start(losing(after=2), record_of(INITIAL), num_rounds=5)
    assert f"{tmp_path / 'here'}, where resume='auto' goes on" in str(raised.value)
    # A resumed run that ends in the same round has the model of the same round.
    with pytest.raises(ColearnError, match=LOST) as raised:
        strategy.start(losing(after=2), record_of(INITIAL), num_rounds=5, resume="auto")
    assert "The model of round 2 is not lost" in str(raised.value)
    assert first_number(raised.value.result) == 2.0


def test_an_evaluation_that_raises_is_an_exception_with_the_model_too():
    def evaluate(server_round, arrays):
        if server_round == 2:
            raise ZeroDivisionError("no images")

    with pytest.raises(ZeroDivisionError) as raised:
        START["CoLearn"](losing(after=9), evaluate_fn=evaluate)
    assert "The model of round 2 is not lost" in "".join(traceback.format_exception(raised.value))
    assert first_number(raised.value.result) == 2.0


def test_the_legacy_api_says_it_too():
    def gone(calls):
        if calls > 4:
            raise OSError("the disk is gone")
        return 1

    strategy = legacy.CoLearn(2, recovery=NO_RESTARTS, fraction_evaluate=0.0, **RULES)
    with pytest.raises(ColearnError, match="The model of round 2 is not lost") as raised:
        run_legacy(strategy, [gone, gone], num_rounds=5)
    assert float(raised.value.result.arrays["0"].numpy()[0, 0]) == 2.0
