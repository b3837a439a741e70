"""What leaves a site of an exception: its type, and this plugin's own messages."""

import traceback

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import ColearnError, InProcessGrid, participant_mod
from flwr_colearn.aggregation import failure_of
from flwr_colearn.errors import ParticipantError

PATIENT = "Erika Mustermann, born 1964"


def failure(raises, kind="train", node_config=None):
    """Return the server's reason for the reply of a ClientApp that raises."""
    app = ClientApp(mods=[participant_mod])

    @app.train()
    def _(message, context):
        raises()

    grid = InProcessGrid(app, 1, node_configs=[node_config or {}])
    content = RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord({"server-round": 1})})
    [reply] = grid.send_and_receive([Message(content, 1, kind)])
    assert PATIENT not in reply.error.reason or node_config
    return failure_of(reply)


def raising(error):
    def raises():
        raise error

    return raises


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError(PATIENT), "RuntimeError"),
        (OutOfMemoryError(PATIENT), "OutOfMemoryError"),
        (KeyError(PATIENT), "KeyError"),
        (ValueError(f"No train function registered for {PATIENT}"), "ValueError"),
        (ExceptionGroup(PATIENT, [ValueError(PATIENT)]), "ExceptionGroup"),
        (SystemExit(PATIENT), "SystemExit"),
        (type(f"Error of\n{PATIENT}", (Exception,), {})(), "Error_of_Erika_Mustermann__born_1964"),
    ],
)
def test_only_the_type_of_an_exception_leaves_and_the_text_is_in_the_sites_log(
    error, kind, flower_log
):
    reason = failure(raising(error))
    assert reason.endswith(f"ParticipantError: {kind}: the text stays in the participant's log")
    assert PATIENT in flower_log.text


def test_our_own_messages_leave_without_the_exception_behind_them():
    def own():
        try:
            raise RuntimeError(PATIENT)
        except RuntimeError as error:
            raise ColearnError("train_set: expected at least one example, found none") from error

    assert failure(own).endswith("train_set: expected at least one example, found none")
    app = ClientApp(mods=[participant_mod])
    app.train()(lambda message, context: own())
    grid = InProcessGrid(app, 1)
    content = RecordDict({"config": ConfigRecord()})
    with pytest.raises(ColearnError, match="expected at least one example") as raised:
        app(Message(content, 1, "train"), grid.contexts[1])
    shown = "".join(traceback.format_exception(raised.value))
    assert "expected at least one example" in shown
    assert PATIENT not in shown  # what a simulation's traceback would have


def test_a_foreign_exception_has_no_trace_of_the_first_one():
    app = ClientApp(mods=[participant_mod])
    app.train()(lambda message, context: raising(RuntimeError(PATIENT))())
    grid = InProcessGrid(app, 1)
    with pytest.raises(ParticipantError, match="RuntimeError") as raised:
        app(Message(RecordDict({"config": ConfigRecord()}), 1, "train"), grid.contexts[1])
    assert PATIENT not in "".join(traceback.format_exception(raised.value))


def test_a_missing_function_is_named():
    reason = failure(None, kind="train.recalibrate")
    assert "No train function registered with name 'recalibrate'" in reason


@pytest.mark.parametrize(("value", "text"), [(True, PATIENT), (False, "RuntimeError: the text")])
def test_a_site_may_let_the_text_leave(value, text):
    reason = failure(raising(RuntimeError(PATIENT)), node_config={"exception-text": value})
    assert text in reason
    with_other = failure(raising(RuntimeError("x")), node_config={"exception-text": "no"})
    assert "'exception-text': expected true or false, found 'no'" in with_other


def test_without_the_mod_flower_sends_the_text():
    app = ClientApp()
    app.train()(lambda message, context: raising(RuntimeError(PATIENT))())
    [reply] = InProcessGrid(app, 1).send_and_receive([Message(RecordDict(), 1, "train")])
    assert PATIENT in failure_of(reply)
