"""Dynamic averaging on a real SuperLink: a process for every message, and a SuperNode that dies."""

import signal
from pathlib import Path

import numpy as np
import pytest
from deployment import Deployment, await_that

from flwr_colearn import DynamicHistory

APP = Path(__file__).parent / "online_app"
LEARNERS, ROUNDS = 2, 6


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
    (output / "wait-5-1").touch()
    run = deployment.run(app=APP, output_dir=output, rounds=ROUNDS, threshold=0.3)
    await_that((output / "wait-5-1.done").exists, 600, "round 5")
    deployment.sites[1].kill(signal.SIGTERM)
    run.wait(timeout=600)
    records = DynamicHistory.read(output / "history.jsonl").records
    assert [record.round for record in records] == list(range(1, ROUNDS + 1))
    # Nobody's model is lost from message to message, though every message has a process of its own.
    assert [len(record.lost) for record in records] == [0, 0, 0, 0, 1, 0]
    assert records[4].lost == [{"participant": "partition-1", "reason": "it has no state"}]
    assert [len(record.restarts) for record in records] == [0, 0, 0, 0, 1, 0]
    assert {record.synchronised for record in records} == {"none", "full"}
    quiet = [record for record in records[1:4] if record.synchronised == "none"]
    assert quiet
    assert all(record.moved["models_up"] == record.moved["models_down"] == 0 for record in quiet)
    assert np.isfinite(np.load(output / "model.npy")).all()
    for record in records:
        print(record.round, round(record.seconds, 1), record.synchronised, record.restarts)
