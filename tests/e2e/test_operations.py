"""The life of a federation, by the commands of docs/operations.md, which this file runs."""

import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys

import numpy as np
import pytest

from flwr_colearn import History
from simulations.launch.simulation import stop
from tests.e2e.deployment import Deployment, Site, await_that, node_of

SITES = 2
BACKUP = (
    "import sqlite3, sys; "
    "sqlite3.connect(sys.argv[1]).backup(sqlite3.connect(sys.argv[2]))"
)  # fmt: skip


def started(folder):
    """A deployment of its sites, for a fixture."""
    deployed = Deployment(folder)
    try:
        deployed.start(sites=SITES)
        yield deployed
    finally:
        deployed.stop()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """Shared by the tests after which all its sites are online."""
    yield from started(tmp_path_factory.mktemp("operations"))


@pytest.fixture
def own_deployment(tmp_path):
    yield from started(tmp_path)


def nodes(deployment):
    """The SuperNodes by status, as the operator sees them."""
    text = deployment.flwr("supernode", "list", "site", "--format", "json")
    return {int(node["node-id"]): node["status"] for node in json.loads(text)["nodes"]}


def train(deployment, name, participants=SITES):
    """A run of one round; its history."""
    output = deployment.folder / name
    (output / "faults").mkdir(parents=True)
    deployment.run(
        output_dir=output, faults_dir=output / "faults", rounds=1, participants=participants
    ).wait(timeout=300)
    assert np.isfinite(np.load(output / "model.npy")).all()
    return History.read(output / "history.jsonl").records


def certificate_of(address):
    """The serial number of the certificate that a server shows."""
    context = ssl._create_unverified_context()
    with (
        socket.create_connection(tuple(address.split(":"))) as plain,
        context.wrap_socket(plain) as tls,
    ):
        return ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True))


def test_a_site_is_revoked_and_another_gets_a_new_key(own_deployment):
    deployment = own_deployment
    first, second = deployment.sites
    before = set(nodes(deployment))
    # Revoked: the operator unregisters the site's node.
    first_id = node_of(first)
    process = first.process
    deployment.flwr("supernode", "unregister", first_id, "site")
    process.wait(timeout=60)
    await_that(lambda: first.process is not process, 30, "a new start of the revoked site")
    first.process.wait(timeout=60)
    assert first.process.returncode != 0
    assert nodes(deployment)[first_id] == "unregistered" or first_id not in nodes(deployment)
    # A new key: it is registered before the old one is unregistered.
    old = node_of(second)
    deployment.run_script("site-key.sh", second.home / "new")
    deployment.register(second.home / "new" / "site.key.pub")
    shutil.copy(second.home / "new" / "site.key", second.home / "site.key")
    second.kill(signal.SIGTERM)
    await_that(
        lambda: "online" in [s for n, s in nodes(deployment).items() if n not in before],
        120, "the site online under its new key",
    )  # fmt: skip
    deployment.flwr("supernode", "unregister", old, "site")
    (record,) = train(deployment, "renewed", participants=1)
    assert record.participants == ["partition-1"]


def test_certificates_are_renewed_and_sites_change_nothing(deployment):
    folder = deployment.folder / "certificates"
    authority = deployment.ca.read_bytes()
    processes = [site.process for site in deployment.sites]
    addresses = {deployment.address, deployment.public_address}
    shown = {address: certificate_of(address) for address in addresses}
    deployment.run_script("certificates.sh", folder, "127.0.0.1")
    if deployment.nginx is not None:
        deployment.nginx.send_signal(signal.SIGHUP)
    stop(deployment.superlink)
    deployment.start_superlink()
    await_that(
        lambda: all(certificate_of(address) != shown[address] for address in addresses),
        30, "the new certificates",
    )  # fmt: skip
    assert deployment.ca.read_bytes() == authority
    deployment.await_nodes(SITES)
    (record,) = train(deployment, "with-new-certificates")
    assert len(record.participants) == SITES
    assert [site.process for site in deployment.sites] == processes


def test_the_database_is_restored_from_a_backup_made_while_it_was_in_use(deployment):
    known = set(nodes(deployment))
    database, backup = deployment.folder / "state.db", deployment.folder / "backup.db"
    subprocess.run([sys.executable, "-c", BACKUP, database, backup], check=True)
    deployment.run_script("site-key.sh", deployment.folder / "later")
    deployment.register(deployment.folder / "later" / "site.key.pub")
    assert set(nodes(deployment)) > known
    stop(deployment.superlink)
    for leftover in deployment.folder.glob("state.db*"):
        leftover.unlink()
    shutil.copy(backup, database)
    deployment.start_superlink()
    deployment.await_nodes(SITES)
    assert set(nodes(deployment)) == known
    (record,) = train(deployment, "restored")
    assert len(record.participants) == SITES


def test_a_site_that_was_away_comes_back_as_the_same_node(deployment):
    before = nodes(deployment)
    first = deployment.sites[0]
    away = node_of(first)
    first.stop()
    await_that(lambda: nodes(deployment)[away] == "offline", 120, "the site offline")
    deployment.sites[0] = Site(deployment, 0).start()
    deployment.await_nodes(SITES)
    assert nodes(deployment) == before
