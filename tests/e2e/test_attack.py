"""A stranger at the proxy's port: with nothing, or with the CA certificate that every site has."""

import base64
import http.client
import json
import os
import re
import ssl
import subprocess

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from flwr_colearn import History
from simulations.launch.deployment import nginx_program
from simulations.launch.simulation import flower
from tests.e2e.deployment import APP, Deployment, Site, await_that, node_of

pytestmark = pytest.mark.skipif(nginx_program() is None, reason="nginx is not installed")
SITES = 2
LIMIT = 32  # of nginx.conf: requests at a time from one address
STRANGER = "127.0.0.2"  # all of 127.0.0.0/8 is loopback, so it is another address than the sites'

BEYOND = [  # methods and paths of the APIs that are the server's own
    ("POST", "/v1/control/list-nodes"),
    ("POST", "/v1/control/list-runs"),
    ("POST", "/v1/control/start-run"),
    ("POST", "/v1/control/register-node"),
    ("POST", "/v1/control/unregister-node"),
    ("POST", "/v1/control/stream-logs"),
    ("POST", "/v1/control/pull-artifacts"),
    ("POST", "/v1/runtime/acquire-task"),
    ("POST", "/v1/runtime/pull-messages"),
    ("POST", "/v1/runtime/push-logs"),
    ("GET", "/"),
    ("GET", "/docs"),
    ("GET", "/redoc"),
    ("GET", "/openapi.json"),
    ("GET", "/health"),
    ("GET", "/v1/control/list-nodes"),
    ("GET", "/v1/fleet/pull-messages"),
    ("PUT", "/v1/fleet/push-object"),
]
SPELLINGS = [  # of /v1/control/list-nodes, for a proxy that compares before it understands
    "//v1/control/list-nodes",
    "/v1//control/list-nodes",
    "/v1/control//list-nodes",
    "/v1/control/list-nodes/",
    "/./v1/control/list-nodes",
    "/V1/CONTROL/LIST-NODES",
    "/v1/Control/list-nodes",
    "/v1/%63ontrol/list-nodes",
    "/%76%31/control/list-nodes",
    "/v1%2fcontrol%2flist-nodes",
    "/api/v1/control/list-nodes",
    "/v1/fleet/../control/list-nodes",
    "/v1/fleet//../control/list-nodes",
    "/v1/fleet/./../control/list-nodes",
    "/v1/fleet/x/../../control/list-nodes",
    "/v1/fleet/%2e%2e/control/list-nodes",
    "/v1/fleet/%2E%2E/control/list-nodes",
    "/v1/fleet/.%2e/control/list-nodes",
    "/v1/fleet/..%2fcontrol/list-nodes",
    "/v1/fleet/..%2Fcontrol%2Flist-nodes",
    "/v1/fleet%2f../control/list-nodes",
    "/v1/fleet%2f..%2fcontrol/list-nodes",
    "/v1/fleet/%252e%252e/control/list-nodes",
    "/v1/fleet/..%252fcontrol/list-nodes",
    "/v1/fleet/..%5ccontrol/list-nodes",
    "/v1/fleet/..\\control/list-nodes",
    "/v1/fleet/..;/control/list-nodes",
    "/v1/fleet/%c0%ae%c0%ae/control/list-nodes",
    "/v1/fleet/../../v1/control/list-nodes",
    "/v1/fleet/../../../../v1/control/list-nodes",
    "/v1/fleet/?/../control/list-nodes",
    "/v1/fleet/%3f/../../control/list-nodes",
    "/v1/fleet/#/../../control/list-nodes",
    "/v1/fleet/%00/../../control/list-nodes",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleets/../control/list-nodes",
    "https://127.0.0.1/v1/control/list-nodes",
    "https://127.0.0.1/v1/fleet/../control/list-nodes",
]
REQUESTS = BEYOND + [("POST", path) for path in SPELLINGS]
PROTOBUF = {"Content-Type": "application/protobuf"}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    deployed = Deployment(tmp_path_factory.mktemp("attacked"), proxy=True)
    try:
        deployed.start(sites=SITES)
        yield deployed
    finally:
        deployed.stop()


@pytest.fixture(params=["without the CA", "with the CA"])
def ca(request, deployment):
    return deployment.ca if request.param == "with the CA" else None


def connect(address, ca=None, source=STRANGER):
    """A connection that trusts anybody, unless it has a CA certificate."""
    context = ssl.create_default_context(cafile=ca)
    if ca is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, port = address.split(":")
    return http.client.HTTPSConnection(
        host, int(port), context=context, timeout=30, source_address=(source, 0)
    )


def ask(address, method, path, *, ca=None, headers=PROTOBUF, body=b"", source=STRANGER):
    """The status of the answer to one request, whose path is sent as it is."""
    connection = connect(address, ca, source)
    try:
        connection.request(method, path, body=body, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def state(deployment):
    """What the SuperLink knows, as the operator sees it: its runs and its SuperNodes."""
    runs = json.loads(deployment.flwr("ls", "site", "--format", "json"))
    nodes = json.loads(deployment.flwr("supernode", "list", "site", "--format", "json"))
    assert runs["success"]
    assert nodes["success"]
    return (
        sorted(run["run-id"] for run in runs["runs"]),
        sorted(node["node-id"] for node in nodes["nodes"]),
    )


def strangers_flwr(deployment, ca, *arguments, address=None):
    """Run ``flwr`` as a stranger who knows the proxy's address."""
    home = deployment.folder / "stranger-home"
    home.mkdir(exist_ok=True)
    trust = f'root-certificates = "{ca}"' if ca else "insecure = true"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "site"\n\n[superlink.site]\n'
        f'address = "{address or deployment.public_address}"\n{trust}\n'
    )
    done = subprocess.run(
        [flower("flwr"), *map(str, arguments)],
        env={**deployment.environment, "FLWR_HOME": str(home)},
        text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_no_request_reaches_more_than_the_sites_api(deployment, ca):
    before, logged = state(deployment), len(deployment.log.read_text())
    answers = {r: ask(deployment.public_address, *r, ca=ca) for r in REQUESTS}
    # The SuperLink logs every request except successful ones of sites and of its own processes.
    lines = deployment.log.read_text()[logged:].splitlines()
    assert {r: status for r, status in answers.items() if not 400 <= status < 500} == {}
    assert all(answers[r] == 403 for r in BEYOND)
    assert [line for line in lines if "/v1/control" in line or re.search(r'" [23]\d\d', line)] == []
    assert state(deployment) == before


def test_the_same_requests_get_in_where_no_proxy_is_in_front(deployment):
    """The control of the test above: what the SuperLink's own port answers to a local process."""
    answers = {r: ask(deployment.address, *r, source="127.0.0.1") for r in REQUESTS}
    assert answers["POST", "/v1/control/list-nodes"] == 200
    assert answers["POST", "/v1/control/list-runs"] == 200
    assert answers["GET", "/docs"] == 200


def test_no_command_of_flwr_gets_through(deployment, ca):
    before = state(deployment)
    deployment.run_script("site-key.sh", deployment.folder / f"key-of-{ca is None}")
    output = deployment.folder / f"evil-{ca is None}"
    output.mkdir()
    commands = [
        ["run", APP, "site", "--run-config", f"output-dir='{output}'"],
        ["supernode", "register", deployment.folder / f"key-of-{ca is None}/site.key.pub", "site"],
        ["supernode", "unregister", before[1][0], "site"],
        ["supernode", "list", "site"],
        ["ls", "site"],
    ]
    for command in commands:
        code, text = strangers_flwr(deployment, ca, *command)
        assert code != 0, (command, text)
        assert "success" not in text.lower(), (command, text)
    assert state(deployment) == before
    assert list(output.iterdir()) == []


def test_the_same_commands_get_in_where_no_proxy_is_in_front(deployment):
    _, text = strangers_flwr(
        deployment, deployment.ca, "supernode", "list", "site", address=deployment.address
    )
    assert len(re.findall(r"\bonline\b", text)) == SITES


def test_a_sites_request_without_a_registered_key_is_refused(deployment):
    for path in ("pull-messages", "push-messages", "register-node", "get-fab", "pull-object"):
        assert ask(deployment.public_address, "POST", f"/v1/fleet/{path}") == 401, path


def signed(site):
    """The headers with which a site proves that it has its key, as its SuperNode makes them."""
    key = load_ssh_private_key((site.home / "site.key").read_bytes(), None)
    timestamp = now().isoformat()
    encoded = {
        FLEET_HTTP_PUBLIC_KEY_HEADER: public_key_to_bytes(key.public_key()),
        FLEET_HTTP_SIGNATURE_HEADER: sign_message(key, timestamp.encode()),
    }
    headers = {name: base64.b64encode(value).decode() for name, value in encoded.items()}
    return {**PROTOBUF, TIMESTAMP_HEADER: timestamp, **headers}


def test_a_sites_key_is_good_for_its_own_node_only(deployment):
    first, second = deployment.sites
    own, others = (
        PullMessagesRequest(node=Node(node_id=node_of(site))).SerializeToString()
        for site in (first, second)
    )
    address = deployment.public_address
    pull = {"headers": signed(first), "source": "127.0.0.1"}
    assert ask(address, "POST", "/v1/fleet/pull-messages", body=own, **pull) == 200
    assert ask(address, "POST", "/v1/fleet/pull-messages", body=others, **pull) == 401
    # And it is a key for the sites' API alone.
    assert ask(address, "POST", "/v1/control/list-nodes", **pull) == 403


def test_a_body_above_the_limit_is_refused_before_it_is_sent(deployment):
    connection = connect(deployment.public_address)
    connection.putrequest("POST", "/v1/fleet/push-object")
    connection.putheader("Content-Length", str(64 * 2**20 + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(deployment):
    connection = connect(deployment.public_address)
    connection.putrequest("POST", "/v1/fleet/push-object")
    connection.putheader("Content-Type", "application/protobuf")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    mebibyte = b"100000\r\n" + bytes(2**20) + b"\r\n"
    for _ in range(80):
        connection.send(mebibyte)
    connection.send(b"0\r\n\r\n")
    assert connection.getresponse().status == 413


def test_one_address_cannot_hold_all_connections(deployment):
    held = []
    try:
        for _ in range(LIMIT):
            connection = connect(deployment.public_address)
            connection.putrequest("POST", "/v1/fleet/push-object")
            connection.putheader("Content-Type", "application/protobuf")
            connection.putheader("Content-Length", "1000")
            connection.endheaders()  # and no body: the request stays open
            held.append(connection)
        # nginx reads the held requests when it comes to them.
        await_that(
            lambda: ask(deployment.public_address, "POST", "/v1/fleet/pull-messages") == 503,
            10, "a refusal of the next request",
        )  # fmt: skip
        others = ask(
            deployment.public_address, "POST", "/v1/fleet/pull-messages", source="127.0.0.1"
        )
        assert others == 401  # it reached the SuperLink, as a site's request does
    finally:
        for connection in held:
            connection.close()


def test_an_unregistered_supernode_gets_no_message_while_a_run_goes_through(deployment):
    folder = deployment.folder
    deployment.run_script("site-key.sh", folder / "intruder")
    intruder = Site(deployment, 9, key=folder / "intruder" / "site.key").start()
    output = folder / "run"
    (output / "faults").mkdir(parents=True)
    try:
        config = {"participants": SITES, "rounds": 1, "faults_dir": output / "faults"}
        deployment.run(output_dir=output, **config).wait(timeout=300)
        await_that(lambda: "Starting Flower SuperNode" in intruder.log.read_text(), 60, "a start")
    finally:
        intruder.stop()
    assert np.isfinite(np.load(output / "model.npy")).all()
    (record,) = History.read(output / "history.jsonl")
    assert sorted(record.participants) == ["partition-0", "partition-1"]
    assert "[RUN" not in intruder.log.read_text()
    # The sites' models came through the proxy.
    access = (folder / "proxy" / "access.log").read_text()
    assert len(re.findall(r'"POST /v1/fleet/push-messages HTTP/1.1" 200', access)) >= SITES
    assert not re.search(r'"[A-Z]+ (?!/v1/fleet/)\S* HTTP/1.1" 2', access)


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run nginx without root's rights")
def test_nginx_needs_no_rights_of_root(deployment, tmp_path_factory):
    """The configuration is accepted from an ordinary user, who owns the folder and the key."""
    folder = tmp_path_factory.mktemp("unprivileged")
    # pytest's own folders, of which each process of pytest-xdist has one more.
    for parent in (folder, *folder.parents):
        if parent.name.startswith(("pytest-", "popen-", "unprivileged")):
            parent.chmod(0o755)
    deployment.run_script("certificates.sh", folder / "certificates", "127.0.0.1")
    deployment.run_script("proxy.sh", folder / "proxy", folder / "certificates", "9092", "9192")
    subprocess.run(["chown", "-R", "nobody", folder], check=True)
    done = subprocess.run(
        [nginx_program(), "-e", "stderr", "-t", "-c", folder / "proxy" / "nginx.conf"],
        user="nobody", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr
