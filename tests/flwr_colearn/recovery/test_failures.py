"""Failures that cannot differ the next time, those that may, and those that take time."""

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict

from flwr_colearn import ColearnError, Quorum, Recovery
from flwr_colearn.recovery.failures import Failure
from tests.faults import MODEL, FaultyGrid, K, bits, record_of, strategy_of, train
from tests.flwr_colearn.recovery.test_grid import failing

ROUND = 2


class Raising(FaultyGrid):
    """Participant 1 raises, in its n-th attempt of the second round, the n-th of these errors."""

    def __init__(self, clock, *errors):
        super().__init__(clock, train=self._raise)
        self.errors = list(errors)

    def _raise(self, k, plan, arrays):
        if (k, plan.round) == (1, ROUND) and self.errors:
            raise self.errors.pop(0)
        return train(k, plan, arrays)


def run(grid, rounds=2, **recovery):
    strategy = strategy_of(recovery=Recovery(**recovery), fraction_evaluate=0.0)
    result = strategy.start(grid, record_of(MODEL), num_rounds=rounds, timeout=60.0)
    return strategy.history.records[ROUND - 1], result


def attempts(grid):
    return [each.at for each in grid.attempts if (each.round, each.k) == (ROUND, 1)]


class OutOfMemoryError(RuntimeError):
    """The name of PyTorch's, which is not installed wherever these tests run."""


class ResourceExhaustedError(Exception):
    """TensorFlow's, of which the server knows the name only."""


# The same again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, TypeError, ColearnError, ZeroDivisionError])
def test_the_same_exception_is_trained_once_more_at_most(error, clock):
    grid = Raising(clock, *[error("no such column")] * 9)
    with pytest.raises(ColearnError, match=r"partition-1: .*\(after 1 restarts, the same again\)"):
        run(grid)
    assert len(attempts(grid)) == 2


@pytest.mark.parametrize("kind", ["NaN", "no examples", "missing key", "wrong type", "wrong shape"])
def test_a_reply_that_is_refused_for_the_same_reason_is_left_out_under_a_quorum(kind, clock):
    grid = FaultyGrid(clock, failing(1, ROUND, kind=kind))
    record, _ = run(grid, policy=Quorum(3))
    assert len(attempts(grid)) == 2
    assert len(record.restarts) == 1
    [absence] = record.absences
    assert "the same again" in absence["reason"]
    assert record.participants == ["partition-0", "partition-2", "partition-3"]


def test_another_round_begins_anew(clock):
    grid = FaultyGrid(clock, {(1, 1, 0): "NaN", (2, 1, 0): "NaN", (3, 1, 0): "NaN"})
    run(grid, rounds=3)
    assert len(grid.attempts) == 3 * (K + 1)


def test_different_failures_have_all_restarts(clock):
    grid = Raising(clock, ValueError("a"), TypeError("a"), KeyError("a"))
    record, _ = run(grid)
    assert len(attempts(grid)) == 4
    assert len(record.restarts) == 3


def test_a_failure_that_has_passed_does_not_count(clock):
    grid = Raising(clock, ValueError("a"))
    _, result = run(grid)
    assert bits(result.arrays) == bits(run(FaultyGrid(clock))[1].arrays)


@pytest.mark.parametrize(
    "error", [OSError(5, "I/O"), ConnectionResetError(), TimeoutError(), BrokenPipeError()]
)
def test_what_disks_and_networks_raise_may_pass(error, clock):
    grid = Raising(clock, error, error, error)
    run(grid)
    assert len(attempts(grid)) == 4


def test_wait_goes_on_with_the_same_failure(clock):
    grid = Raising(clock, *[ValueError("a")] * 9)
    run(grid, policy="wait")
    assert len(attempts(grid)) == 10


# Memory and machines ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("CUDA out of memory"),
        ResourceExhaustedError("OOM when allocating tensor with shape[64,512]"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"),
        ColearnError("device 0: expected train_epoch to succeed, found OutOfMemoryError"),
    ],
    ids=repr,
)
def test_out_of_memory_is_named_and_has_pauses_that_grow(error, clock, monkeypatch):
    monkeypatch.setattr("flwr_colearn.recovery.attempts.LONGEST_POLL", 0.01)
    grid = Raising(clock, *[error] * 3)
    record, result = run(grid)
    assert np.diff(attempts(grid)) == pytest.approx([15, 30, 60], abs=0.1)
    assert all(each["reason"].startswith("it ran out of memory") for each in record.restarts)
    assert bits(result.arrays) == bits(run(FaultyGrid(clock))[1].arrays)


def test_out_of_memory_for_good_is_dealt_with_by_the_policy(clock):
    grid = Raising(clock, *[MemoryError()] * 9)
    record, _ = run(grid, policy=Quorum(3))
    assert len(attempts(grid)) == 4
    [absence] = record.absences
    assert absence["reason"].startswith("it ran out of memory")
    assert "after 3 restarts" in absence["reason"]


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("code 5", "its machine is gone (preempted"),
        ("leaves", "its machine is gone (preempted"),
        ("code 8", "its process was ended (preempted"),
    ],
)
def test_a_preempted_machine_is_named_and_has_all_restarts(kind, named, clock):
    grid = FaultyGrid(clock, failing(1, ROUND, attempts=range(3), kind=kind))
    record, _ = run(grid)
    assert len(attempts(grid)) == 4
    assert all(each["reason"].startswith(named) for each in record.restarts)


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (0, "unknown", "passing"),
        (1, "ImportError: no torch", "repeatable"),
        (2, "ValueError: MemoryErrors are no MemoryErrors", "repeatable"),
        (2, "a.b.OutOfMemoryError: CUDA out of memory", "memory"),
        (3, "the message is not there", "passing"),
        (5, "gone", "machine"),
        (8, "crashed", "machine"),
    ],
)
def test_the_kind_of_a_failure_follows_from_code_and_exception(code, text, kind):
    sent = Message(RecordDict(), 1, "train")
    sent.metadata.__dict__["_message_id"] = "sent"
    failure = Failure.of(Message(Error(code, text), reply_to=sent))
    assert failure.kind == kind
    assert text in failure.reason
