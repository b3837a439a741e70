"""PlateauEpochs in runs whose relative changes and losses are given, and T computed by hand."""

import itertools

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping

from flwr_colearn import (
    Averaging,
    CheckpointFolder,
    CoLearn,
    CyclicalRate,
    IncreasingEpochs,
    InProcessGrid,
    LocalPlan,
    PlateauEpochs,
    legacy,
    run,
)
from flwr_colearn.strategies import Progress, algorithm_of

K = 3
RULE = PlateauEpochs(2, patience=2, tolerance=0.05, maximum=8, learned=0.25)
RATE = CyclicalRate(0.1)

# The relative change of every round, powers of two, and the mean training loss of its replies.
CHANGES = [
    *(0.5, 0.25, 0.125, 0.125, 0.125, 0.125),  # level after round 6, and the loss has not fallen
    *(0.125, 0.125),  # the loss falls in round 8
    *(0.5, 0.5, 0.25, 0.25, 0.25, 0.25),  # T=4: means .5 .25, .375 .25, and .25 .25 in round 14
    *(0.5, 0.5, 0.5, 0.5, 0.5),  # T=8, the maximum
]
LOSSES = [2.0, 2.0, 1.75, 1.75, 1.75, 1.75, 1.75, 1.5, *[1.0] * 11]
PATH = [2] * 8 + [4] * 6 + [8] * 5
ROUNDS = len(CHANGES)


def scaled(w, plan):
    return w * (1 + CHANGES[plan.round - 1])


def loss_of(k, plan):
    """Return the loss of participant k, with the mean LOSSES."""
    return LOSSES[plan.round - 1] + 0.5 * (k - 1)


def app_of(name="train-loss", train=scaled):
    app = ClientApp()

    @app.train()
    def _(message, context):
        plan = LocalPlan.from_config(message.content["config"])
        w = train(message.content["arrays"]["w"].numpy(), plan)
        loss = {} if name is None else {name: loss_of(context.node_config["partition-id"], plan)}
        content = {
            "arrays": ArrayRecord({"w": Array(w)}),
            "metrics": MetricRecord({"num-examples": 1, **loss}),
        }
        return Message(RecordDict(content), reply_to=message)

    return app


def initial(size=4):
    return ArrayRecord({"w": Array(np.ones(size))})


def strategy_of(rule=RULE, **arguments):
    arguments = {"fraction_evaluate": 0.0, **arguments}
    return CoLearn(K, local_epochs=rule, learning_rate=RATE, guard=None, **arguments)


def start(strategy, app=None, rounds=ROUNDS, **arguments):
    strategy.start(InProcessGrid(app or app_of(), K), initial(), rounds, **arguments)
    return strategy.history.epochs_path


@pytest.mark.parametrize("name", ["train-loss", "train_loss"])
def test_the_golden_path(name):
    assert start(strategy_of(), app_of(name)) == PATH


def test_without_a_training_loss_the_first_plateau_counts_and_the_log_says_so_once(flower_log):
    path = start(strategy_of(), app_of(None))
    assert path[:7] == [2] * 6 + [4]  # .375 .125, .1875 .125, and .125 .125 after round 6
    assert flower_log.text.count("no participant reports the metric train-loss") == 1


def test_a_loss_that_has_not_fallen_is_logged_once(flower_log):
    start(strategy_of())
    said = [r.getMessage() for r in flower_log.records if "T stays" in r.getMessage()]
    assert len(said) == 1
    assert "fallen by 12.5% since the first round (from 2 to 1.75)" in said[0]
    assert "waits for 25%" in said[0]


def test_the_budget_and_the_maximum_bound_it():
    assert start(strategy_of(total_epochs=43), rounds=None) == [*PATH[:14], 3]
    half = PlateauEpochs(2, patience=2, maximum=3, learned=0.25)
    assert start(strategy_of(half)) == [2] * 8 + [3] * 11


@pytest.mark.parametrize("done", range(1, ROUNDS))
def test_a_run_resumed_after_any_round_has_the_same_path(done, tmp_path):
    start(strategy_of(checkpoints=tmp_path), rounds=done)
    assert start(strategy_of(checkpoints=tmp_path), resume="auto") == PATH


@pytest.mark.parametrize("round_", [1, 5, 8, 14])
def test_a_run_resumed_between_average_and_evaluation_has_the_same_path(round_, tmp_path):
    def evaluate(server_round, arrays):
        if server_round == round_:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        start(strategy_of(checkpoints=tmp_path), evaluate_fn=evaluate)
    assert start(strategy_of(checkpoints=tmp_path), resume="auto") == PATH


def test_a_round_that_was_interrupted_counts_once(tmp_path):
    def dies(w, plan):
        if plan.round == 7:
            raise RuntimeError("no such file")
        return scaled(w, plan)

    with pytest.raises(Exception, match="no such file"):
        start(strategy_of(checkpoints=tmp_path), app_of(train=dies))
    assert start(strategy_of(checkpoints=tmp_path), resume="auto") == PATH


def test_a_subclass_that_overrides_the_aggregation_and_an_averaging_have_the_same_path():
    class Own(CoLearn):
        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, list(replies))

    own = Own(K, local_epochs=RULE, learning_rate=RATE, guard=None, fraction_evaluate=0.0)
    assert start(own) == PATH
    algorithm = algorithm_of(RULE, RATE)
    assert start(Averaging(K, algorithm=algorithm, guard=None, fraction_evaluate=0.0)) == PATH


def test_the_average_of_losses_is_that_of_participants_whatever_the_user_aggregates():
    def nothing(contents, key):
        return MetricRecord({"sum": float(len(contents))})

    assert start(strategy_of(train_metrics_aggr_fn=nothing)) == PATH


# The legacy API ---------------------------------------------------------------------------------


class Participant(NumPyClient):
    def __init__(self, k):
        self.k = k

    def fit(self, parameters, config):
        plan = LocalPlan.from_config(config)
        return [scaled(parameters[0], plan)], 1, {"train-loss": loss_of(self.k, plan)}


def test_the_legacy_api_has_the_same_path():
    strategy = legacy.CoLearn(
        K,
        local_epochs=RULE,
        learning_rate=RATE,
        guard=None,
        fraction_evaluate=0.0,
        initial_parameters=ndarrays_to_parameters([np.ones(4)]),
    )
    components = ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=ROUNDS))
    app = ClientApp(lambda context: Participant(context.node_config["partition-id"]).to_client())
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    ServerApp(server_fn=lambda context: components)(InProcessGrid(app, K), context)
    assert strategy.history.epochs_path == PATH


# Differential privacy ---------------------------------------------------------------------------


def plateau_path(changes, initial, patience, tolerance, maximum):
    """The rule once more, written from its text for a whole run."""
    path, at_this = [initial], []
    for change in changes:
        at_this.append(change)
        first, last = at_this[-2 * patience : -patience], at_this[-patience:]
        stands = len(first) == patience and np.mean(last) >= (1 - tolerance) * np.mean(first)
        if stands and path[-1] < maximum:
            path.append(min(2 * path[-1], maximum))
            at_this = []
        else:
            path.append(path[-1])
    return path


def halving(w, plan):
    """Move by a half, a quarter, an eighth ..., which the noise covers in the end."""
    return w * (1 + 0.5**plan.round)


@pytest.mark.parametrize("loop", ["Flower's", "ours"])
def test_noise_of_differential_privacy_is_a_level_of_its_own(loop):
    np.random.seed(0)  # Flower draws its noise from the global generator
    rule, shared = PlateauEpochs(2, maximum=16), []
    strategy = strategy_of(rule)
    # A standard deviation of 0.01 for each weight of the average.
    private = DifferentialPrivacyServerSideFixedClipping(strategy, 3e-5, 1e3, K)
    arguments = {
        "num_rounds": 40,
        "evaluate_fn": lambda _, arrays: shared.append(arrays["w"].numpy()),
    }
    begin = private.start if loop == "Flower's" else lambda *a, **b: run(private, *a, **b)
    begin(InProcessGrid(app_of(None, halving), K), initial(100), **arguments)
    changes = [
        np.linalg.norm(new - old) / np.linalg.norm(old) for old, new in itertools.pairwise(shared)
    ]
    assert min(changes) > 0.002  # a level, on which eq. 4 would wait for a lucky draw
    path = strategy.history.epochs_path
    assert path == plateau_path(changes, 2, 3, 0.05, 16)[:-1]
    assert sorted(set(path)) == [2, 4, 8, 16]


# Checkpoints of version 0.6 ---------------------------------------------------------------------


def as_version_0_6(folder):
    """Rewrite the newest checkpoint as version 0.6 has it."""
    checkpoints = CheckpointFolder(folder)
    checkpoints.open()
    saved = checkpoints.latest()
    progress = saved.state["strategy"]["0"]["progress"]
    progress["local_epochs"] = progress.pop("seen")["local_epochs"]
    del progress["train_loss"]
    checkpoints.save(saved, checkpoints.records(saved))
    checkpoints.close()


def test_a_run_of_version_0_6_goes_on(tmp_path):
    rule = IncreasingEpochs(1, epsilon=0.25)
    expected = start(strategy_of(rule), rounds=10)
    assert len(set(expected)) > 3
    start(strategy_of(rule, checkpoints=tmp_path), rounds=3)
    as_version_0_6(tmp_path)
    resumed = strategy_of(rule, checkpoints=tmp_path)
    assert start(resumed, rounds=10, resume="auto") == expected


def test_the_progress_of_version_0_6():
    saved = {
        "round": 3,
        "local_epochs": 4,
        "epochs_done": 7,
        "seconds_per_epoch": 1.5,
        "first_seconds_per_epoch": 1.0,
    }
    progress = Progress.from_json(saved)
    assert (progress.round, progress.local_epochs, progress.epochs_done) == (3, 4, 7)
    assert progress.seen.changes == ()
    assert Progress.from_json(progress.to_json()) == progress
