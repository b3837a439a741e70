"""Settings for all tests: their groups, reproducible property tests, Flower's log for caplog."""

import gc
import logging
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# PyTorch imports Triton, where it is installed, with its first optimizer, and after TensorFlow that
# ends the process: each brings its own LLVM. Only tests have both frameworks in one process.
with suppress(ImportError):
    import triton  # noqa: F401

collect_ignore_glob = ["dropin/*_app.py"]  # they need libraries that may be missing
for folder, library in (("torch", "torch"), ("keras", "tensorflow")):
    if find_spec(library) is None:
        collect_ignore_glob.append(f"flwr_colearn/{folder}/*")

settings.register_profile(
    "tests",
    deadline=None,  # no test depends on the clock
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")


TESTS = Path(__file__).parent
TENSORFLOW = ["clients/keras", "clients/slim", "clients/tensorflow", "flwr_colearn/keras"]
TENSORFLOW += ["clients/test_frameworks.py", "clients/tasks/test_spectrogram.py"]
# Deployments, Flower's simulations, training runs, builds of packages, and TensorFlow, which takes
# seconds to import. Single tests have the mark `slow` themselves.
SLOW = ["e2e", "dropin", *(f"simulations/{part}" for part in ("launch", "study", "bench"))]
SLOW += [f"simulations/test_{part}.py" for part in ("server_app", "golden", "export")]
SLOW += [*TENSORFLOW, "clients/test_torch_after_tensorflow.py", "clients/torch"]
SLOW += ["flwr_colearn/test_features.py", "test_packaging.py"]
# Groups of pytest-xdist begin in this order: those that take longest, and deployments, which
# mostly wait, before all others.
ORDER = ("e2e", "simulations/launch", "tensorflow", "dropin", "simulations", "clients")


def is_in(path: Path, folders: list[str]) -> bool:
    return any(path.is_relative_to(TESTS / folder) for folder in folders)


def group_of(path: Path) -> str:
    """The tests of a file are in one group, so that its fixtures are made once.

    So are all that build TensorFlow's graphs, whose memory is then needed in one process, and all
    that start Ray, each of which takes all processors.
    """
    if is_in(path, TENSORFLOW):
        return "tensorflow"
    if is_in(path, ["simulations/launch"]):
        return "simulations/launch"
    return str(path.relative_to(TESTS if path.is_relative_to(TESTS) else TESTS.parent))


def rank_of(item: pytest.Item) -> int:
    group = item.get_closest_marker("xdist_group").args[0]
    return next((i for i, start in enumerate(ORDER) if group.startswith(start)), len(ORDER))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where slow tests are left out their files need not be imported."""
    left_out = config.option.markexpr == "not slow" and is_in(collection_path, SLOW)
    return True if left_out else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_in(item.path, SLOW):
            item.add_marker("slow")
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group_of(item.path)))
    if hasattr(config, "workerinput"):  # a process of pytest-xdist, which deals groups in order
        items.sort(key=rank_of)


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect():
    """Take all that is imported by now out of the garbage collector's way.

    Flower calls ``gc.collect()`` for every model that it converts, which otherwise walks through
    the objects of PyTorch, TensorFlow and of thousands of tests each time.
    """
    gc.collect()  # so that what is garbage by now is not kept
    gc.freeze()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """The plugin's clock, which only the test moves."""
    from tests.faults import Clock

    return Clock(monkeypatch)


@pytest.fixture
def flower_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Everything that is written to Flower's log, from the INFO level upwards."""
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    caplog.set_level(logging.INFO, logger="flwr")
    return caplog
