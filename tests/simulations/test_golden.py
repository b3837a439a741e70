"""Every round of one fixed run, against the trace of an earlier version.

golden/regenerate.py writes the trace.
"""

import json
from pathlib import Path

import pytest
import torch

from clients.app import app
from clients.settings import ParticipantSettings
from clients.tasks.registry import server_trainer
from flwr_colearn import InProcessGrid
from simulations.server_app import make_strategy, to_record
from simulations.settings import RunSettings

GOLDEN = Path(__file__).parent / "golden" / "digits.json"

# Training amplifies the rounding of BLAS kernels, which differ between CPUs. Without momentum the
# relative changes still agree to 5e-4 from SSE 4.1 to AVX-512, and epsilon lies 15 % or more away
# from all that are compared with it, so the path of T is the same everywhere.
PARTICIPANTS = ParticipantSettings(task="digits", model="cnn", seed=0, batch_size=32, momentum=0.0)
RUN = RunSettings(
    arm="clr-ile",
    num_participants=5,
    initial_epochs=1,
    epsilon=0.059,
    learning_rate=0.05,
    decay=0.25,
    total_epochs=20,
)
FIELDS = (
    "round",
    "local_epochs",
    "learning_rate",
    "epochs_done",
    "relative_change",
    "bytes_down",
    "bytes_up",
)


def trace():
    """Run, and return what every round's record says."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = server_trainer(PARTICIPANTS)
    strategy = make_strategy(RUN, trainer, None)
    strategy.start(
        InProcessGrid(app, RUN.num_participants, run_config=PARTICIPANTS.to_config()),
        to_record(trainer),
    )
    torch.set_num_threads(threads)
    return [{name: getattr(record, name) for name in FIELDS} for record in strategy.history]


def test_the_run_is_what_it_was(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    golden, run = json.loads(GOLDEN.read_text()), trace()
    exact = [name for name in FIELDS if name != "relative_change"]
    assert [[row[name] for name in exact] for row in run] == [
        [row[name] for name in exact] for row in golden
    ]
    changes = [[row["relative_change"] for row in rows] for rows in (run, golden)]
    assert changes[0] == pytest.approx(changes[1], rel=2e-3)


def test_the_golden_run_compares_nothing_near_a_tie():
    golden = json.loads(GOLDEN.read_text())
    assert len({row["local_epochs"] for row in golden}) > 2  # T grew more than once
    for row in golden[:-1]:
        assert abs(row["relative_change"] - RUN.epsilon) > 0.15 * RUN.epsilon
