"""A server whose process is killed with SIGKILL, at twenty moments for each strategy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "CoLearn"])
def test_a_killed_server_ends_with_the_same_bits(name, tmp_path):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed.py"), name, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == 20
    assert sum(saving for saving, _, _ in outcomes) >= 5
    assert len({saved for _, saved, _ in outcomes}) > 1  # in different rounds
    assert all(same for _, _, same in outcomes), outcomes
