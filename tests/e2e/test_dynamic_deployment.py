"""Dynamic averaging on a real SuperLink: a process for every message, and a SuperNode that dies."""

import signal
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from flwr_colearn import Compression, DynamicAveraging, DynamicHistory, Float16, InProcessGrid
from tests.e2e.deployment import Deployment, await_that

APP = Path(__file__).parent / "online_app"
LEARNERS, ROUNDS, THRESHOLD = 2, 4, 0.3
BEFORE, IN_ALL = 2, 3  # rounds of the run whose server is killed


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    deployed = Deployment(tmp_path_factory.mktemp("dynamic"))
    try:
        deployed.start(sites=LEARNERS)
        yield deployed
    finally:
        deployed.stop()


@pytest.mark.timeout(1800)
def test_learners_keep_their_models_and_one_whose_supernode_died_begins_anew(deployment):
    output = deployment.folder / "output"
    output.mkdir()
    (output / "wait-3-1").touch()
    run = deployment.run(app=APP, output_dir=output, rounds=ROUNDS, threshold=THRESHOLD)
    await_that((output / "wait-3-1.done").exists, 600, "round 3")
    deployment.sites[1].kill(signal.SIGTERM)
    run.wait(timeout=600)
    records = DynamicHistory.read(output / "history.jsonl").records
    assert [record.round for record in records] == list(range(1, ROUNDS + 1))
    # Nobody's model is lost from message to message, though every message has a process of its own.
    assert [len(record.lost) for record in records] == [0, 0, 1, 0]
    assert records[2].lost == [{"participant": "partition-1", "reason": "it has no state"}]
    assert [len(record.restarts) for record in records] == [0, 0, 1, 0]
    assert {record.synchronised for record in records} == {"none", "full"}
    quiet = [record for record in records[1:2] if record.synchronised == "none"]
    assert quiet
    assert all(record.moved["models_up"] == record.moved["models_down"] == 0 for record in quiet)
    assert np.isfinite(np.load(output / "model.npy")).all()
    for record in records:
        print(record.round, round(record.seconds, 1), record.synchronised, record.restarts)


def uninterrupted(output, monkeypatch):
    """The history and the model of the same run in one process, with nothing happening to it."""
    monkeypatch.syspath_prepend(APP)
    from online_app.client_app import app

    grid = InProcessGrid(app, LEARNERS, run_config={"output-dir": str(output)})
    strategy = DynamicAveraging(
        THRESHOLD, 2, num_learners=LEARNERS, compression=Compression(Float16(), Float16()), seed=0
    )
    initial = ArrayRecord({"weights": Array(np.zeros((3, 1), np.float32))})
    result = strategy.start(grid, initial, num_rounds=IN_ALL)
    return strategy.history.records, result.arrays["weights"].numpy()


@pytest.mark.timeout(1800)
def test_a_server_that_is_killed_resumes_and_learners_have_kept_their_models(
    deployment, monkeypatch
):
    deployment.give_state_dirs()
    output = deployment.folder / "resumed"
    output.mkdir()
    config = {
        "app": APP,
        "output_dir": output,
        "rounds": IN_ALL,
        "threshold": THRESHOLD,
        "compression": "float16",
    }
    history = output / "history.jsonl"
    run = deployment.run(**config)
    await_that(
        lambda: history.exists() and history.read_text().count("\n") >= BEFORE, 300, "a round"
    )
    deployment.process_named("flwr-serverapp").kill()
    run.terminate()
    run.wait(timeout=60)
    assert not (output / "model.npy").exists()
    deployment.run(**config).wait(timeout=600)
    records = DynamicHistory.read(history).records
    expected, model = uninterrupted(output, monkeypatch)
    assert [record.lost for record in records] == [[]] * IN_ALL
    for record, wanted in zip(records, expected, strict=True):
        for name in ("round", "synchronised", "violations", "largest_distance", "cumulative_loss"):
            assert getattr(record, name) == getattr(wanted, name), (record.round, name)
    np.testing.assert_array_equal(np.load(output / "model.npy"), model)
    # After a round without any exchange the models are nowhere but with the learners.
    assert [record.synchronised for record in records] == ["full", "none", "full"]
