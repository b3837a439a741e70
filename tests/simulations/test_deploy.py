"""The files of simulations/deploy, and what docs/security.md and docs/operations.md say of them."""

import configparser
import json
import re
import shutil
import stat
import subprocess
import sys
from functools import cache

import numpy as np
import pytest

from clients.app import app as client_app
from clients.settings import ParticipantSettings
from clients.tasks.registry import server_task, server_trainer
from flwr_colearn import CoLearn, CyclicalRate, FixedEpochs, InProcessGrid
from simulations.launch.deployment import nginx_program
from simulations.launch.simulation import ROOT, flower
from simulations.server_app import to_record

DEPLOY = ROOT / "simulations" / "deploy"
UNITS = ["flower-superlink", "flower-proxy", "flower-supernode", "flower-check"]
PAGES = [ROOT / "docs" / name for name in ("security.md", "operations.md", "deploy.md")]
PAGES.append(ROOT / "README.md")


def run(name, *arguments):
    subprocess.run([DEPLOY / name, *map(str, arguments)], check=True, capture_output=True)


def openssl(*arguments):
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    return done.stdout + done.stderr


# Certificates and keys


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    run("certificates.sh", folder, "link.example.org", "192.0.2.7")
    return folder


def test_keys_are_for_their_owner_only(certificates, tmp_path):
    run("site-key.sh", tmp_path / "site")
    keys = [*certificates.glob("*.key"), tmp_path / "site" / "site.key"]
    assert {key.name for key in keys} == {"ca.key", "proxy.key", "superlink.key", "site.key"}
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert stat.S_IMODE((tmp_path / "site").stat().st_mode) == 0o700


def test_the_proxys_certificate_has_the_public_names_and_the_superlinks_loopback_only(certificates):
    names = {
        name: openssl("x509", "-in", certificates / name, "-noout", "-ext", "subjectAltName")
        for name in ("proxy.pem", "superlink.pem")
    }
    assert "DNS:link.example.org" in names["proxy.pem"]
    assert "IP Address:192.0.2.7" in names["proxy.pem"]
    assert "link.example.org" not in names["superlink.pem"]
    for name, text in names.items():
        assert "IP Address:127.0.0.1" in text
        assert "DNS:localhost" in text  # what nginx compares: it matches no addresses
        verified = openssl("verify", "-CAfile", certificates / "ca.crt", certificates / name)
        assert verified.endswith(": OK\n")


def test_a_renewal_keeps_the_authority(certificates, tmp_path):
    folder = shutil.copytree(certificates, tmp_path / "certificates")
    run("certificates.sh", folder, "link.example.org")
    same = {
        path.name for path in certificates.iterdir()
        if path.read_bytes() == (folder / path.name).read_bytes()
    }  # fmt: skip
    assert same == {"ca.crt", "ca.key"}
    assert not list(folder.glob("*.new"))


def certificates_for(folder, *hosts):
    command = [DEPLOY / "certificates.sh", folder, *hosts]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (["ca.key"], "expected ca.key beside ca.crt"),
        (["ca.crt"], "expected ca.crt beside ca.key"),
        (["ca.key", "ca.crt"], "expected ca.key and ca.crt, which issued proxy.pem"),
        (["ca.key", "ca.crt", "proxy.pem"], "expected ca.key and ca.crt, which issued superlink"),
    ],
)
def test_without_the_authority_nothing_is_made(missing, said, certificates, tmp_path):
    folder = shutil.copytree(certificates, tmp_path / "certificates")
    for name in missing:
        (folder / name).unlink()
    done = certificates_for(folder, "link.example.org")
    assert done.returncode == 2
    assert said in done.stderr
    assert {p.name for p in folder.iterdir()} == {p.name for p in certificates.iterdir()} - {
        *missing
    }
    for path in folder.iterdir():
        assert path.read_bytes() == (certificates / path.name).read_bytes()


@pytest.mark.parametrize(
    "host",
    [
        "link.example.org:9092",
        "192.0.2.7:9092",
        "[2001:db8::1]:9092",
        "https://link.example.org",
        "link.example.org/",
        "link.example.org,DNS:evil.example.org",
        "link example",
        "192.0.2",
        "-link",
        "",
    ],
)
def test_a_host_that_no_certificate_can_have_is_refused_by_name(host, tmp_path):
    done = certificates_for(tmp_path / "certificates", "link.example.org", host)
    assert done.returncode == 2
    assert f"without a port or a scheme, found '{host}'" in done.stderr
    assert not (tmp_path / "certificates").exists()


def test_a_certificate_may_have_every_kind_of_host(certificates, tmp_path):
    folder = shutil.copytree(certificates, tmp_path / "certificates")
    hosts = ["a" * 60 + ".example.org", "2001:db8::1", "*.example.org", "link", "10.0.0.1"]
    done = certificates_for(folder, *hosts)
    assert done.returncode == 0, done.stderr
    found = openssl("x509", "-in", folder / "proxy.pem", "-noout", "-ext", "subjectAltName")
    for name in (f"DNS:{hosts[0]}", "IP Address:2001:DB8:0:0:0:0:0:1", "DNS:*.example.org"):
        assert name in found


def test_what_openssl_refuses_is_said(certificates, tmp_path):
    folder = shutil.copytree(certificates, tmp_path / "certificates")
    done = certificates_for(folder, "999.0.0.1")
    assert done.returncode == 1
    assert "openssl x509" in done.stderr
    assert "bad ip address" in done.stderr
    for name in ("ca.crt", "ca.key", "proxy.pem", "proxy.key"):
        assert (folder / name).read_bytes() == (certificates / name).read_bytes()


# nginx


@pytest.mark.skipif(nginx_program() is None, reason="nginx is not installed")
def test_nginx_accepts_the_configuration(certificates, tmp_path):
    run("proxy.sh", tmp_path, certificates, "127.0.0.1:19092", "19192")
    text = (tmp_path / "nginx.conf").read_text()
    assert "@" not in text
    done = subprocess.run(
        [nginx_program(), "-e", "stderr", "-t", "-c", tmp_path / "nginx.conf"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["with blank", "semi;colon", "a|b"])
def test_a_path_that_nginx_would_read_otherwise_is_refused(certificates, tmp_path, folder):
    done = subprocess.run(
        [DEPLOY / "proxy.sh", tmp_path / folder, certificates], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "expected a path of plain characters" in done.stderr


# systemd


def service(unit):
    """The options of a unit's [Service]; those given several times as a list of lines."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    text = (DEPLOY / f"{unit}.service").read_text().replace("\\\n", " ")
    parser.read_string(text)
    return dict(parser["Service"]), re.findall(r"^Environment=(.*)$", text, re.MULTILINE)


CLOSED = {
    "UMask": "0077",
    "StateDirectoryMode": "0700",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "RestrictSUIDSGID": "yes",
    "RestrictNamespaces": "yes",
    "ProtectProc": "invisible",
}


@pytest.mark.parametrize("unit", UNITS)
def test_the_units_are_closed(unit):
    options, environment = service(unit)
    assert {name: options.get(name) for name in CLOSED} == CLOSED
    assert options["User"] not in ("root", "")
    state = f"/var/lib/{options['StateDirectory']}"
    assert options["ReadWritePaths"] == options["WorkingDirectory"] == state
    if unit == "flower-proxy":
        return
    assert {"FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1"} <= set(environment)
    assert f"FLWR_HOME={state}" in environment
    if unit == "flower-supernode":
        assert options["TemporaryFileSystem"] == "/srv:ro /mnt:ro /media:ro"
        assert options["BindReadOnlyPaths"] == "/srv/data"
    elif unit == "flower-check":
        assert (options["IPAddressDeny"], options["IPAddressAllow"]) == ("any", "localhost")
        assert "flwr ls site --format json | " in options["ExecStart"]
        assert (DEPLOY / options["ExecStart"].rstrip("'").rpartition("/")[2]).exists()
    else:
        assert (options["IPAddressDeny"], options["IPAddressAllow"]) == ("any", "localhost")
        assert "--host 127.0.0.1" in options["ExecStart"]
        assert "--enable-supernode-auth" in options["ExecStart"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_finds_the_units_well_closed(unit):
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20",
         DEPLOY / f"{unit}.service"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout  # an exposure above 2.0 of 10
    assert "Overall exposure level" in done.stdout


# Options of Flower's programs, wherever they are written


@cache
def options_of(program):
    done = subprocess.run([flower(program), "--help"], capture_output=True, text=True, timeout=120)
    return set(re.findall(r"--[a-z][a-z-]+", done.stdout))


@pytest.mark.parametrize("program", ["flower-superlink", "flower-supernode"])
def test_the_options_in_units_and_pages_exist(program):
    known = options_of(program)
    used = set()
    for path in [*PAGES, *(DEPLOY / f"{unit}.service" for unit in UNITS)]:
        for command in re.findall(rf"{program} ((?:.*\\\n)*.*)", path.read_text()):
            used |= set(re.findall(r"(?<=\s)--[a-z][a-z-]+", f" {command}"))
    assert len(used) > 3
    assert used <= known


def test_the_compose_files_commands_exist_and_only_the_proxys_port_is_published():
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = compose["services"]
    for name in ("superlink", "supernode"):
        used = {argument.partition("=")[0] for argument in services[name]["command"]}
        assert used <= options_of(f"flower-{name}"), name
        assert services[name]["cap_drop"] == ["ALL"]
    assert {n: s.get("ports") for n, s in services.items()} == {
        "superlink": ["9092:9092"], "proxy": None, "supernode": None
    }  # fmt: skip
    # The proxy's port is that of the container whose network it shares, where the SuperLink
    # listens on loopback.
    assert services["proxy"]["network_mode"] == "service:superlink"
    assert {"--host=127.0.0.1", "--enable-supernode-auth"} <= set(services["superlink"]["command"])
    named = {volume.partition(":")[0] for s in services.values() for volume in s["volumes"]}
    assert {n for n in named if "/" not in n and "$" not in n} == set(compose["volumes"])


# The pages


@pytest.mark.parametrize("page", ["security.md", "operations.md"])
def test_every_test_that_a_page_names_exists(page):
    text = (ROOT / "docs" / page).read_text()
    named = set(re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", text))
    assert len(named) > 0
    for path, test in named:
        source = (ROOT / path).read_text()
        assert not test or f"\ndef {test}(" in source, (path, test)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page):
    named = set(re.findall(r"simulations/deploy/[\w.-]+\w", page.read_text()))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_a_reply_holds_the_model_the_metrics_and_the_sites_name(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "train.npz", x=x, y=np.arange(40) % 10)
    settings = ParticipantSettings(task="cifar10")
    replies = []

    def spied(message, context):
        replies.append(client_app(message, context))
        return replies[-1]

    grid = InProcessGrid(spied, 1, run_config=settings.to_config())
    (node,) = grid.contexts
    grid.contexts[node].node_config = {"data-dir": str(tmp_path), "name": "utrecht"}
    trainer = server_trainer(settings, server_task(settings))
    strategy = CoLearn(
        1,
        local_epochs=FixedEpochs(1),
        learning_rate=CyclicalRate(0.01),
        fraction_evaluate=1.0,
        history=tmp_path / "history.jsonl",
    )
    strategy.start(grid, to_record(trainer), num_rounds=1)
    trained = [r.content for r in replies if "arrays" in r.content]
    evaluated = [r.content for r in replies if "metrics" in r.content and "arrays" not in r.content]
    assert len(trained) == len(evaluated) == 1
    for content, records in ((trained[0], {"arrays", "metrics", "colearn"}),
                             (evaluated[0], {"metrics", "colearn"})):  # fmt: skip
        assert set(content) == records
        plan = {"epochs-iterated", "rates-iterated", "plan-read"}
        stated = {"participant", "server-round", "version", "mod", "model", *plan}
        assert set(content["colearn"]) <= stated
    weights = {name: array.shape for name, array in trainer.get_weights().items()}
    assert {n: a.numpy().shape for n, a in trained[0]["arrays"].items()} == weights
    assert set(trained[0]["metrics"]) == {"num-examples", "train-loss", "learning-rate"}
    assert set(evaluated[0]["metrics"]) == {"num-examples", "loss", "accuracy"}
    assert str(tmp_path) not in (tmp_path / "history.jsonl").read_text()


# How the newest run ended


def run_of(status, pending="2026-11-25 20:00:00Z", **more):
    """A run as `flwr ls --format json` of flwr 1.41 lists it."""
    return {
        "run-id": "1234",
        "federation-id": "@none/default",
        "fab-id": "flwrlabs/colearn",
        "status": status,
        "status-details": "",
        "elapsed": 61.5,
        "pending-at": pending,
        "finished-at": "N/A",
        **more,
    }


def checked(answer):
    command = [sys.executable, DEPLOY / "check-runs.py"]
    return subprocess.run(command, input=answer, capture_output=True, text=True)


def listed(*runs):
    return json.dumps({"success": True, "runs": runs})


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("pending", 0),
        ("starting", 0),
        ("running", 0),
        ("finished:completed", 0),
        ("finished:stopped", 0),
        ("finished:failed", 1),
        ("finished:evicted", 1),
    ],
)
def test_a_run_that_ended_with_an_error_is_seen(status, code):
    done = checked(listed(run_of(status)))
    assert done.returncode == code
    assert done.stdout.startswith(f"run 1234 of 2026-11-25 20:00:00Z: {status}")


def test_the_newest_run_counts_in_any_order():
    runs = [
        run_of("finished:failed", "2026-11-25 20:00:00Z"),
        run_of("running", "2026-11-26 03:00:00Z"),
        run_of("finished:failed", "2026-11-24 20:00:00Z"),
    ]
    assert checked(listed(*runs)).returncode == 0
    assert checked(listed(runs[0], runs[2])).returncode == 1
    assert checked(listed()).returncode == 0


@pytest.mark.parametrize(
    "answer", ["", "Traceback", "[]", '{"success": false, "error-message": "no connection"}']
)
def test_a_superlink_that_does_not_answer_is_another_status(answer):
    done = checked(answer)
    assert done.returncode == 2
    assert done.stderr.startswith("SuperLink: expected")


def test_the_details_of_a_run_are_one_line():
    done = checked(listed(run_of("finished:failed", **{"status-details": "a\nb\x1b" * 1000})))
    assert done.stdout.count("\n") == 1
    assert "\x1b" not in done.stdout
    assert len(done.stdout) < 600
