"""Runs in processes of their own that are killed with SIGKILL, and resumed by another process.

    python tests/flwr_colearn/killed.py FedAdam /tmp/folder

Moments are counted in calls of functions, so that a seed chooses the same ones again. Printed is a
JSON list: for every moment whether the process was saving a checkpoint, how many rounds were
complete, and whether the resumed run ended with the bits of one that nobody killed.
"""

import hashlib
import json
import logging
import os
import random
import signal
import sys
from pathlib import Path

from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg

from flwr_colearn import CheckpointFolder, CoLearn, InProcessGrid, run
from tests.faults import MODEL, K, participants, record_of

ROUNDS, ANYWHERE, SAVING = 4, 14, 6
SAMPLED = {"fraction_train": 0.75, "fraction_evaluate": 0.5, "min_available_nodes": K}
STRATEGIES = {
    "FedAvg": lambda: FedAvg(**SAMPLED),
    "FedAdam": lambda: FedAdam(**SAMPLED, eta=0.01),
    "CoLearn": lambda: seeded(CoLearn(K, local_epochs=2, learning_rate=0.1, fraction_evaluate=0.5)),
}
PLAN = {"local-epochs": 2, "learning-rate": 0.1}


def seeded(strategy):
    """Return the strategy; which participants evaluate is then the same in every process."""
    strategy.random.seed(7)
    return strategy


def start(name, folder):
    """Run to the end, from the newest checkpoint if there is one; return all that came of it."""
    random.seed(7)  # as in every process of an app that is started again
    result = run(
        STRATEGIES[name](),
        InProcessGrid(participants(), K),
        record_of(MODEL),
        ROUNDS,
        train_config=ConfigRecord({} if name == "CoLearn" else PLAN),
        evaluate_fn=lambda _, arrays: MetricRecord(
            {"sum": float(arrays["fc.weight"].numpy().sum())}
        ),
        checkpoints=folder / "checkpoints",
        history=folder / "history.jsonl",
        resume="auto",
    )
    records = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    # Which participants Flower's strategies draw for an evaluation is no part of a run's state.
    apart = ("seconds",) if name == "CoLearn" else ("seconds", "site_metrics")
    rounds = [{key: value for key, value in each.items() if key not in apart} for each in records]
    arrays = b"".join(array.data for array in result.arrays.values())
    return hashlib.sha256(json.dumps(rounds).encode() + arrays).hexdigest()


def in_a_process(name, folder, kill_at=None, saving=False):
    """Return what `start` does in a new process, and the calls it made; None if it was killed."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        calls = Calls(kill_at, saving)
        outcome = start(name, folder)
        os.write(write, json.dumps([outcome, calls.stop()]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if kill_at is None:
        return json.loads(said)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    return None


class Calls:
    """Counts calls of functions, all of them and those during a save, and kills at the n-th."""

    def __init__(self, kill_at, saving):
        self.kill_at, self.saving = kill_at, saving
        self.count = {False: 0, True: 0}
        self.within = 0
        sys.setprofile(self)

    def __call__(self, frame, event, arg):
        if frame.f_code is CheckpointFolder.save.__code__:
            self.within += {"call": 1, "return": -1}.get(event, 0)
        if event in ("call", "c_call"):
            for kind in {False, self.within > 0}:
                self.count[kind] += 1
                if kind == self.saving and self.count[kind] == self.kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

    def stop(self):
        sys.setprofile(None)
        return self.count[False], self.count[True]


def main(name, folder):
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    wanted, (calls, saves) = in_a_process(name, folder / "whole")
    generator, outcomes = random.Random(name), []
    for moment in range(ANYWHERE + SAVING):
        saving = moment >= ANYWHERE
        path = folder / str(moment)
        kill_at = generator.randrange(1, int(0.98 * (saves if saving else calls)))
        in_a_process(name, path, kill_at, saving)
        saved = list((path / "checkpoints").glob("*.npz"))
        found, _ = in_a_process(name, path)
        outcomes.append([saving, len(saved), found == wanted])
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
