"""The repository's app in a real deployment, sites with data of their own, and faults."""

import json
import shutil
import signal

import numpy as np
import pytest
from sklearn.datasets import load_digits

from flwr_colearn import History
from tests.e2e.deployment import ROOT, Deployment, Site, await_that

ROUNDS = 3
SITES = ["delft", "leiden", "utrecht"]
TIME_LIMIT = 60.0
CONFIG = {
    "task": "tests.e2e.faulty:task",
    "model": "tests.e2e.faulty:net",
    "num_participants": 3,
    "num_server_rounds": ROUNDS,
    "total_epochs": 0,
    "epsilon": 0.9,
    "max_local_epochs": 2,
    "fraction_evaluate": 0.0,
}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    deployed = Deployment(tmp_path_factory.mktemp("deployment"))
    try:
        deployed.start_servers()
        digits = load_digits()
        for index, name in enumerate(SITES):
            data = deployed.folder / name
            data.mkdir()
            own = slice(300 * index, 300 * index + 100 * (index + 1))
            np.savez(data / "train.npz", x=digits.images[own], y=digits.target[own])
            deployed.add_site(f'name="{name}" data-dir="{data}"')
        deployed.await_nodes(len(SITES))
        yield deployed
    finally:
        deployed.stop()


def run(deployment, name, faults=None, **config):
    """Start a run for whose rounds the sites have orders, as {(round, site): fault}."""
    for site in SITES:
        data = deployment.folder / site
        shutil.rmtree(data / "faults", ignore_errors=True)
        (data / "faults").mkdir()
    for (server_round, site), fault in (faults or {}).items():
        (deployment.folder / SITES[site] / "faults" / f"round-{server_round}").write_text(fault)
    return deployment.run(ROOT, **{**CONFIG, "run_name": name, **config})


def folder_of(deployment, name):
    """The run's folder, in the FLWR_HOME of the SuperLink."""
    return deployment.folder / "home" / "colearn" / name


def model_of(folder):
    with np.load(folder / "model.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def clean(deployment):
    """The run without faults: its model and history."""
    run(deployment, "clean").wait(timeout=600)
    folder = folder_of(deployment, "clean")
    return model_of(folder), History.read(folder / "history.jsonl")


def test_a_clean_run_has_every_participant_in_every_round(clean):
    _, history = clean
    assert [record.round for record in history] == list(range(1, ROUNDS + 1))
    for record in history:
        assert record.participants == SITES
        assert record.restarts == record.refusals == record.absences == []


def test_a_site_says_what_it_found_in_its_folder(deployment, clean):
    for index, site in enumerate(deployment.sites):
        found = 100 * (index + 1)
        text = f"{found - found // 10} training examples in 10 classes in {deployment.folder}"
        assert text in site.log.read_text()


@pytest.mark.timeout(1800)
def test_a_run_with_a_fault_in_every_round_ends_with_the_same_model(deployment, clean):
    def await_fault(server_round, site):
        done = deployment.folder / SITES[site] / "faults" / f"round-{server_round}.done"
        await_that(done.exists, 600, f"the fault of round {server_round} at {SITES[site]}")

    faults = {
        (1, 0): "raise", (1, 1): "kill", (1, 2): "hang",
        (2, 0): "wait", (2, 1): "wait", (2, 2): "poison",
        (3, 2): "wait",
    }  # fmt: skip
    first = run(deployment, "faulty", faults, timeout=TIME_LIMIT)
    await_fault(2, 0)
    deployment.sites[0].kill(signal.SIGTERM)
    await_fault(2, 1)
    deployment.sites[1].kill(signal.SIGKILL)
    await_fault(3, 2)
    deployment.process_named("flwr-serverapp").kill()
    first.terminate()
    first.wait(timeout=60)
    folder = folder_of(deployment, "faulty")
    assert not (folder / "model.npz").exists()
    # The same command again: the run's name is that of its checkpoints.
    deployment.run(ROOT, **{**CONFIG, "run_name": "faulty", "timeout": TIME_LIMIT}).wait(
        timeout=600
    )

    model, history = clean
    found = model_of(folder)
    assert found.keys() == model.keys()
    assert all(np.array_equal(found[name], array) for name, array in model.items())
    faulty = History.read(folder / "history.jsonl")
    assert [record.round for record in faulty] == list(range(1, ROUNDS + 1))
    for record, expected in zip(faulty, history, strict=True):
        assert record.participants == SITES
        assert record.relative_change == expected.relative_change
        assert record.local_epochs == expected.local_epochs
    restarts = [
        {entry["participant"]: entry["reason"] for entry in record.restarts} for record in faulty
    ]
    assert [sorted(reasons) for reasons in restarts] == [SITES, SITES, []]
    # A model far from all others, which the guard refuses.
    assert "norm" in restarts[1]["utrecht"]
    # Only the type of an exception reaches the server (docs/security.md says so).
    reason = restarts[0]["delft"]
    assert "RuntimeError: the text stays in the participant's log" in reason
    assert "injected fault" not in reason
    for record, expected in zip(faulty, history, strict=True):
        print(record.round, expected.seconds, record.seconds, json.dumps(record.restarts))


@pytest.mark.timeout(900)
def test_a_hang_in_an_evaluation_ends_at_the_time_limit_and_costs_no_round(deployment):
    process = run(deployment, "evaluated", num_server_rounds=2, fraction_evaluate=1.0, timeout=30.0)
    # The counter of rounds travels with the model, so that the evaluation knows its number.
    (deployment.folder / "leiden" / "faults" / "evaluation-1").write_text("hang")
    process.wait(timeout=600)
    first, second = History.read(folder_of(deployment, "evaluated") / "history.jsonl")
    assert first.participants == second.participants == SITES
    assert sorted(first.site_metrics) == ["delft", "utrecht"]
    assert sorted(second.site_metrics) == SITES
    print("evaluation", second.seconds, first.seconds)


def test_an_unregistered_supernode_is_refused(deployment):
    deployment.run_script("site-key.sh", deployment.folder / "stranger")
    stranger = Site(deployment, 5, key=deployment.folder / "stranger" / "site.key").start()
    try:
        await_that(lambda: stranger.process is not None, 10, "a SuperNode")
        stranger.process.wait(timeout=60)
        assert stranger.process.returncode != 0
        assert deployment.nodes_online() == len(SITES)
    finally:
        stranger.stop()


def test_a_superlink_with_another_certificate_is_refused(deployment):
    deployment.run_script("certificates.sh", deployment.folder / "impostor", "127.0.0.1")
    deployment.run_script("site-key.sh", deployment.folder / "deceived")
    deployment.register(deployment.folder / "deceived" / "site.key.pub")
    site = Site(
        deployment,
        6,
        key=deployment.folder / "deceived" / "site.key",
        ca=deployment.folder / "impostor" / "ca.crt",
    ).start()
    try:
        await_that(lambda: "CERTIFICATE_VERIFY_FAILED" in site.log.read_text(), 60, "a refusal")
        assert deployment.nodes_online() == len(SITES)
    finally:
        site.stop()
