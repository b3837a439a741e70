"""``flwr run`` on a SuperLink of its own: own FLWR_HOME, own ports, stopped by process id."""

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
from typing import Any

import psutil

from flwr_colearn import ColearnError

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT = 60.0


def run_app(
    app: Path, num_supernodes: int, run_config: Mapping[str, Any], home: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a Flower app in Flower's simulation and wait for its end.

    ``flwr run`` by itself leaves a SuperLink running for ever, in the environment of the first
    run; this one is started for the run and ended with all its children.

    Parameters
    ----------
    app : Path
        Folder of the app.
    num_supernodes : int
        Simulated SuperNodes, one CPU each.
    run_config : mapping
        Overrides of the app's run config.
    home : Path
        FLWR_HOME, made if absent; the SuperLink's log is in it.
    timeout : float
        Seconds; then everything is stopped.

    Returns
    -------
    subprocess.CompletedProcess
        Its output is also shown as it comes.

    Raises
    ------
    ColearnError
        If the SuperLink does not start.
    """
    overrides = " ".join(f"{key}={json.dumps(value)}" for key, value in run_config.items())
    with simulation_superlink(home) as environment:
        command = [
            flower("flwr"), "run", str(app), "--stream",
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
    """Run a simulation SuperLink; yield the environment in which ``flwr`` finds it."""
    home.mkdir(parents=True, exist_ok=True)
    http, control = free_port(), free_port()
    environment = {
        **os.environ,
        "FLWR_HOME": str(home.absolute()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # For apps other than this repository's own: the plugin is beside this module.
        "PYTHONPATH": str(ROOT),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        # Flower's own programs, and those that they start, are those of this environment.
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
    """End a process and all that it started, politely first."""
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
    """Return a TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def flower(program: str) -> str:
    """Return the path of one of Flower's programs in this environment."""
    return str(Path(sys.executable).parent / program)


def _await_health(port: int, process: subprocess.Popen[Any], log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1.0):
                return
        except OSError:  # not listening yet, or not answering yet
            time.sleep(0.2)
    raise ColearnError(
        f"SuperLink: expected it to answer within {START_TIMEOUT:g} s, found "
        f"{'silence' if process.poll() is None else f'exit code {process.returncode}'}; "
        f"its log is {log_path}"
    )


def _stream(process: subprocess.Popen[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Show a process's output line by line until it ends or the time is up."""
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
