"""ClientApps for worker processes, and what befalls those processes."""

import os
import signal
from pathlib import Path

from flwr.app import ConfigRecord

from tests.faults import participants, train


def dies_once(folder):
    """An app whose participant 1 is killed in the second round, once."""

    def killed(k, plan, arrays):
        mark = Path(folder) / "died"
        if k == 1 and plan.round == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return train(k, plan, arrays)

    return participants(killed)


def dies_always():
    """An app whose participant 1 is killed in every training."""

    def killed(k, plan, arrays):
        if k == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(k, plan, arrays)

    return participants(killed)


def counting():
    """An app that counts its trainings in the context's state."""

    def count(message, context, call_next):
        config = context.state.get("count", ConfigRecord({"n": 0}))
        context.state["count"] = ConfigRecord({"n": int(config["n"]) + 1})
        return call_next(message, context)

    return participants(mods=[count])
