"""A deployment on loopback: a SuperLink with TLS and authentication, and SuperNodes."""

import os
import re
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from flwr_colearn import ColearnError
from simulations.launch.simulation import ROOT, flower, free_port, stop

SCRIPTS = ROOT / "simulations" / "deploy"


class Deployment:
    """A SuperLink and its sites, whose files are in one folder and whose processes `stop` ends.

    Parameters
    ----------
    folder : Path
        The folder for certificates, keys, logs, and the FLWR_HOME of every program.

    Attributes
    ----------
    sites : list of Site
        The SuperNodes that `start` started.
    ca : Path
        The CA certificate that the sites trust.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sites: list[Site] = []
        self.superlink: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            # The apps' processes import the plugin and the clients from here.
            "PYTHONPATH": str(ROOT),
            # Flower starts its other programs by name.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        self.ca = folder / "certificates" / "ca.crt"

    def start(self, sites: int = 5) -> None:
        """Start the SuperLink, register and start the sites, and wait until they are online."""
        self.run_script("certificates.sh", self.folder / "certificates", "127.0.0.1")
        self._start_superlink()
        self._connect()
        for index in range(sites):
            # The SuperLink refuses a SuperNode whose key is not registered yet.
            self.run_script("site-key.sh", self.folder / f"site-{index}")
            self.register(self.folder / f"site-{index}" / "site.key.pub")
            self.sites.append(Site(self, index).start())
        self.await_nodes(sites)

    def run_script(self, name: str, *arguments: Any) -> None:
        """Run one of the deployment scripts."""
        subprocess.run([SCRIPTS / name, *arguments], check=True, capture_output=True)

    def flwr(self, *arguments: Any, timeout: float = 120) -> str:
        """Run a ``flwr`` command and return its output."""
        done = subprocess.run(
            [flower("flwr"), *map(str, arguments)],
            env=self.environment, text=True, capture_output=True, timeout=timeout, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    def register(self, public_key: Path) -> None:
        """Register a site's key.

        Raises
        ------
        ColearnError
            If the SuperLink does not accept it.
        """
        output = self.flwr("supernode", "register", public_key, "site")
        # The text is checked, because Flower's commands may exit with 0 after a failure.
        if "success" not in output.lower():
            raise ColearnError(f"registering {public_key}: expected success, found {output}")

    def nodes_online(self) -> int:
        """Return the number of SuperNodes that are online."""
        return len(re.findall(r"\bonline\b", self.flwr("supernode", "list", "site")))

    def await_nodes(self, number: int, seconds: float = 120) -> None:
        """Wait until this number of SuperNodes is online."""
        await_that(lambda: self.nodes_online() >= number, seconds, f"{number} SuperNodes online")

    def run(self, app: Path, **config: Any) -> subprocess.Popen[bytes]:
        """Start a run; return the ``flwr run`` process that streams its log to ``run.log``."""
        overrides = " ".join(
            f"{key.replace('_', '-')}={_toml(value)}" for key, value in config.items()
        )
        command = [flower("flwr"), "run", str(app), "site", "--stream", "--run-config", overrides]
        with (self.folder / "run.log").open("a") as log_file:
            return subprocess.Popen(
                command, env=self.environment, stdout=log_file, stderr=subprocess.STDOUT
            )

    def process_named(self, name: str) -> psutil.Process | None:
        """Return the SuperLink's descendant process that runs this program, or None."""
        assert self.superlink is not None
        # Flower's programs are Python scripts, so the name is the first or the second word of the
        # command line.
        for child in psutil.Process(self.superlink.pid).children(recursive=True):
            if any(Path(part).name == name for part in child.cmdline()[:2]):
                return child
        return None

    def stop(self) -> None:
        """End all sites and the SuperLink."""
        # Sites first: their restart loops would start new SuperNodes.
        for site in self.sites:
            site.stop()
        if self.superlink is not None:
            stop(self.superlink)

    def _start_superlink(self) -> None:
        certificates = self.folder / "certificates"
        self.log = self.folder / "superlink.log"
        with self.log.open("w") as log_file:
            self.superlink = subprocess.Popen(
                [
                    flower("flower-superlink"),
                    "--ssl-ca-certfile", str(self.ca),
                    "--ssl-certfile", str(certificates / "server.pem"),
                    "--ssl-keyfile", str(certificates / "server.key"),
                    "--enable-supernode-auth",
                    "--database", str(self.folder / "state.db"),
                    "--host", "127.0.0.1", "--port", str(self.port),
                    "--disable-runtime-dependency-installation",
                ],
                env=self.environment, stdout=log_file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        trusted = ssl.create_default_context(cafile=self.ca)

        def healthy() -> bool:
            try:
                urllib.request.urlopen(f"https://{self.address}/health", context=trusted, timeout=2)
            except OSError:
                return False
            return True

        await_that(healthy, 60, f"the SuperLink ({self.log})")

    def _connect(self) -> None:
        # Without a config, a flwr command starts a local SuperLink of its own.
        home = Path(self.environment["FLWR_HOME"])
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "site"\n\n[superlink.site]\n'
            f'address = "{self.address}"\nroot-certificates = "{self.ca}"\n'
        )


class Site:
    """A SuperNode in a restart loop, as with systemd's Restart=always.

    Parameters
    ----------
    deployment : Deployment
        The deployment with the SuperLink to connect to.
    index : int
        The site's partition.
    key, ca : Path, optional
        The site's private key and the CA certificate that it trusts; by default the deployment's.
    """

    def __init__(
        self, deployment: Deployment, index: int, key: Path | None = None, ca: Path | None = None
    ) -> None:
        self.index = index
        self.home = deployment.folder / f"site-{index}"
        self.home.mkdir(exist_ok=True)
        self.log = self.home / "supernode.log"
        self.log.touch()
        self.command = [
            flower("flower-supernode"),
            "--root-certificates", str(ca or deployment.ca),
            "--auth-supernode-private-key", str(key or self.home / "site.key"),
            "--superlink", deployment.address,
            "--port", str(free_port()),
            "--node-config", f"partition-id={index} num-partitions=5",
        ]  # fmt: skip
        self.environment = {**deployment.environment, "FLWR_HOME": str(self.home)}
        self.process: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()
        self._loop = threading.Thread(target=self._run, daemon=True)

    def start(self) -> "Site":
        """Start the loop."""
        self._loop.start()
        return self

    def stop(self) -> None:
        """End the loop and its SuperNode."""
        # The event first, or the loop would restart the SuperNode.
        self._stopped.set()
        if self.process is not None:
            stop(self.process)
        self._loop.join(timeout=30)

    def kill(self, signal_number: int) -> None:
        """Send the SuperNode a signal; the loop starts another."""
        assert self.process is not None
        self.process.send_signal(signal_number)

    def _run(self) -> None:
        with self.log.open("a") as log_file:
            while not self._stopped.is_set():
                self.process = subprocess.Popen(
                    self.command, env=self.environment, stdout=log_file, stderr=subprocess.STDOUT
                )
                self.process.wait()
                # A pause between restarts, as systemd has; `stop` ends it at once.
                self._stopped.wait(2)


def await_that(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until a condition holds.

    Raises
    ------
    ColearnError
        If it does not hold within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            raise ColearnError(f"expected {what} within {seconds} s")
        time.sleep(0.5)


def _toml(value: Any) -> str:
    return str(value) if isinstance(value, int | float) else f"'{value}'"
