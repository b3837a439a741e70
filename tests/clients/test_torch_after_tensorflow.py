"""PyTorch in a process in which Flower's simulation has imported TensorFlow."""

import subprocess
import sys

PROGRAM = """
import tensorflow
from clients.settings import ParticipantSettings
from clients.tasks.registry import participant_trainer
participant_trainer(ParticipantSettings(), 0, 5).train_epoch(0.1, seed=0)
print("alive")
"""


def test_training_with_tensorflow_loaded_does_not_end_the_process():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout == "alive\n"
