"""The repository's ServerApp and ClientApp together, in process."""

import json

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from clients.app import app as client_app
from clients.settings import ParticipantSettings
from clients.tasks.registry import server_trainer
from flwr_colearn import (
    CoLearn,
    ColearnError,
    Compression,
    CyclicalRate,
    Float16,
    History,
    IncreasingEpochs,
    Int8,
)
from flwr_colearn import InProcessGrid as Grid
from flwr_colearn.torch import BatchRenormLayer
from simulations import server_app
from simulations.server_app import evaluate_with, make_strategy, save_model, to_record
from simulations.settings import RunSettings

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

K = 3
CONFIG = {
    **ParticipantSettings(examples=150).to_config(),
    **RunSettings(
        num_participants=K, initial_epochs=2, total_epochs=5, epsilon=0.0, wait_for_participants=0.0
    ).to_config(),
}


@pytest.fixture(autouse=True, scope="module")
def _cpu():
    """Without a GPU, runs repeat themselves bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def run(output, grid=None, **overrides):
    config = {**CONFIG, "output-dir": str(output), **overrides}
    context = Context(1, 0, {}, RecordDict(), config)
    server_app.main(grid or Grid(client_app, K, run_config=config), context)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The output folder of a run of three rounds: 2, 2 and the 1 local epoch that is left."""
    folder = tmp_path_factory.mktemp("run")
    run(folder)
    return folder


def test_the_summary_says_what_was_reached(output):
    history = History.read(output / "history.jsonl")
    model = sum(
        len(array.data) for array in to_record(server_trainer(ParticipantSettings())).values()
    )
    assert json.loads((output / "summary.json").read_text()) == {
        "accuracy": history.records[-1].server_metrics["accuracy"],
        "rounds": 3,
        "local-epochs": 5,
        "epochs-path": [2, 2, 1],
        "bytes": 3 * 2 * K * model,
        "fedavg-rounds": 3,  # 5 local epochs, 2 a round
        "fedavg-bytes": 3 * 2 * K * model,
    }


def test_the_history_has_every_round_with_the_servers_evaluation(output):
    records = History.read(output / "history.jsonl").records
    assert [record.epochs_done for record in records] == [2, 4, 5]
    assert [record.server_metrics["num-examples"] for record in records] == [500] * 3
    assert records[-1].server_metrics["accuracy"] > 0.3  # chance is 0.1
    assert all(len(set(record.participants)) == K for record in records)


def test_the_model_is_the_one_that_was_evaluated_last(output):
    trainer = server_trainer(ParticipantSettings())
    with np.load(output / "model.npz") as arrays:
        assert list(arrays) == list(trainer.model.state_dict())
        trainer.set_weights(dict(arrays))
    record = History.read(output / "history.jsonl").records[-1]
    assert trainer.evaluate() == record.server_metrics


def test_a_picture_is_drawn(output):
    assert (output / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_bytes_of_federated_averaging_are_those_of_a_round_every_t0_epochs(tmp_path):
    # An infinite epsilon doubles T every round: 1 and then the 2 of 3 epochs that are left.
    run(tmp_path, **{"initial-epochs": 1, "total-epochs": 3, "epsilon": 1e9})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["epochs-path"], summary["fedavg-rounds"]) == ([1, 2], 3)
    assert summary["fedavg-bytes"] == summary["bytes"] * 3 // 2


def test_a_run_stops_after_its_rounds_too(tmp_path):
    run(tmp_path, **{"num-server-rounds": 1})
    assert json.loads((tmp_path / "summary.json").read_text())["epochs-path"] == [2]


def test_participants_evaluate_if_asked_to(tmp_path):
    run(tmp_path, **{"fraction-evaluate": 1.0, "num-server-rounds": 1})
    [record] = History.read(tmp_path / "history.jsonl")
    assert 0 < record.evaluate_metrics["accuracy"] <= 1


def test_a_run_without_its_participants_ends_with_the_reason_and_no_summary(tmp_path):
    with pytest.raises(ColearnError, match=f"participants: expected {K}, found 2"):
        run(tmp_path, Grid(client_app, 2, run_config=CONFIG))
    assert not (tmp_path / "summary.json").exists()


def test_a_run_that_fails_later_leaves_the_model_of_the_last_round(tmp_path, output):
    def leaving(message, context):
        reply = client_app(message, context)
        if context.node_id == K and message.content["config"]["server-round"] == 2:
            del grid.contexts[K]
        return reply

    grid = Grid(leaving, K, run_config=CONFIG)
    with pytest.raises(ColearnError, match=f"participants: expected {K}, found 2"):
        run(tmp_path, grid)
    assert not (tmp_path / "summary.json").exists()
    trainer = server_trainer(ParticipantSettings())
    with np.load(tmp_path / "model.npz") as arrays:
        trainer.set_weights(dict(arrays))
    second = History.read(output / "history.jsonl").records[1]
    assert trainer.evaluate() == second.server_metrics


def test_the_ensemble_is_no_strategy():
    with pytest.raises(ColearnError, match="'arm': expected one whose participants exchange"):
        make_strategy(RunSettings(arm="ensemble"), server_trainer(ParticipantSettings()), None)


def test_settings_become_the_strategy(flower_log):
    settings = RunSettings(
        num_participants=4,
        initial_epochs=3,
        epsilon=0.2,
        learning_rate=0.3,
        decay=0.5,
        compression_up="int8",
        compression_down="float16",
    )
    strategy = make_strategy(settings, server_trainer(ParticipantSettings()), None)
    assert isinstance(strategy, CoLearn)
    assert strategy.min_train_nodes == strategy.min_available_nodes == 4
    assert strategy.fraction_evaluate == 0.0
    assert strategy.transport.compression == Compression(up=Int8(), down=Float16())
    strategy.summary()
    assert str(IncreasingEpochs(3, epsilon=0.2)) in flower_log.text
    assert str(CyclicalRate(0.3, 0.5)) in flower_log.text


def test_weights_travel_by_name_and_are_evaluated_as_they_are():
    trainer = server_trainer(ParticipantSettings(seed=1))
    record = to_record(trainer)
    assert list(record) == list(trainer.model.state_dict())
    evaluator = server_trainer(ParticipantSettings(seed=2))
    metrics = evaluate_with(evaluator)(1, record)
    assert dict(metrics) == trainer.evaluate()
    torch.testing.assert_close(
        evaluator.model.state_dict(), trainer.model.state_dict(), rtol=0, atol=0
    )


def test_a_saved_model_keeps_types_and_scalars(tmp_path):
    class Result:
        arrays = to_record(server_trainer(ParticipantSettings()))

    save_model(Result, tmp_path / "new")
    with np.load(tmp_path / "new" / "model.npz") as arrays:
        assert set(arrays) == set(Result.arrays)
        for name, array in Result.arrays.items():
            assert arrays[name].dtype == array.numpy().dtype
            assert np.array_equal(arrays[name], array.numpy())


# Normalization schemes by name


def saved(folder):
    with np.load(folder / "model.npz") as arrays:
        return dict(arrays)


def test_batch_renorm_by_name_is_what_both_sides_train_with(tmp_path):
    # 125 batches for each participant: after 100 the limits of batch renorm begin to open.
    config = {"batch-size": 2, "examples": 150}
    for name in ("pooled", "batch-renorm"):
        run(tmp_path / name, **config, normalization=name)
    pooled, renorm = saved(tmp_path / "pooled"), saved(tmp_path / "batch-renorm")
    assert list(pooled) == list(renorm)
    assert renorm["1.num_batches_tracked"] == pooled["1.num_batches_tracked"] == 125
    assert np.abs(pooled["0.weight"] - renorm["0.weight"]).max() > 1e-5
    evaluator = server_trainer(ParticipantSettings(normalization="batch-renorm"))
    assert {type(module) for module in evaluator.model.modules()} >= {BatchRenormLayer}
    evaluator.set_weights(renorm)
    last = History.read(tmp_path / "batch-renorm" / "history.jsonl").records[-1]
    assert evaluator.evaluate() == last.server_metrics


def test_local_statistics_by_name_never_leave_and_the_summary_says_what_that_means(tmp_path):
    run(tmp_path, normalization="local-statistics", **{"fraction-evaluate": 1.0})
    initial = server_trainer(ParticipantSettings()).get_weights()
    model = saved(tmp_path)
    assert all(np.array_equal(model[n], initial[n]) == ("running" in n or "tracked" in n)
               for n in model)  # fmt: skip
    first, *_, last = History.read(tmp_path / "history.jsonl").records
    assert last.bytes_down < first.bytes_down
    assert last.evaluate_metrics["accuracy"] > 0.3  # chance is 0.1
    assert (
        "test at the participants"
        in json.loads((tmp_path / "summary.json").read_text())["shared-model"]
    )


def test_frozen_by_name_with_keras(tmp_path):
    pytest.importorskip("tensorflow")
    config = {"framework": "keras", "normalization": "frozen", "frozen-after": 1}
    run(tmp_path / "one", **config, **{"num-server-rounds": 1})
    run(tmp_path / "all", **config)
    one, whole = saved(tmp_path / "one"), saved(tmp_path / "all")
    assert len([name for name in one if "moving" in name]) == 4
    for name in one:
        assert np.array_equal(one[name], whole[name]) == ("moving" in name), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"normalization": "batchnorm"}, "normalization: expected one of average, .*'batchnorm'"),
        ({"normalization": "synchronised"}, "layers that compute together need SynchronousSGD"),
        ({"normalization": "frozen", "frozen-after": 0}, "after of Frozen: expected"),
    ],
    ids=str,
)
def test_schemes_that_cannot_be_had_are_refused(tmp_path, config, message):
    with pytest.raises(ColearnError, match=message):
        run(tmp_path, **config)
