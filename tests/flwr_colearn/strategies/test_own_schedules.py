"""Learning-rate schedules of a user's own, from the strategy's argument to the participant."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerAppComponents, ServerConfig
from flwr.serverapp import ServerApp

from flwr_colearn import (
    Annealed,
    CoLearn,
    ColearnError,
    CosineRate,
    CyclicalRate,
    ExponentialRate,
    InProcessGrid,
    SynchronousSGD,
    Warmup,
    legacy,
)
from flwr_colearn.schedules import ProgressRate
from tests.faults import MODEL, FaultyGrid, bits, record_of, strategy_of, train
from tests.small_net import K, initial, legacy_app, message_app, named

TOTAL = 7


@dataclass
class InverseRate:
    """A schedule that shares no class with the package."""

    eta: float
    kind: str = "inverse"

    def start(self, round_index):
        return self.eta / (round_index + 1)

    def at(self, epoch, local_epochs, round_index, epochs_done):
        return self.eta / (epochs_done + epoch)


class Killed(BaseException):
    """The server's process ends here."""


def run(clock, rate, kill_in=None, **arguments):
    """Run rounds of two epochs; return every round's plan, the final model and the history."""
    plans = {}

    def watched(k, plan, arrays):
        if plan.round == kill_in:
            raise Killed
        plans[plan.round] = plan
        return train(k, plan, arrays)

    strategy = strategy_of(
        local_epochs=2,
        learning_rate=rate,
        total_epochs=TOTAL,
        fraction_evaluate=0.0,
        **arguments,
    )
    grid = FaultyGrid(clock, train=watched)
    result = strategy.start(grid, record_of(MODEL), timeout=60, resume="auto")
    return list(plans.values()), bits(result.arrays), strategy.history


RATES = {
    "cosine": (CosineRate(0.2, TOTAL), lambda e: 0.1 * (1 + math.cos(math.pi * (e - 1) / TOTAL))),
    "warm-up": (Warmup(0.2, 4), lambda e: 0.2 * min(e / 4, 1)),
    "annealed": (
        Annealed(CyclicalRate(0.2), CosineRate(1.0, TOTAL)),
        # Rounds of two epochs begin with e = 1, 3, 5, 7; the last one, of one epoch, ends at r.
        lambda e: (
            (0.5 if e % 2 and e < TOTAL else 0.25)
            * (0.1 * (1 + math.cos(math.pi * ((e - 1) // 2 * 2) / TOTAL)))
        ),
    ),
    "object": (InverseRate(0.2), lambda e: 0.2 / e),
    "function": (
        lambda progress: 0.2 * (1.25 - progress),
        lambda e: 0.2 * (1.25 - (e - 1) / TOTAL),
    ),
    "numpy function": (
        lambda progress: np.float64(0.2) - progress / 8,
        lambda e: 0.2 - (e - 1) / 56,
    ),
}


@pytest.mark.parametrize(("rate", "expected"), RATES.values(), ids=RATES)
def test_participants_train_with_the_rates_of_the_schedule(rate, expected, clock):
    plans, _, history = run(clock, rate)
    assert [plan.local_epochs for plan in plans] == [2, 2, 2, 1]
    rates = [epoch.learning_rate for plan in plans for epoch in plan]
    assert rates == pytest.approx([expected(e) for e in range(1, TOTAL + 1)], abs=1e-16)
    assert [record.learning_rate for record in history] == [plan.learning_rate for plan in plans]


def test_the_record_of_a_round_states_the_rate_of_the_round(clock):
    def recorded(rate):
        return [record.learning_rate for record in run(clock, rate)[2]]

    assert recorded(CosineRate(0.2, TOTAL)) == [0.2] * 4
    assert recorded(Warmup(CyclicalRate(0.2), 3)) == [0.2] * 4
    assert recorded(InverseRate(0.2)) == [0.2 / (i + 1) for i in range(4)]
    assert recorded(lambda progress: progress) == [0, 2 / 7, 4 / 7, 6 / 7]  # the first epoch's


def test_a_function_needs_the_runs_total_epochs():
    with pytest.raises(ColearnError, match="expected total_epochs beside a function"):
        strategy_of(learning_rate=lambda progress: 0.1)
    with pytest.raises(ColearnError, match="expected total_epochs beside a function"):
        legacy.CoLearn(3, local_epochs=1, learning_rate=lambda progress: 0.1)


@pytest.mark.parametrize(
    "rate",
    [
        ExponentialRate(0.1, 0.5, 10),
        CosineRate(0.1, 10),
        Warmup(CosineRate(0.1, 10), 3),
        ProgressRate(lambda progress: 0.1, 10),
        Annealed(CyclicalRate(0.1), CosineRate(1.0, 10)),
        Annealed(CosineRate(0.1, 10), 0.5),
    ],
    ids=lambda rate: type(rate).__name__,
)
def test_a_schedule_planned_for_another_total_is_refused(rate):
    message = (
        f"total_epochs of {type(rate).__name__}: expected the run's own total_epochs=20, found"
    )
    with pytest.raises(ColearnError, match=f"{message} 10"):
        strategy_of(learning_rate=rate, total_epochs=20)
    strategy_of(learning_rate=rate, total_epochs=10)
    strategy_of(learning_rate=rate)


@pytest.mark.parametrize("wrong", [-0.1, math.nan, "0.1", None])
def test_a_wrong_rate_ends_the_run_with_the_name_of_the_schedule(wrong, clock):
    message = (
        r"epoch 1 of round i=2 by ProgressRate \(kind 'function of the progress'\): expected a"
    )
    with pytest.raises(ColearnError, match=message) as error:
        run(clock, lambda progress: 0.1 if progress < 0.5 else wrong)
    assert f"found {wrong!r}" in str(error.value)


MAKERS = {
    "function of the progress": lambda x: lambda progress: x * (1 - progress),
    "function of the round": lambda x: CyclicalRate(lambda i: x * 0.9**i),
    "object": InverseRate,
    "annealed by a function": lambda x: Annealed(
        CyclicalRate(x), ProgressRate(lambda progress: 1 - progress, TOTAL)
    ),
    "warm-up of a function": lambda x: Warmup(ProgressRate(lambda p: x * p, TOTAL), 4),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_run_goes_on_with_the_same_schedule_in_another_process(make, clock, tmp_path):
    whole = run(clock, make(0.2), checkpoints=tmp_path / "whole")
    with pytest.raises(Killed):
        run(clock, make(0.2), kill_in=3, checkpoints=tmp_path / "killed")
    with pytest.raises(ColearnError, match="found another learning rate: "):
        run(clock, make(0.3), checkpoints=tmp_path / "killed")
    plans, model, _ = run(clock, make(0.2), checkpoints=tmp_path / "killed")
    assert plans == whole[0][2:]
    assert model == whole[1]


class Rounds(legacy.CoLearn):
    """A legacy strategy that keeps the shared models."""

    shared: list

    def aggregate_fit(self, server_round, results, failures):
        average, metrics = super().aggregate_fit(server_round, results, failures)
        self.shared = parameters_to_ndarrays(average)
        return average, metrics


@pytest.mark.parametrize(
    "rate",
    [
        lambda progress: 1 / (1 + 3 * progress),
        CosineRate(0.7, TOTAL),
        Annealed(CyclicalRate(0.7), CosineRate(1.0, TOTAL)),
    ],
    ids=["function", "cosine", "annealed"],
)
def test_both_apis_train_with_the_same_bits(rate):
    arguments = {
        "local_epochs": 2,
        "learning_rate": rate,
        "total_epochs": TOTAL,
        "fraction_evaluate": 0.0,
    }
    strategy = Rounds(K, initial_parameters=ndarrays_to_parameters(initial()), **arguments)
    components = ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=4))
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    grid = InProcessGrid(legacy_app(), K)
    ServerApp(server_fn=lambda context: components)(grid, context)

    result = CoLearn(K, **arguments).start(InProcessGrid(message_app(), K), named(initial()))
    assert len(strategy.history) == 4
    for found, wanted in zip(strategy.shared, result.arrays.to_numpy_ndarrays(), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_synchronous_sgd_takes_a_function_of_the_steps():
    app = ClientApp()

    @app.train()
    def _(message, context):
        gradient = ArrayRecord({"w": Array(np.array([1.0]))})
        content = {"arrays": gradient, "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    strategy = SynchronousSGD(2, learning_rate=lambda progress: 1 - progress, total_steps=4)
    start = ArrayRecord({"w": Array(np.array([4.0]))})
    result = strategy.start(InProcessGrid(app, 2), start)
    assert result.arrays["w"].numpy() == 4 - (1 + 0.75 + 0.5 + 0.25)


def test_a_function_of_the_progress_may_have_a_single_epoch():
    assert ProgressRate(lambda progress: 0.5 - progress / 4, 1).total_epochs == 1
    with pytest.raises(ColearnError, match="total_epochs of ProgressRate"):
        ProgressRate(lambda progress: 0.1, 0)
