"""The repository's ServerApp and ClientApp together, in process."""

import json

import numpy as np
import pytest
import torch
from flwr.app import Context, MetricRecord, RecordDict

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
    Quorum,
    Recovery,
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


def test_a_report_is_written_with_epsilon_and_the_run_config(output):
    text = (output / "report.html").read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert "epsilon" in text
    assert "num-participants" in text
    assert text.count("<figure>") >= 6


def test_an_unknown_tracker_is_refused_before_the_run(tmp_path):
    with pytest.raises(ColearnError, match="'tracker': expected 'tensorboard', or '' for none"):
        run(tmp_path, tracker="tensorbord")


def test_the_tracker_has_every_round(tmp_path):
    pytest.importorskip("tensorboardX")
    run(tmp_path, tracker="tensorboard", **{"num-server-rounds": 2})
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) == 2
    assert b"server_metrics/accuracy" in files[1].read_bytes()


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


# An annealed rate, the best model and an early end


def test_an_annealed_rate_is_in_the_record(tmp_path):
    run(tmp_path, anneal="cosine", **{"initial-epochs": 1, "total-epochs": 4})
    rates = [record.learning_rate for record in History.read(tmp_path / "history.jsonl")]
    cosine = [1, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2]
    assert rates == pytest.approx([0.05 * 0.25 * share for share in cosine])


def test_the_best_model_is_written_beside_the_last_and_the_run_ends_early(tmp_path, monkeypatch):
    models, numbers = [], [0.2, 0.5, 0.4, 0.3, 0.9, 0.9]

    def scripted(trainer):
        def evaluate(server_round, arrays):
            models.append({name: array.numpy() for name, array in arrays.items()})
            return MetricRecord({"accuracy": numbers[server_round]})

        return evaluate

    monkeypatch.setattr(server_app, "evaluate_with", scripted)
    keys = {"best-metric": "accuracy", "stop-patience": 2, "initial-epochs": 1}
    run(tmp_path, **keys)
    assert len(models) == 4
    with np.load(tmp_path / "best.npz") as best:
        assert set(best) == set(models[1])
        assert all(np.array_equal(best[name], models[1][name]) for name in best)
    assert all(np.array_equal(array, models[3][name]) for name, array in saved(tmp_path).items())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best"] == {"metric": "accuracy", "value": 0.5, "round": 1}
    assert "has not improved in the last 2 evaluations" in summary["stopped"]
    assert summary["accuracy"] == 0.3
    run(tmp_path, **keys)  # resumed: nothing is trained, and the files are the same
    assert len(models) == 4
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_without_a_metric_there_is_no_best_model(output):
    assert not (output / "best.npz").exists()
    assert not {"best", "stopped"} & set(json.loads((output / "summary.json").read_text()))


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


# Own data, and a server without any


def own_sites(tmp_path, k=2, **config):
    """A grid of sites, each with 40 images of its own, of which 4 are held out."""
    rng = np.random.default_rng(0)
    config = {**CONFIG, "task": "cifar10", "examples": 0, "num-participants": k, **config}
    grid = Grid(client_app, k, run_config=config)
    for node in grid.contexts:
        folder = tmp_path / f"site-{node}"
        folder.mkdir()
        x = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / "train.npz", x=x, y=np.arange(40) % 10)
        grid.contexts[node].node_config = {"data-dir": str(folder), "name": f"site-{node}"}
    return grid, config


def test_without_data_at_the_server_the_sites_evaluate_and_the_history_has_each(
    tmp_path, monkeypatch, flower_log
):
    monkeypatch.chdir(tmp_path)
    grid, config = own_sites(tmp_path)
    run(tmp_path / "out", grid, **{**config, "output-dir": str(tmp_path / "out")})
    assert "The server has no test set" in flower_log.text
    records = History.read(tmp_path / "out" / "history.jsonl").records
    assert all(record.server_metrics == {} for record in records)
    for record in records:
        sites = record.site_metrics
        assert sites.keys() == {"site-1", "site-2"}
        assert [site["num-examples"] for site in sites.values()] == [4, 4]
        mean = (sites["site-1"]["accuracy"] + sites["site-2"]["accuracy"]) / 2
        assert record.site_means["accuracy"] == pytest.approx(mean)
        assert record.evaluate_metrics["accuracy"] == pytest.approx(mean)  # of as many examples
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["sites"] == records[-1].site_metrics
    assert summary["accuracy"] == records[-1].evaluate_metrics["accuracy"]
    assert (tmp_path / "out" / "accuracy.png").exists()


def test_weighted_and_plain_means_differ_where_sites_have_different_numbers(tmp_path):
    from flwr_colearn.history import plain_means

    sites = [{"accuracy": 1.0, "num-examples": 30, "a": 1}, {"accuracy": 0.5, "num-examples": 10}]
    assert plain_means(sites) == {"accuracy": 0.75, "a": 1.0}  # over those that have it
    assert plain_means([]) == {}


def test_a_run_that_is_started_again_goes_on_and_a_finished_one_says_so(tmp_path, flower_log):
    config = {"output-dir": str(tmp_path), "run-name": "again"}
    run(tmp_path, **config, **{"num-server-rounds": 2})
    assert len(list((tmp_path / "checkpoints").glob("round-*.npz"))) == 3
    model = saved(tmp_path)
    run(tmp_path, **config, **{"num-server-rounds": 2})
    assert "nothing is left to train" in flower_log.text
    assert all(np.array_equal(model[name], array) for name, array in saved(tmp_path).items())
    flower_log.clear()
    run(tmp_path, **config, **{"num-server-rounds": 3})  # with a larger number it goes on
    assert "resumed after round 2" in flower_log.text
    assert "nothing is left" not in flower_log.text
    whole = tmp_path / "whole"
    run(whole)
    assert all(np.array_equal(saved(whole)[n], array) for n, array in saved(tmp_path).items())


def test_without_a_run_name_the_settings_decide_where_results_are(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    for seed in (0, 1):
        run("", seed=seed, **{"num-server-rounds": 1})
    folders = list((tmp_path / "colearn").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert folder.name.startswith("digits-clr-ile-")
        files = {path.name for path in folder.iterdir()}
        assert files == {
            "accuracy.png",
            "checkpoints",
            "history.jsonl",
            "model.npz",
            "report.html",
            "summary.json",
        }


def test_checkpoints_may_be_switched_off(tmp_path):
    run(tmp_path, checkpoints="", history="other.jsonl", **{"num-server-rounds": 1})
    assert not (tmp_path / "checkpoints").exists()
    assert len(History.read(tmp_path / "other.jsonl")) == 1


def test_pretrained_weights_are_what_the_run_starts_from(tmp_path):
    weights = server_trainer(ParticipantSettings(seed=5)).get_weights()
    np.savez(tmp_path / "start.npz", **weights)
    seen = []

    def watching(message, context):
        seen.append(message.content["arrays"].to_numpy_ndarrays()[0])
        return client_app(message, context)

    config = {"initial-weights": str(tmp_path / "start.npz"), "num-server-rounds": 1}
    run(tmp_path / "out", Grid(watching, K, run_config=CONFIG), **config)
    assert np.array_equal(seen[0], next(iter(weights.values())))


def test_weights_of_another_model_are_refused_before_the_run(tmp_path):
    np.savez(tmp_path / "start.npz", other=np.zeros(3))
    with pytest.raises(ColearnError, match="weights: expected those of"):
        run(tmp_path / "out", **{"initial-weights": str(tmp_path / "start.npz")})


def test_policy_quorum_and_participants_reach_the_strategy():
    settings = RunSettings(policy="wait", participants="delft, utrecht", num_participants=9)
    strategy = make_strategy(settings, server_trainer(ParticipantSettings()), None)
    assert strategy.num_participants == 2
    assert strategy.transport.recovery.policy == "wait"
    assert settings.participant_names == ("delft", "utrecht")
    assert RunSettings(quorum=3).recovery == Recovery(policy=Quorum(3))
    assert RunSettings().participant_names is None
    with pytest.raises(ColearnError, match="policy: expected 'fail', 'wait'"):
        _ = RunSettings(policy="never").recovery
