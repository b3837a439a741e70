import subprocess
import sys

PROGRAM = """
import sys
import clients.app
import clients.torch.tasks
slow = {"torchvision", "torch._dynamo", "matplotlib", "pandas", "sklearn", "tensorflow"}
sys.exit(", ".join(slow & set(sys.modules)) or 0)
"""


def test_a_participant_imports_nothing_slow_that_its_task_does_not_need():
    """Flower starts a process for every message of a deployment."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert not done.returncode, done.stderr
