"""Rounds that are interrupted in an epoch, for trainers of every framework."""

import numpy as np

from clients.trainer import follow
from flwr_colearn import CyclicalRate, LocalPlan

EPOCHS = 5
SEED = 7


class Interrupted(BaseException):
    """Training ends here."""


class Interrupting:
    """A trainer that raises in the middle of the epoch with this number, counted from 1."""

    def __init__(self, trainer, at):
        self.trainer, self.at, self.trained = trainer, at, 0

    def __getattr__(self, name):
        return getattr(self.trainer, name)

    def train_epoch(self, learning_rate, seed):
        result = self.trainer.train_epoch(learning_rate, seed)  # whose weights are then lost
        self.trained += 1
        if self.trained == self.at:
            raise Interrupted
        return result


def plan(session="s", **changes):
    of = {"round": 2, "local_epochs": EPOCHS, "epochs_done": 3, **changes}
    rates = LocalPlan.of(CyclicalRate(0.05, 0.25), **of)
    return LocalPlan.from_config({**rates.to_config(), "session": session})


def attempt(make, model, folder, at=None, plan=plan(), seed=SEED):  # noqa: B008
    """One attempt of a new process; return (weights, metrics, epochs trained)."""
    trainer = Interrupting(make(), at)
    trainer.set_weights(model)
    try:
        metrics = follow(plan, trainer, seed, folder and str(folder))
    except Interrupted:
        metrics = None
    return trainer.get_weights(), metrics, trainer.trained


def same(first, second):
    return list(first) == list(second) and all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(first.values(), second.values(), strict=True)
    )


def check(make, model, folder):
    """A round that is interrupted in any of its epochs has the bits of one that is not."""
    expected, metrics, _ = attempt(make, model, None)
    assert not same(expected, model)
    for at in range(1, EPOCHS + 1):
        home = folder / str(at)
        attempt(make, model, home, at)
        weights, found, trained = attempt(make, model, home)
        assert trained == EPOCHS - at + 1
        assert same(weights, expected)
        assert found == metrics
    # Interrupted in every epoch: each attempt gets one further.
    for _ in range(EPOCHS - 1):
        attempt(make, model, folder, at=2)
    weights, found, trained = attempt(make, model, folder)
    assert (trained, found) == (1, metrics)
    assert same(weights, expected)
