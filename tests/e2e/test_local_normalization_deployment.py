"""Statistics that stay at their sites: a process for every message, and a SuperNode that dies."""

import signal
from pathlib import Path

import numpy as np
import pytest

from flwr_colearn import History
from tests.e2e.deployment import Deployment, await_that

APP = Path(__file__).parent / "silo_app"
PARTICIPANTS, ROUNDS = 2, 3  # in the last one a SuperNode dies


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    deployed = Deployment(tmp_path_factory.mktemp("silos"))
    try:
        deployed.start(sites=PARTICIPANTS)
        yield deployed
    finally:
        deployed.stop()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("keeps_files", [False, True], ids=["context only", "state-dir"])
def test_statistics_that_stay_survive_messages_and_with_a_state_dir_their_supernode(
    keeps_files, deployment, tmp_path
):
    if keeps_files:
        deployment.give_state_dirs()
    (tmp_path / f"wait-{ROUNDS}-1").touch()
    run = deployment.run(app=APP, output_dir=tmp_path, participants=PARTICIPANTS, rounds=ROUNDS)
    await_that((tmp_path / f"wait-{ROUNDS}-1.done").exists, 600, "the last round")
    deployment.sites[1].kill(signal.SIGTERM)
    run.wait(timeout=600)
    records = History.read(tmp_path / "history.jsonl").records
    lost = [] if keeps_files else ["partition-1"]
    assert [record.normalization["reinitialised"] for record in records] == [[], [], lost]
    # Site k adds 1 + k to its own mean in every round, and never sees another's.
    own = [(0, 0), (1, 2), (2, 4 if keeps_files else 0)]
    assert [record.train_metrics["before"] for record in records] == [np.mean(o) for o in own]
    with np.load(tmp_path / "model.npz") as model:
        assert np.array_equal(model["weight"], np.full(2, 1.5 * ROUNDS, np.float32))
        assert not model["bn.running_mean"].any()
        assert np.array_equal(model["bn.running_var"], np.ones(3))
    weight, statistics = 128 + 2 * 4, 2 * (128 + 3 * 4)  # serialised
    sizes = [(record.bytes_down, record.bytes_up) for record in records]
    whole = PARTICIPANTS * (weight + statistics), PARTICIPANTS * weight
    assert sizes[0] == whole  # statistics go down once, with the first model, and never up
    assert sizes[1] == (PARTICIPANTS * weight, PARTICIPANTS * weight)
    assert sizes[2][1] == PARTICIPANTS * weight
