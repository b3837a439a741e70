"""Secure aggregation on a real SuperLink: sites that end while they train, and in its stages."""

import signal
from pathlib import Path

import numpy as np
import pytest

from flwr_colearn import History
from tests.e2e.deployment import Deployment, await_that

APP = Path(__file__).parent / "secure_app"
K = 5


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    deployed = Deployment(tmp_path_factory.mktemp("secure"))
    try:
        deployed.start(sites=K)
        yield deployed
    finally:
        deployed.stop()


def run(deployment, output, **config):
    output.mkdir()
    return deployment.run(app=APP, output_dir=output, participants=K, **config)


@pytest.mark.timeout(1800)
def test_sites_that_end_in_training_and_in_every_stage(deployment):
    output = deployment.folder / "faulty"
    # One while it trains, one after it has shared its keys, one after it has sent its vector.
    ends = {
        ("train", 0): signal.SIGTERM,
        ("mask", 1): signal.SIGKILL,
        ("unmask", 2): signal.SIGTERM,
    }
    process = run(deployment, output, rounds=2)
    for stage, site in ends:
        (output / f"wait-{stage}-{site}").touch()
    for (stage, site), how in ends.items():
        await_that((output / f"wait-{stage}-{site}.done").exists, 600, f"stage {stage}")
        deployment.sites[site].kill(how)
    process.wait(timeout=900)
    first, second = History.read(output / "history.jsonl")
    names = [f"partition-{site}" for site in range(K)]
    assert first.participants == [name for name in names if name != "partition-1"]
    assert [each["participant"] for each in first.restarts] == ["partition-0"]
    assert {each["participant"] for each in first.absences} == {"partition-1", "partition-2"}
    assert all("secure aggregation" in each["reason"] for each in first.absences)
    assert second.participants == names
    assert second.absences == second.restarts == []
    # Site k adds 1 + k: the second one's model is not in the first sum.
    expected = np.mean([1, 3, 4, 5]) + np.mean([1, 2, 3, 4, 5])
    found = np.load(output / "model.npy")
    assert np.abs(found - expected).max() <= 2 * 8.0 * K / 2**31 * K + 1e-6
    print("seconds", [round(record.seconds, 1) for record in (first, second)])


@pytest.mark.timeout(900)
def test_the_round_of_a_run_without_faults_with_and_without_it(deployment):
    seconds = {}
    for secure in (False, True):
        output = deployment.folder / f"clean-{secure}"
        run(deployment, output, rounds=1, secure=int(secure)).wait(timeout=600)
        (record,) = History.read(output / "history.jsonl")
        assert len(record.participants) == K
        assert bool(record.secure) == secure
        assert np.abs(np.load(output / "model.npy") - 3.0).max() < 1e-5
        seconds[secure] = round(record.seconds, 1)
    print("seconds of a round, plain and secure", seconds)
