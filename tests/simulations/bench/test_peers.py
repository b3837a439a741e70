import json
from pathlib import Path

import pytest

from flwr_colearn import ColearnError
from simulations.bench import __main__ as bench
from simulations.bench import peers
from simulations.bench.users import SmallCnn, Work

SMALL = ["--users", "4", "--cohort", "2", "--rounds", "1", "--cores", "1", "--without-ray"]


def table(folder, *arguments):
    bench.main(["peers", *SMALL, "--output", str(folder), *arguments])
    return json.loads((folder / "peers.json").read_text())


def test_the_model_is_the_one_whose_size_pfl_prints():
    assert sum(p.numel() for p in SmallCnn().parameters()) == 1_626_442


@pytest.mark.parametrize(("cores", "ways"), [(1, 1), (2, 3)])
def test_both_strategies_in_process_do_all_the_work(tmp_path, cores, ways):
    """With two cores in one thread, in two threads, and in two processes."""
    result = table(tmp_path, "--cores", str(cores))
    *ours, pfl, ray = result["rows"]
    assert len(ours) == 2 * ways
    assert result["steps"] == 2 * 2 * 5  # rounds with the warm-up, users, batches
    for row in ours:
        assert row["users/s"] > 0
        assert row["processes"] == 2 if row["CPU ms a user"] is None else row["CPU ms a user"] > 0
    assert "not run, see --pfl-python" in pfl["side"]
    assert "not run, --without-ray" in ray["side"]


def test_a_side_that_does_other_work_is_refused(tmp_path):
    side = peers.Side("lazy", 1, 1, lambda work, folder: folder.mkdir())
    with pytest.raises(ColearnError, match="lazy: expected 20 steps, found 0"):
        peers.measure(side, Work(users=4, cohort=2, rounds=1), tmp_path / "lazy")


PFL_PYTHON = Path("pfl-venv/bin/python")


@pytest.mark.skipif(not PFL_PYTHON.exists(), reason=f"no {PFL_PYTHON} with pfl and torch")
def test_pfl_does_all_the_work(tmp_path):
    names = [row["side"] for row in table(tmp_path, "--pfl-python", str(PFL_PYTHON))["rows"]]
    assert names[2:4] == ["pfl-research", "pfl-research, torchrun"]
