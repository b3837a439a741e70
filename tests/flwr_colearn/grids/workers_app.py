"""ClientApps for worker processes, and what befalls those processes."""

import os
import signal
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from tests.faults import participants, train


def dies_in_training(folder, trained_before):
    """An app whose participant 1 is killed in rounds 2 and 3, once, with its reply or before."""

    def kill(message, context, call_next):
        config = message.content.get("config", {})
        mark = Path(folder) / str(config.get("server-round"))
        killed = context.node_id == 2 and mark.name in ("2", "3") and not mark.exists()
        if killed and not trained_before:
            _die(mark)
        reply = call_next(message, context)
        if killed:
            _die(mark)
        return reply

    return participants(mods=[kill])


def _die(mark):
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def fails_in_round_2(folder, how, times=1000):
    """An app whose participant 1 fails so many times in round 2: it dies, hangs, or raises."""

    def fail(k, plan, arrays):
        marks = len(list(Path(folder).iterdir()))
        if (k, plan.round) == (1, 2) and marks < times:
            mark = Path(folder) / str(marks)
            if how == "dies":
                _die(mark)
            mark.touch()
            if how == "raises":
                raise ValueError("no data")
            time.sleep(600)
        return train(k, plan, arrays)

    return participants(fail)


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


def dies_at_start(folder, times):
    """An app of which so many workers die before they have it."""
    marks = len(list(Path(folder).iterdir()))
    if marks < times:
        (Path(folder) / str(marks)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return participants()


def enlarging(size):
    """An app whose replies have so many numbers, whatever it receives."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        array = np.arange(size, dtype=np.float64) + context.node_id
        content = RecordDict({"arrays": ArrayRecord({"w": Array(array)})})
        return Message(content, reply_to=message)

    return app


def hanging(folder, nodes):
    """An app in which some participants never reply."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        if context.node_id in nodes:
            (Path(folder) / f"{context.node_id}-{os.getpid()}").touch()
            time.sleep(600)
        return Message(RecordDict(), reply_to=message)

    return app


def pausing(folder, seconds):
    """An app whose participants train for so many seconds."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        time.sleep(seconds)
        (Path(folder) / message.metadata.message_id).touch()
        return Message(RecordDict(), reply_to=message)

    return app


def dies_and_leaves_a_child(folder):
    """An app whose first training forks a process that outlives the worker, as a loader may."""
    app, mark = ClientApp(), Path(folder) / "child"

    @app.train()
    def train(message, context):
        if not mark.exists():
            child = os.fork()
            if not child:
                time.sleep(600)
                os._exit(0)
            mark.write_text(str(child))
            os.kill(os.getpid(), signal.SIGKILL)
        return Message(RecordDict(), reply_to=message)

    return app


def raising():
    """An app that raises in every training."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        raise ValueError("no data")

    return app


def reporting():
    """An app whose replies have the process and the environment variables that were asked for."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        found = {name: os.environ.get(name) for name in message.content["config"]["names"]}
        content = RecordDict({"config": ConfigRecord({"pid": os.getpid(), **found})})
        return Message(content, reply_to=message)

    return app


def echoing():
    """An app whose participants return what they receive and what they kept, as new arrays."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        received = message.content["arrays"]
        kept = context.state.get("arrays", received)
        arrays = ArrayRecord({name: Array(array.numpy()) for name, array in received.items()})
        context.state["arrays"] = arrays
        content = RecordDict({**message.content, "arrays": arrays, "kept": kept})
        return Message(content, reply_to=message)

    return app
