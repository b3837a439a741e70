"""A ClientApp without the mod, or without an evaluation: the log says what to write."""

import pytest
from flwr.app import ConfigRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flwr_colearn import (
    BFloat16,
    CoLearn,
    ColearnError,
    Compression,
    Float16,
    InProcessGrid,
    Int8,
    Quorum,
    Recovery,
    Transport,
    legacy,
    numpy_client_app,
    participant_mod,
    run,
)
from tests.dropin.shapes import INITIAL, Participant, answer, app_of, filled, record_of, run_legacy

RULES = {"local_epochs": 1, "learning_rate": 0.1}
ADD_THE_MOD = r"add participant_mod to the ClientApp's mods: ClientApp\(mods=\[participant_mod\]\)"
CODECS = [
    Compression(up=Int8()),
    Compression(up=Float16(), down=Float16()),
    Compression(down=BFloat16()),
]


def forgotten(calls):
    """A ClientApp without the mod that counts the models which reach it."""
    app = ClientApp()
    inner = app_of([1] * 9, mod=False)

    @app.train()
    def train(message, context):
        if "arrays" in message.content:
            calls.append(context.node_id)
        return inner(message, context)

    return app


@pytest.mark.parametrize("codecs", CODECS, ids=str)
def test_without_the_mod_a_participant_is_refused_before_it_receives_the_model(codecs):
    calls = []
    strategy = CoLearn(2, compression=codecs, **RULES)
    with pytest.raises(ColearnError, match=ADD_THE_MOD):
        strategy.start(InProcessGrid(forgotten(calls), 2), record_of(INITIAL))
    assert not calls


@pytest.mark.parametrize("codecs", CODECS, ids=str)
def test_any_strategy_on_a_connected_grid_gives_the_same_reason(codecs):
    calls, transport = [], Transport(compression=codecs)
    with pytest.raises(ColearnError, match=ADD_THE_MOD):
        run(FedAvg(), InProcessGrid(forgotten(calls), 2), record_of(INITIAL), transport=transport)
    with pytest.raises(ColearnError, match=ADD_THE_MOD):
        FedAvg().start(
            transport.connect(InProcessGrid(forgotten(calls), 2)),
            record_of(INITIAL),
            train_config=ConfigRecord({"local-epochs": 1, "learning-rate": 0.1}),
        )
    assert not calls


@pytest.mark.parametrize("codecs", CODECS, ids=str)
def test_without_recovery_the_reason_is_the_same(codecs):
    strategy = CoLearn(2, compression=codecs, recovery=None, **RULES)
    with pytest.raises(ColearnError, match=ADD_THE_MOD) as raised:
        strategy.start(InProcessGrid(forgotten([]), 2), record_of(INITIAL))
    assert "Unsupported serialization" not in str(raised.value)


def test_under_a_quorum_the_others_train():
    with_mod, calls = app_of([1] * 3), []
    without = forgotten(calls)

    class Mixed(ClientApp):
        def __call__(self, message, context):
            return (without if context.node_id == 3 else with_mod)(message, context)

    recovery = Recovery(policy=Quorum(2), pause=0.0)
    strategy = CoLearn(3, compression=CODECS[1], recovery=recovery, fraction_evaluate=0.0, **RULES)
    strategy.start(InProcessGrid(Mixed(), 3), record_of(INITIAL), num_rounds=2)
    for record in strategy.history:
        assert record.participants == ["partition-0", "partition-1"]
        [refusal] = record.refusals
        assert "add participant_mod" in refusal["reason"]
    assert not calls


def test_without_compression_no_mod_is_needed():
    strategy = CoLearn(2, fraction_evaluate=0.0, **RULES)
    strategy.start(InProcessGrid(forgotten([]), 2), record_of(INITIAL), num_rounds=1)
    assert len(strategy.history.records[0].participants) == 2


def test_a_site_with_the_mod_and_an_invalid_name_is_not_taken_for_one_without():
    grid = InProcessGrid(app_of([1, 1]), 2, node_configs=[{"name": "a\nb"}, {}])
    strategy = CoLearn(2, compression=CODECS[1], **RULES)
    with pytest.raises(ColearnError, match="name of a participant") as raised:
        strategy.start(grid, record_of(INITIAL))
    assert "add participant_mod" not in str(raised.value)


def test_a_site_with_the_mod_and_no_name_is_not_taken_for_one_without():
    app = ClientApp(mods=[participant_mod])

    @app.train()
    def train(message, context):
        return answer(message, filled(1))

    grid = InProcessGrid(app, 2)
    for context in grid.contexts.values():
        context.node_config = {}
    strategy = CoLearn(2, compression=CODECS[1], fraction_evaluate=0.0, **RULES)
    strategy.start(grid, record_of(INITIAL), num_rounds=1)
    assert len(strategy.history.records[0].participants) == 2


# Without an evaluation


def clients_of(kind, mod):
    if kind == "message":
        return app_of([1] * 3, mod=mod, evaluates=False)

    def client_fn(context):
        return Participant(context.node_config["partition-id"], [1] * 3, []).to_client()

    return numpy_client_app(client_fn)


@pytest.mark.parametrize("mod", [True, False])
@pytest.mark.parametrize("kind", ["message", "numpy"])
@pytest.mark.parametrize("own", [True, False], ids=["CoLearn", "FedAvg"])
def test_without_evaluate_the_log_says_once_what_to_write(own, kind, mod, flower_log):
    grid = InProcessGrid(clients_of(kind, mod), 3)
    if own:
        CoLearn(3, **RULES).start(grid, record_of(INITIAL), num_rounds=3)
    else:
        config = ConfigRecord({"server-round": 1, "local-epochs": 1, "learning-rate": 0.1})
        run(FedAvg(min_train_nodes=3), grid, record_of(INITIAL), 3, train_config=config)
    assert flower_log.text.count("fraction_evaluate=0") == 1
    # The sites' own logs: asked once, and not in every round.
    assert flower_log.text.count("The ClientApp of node") == 3


def test_with_evaluate_there_is_nothing_to_say(flower_log):
    CoLearn(2, **RULES).start(InProcessGrid(app_of([1, 1]), 2), record_of(INITIAL), num_rounds=2)
    assert "fraction_evaluate" not in flower_log.text.replace("fraction_evaluate is", "")


def test_the_legacy_api_says_it_once_too(flower_log):
    run_legacy(legacy.CoLearn(2, **RULES), [1, 1], num_rounds=3)
    assert flower_log.text.count("fraction_evaluate=0") == 1
