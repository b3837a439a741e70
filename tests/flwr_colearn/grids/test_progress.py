"""The progress of a round: who has replied, when it ends, in a terminal and in a log."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

import flwr_colearn
from flwr_colearn import (
    CoLearn,
    InProcessGrid,
    LocalPlan,
    SecureAggregation,
    Transport,
    run,
    track,
)
from flwr_colearn.grids import ProgressGrid, WrappingGrid
from flwr_colearn.grids.progress import Pace, RoundProgress

ROOT = Path(flwr_colearn.__file__).parent.parent
NAMES = {1: "leiden", 2: "utrecht", 3: "delft"}


def model():
    return ArrayRecord({"w": Array(np.zeros(3, np.float32))})


def messages(number=3, epochs=4, done=6):
    InProcessGrid(app_of(), len(NAMES))  # without which Flower makes no message
    config = ConfigRecord(LocalPlan(number, epochs, 0.1, epochs_done=done).to_config())
    return [Message(RecordDict({"arrays": model(), "config": config}), n, "train") for n in NAMES]


def answer(message, context=None):
    content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


class Slow(WrappingGrid):
    """Sites of which each replies some seconds after the one before."""

    def __init__(self, clock, seconds):
        super().__init__(None)
        self.clock, self.seconds = clock, seconds

    def stream(self, messages, *, timeout=None):
        for message in list(messages):
            self.clock.now += self.seconds
            yield answer(message)


class Now:
    now = 1000.0


@pytest.fixture
def now(monkeypatch):
    clock = Now()
    monkeypatch.setattr("flwr_colearn.grids.progress.time.monotonic", lambda: clock.now)
    return clock


# What is said -----------------------------------------------------------------------------------


def test_the_text_has_the_round_t_who_is_missing_and_the_expected_ends():
    # 30 s a local epoch: this round 120 s, of which 50 are over; 94 of 100 epochs are left.
    progress = RoundProgress.of(messages(), Pace(30.0, 10, 100), now=0.0)
    progress.replied.append(2)
    assert progress.text(50.0, NAMES.__getitem__) == (
        "round 3 of 10 (T = 4): 1 of 3 have replied, not yet leiden, delft, about 1 min left, "
        "the run about 15 min"  # 8 rounds of 4 epochs: 960 s - 50 s
    )
    few = RoundProgress.of(messages(), Pace(30.0, None, 20), now=0.0)
    assert few.run_left(50.0) == 14 * 30 - 50
    assert few.round_left(500.0) == 0.0


def test_before_anything_is_measured_no_end_is_promised():
    progress = RoundProgress.of(messages(1, 2, 0), Pace(None, None, None), now=0.0)
    assert progress.text(9.0, NAMES.__getitem__) == "round 1 (T = 2): 0 of 3 have replied"


def test_the_pace_is_that_of_the_last_round_and_its_epochs(now):
    grid = ProgressGrid(Slow(now, 20.0), NAMES.__getitem__)
    list(grid.stream(messages(epochs=4)))
    assert grid.pace.seconds == 15.0
    list(grid.stream(messages(epochs=1)))
    assert grid.pace.seconds == 60.0


def test_a_round_that_ends_with_an_error_is_no_measure(now):
    class Failing(Slow):
        def stream(self, messages, *, timeout=None):
            yield answer(messages[0])
            raise RuntimeError("lost")

    grid = ProgressGrid(Failing(now, 1.0), NAMES.__getitem__)
    with pytest.raises(RuntimeError, match="lost"):
        list(grid.stream(messages()))
    assert grid.pace.seconds is None


# In a log ---------------------------------------------------------------------------------------


def lines(flower_log):
    return [r.getMessage() for r in flower_log.records if "have replied" in r.getMessage()]


@pytest.mark.parametrize(("seconds", "expected"), [(10.0, 0), (25.0, 0), (35.0, 1), (70.0, 2)])
def test_a_log_has_at_most_a_line_a_minute_and_none_for_the_last_reply(
    now, flower_log, seconds, expected
):
    grid = ProgressGrid(Slow(now, seconds), NAMES.__getitem__)
    assert len(list(grid.stream(messages()))) == 3
    found = lines(flower_log)
    assert len(found) == expected
    if expected == 2:
        assert found == [
            "Round 3 (T = 4): 1 of 3 have replied, not yet utrecht, delft",
            "Round 3 (T = 4): 2 of 3 have replied, not yet delft",
        ]


def app_of():
    from flwr.clientapp import ClientApp

    from flwr_colearn import participant_mod

    app = ClientApp(mods=[participant_mod])
    app.train()(answer)

    @app.evaluate()
    def evaluate(message, context):
        content = RecordDict({"metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    return app


@pytest.mark.parametrize("kind", ["colearn", "fedavg", "secure", "no recovery"])
def test_every_strategy_s_rounds_pass_the_same_layer(kind, monkeypatch):
    seen = []
    monkeypatch.setattr(
        ProgressGrid,
        "_show",
        lambda self, progress: seen.append(
            (progress.round, len(progress.replied), self.pace.num_rounds, self.pace.total_epochs)
        ),
    )
    options = {"local_epochs": 2, "learning_rate": 0.1, "wait_for_participants": 0}
    strategy = CoLearn(3, total_epochs=4, **options)
    transport = None
    if kind == "fedavg":
        strategy = FedAvg(min_available_nodes=3)
    elif kind == "secure":
        transport = Transport(secure=SecureAggregation())
    elif kind == "no recovery":
        strategy = CoLearn(3, total_epochs=4, recovery=None, **options)
    run(strategy, InProcessGrid(app_of(), 3), model(), num_rounds=2, transport=transport)
    budget = None if kind == "fedavg" else 4
    assert seen == [(r, n, 2, budget) for r in (1, 2) for n in (1, 2, 3)]


# In a terminal ----------------------------------------------------------------------------------

SCRIPT = """
import sys, time
from logging import INFO
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import log
from flwr_colearn import CoLearn, LocalPlan, ThreadedGrid, participant_mod, track

app = ClientApp(mods=[participant_mod])

@app.train()
def train(message, context):
    plan = LocalPlan.from_config(message.content["config"])
    for epoch in plan:
        for batch in track(range(3), f"epoch {epoch.index}"):
            time.sleep(0.3 + 0.2 * context.node_id)
            log(INFO, "batch %s of node %s", batch, context.node_id)
    content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)

model = ArrayRecord({"w": Array(np.zeros(3, np.float32))})
strategy = CoLearn(2, local_epochs=1, learning_rate=0.1, fraction_evaluate=0)
strategy.start(ThreadedGrid(app, 2), model, num_rounds=2)
"""


def in_terminal(code):
    """What a program writes to a terminal of 100 columns, as stdout and stderr."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment, cwd=ROOT
    )
    os.close(theirs)
    written = b""
    while True:
        if not select.select([ours], [], [], 60)[0]:
            process.kill()
            raise AssertionError(f"no output for a minute: {written[-2000:]}")
        try:
            data = os.read(ours, 65536)
        except OSError:  # of a terminal that the last process has left
            break
        if not data:
            break
        written += data
    os.close(ours)
    assert process.wait(60) == 0, written.decode()
    return written.decode()


def screen(text):
    """The lines that are left on the screen: a carriage return goes back to a line's beginning."""
    rows, row, column = [""], 0, 0
    text = re.sub(r"\x1b\[\d*m", "", text)
    for token in re.findall(r"\x1b\[A|\r|\n|[^\r\n\x1b]+", text):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif token == "\x1b[A":
            row = max(row - 1, 0)
        else:
            old = rows[row].ljust(column)
            rows[row] = old[:column] + token + old[column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in rows]


@pytest.mark.slow
def test_a_terminal_has_one_line_that_is_alive_and_flower_s_log_stays_whole():
    written = in_terminal(SCRIPT)
    assert "round 1 of 2 (T = 1): 0 of 2 have replied" in written
    assert "1 of 2 have replied, not yet" in written
    assert re.search(r"round 2 of 2 \(T = 1\): 0 of 2 have replied, about \d s left", written)
    assert "epoch 1:" in written  # the site's bar of an epoch
    left = [line for line in screen(written) if line]
    # All that is left is Flower's log, of which each line is whole.
    assert all(re.match(r"(INFO|WARNING) *:", line) for line in left), left
    assert any(line.endswith("[ROUND 2/2]") for line in left)
    # Two rounds of two sites with three batches, logged while the line is alive.
    assert sum(bool(re.search(r": +batch \d of node \d$", line)) for line in left) == 12


@pytest.mark.slow
def test_without_tqdm_a_terminal_has_the_log_alone():
    block = "import sys; sys.modules['tqdm'] = None\n"
    written = in_terminal(block + SCRIPT)
    assert "[ROUND 2/2]" in written
    assert "have replied" not in written


@pytest.mark.slow
def test_a_file_has_no_line_and_no_control_character():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, env=environment, cwd=ROOT, check=True
    )
    text = done.stdout + done.stderr
    assert b"[ROUND 2/2]" in text
    assert b"\r" not in text
    assert b"have replied" not in text
    assert b"epoch 1" not in text


def test_items_are_the_same_with_and_without_a_terminal(monkeypatch):
    assert track([3, 1, 2], "epochs") == [3, 1, 2]
    monkeypatch.setattr("flwr_colearn.progress.in_terminal", lambda: True)
    assert list(track(iter([3, 1, 2]), "epochs", 3)) == [3, 1, 2]
