"""An evaluation that raises costs no training: a resumed run evaluates the round's average."""

import random
from dataclasses import asdict

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg

from flwr_colearn import (
    CoLearn,
    CyclicalRate,
    DynamicAveraging,
    FixedEpochs,
    History,
    IncreasingEpochs,
    InProcessGrid,
    run,
)
from tests.faults import MODEL, K, bits, is_query, participants, record_of
from tests.flwr_colearn.dynamic.test_strategy import client_app, zeros

ROUNDS = 4


class EvaluationError(Exception):
    pass


def colearn(**kwargs):
    rule = {"learning_rate": CyclicalRate(0.2), "local_epochs": IncreasingEpochs(1, epsilon=0.12)}
    strategy = CoLearn(K, **{**rule, **kwargs})
    strategy.random.seed(0)  # which chooses the nodes of an evaluation
    return strategy


STRATEGIES = {
    "CoLearn": colearn,
    "CoLearn, half of the nodes evaluate": lambda: colearn(fraction_evaluate=0.5),
    "CoLearn with a budget": lambda: colearn(local_epochs=FixedEpochs(2), total_epochs=2 * ROUNDS),
    "FedAvg": FedAvg,
    "FedAvg, half of the nodes evaluate": lambda: FedAvg(fraction_evaluate=0.5),
    "FedAdam": lambda: FedAdam(eta=0.01),
    "DynamicAveraging": lambda: DynamicAveraging(0.3, num_learners=K, seed=0),
    "DynamicAveraging, never synchronised": lambda: DynamicAveraging(1e6, num_learners=K, seed=0),
}


class Server:
    """The processes of a server, one after the other, with the same participants."""

    def __init__(self, name, folder):
        self.name, self.folder, self.trained = name, folder, []
        self.dynamic = name.startswith("Dynamic")
        self.grid = InProcessGrid(client_app() if self.dynamic else participants(), K)
        call = self.grid._call

        def counted(message):
            if message.metadata.message_type == "train" and not is_query(message):
                self.trained.append(message.content.get("config", {}).get("server-round"))
            return call(message)

        self.grid._call = counted

    def start(self, fails_in=None, hook="evaluate_fn", rounds=ROUNDS):
        strategy, seen = STRATEGIES[self.name](), []

        def evaluate(server_round, arrays):
            seen.append(server_round)
            if (hook, server_round) == ("evaluate_fn", fails_in):
                raise EvaluationError
            norm = sum(float(np.linalg.norm(array.numpy())) for array in arrays.values())
            return MetricRecord({"norm": norm})

        aggregate = strategy.aggregate_evaluate

        def aggregate_evaluate(server_round, replies):
            if (hook, server_round) == ("aggregate_evaluate", fails_in):
                raise EvaluationError
            return aggregate(server_round, replies)

        strategy.aggregate_evaluate = aggregate_evaluate
        budget = "budget" in self.name
        result = run(
            strategy,
            self.grid,
            zeros() if self.dynamic else record_of(MODEL),
            None if budget else rounds,
            train_config=ConfigRecord({"local-epochs": 1, "learning-rate": 0.2}),
            evaluate_fn=evaluate,
            checkpoints=self.folder / "checkpoints",
            history=None if self.dynamic else self.folder / "history.jsonl",
            resume="auto",
        )
        records = getattr(strategy, "history", None) or self.history()
        return seen, (
            bits(result.arrays),
            [{**asdict(record), "seconds": 0} for record in records],
            [
                {number: dict(metrics) for number, metrics in by_round.items() if number}
                for by_round in (
                    result.train_metrics_clientapp,
                    result.evaluate_metrics_clientapp,
                    result.evaluate_metrics_serverapp,
                )
            ],
        )

    def history(self):
        return History.read(self.folder / "history.jsonl")


@pytest.mark.parametrize("hook", ["evaluate_fn", "aggregate_evaluate"])
@pytest.mark.parametrize(
    "fails_in",
    [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(ROUNDS, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_whose_evaluation_raised_goes_on_without_training_the_round_again(
    name, fails_in, hook, tmp_path
):
    random.seed(0)
    plain = Server(name, tmp_path / "plain")
    _, expected = plain.start()
    random.seed(0)
    server = Server(name, tmp_path / "run")
    with pytest.raises(EvaluationError) as caught:
        server.start(fails_in, hook)
    trained = list(server.trained)
    if not server.dynamic:  # whose reference may be the initial model yet
        assert bits(caught.value.result.arrays) != bits(record_of(MODEL))
    # Once more, from the checkpoint of the middle of the round.
    with pytest.raises(EvaluationError):
        server.start(fails_in, hook)
    assert server.trained == trained
    seen, found = server.start()
    assert found == expected
    assert seen == list(range(fails_in, ROUNDS + 1))
    assert server.trained == plain.trained


def test_the_seconds_of_the_training_count_after_a_resume(tmp_path, clock):
    server = Server("CoLearn", tmp_path)
    train = server.grid._call

    def slow(message):
        clock.sleep(100.0 if message.metadata.message_type == "train" else 0.0)
        return train(message)

    server.grid._call = slow
    with pytest.raises(EvaluationError):
        server.start(1, rounds=1)
    clock.sleep(1e6)  # nobody starts the server again for days
    server.start(rounds=1)
    [record] = server.history()
    # One after the other, with a query for the name of each before.
    assert 2 * K * 100.0 <= record.seconds < 2 * K * 100.0 + 50.0
