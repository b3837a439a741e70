"""``flwr run`` in Flower's simulation, on a SuperLink that is started and stopped for the run."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from flwr_colearn import ColearnError
from simulations.launch.app_files import app_files

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT = 60.0


def run_app(
    app: Path, num_supernodes: int, run_config: Mapping[str, Any], home: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a Flower app in Flower's simulation and wait for its end.

    ``flwr run`` alone starts a SuperLink that keeps running, in the environment of the first run.
    Here a SuperLink with its own FLWR_HOME and ports is started for the run, and it is stopped with
    all its child processes afterwards.

    Parameters
    ----------
    app : Path
        The folder of the app.
    num_supernodes : int
        The number of simulated SuperNodes, which get one CPU each.
    run_config : mapping
        The overrides of the app's run config.
    home : Path
        The folder for FLWR_HOME, made if absent; the SuperLink's log is in it.
    timeout : float
        The seconds after which all processes are stopped.

    Returns
    -------
    subprocess.CompletedProcess
        The process of ``flwr run`` with its output, which is also printed line by line.

    Raises
    ------
    ColearnError
        If the SuperLink does not start.
    """
    # --run-config takes TOML; JSON's strings, numbers and booleans are TOML too.
    overrides = " ".join(f"{key}={json.dumps(value)}" for key, value in run_config.items())
    with TemporaryDirectory() as scratch, simulation_superlink(home) as environment:
        command = [
            flower("flwr"), "run", str(app_files(app, Path(scratch, "app"))), "--stream",
            "--federation-config",
            f"num-supernodes={num_supernodes} client-resources-num-cpus=1",
            "--run-config", overrides,
        ]  # fmt: skip
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return _stream(process, timeout)


@contextmanager
def simulation_superlink(home: Path) -> Iterator[dict[str, str]]:
    """Run a simulation SuperLink; yield the environment with which ``flwr`` uses it."""
    home.mkdir(parents=True, exist_ok=True)
    http, control = free_port(), free_port()
    environment = {
        **os.environ,
        "FLWR_HOME": str(home.absolute()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # Apps in other folders import the plugin and the clients from here.
        "PYTHONPATH": str(ROOT),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        # Flower starts its other programs by name; they must be those of this environment.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    command = [
        flower("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess",
        "--control-api-address", f"127.0.0.1:{control}",
        "--host", "127.0.0.1", "--port", str(http),
    ]  # fmt: skip
    with (home / "superlink.log").open("w") as log_file:
        process = subprocess.Popen(
            command, env=environment, stdout=log_file, stderr=subprocess.STDOUT
        )
        try:
            _await_health(http, process, home / "superlink.log")
            yield environment
        finally:
            stop(process)


def stop(process: subprocess.Popen[Any]) -> None:
    """Terminate a process, and kill it and its descendants if they do not end."""
    # Listed before: the children of a process that has ended cannot be found any more.
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
    for child in family:
        if child.is_running():
            child.kill()
    psutil.wait_procs(family, timeout=10)


def free_port() -> int:
    """Return a TCP port of the loopback interface that no process listens on.

    The operating system gives the port to nobody who asks for any port, and to no outgoing
    connection, for a minute after; a server that asks for this port gets it.
    """
    # Port 0 makes the operating system choose. A connection that its server closes first leaves the
    # port in the state TIME_WAIT, in which only SO_REUSEADDR, which servers set, opens it: two
    # processes that ask one after the other never get the same port.
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address):
            server.accept()[0].close()
    return int(address[1])


def flower(program: str) -> str:
    """Return the path of one of Flower's programs in this environment."""
    return str(Path(sys.executable).parent / program)


def _await_health(port: int, process: subprocess.Popen[Any], log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    # The process is checked as well, so that a SuperLink that fails at once is reported at once.
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1.0):
                return
        except OSError:  # the SuperLink does not listen or answer yet
            time.sleep(0.2)
    raise ColearnError(
        f"SuperLink: expected it to answer within {START_TIMEOUT:g} s, found "
        f"{'no answer' if process.poll() is None else f'exit code {process.returncode}'}; "
        f"its log is {log_path}"
    )


def _stream(process: subprocess.Popen[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Print a process's output line by line until it ends or the time is up."""
    # A timer, because reading a line blocks without a timeout.
    watchdog = threading.Timer(timeout, lambda: stop(process))
    watchdog.start()
    lines = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    finally:
        watchdog.cancel()
        stop(process)
    return subprocess.CompletedProcess(process.args, process.returncode, "".join(lines))
