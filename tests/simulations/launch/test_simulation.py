"""``flwr run`` for real: each run starts a SuperLink and Ray, about 40 s on two cores."""

import json
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from flwr.app import Context, RecordDict

import simulations
from clients.app import app as client_app
from clients.settings import ParticipantSettings
from clients.tasks.registry import server_trainer
from flwr_colearn import ColearnError, History, InProcessGrid
from simulations import server_app
from simulations.launch import simulation
from simulations.launch.simulation import free_port, run_app, simulation_superlink, stop
from simulations.settings import RunSettings

ROOT = Path(simulations.__file__).resolve().parent.parent


def processes_of(home):
    """The processes that were started for this FLWR_HOME."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(home):
                found.append(process)
        except psutil.Error:  # it ended, or is not ours
            continue
    return found


def run(folder, supernodes, **config):
    """Run the app; return what it wrote and said, and the processes that it left behind."""
    home, output = folder / "home", folder / "output"
    options = {"output-dir": str(output), "total-epochs": 4, "devices": "cpu", **config}
    completed = run_app(ROOT, supernodes, options, home, timeout=400)
    _, alive = psutil.wait_procs(processes_of(home), timeout=60)
    return output, completed, alive


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    return run(tmp_path_factory.mktemp("five"), 5)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), 2, **{"wait-for-participants": 3.0})


# A run of five participants


def test_a_run_reaches_its_end(five):
    output, completed, _ = five
    assert completed.returncode == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["accuracy"] > 0.8  # chance is 0.1
    assert summary["local-epochs"] == sum(summary["epochs-path"]) == 4
    assert summary["fedavg-rounds"] == 4
    assert (output / "accuracy.png").exists()


def test_its_history_has_five_participants_in_every_round(five):
    records = History.read(five[0] / "history.jsonl").records
    summary = json.loads((five[0] / "summary.json").read_text())
    assert [record.local_epochs for record in records] == summary["epochs-path"]
    for record in records:
        assert len(set(record.participants)) == 5
        assert not record.refusals
        assert record.bytes_down == record.bytes_up > 0


def test_its_model_is_that_of_the_same_run_in_process(five, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.set_num_threads(1)  # as Flower's simulation gives each participant
    config = {**ParticipantSettings().to_config(), **RunSettings(total_epochs=4).to_config()}
    config["output-dir"] = str(tmp_path)
    context = Context(1, 0, {}, RecordDict(), config)
    server_app.main(InProcessGrid(client_app, 5, run_config=config), context)
    with np.load(five[0] / "model.npz") as ours, np.load(tmp_path / "model.npz") as theirs:
        assert (
            list(ours) == list(theirs) == list(server_trainer(ParticipantSettings()).get_weights())
        )
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_nothing_that_it_started_is_left(five):
    assert not five[2]


# Runs with other frameworks


@pytest.mark.parametrize("framework", ["keras", "slim"])
def test_a_run_with_tensorflow_and_compressed_models_reaches_its_end(framework, tmp_path):
    config = {"framework": framework, "num-participants": 2, "num-server-rounds": 1}
    codecs = {"compression-up": "int8-last-axis", "compression-down": "float16"}
    output, completed, alive = run(tmp_path, 2, **{**config, **codecs, "initial-epochs": 4})
    assert completed.returncode == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["epochs-path"] == [4]
    assert summary["accuracy"] > 0.5  # chance is 0.1
    [record] = History.read(output / "history.jsonl").records
    assert len(set(record.participants)) == 2
    with np.load(output / "model.npz") as model:
        settings = ParticipantSettings(framework=framework)
        assert list(model) == list(server_trainer(settings).get_weights())
        plain = 2 * sum(model[name].nbytes for name in model)
    assert 0.25 < record.bytes_up / plain < 0.30
    assert 0.49 < record.bytes_down / plain < 0.54
    assert not alive


# A run whose simulation has too few participants


def test_a_run_with_too_few_supernodes_says_how_to_start_enough(two):
    output, completed, _ = two
    # Flower's log breaks no lines, so the command can be copied as it is.
    assert "ColearnError: participants: expected 5, found 2 connected after 3 s" in completed.stdout
    assert "flwr run . --stream --federation-config" in completed.stdout
    assert '"num-supernodes=5 client-resources-num-cpus=1"' in completed.stdout
    assert not (output / "summary.json").exists()


def test_nothing_is_left_after_a_failed_run_either(two):
    assert not two[2]


# The parts


def test_a_superlink_that_does_not_start_is_an_error_that_names_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "flower", lambda program: shutil.which("false"))
    with (
        pytest.raises(ColearnError, match=r"found exit code 1; its log is .*superlink.log"),
        simulation_superlink(tmp_path),
    ):
        pass


def test_a_server_can_listen_on_a_free_port():
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as server:
        assert server.getsockname() == ("127.0.0.1", port)


def test_no_port_is_given_twice_nor_to_who_asks_for_any():
    given = [free_port() for _ in range(1000)]
    assert len(set(given)) == 1000
    with ExitStack() as stack:
        others = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(500)]
        assert not {other.getsockname()[1] for other in others} & set(given)


def test_stop_ends_a_process_and_what_it_started():
    sleep = "import time; time.sleep(600)"
    parent = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {sleep!r}]).pid"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{parent}, flush=True); {sleep}"], stdout=subprocess.PIPE, text=True
    )
    child = psutil.Process(int(process.stdout.readline()))
    stop(process)
    assert process.returncode is not None
    assert not child.is_running()
    process.stdout.close()


def test_stop_after_the_end_is_harmless():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    stop(process)
    stop(process)
