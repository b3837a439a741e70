"""CoLearn inside Flower's differential privacy wrappers."""

import math
import re
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)

from flwr_colearn import (
    Averaging,
    CoLearn,
    ColearnError,
    CyclicalRate,
    IncreasingEpochs,
    InProcessGrid,
    Quorum,
    Recovery,
    Transport,
)
from flwr_colearn import run as run_any
from flwr_colearn.strategies import Progress
from tests import small_net
from tests.faults import bits
from tests.small_net import K

EPSILON = 0.08
ROUNDS = 16


def strategy_of(**arguments):
    return CoLearn(
        K,
        local_epochs=IncreasingEpochs(1, epsilon=EPSILON),
        learning_rate=CyclicalRate(0.5),
        fraction_evaluate=0.0,
        **arguments,
    )


def run(wrapper, mods=(), noise=0.1, clipping_norm=1.5, rounds=ROUNDS):
    """Return the strategy inside and all shared models, the initial one first."""
    np.random.seed(0)  # Flower draws its noise from the global generator
    strategy, shared = strategy_of(), []
    wrapper(
        strategy, noise_multiplier=noise, clipping_norm=clipping_norm, num_sampled_clients=K
    ).start(
        InProcessGrid(small_net.message_app(*mods), K),
        small_net.named(small_net.initial()),
        num_rounds=rounds,
        evaluate_fn=lambda _, arrays: shared.append(arrays.to_numpy_ndarrays()),
    )
    return strategy, shared


SIDES = pytest.mark.parametrize(
    ("wrapper", "mods"),
    [
        (DifferentialPrivacyServerSideFixedClipping, ()),
        (DifferentialPrivacyClientSideFixedClipping, (fixedclipping_mod,)),
    ],
    ids=["server side", "client side"],
)


@SIDES
def test_a_model_learns_under_noise_and_the_epochs_follow_equation_4(wrapper, mods):
    strategy, shared = run(wrapper, mods)
    path = strategy.history.epochs_path
    assert len(path) == ROUNDS
    assert path == small_net.epochs_by_equation_4(1, EPSILON, shared)
    assert path[-1] > path[0]
    assert len(set(path)) < len(path)
    assert small_net.accuracy(shared[0]) < 0.7
    assert small_net.accuracy(shared[-1]) > 0.9
    assert {array.dtype for array in shared[-1]} == {np.dtype(np.float32)}


@SIDES
def test_the_shared_model_is_the_mean_of_the_clipped_updates(wrapper, mods):
    _, (start, average) = run(wrapper, mods, noise=0.0, clipping_norm=0.1, rounds=1)
    plan, _ = strategy_of().algorithm.next_plan(1, Progress(), None)
    clipped = []
    for k in range(K):
        trained = small_net.train(k, plan, start)
        update = [new.astype(float) - old for new, old in zip(trained, start, strict=True)]
        norm = np.sqrt(sum((part**2).sum() for part in update))
        assert norm > 0.1
        clipped.append([part * 0.1 / norm for part in update])
    for found, old, *updates in zip(average, start, *clipped, strict=True):
        assert found == pytest.approx(old + np.mean(updates, axis=0), abs=1e-6)


def warnings_of(flower_log):
    records = flower_log.records
    return [each.getMessage() for each in records if "differential privacy" in each.getMessage()]


def with_batch_norm():
    return ArrayRecord(
        {
            **small_net.named(small_net.initial()),
            "bn.running_var": Array(np.ones(3, np.float32)),
        }
    )


@pytest.mark.parametrize("statistics", [True, False])
def test_statistics_in_a_private_model_are_warned_of_once(statistics, flower_log):
    model = with_batch_norm() if statistics else small_net.named(small_net.initial())
    strategy = DifferentialPrivacyServerSideFixedClipping(strategy_of(), 0.1, 1.0, K)
    strategy.start(InProcessGrid(keeping_app(), K), model, num_rounds=2)
    found = warnings_of(flower_log)
    assert len(found) == statistics
    assert all("bn.running_var, 1 in all" in message for message in found)


def test_without_a_wrapper_there_is_no_warning_of_statistics(flower_log):
    strategy_of().start(InProcessGrid(keeping_app(), K), with_batch_norm(), num_rounds=2)
    assert warnings_of(flower_log) == []


def keeping_app():
    """Participants that move every array by a little."""
    return small_net.app_of(
        lambda k, plan, arrays: {name: array + np.float32(0.1) for name, array in arrays.items()}
    )


def test_run_ends_with_the_budget_and_resumes(tmp_path):
    """What Flower's own loop of a wrapper cannot do."""

    def start(folder, rounds):
        budget = CoLearn(K, local_epochs=2, learning_rate=0.5, total_epochs=7)
        private = DifferentialPrivacyServerSideFixedClipping(budget, 0.0, 1.0, K)
        grid, initial = InProcessGrid(small_net.message_app(), K), small_net.initial()
        result = run_any(
            private, grid, small_net.named(initial), rounds, checkpoints=folder, resume="auto"
        )
        return budget.history, bits(result.arrays)

    history, whole = start(tmp_path / "whole", None)
    assert history.epochs_path == [2, 2, 2, 1]
    start(tmp_path / "halted", 2)
    history, resumed = start(tmp_path / "halted", None)
    assert history.epochs_path == [2, 2, 2, 1]
    assert resumed == whole


def weighted():
    return strategy_of(weighting="weighted")


def averaging():
    return Averaging(K, fraction_evaluate=0.0)  # "weighted" by default


@pytest.mark.parametrize("inner", [weighted, averaging])
@pytest.mark.parametrize("loop", ["run", "the wrapper's own"])
def test_weights_by_number_of_examples_are_refused_under_privacy(inner, loop):
    private = DifferentialPrivacyServerSideFixedClipping(inner(), 1.0, 1.0, K)
    grid = InProcessGrid(small_net.message_app(), K)
    start = private.start if loop != "run" else lambda *args, **kw: run_any(private, *args, **kw)
    with pytest.raises(ColearnError, match="weighting under differential privacy: expected 'unif"):
        start(grid, small_net.named(small_net.initial()), num_rounds=1)


@pytest.mark.parametrize("loop", ["run", "the wrapper's own"])
def test_a_quorum_is_refused_under_privacy(loop):
    recovery = Recovery(policy=Quorum(2))
    private = DifferentialPrivacyServerSideFixedClipping(strategy_of(), 1.0, 1.0, K)
    grid = Transport(recovery=recovery).connect(InProcessGrid(small_net.message_app(), K))
    start = private.start if loop != "run" else lambda *args, **kw: run_any(private, *args, **kw)
    with pytest.raises(ColearnError, match="recovery policy under differential privacy: expected"):
        start(grid, small_net.named(small_net.initial()), num_rounds=1)


def sized_app(sizes):
    """Participants that move every array by a little, and state these numbers of examples."""
    app = ClientApp()

    @app.train()
    def _(message, context):
        metrics = MetricRecord({"num-examples": sizes[context.node_config["partition-id"]]})
        sent = message.content["arrays"].items()
        arrays = ArrayRecord({name: Array(each.numpy() + np.float32(0.1)) for name, each in sent})
        content = {"arrays": arrays, "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    return app


@pytest.mark.parametrize(("first", "warnings"), [(1, 0), (9, 1)])
def test_unequal_weights_of_a_strategy_of_flower_are_warned_of_once(first, warnings, flower_log):
    nodes = {"min_train_nodes": K, "min_available_nodes": K, "fraction_evaluate": 0.0}
    private = DifferentialPrivacyServerSideFixedClipping(FedAvg(**nodes), 0.1, 1.0, K)
    grid = InProcessGrid(sized_app([first] + [1] * (K - 1)), K)
    run_any(private, grid, small_net.named(small_net.initial()), 2)
    assert len([text for text in warnings_of(flower_log) if "found 1 to 9" in text]) == warnings


# The example of docs/privacy.md -----------------------------------------------------------------

PAGE = (Path(__file__).parents[3] / "docs" / "privacy.md").read_text()


def number_of(name):
    return float(re.search(rf"{name}=([\d.]+)", PAGE)[1])


def epsilon_of(noise_multiplier, rounds, delta, sensitivity):
    """The exact epsilon of a Gaussian mechanism (Balle and Wang, 2018, theorem 8)."""
    # Not everywhere where these tests run; the logarithm of the tail is beyond `math`.
    norm = pytest.importorskip("scipy.stats").norm
    mu = sensitivity * math.sqrt(rounds) / noise_multiplier

    def excess(epsilon):
        first = norm.cdf(mu / 2 - epsilon / mu)
        return first - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)) - delta

    return pytest.importorskip("scipy.optimize").brentq(excess, 0, mu**2 + 20 * mu)


def test_the_epsilon_of_the_documented_example_is_the_computed_one():
    delta = 1e-5
    noise, rounds = number_of("noise_multiplier"), number_of("num_rounds")
    joins, replaced = map(float, re.findall(r"\(([\d.]+), 1e-5\)", PAGE))
    assert epsilon_of(noise, rounds, delta, 1) == pytest.approx(joins, abs=0.05)
    assert epsilon_of(noise, rounds, delta, 2) == pytest.approx(replaced, abs=0.05)
    assert joins < 10
    assert epsilon_of(0.1, 20, delta, 1) == pytest.approx(1190, abs=1)


@pytest.mark.slow
def test_a_model_learns_with_the_documented_noise():
    np.random.seed(0)
    participants = int(number_of("num_sampled_clients"))
    assert participants == int(re.search(r"CoLearn\((\d+),", PAGE)[1])
    strategy = CoLearn(
        participants,
        local_epochs=IncreasingEpochs(5, epsilon=0.08),
        learning_rate=CyclicalRate(0.5),
        fraction_evaluate=0.0,
    )
    private = DifferentialPrivacyServerSideFixedClipping(
        strategy, number_of("noise_multiplier"), number_of("clipping_norm"), participants
    )
    grid = InProcessGrid(small_net.message_app(), participants)
    initial = small_net.initial()
    result = run_any(private, grid, small_net.named(initial), int(number_of("num_rounds")))
    assert small_net.accuracy(initial) < 0.7
    assert small_net.accuracy(result.arrays.to_numpy_ndarrays()) > 0.95


def test_flower_refuses_its_accountant_as_documented():
    accounting = pytest.importorskip("flwr.supercore.privacy_accounting")
    if "accountant" not in signature(DifferentialPrivacyServerSideFixedClipping).parameters:
        pytest.skip("this version of Flower has no accountant")
    config = SimpleNamespace(sampling_method=accounting.SamplingMethod.NO_AMPLIFICATION)
    with pytest.raises(ValueError, match=r"FedAvg\.aggregate_train"):
        DifferentialPrivacyServerSideFixedClipping(
            strategy_of(), 1.0, 1.0, K, accountant=SimpleNamespace(config=config)
        )
