"""Settings for all tests: reproducible property tests, and Flower's log within reach of caplog."""

import logging
from contextlib import suppress
from importlib.util import find_spec

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
