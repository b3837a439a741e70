"""Settings for all tests: their groups, reproducible property tests, Flower's log for caplog."""

import gc
import logging
from contextlib import suppress
from functools import cache
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
TENSORFLOW = ("clients/keras", "clients/slim", "clients/tensorflow", "flwr_colearn/keras")
TENSORFLOW += ("clients/test_frameworks.py", "clients/tasks/test_spectrogram.py")
# Deployments, Flower's simulations, training runs, builds of packages, and TensorFlow, which takes
# seconds to import. Single tests have the mark `slow` themselves.
SLOW = ("e2e", "docs", "dropin", *(f"simulations/{part}" for part in ("launch", "study", "bench")))
SLOW += tuple(
    f"simulations/test_{part}.py" for part in ("server_app", "golden", "export", "secure_accuracy")
)
SLOW += (*TENSORFLOW, "clients/test_torch_after_tensorflow.py", "clients/torch")
SLOW += ("flwr_colearn/test_features.py", "flwr_colearn/dynamic/test_protocol.py")
SLOW += ("flwr_colearn/grids/test_processes.py",)  # each test starts processes of its own
SLOW += ("test_packaging.py",)
# Groups of pytest-xdist begin in this order: those that take longest, and deployments, which
# mostly wait, before all others.
ORDER = ("e2e", "simulations/launch", "tensorflow", "dropin", "simulations", "clients")
# In a process of their own these tests have a deployment of their own.
ALONE = {
    "test_a_hang_in_an_evaluation_ends_at_the_time_limit_and_costs_no_round": "e2e/evaluation",
    "test_a_site_is_revoked_and_another_gets_a_new_key": "e2e/revocation",
}


@cache  # asked for thousands of tests of a few hundred files
def is_in(path: Path, folders: tuple[str, ...]) -> bool:
    return any(path.is_relative_to(TESTS / folder) for folder in folders)


def group_of(nodeid: str) -> str:
    """The tests of a file are in one group, so that its fixtures are made once.

    So are all that build TensorFlow's graphs, whose memory is then needed in one process, and all
    that start Ray, each of which takes all processors.
    """
    file, _, test = nodeid.partition("::")
    path = TESTS.parent / file
    if is_in(path, TENSORFLOW):
        return "tensorflow"
    if is_in(path, ("simulations/launch",)):
        return "simulations/launch"
    return ALONE.get(test, file.removeprefix("tests/"))


def rank_of(item: pytest.Item) -> int:
    group = group_of(item.nodeid)
    return next((i for i, start in enumerate(ORDER) if group.startswith(start)), len(ORDER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Deal out the groups; ``--dist loadgroup`` of pytest-xdist 3.8 has none under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Where slow tests are left out, TensorFlow is not imported for the package's doctests."""
    if config.option.markexpr == "not slow":
        keras = TESTS.parent / "flwr_colearn" / "keras"
        config.option.ignore = [*(config.option.ignore or []), str(keras)]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where slow tests are left out their files need not be imported."""
    left_out = config.option.markexpr == "not slow" and is_in(collection_path, SLOW)
    return True if left_out else None


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_in(item.path, SLOW):
            item.add_marker("slow")
    if hasattr(config, "workerinput"):  # a process of pytest-xdist
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
