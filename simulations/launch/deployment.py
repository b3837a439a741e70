"""A deployment on loopback: a SuperLink, nginx in front of it, and SuperNodes."""

import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from flwr_colearn import ColearnError
from simulations.launch.app_files import app_files
from simulations.launch.simulation import ROOT, flower, free_port, stop

SCRIPTS = ROOT / "simulations" / "deploy"


class Deployment:
    """A SuperLink and its sites, whose files are in one folder and whose processes `stop` ends.

    The SuperLink has TLS and SuperNode authentication. The sites reach it through nginx, which
    passes on their API alone; where nginx is not installed they reach it directly.

    Parameters
    ----------
    folder : Path
        The folder for certificates, keys, logs, and the FLWR_HOME of every program.
    proxy : bool, optional
        Whether nginx is in front of the SuperLink; by default if nginx is installed.
    prefix : sequence of str
        A command under which the SuperLink runs, such as one that takes rights from it.

    Attributes
    ----------
    sites : list of Site
        The SuperNodes that `start` started.
    ca : Path
        The CA certificate that the sites trust.
    address : str
        The SuperLink's own address, for the operator's ``flwr``.
    public_address : str
        The address that the sites are given: the proxy's, or without one the SuperLink's.
    """

    def __init__(self, folder: Path, proxy: bool | None = None, prefix: Sequence[str] = ()) -> None:
        self.folder, self.prefix = folder, prefix
        self.home = folder / "home"
        self.sites: list[Site] = []
        self.superlink: subprocess.Popen[bytes] | None = None
        self.nginx: subprocess.Popen[bytes] | None = None
        self.proxy = nginx_program() is not None if proxy is None else proxy
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.public_address = f"127.0.0.1:{free_port()}" if self.proxy else self.address
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            # The apps' processes import the plugin and the clients from here.
            "PYTHONPATH": str(ROOT),
            # Flower starts its other programs by name.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        self.ca = folder / "certificates" / "ca.crt"

    def start(self, sites: int = 5) -> None:
        """Start the servers, register and start the sites, and wait until they are online."""
        self.start_servers()
        for _ in range(sites):
            self.add_site()
        self.await_nodes(sites)

    def start_servers(self) -> None:
        """Start the SuperLink and nginx, and tell the operator's ``flwr`` where they are."""
        self.run_script("certificates.sh", self.folder / "certificates", "127.0.0.1")
        self.start_superlink()
        if self.proxy:
            self.start_proxy()
        self._connect()

    def add_site(self, node_config: str | None = None, name: str | None = None) -> "Site":
        """Make a key, register it and start a site with it.

        Parameters
        ----------
        node_config : str, optional
            The site's node config; by default that of a simulation's partition.
        name : str, optional
            The name to register the site with.
        """
        index = len(self.sites)
        # The SuperLink refuses a SuperNode whose key is not registered yet.
        self.run_script("site-key.sh", self.folder / f"site-{index}")
        self.register(self.folder / f"site-{index}" / "site.key.pub", name)
        site = Site(self, index, node_config=node_config).start()
        self.sites.append(site)
        return site

    def run_script(self, name: str, *arguments: Any) -> None:
        """Run one of the deployment scripts."""
        subprocess.run([SCRIPTS / name, *map(str, arguments)], check=True, capture_output=True)

    def flwr(self, *arguments: Any, timeout: float = 120) -> str:
        """Run a ``flwr`` command and return its output."""
        done = subprocess.run(
            [flower("flwr"), *map(str, arguments)],
            env=self.environment, text=True, capture_output=True, timeout=timeout, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    def register(self, public_key: Path, name: str | None = None) -> None:
        """Register a site's key, with a name if one is given.

        Raises
        ------
        ColearnError
            If the SuperLink does not accept it.
        """
        named = () if name is None else ("--name", name)
        output = self.flwr("supernode", "register", public_key, "site", *named)
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
        app = app_files(app, self.folder / "app")
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
            with suppress(psutil.Error):  # it has just ended
                if any(Path(part).name == name for part in child.cmdline()[:2]):
                    return child
        return None

    def stop(self) -> None:
        """End all sites, nginx and the SuperLink."""
        # Sites first: their restart loops would start new SuperNodes.
        for site in self.sites:
            site.stop()
        for server in (self.nginx, self.superlink):
            if server is not None:
                stop(server)

    def start_superlink(self) -> None:
        """Start the SuperLink on loopback and wait until it answers."""
        certificates = self.folder / "certificates"
        self.log = self.folder / "superlink.log"
        with self.log.open("a") as log_file:
            self.superlink = subprocess.Popen(
                [
                    *self.prefix,
                    flower("flower-superlink"),
                    "--ssl-ca-certfile", str(self.ca),
                    "--ssl-certfile", str(certificates / "superlink.pem"),
                    "--ssl-keyfile", str(certificates / "superlink.key"),
                    "--enable-supernode-auth",
                    "--database", str(self.folder / "state.db"),
                    "--host", "127.0.0.1", "--port", str(self.port),
                    "--disable-runtime-dependency-installation",
                ],
                env=self.environment, stdout=log_file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        await_that(lambda: self._answers(self.address), 60, f"the SuperLink ({self.log})")

    def start_proxy(self) -> None:
        """Start nginx in front of the SuperLink and wait until it answers.

        Raises
        ------
        ColearnError
            If nginx is not installed.
        """
        program = nginx_program()
        if program is None:
            raise ColearnError("proxy: expected nginx on PATH or in /usr/sbin, found none")
        folder = self.folder / "proxy"
        self.run_script(
            "proxy.sh", folder, self.folder / "certificates", self.public_address, self.port
        )
        log = self.folder / "nginx.log"
        with log.open("w") as log_file:
            self.nginx = subprocess.Popen(
                [program, "-e", "stderr", "-c", str(folder / "nginx.conf")],
                stdout=log_file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        await_that(lambda: self._answers(self.public_address), 60, f"nginx ({log})")

    def _answers(self, address: str) -> bool:
        trusted = ssl.create_default_context(cafile=self.ca)
        try:
            urllib.request.urlopen(f"https://{address}/health", context=trusted, timeout=2).close()
        except urllib.error.HTTPError:
            return True  # nginx answers, with its 403
        except OSError:
            return False
        return True

    def _connect(self) -> None:
        # Without a config, a flwr command starts a local SuperLink of its own.
        self.home.mkdir(exist_ok=True)
        (self.home / "config.toml").write_text(
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
    node_config : str, optional
        The node config; by default the site is partition `index` of a simulation's five.
    """

    def __init__(
        self,
        deployment: Deployment,
        index: int,
        key: Path | None = None,
        ca: Path | None = None,
        node_config: str | None = None,
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
            "--superlink", deployment.public_address,
            "--port", str(free_port()),
            "--node-config", node_config or f"partition-id={index} num-partitions=5",
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


def nginx_program() -> str | None:
    """Return the path of nginx, or None if it is not installed."""
    # Debian keeps it in /usr/sbin, which is not on every user's PATH.
    return shutil.which("nginx", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin"]))


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
