import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import nn
from torch.utils.data import TensorDataset

from clients.client_app import make_client_app
from clients.local_training import OPTIMIZER
from clients.torch.trainer import TorchTrainer
from clients.trainer import EpochResult, derive_seed, follow
from flwr_colearn import (
    CoLearn,
    ConstantRate,
    CyclicalRate,
    ExponentialRate,
    FixedEpochs,
    IncreasingEpochs,
    InProcessGrid,
    LocalPlan,
)
from flwr_colearn.torch import roles
from simulations.server_app import to_record

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

SEED = 4


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def trainer_of(k, model=None):
    """The trainer of participant k, with data of its own."""
    generator = torch.Generator().manual_seed(k)
    labels = torch.arange(20 + k) % 3
    data = TensorDataset(torch.randn(20 + k, 4, generator=generator) + labels[:, None], labels)
    return TorchTrainer(model or network(), data, data, batch_size=8, device="cpu")


def build(context):
    # Its own initial weights never matter: those of the message do.
    k = context.node_config["partition-id"]
    return trainer_of(k, network(seed=100 + k))


def app_of(**options):
    return make_client_app(build, seed=lambda context: SEED, **options)


def shared_model(seed=0):
    return to_record(trainer_of(0, network(seed)))


def ask(grid, node_id, message_type="train", **config):
    content = RecordDict({"arrays": shared_model(), "config": ConfigRecord(config)})
    [reply] = grid.send_and_receive([Message(content, node_id, message_type)])
    return reply


def arrays_of(record):
    return {name: array.numpy() for name, array in record.items()}


def same(first, second):
    return list(first) == list(second) and all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(first.values(), second.values(), strict=True)
    )


def trained_by_hand(k, *plans):
    trainer = trainer_of(k)
    for plan in plans:
        metrics = follow(plan, trainer, derive_seed(SEED, k))
    return trainer.get_weights(), metrics


@pytest.mark.parametrize("k", [0, 2])
def test_a_participant_follows_the_plan_from_the_shared_model_on_its_own_data(k):
    plan = LocalPlan.of(CyclicalRate(0.1, 0.25), 2, 3, 5)
    reply = ask(InProcessGrid(app_of(), 3), k + 1, **plan.to_config())
    weights, metrics = trained_by_hand(k, plan)
    assert same(arrays_of(reply.content["arrays"]), weights)
    assert dict(reply.content["metrics"]) == metrics
    # The last of 20, 21, 22 examples in batches of 8 is never alone.
    assert metrics["num-examples"] == 20 + k
    assert metrics["learning-rate"] == 0.025


def test_the_runs_seed_decides():
    def train(seed):
        grid = InProcessGrid(make_client_app(build, seed=lambda context: seed), 1)
        return arrays_of(ask(grid, 1, **LocalPlan(1, 1, 0.1).to_config()).content["arrays"])

    assert same(train(0), train(0))
    assert not same(train(0), train(1))


def test_a_participant_evaluates_the_shared_model_on_its_own_data():
    reply = ask(InProcessGrid(app_of(), 3), 3, "evaluate")
    assert dict(reply.content["metrics"]) == trainer_of(2).evaluate()


def test_a_server_without_a_plan_is_answered_with_the_key_that_is_missing():
    reply = ask(InProcessGrid(app_of(), 1), 1, **{"server-round": 1})
    assert "ColearnError: train config: expected the key 'local-epochs'" in reply.error.reason


def test_a_model_of_another_architecture_is_answered_with_an_error():
    arrays = ArrayRecord({"w": next(iter(shared_model().values()))})
    content = RecordDict(
        {"arrays": arrays, "config": ConfigRecord(LocalPlan(1, 1, 0.1).to_config())}
    )
    [reply] = InProcessGrid(app_of(), 1).send_and_receive([Message(content, 1, "train")])
    assert "ColearnError: weights: expected those of this participant's" in reply.error.reason


@pytest.mark.parametrize("rate", [CyclicalRate(0.1), ExponentialRate(0.1, 0.25, 6), 0.05], ids=repr)
def test_one_round_of_one_participant_is_vanilla_training(rate):
    strategy = CoLearn(
        1, local_epochs=FixedEpochs(6), learning_rate=rate, total_epochs=6, fraction_evaluate=0.0
    )
    result = strategy.start(InProcessGrid(app_of(), 1), shared_model())
    plan = LocalPlan.of(ConstantRate(rate) if isinstance(rate, float) else rate, 1, 6)
    weights, _ = trained_by_hand(0, plan)
    assert len(strategy.history) == 1
    assert same(arrays_of(result.arrays), weights)


def test_a_round_is_the_mean_of_the_participants_trained_alone():
    strategy = CoLearn(
        3,
        local_epochs=2,
        learning_rate=CyclicalRate(0.1),
        roles=roles(network()),
        fraction_evaluate=0.0,
    )
    result = strategy.start(InProcessGrid(app_of(), 3), shared_model(), num_rounds=1)
    plan = LocalPlan.of(CyclicalRate(0.1, 0.25), 1, 2)
    alone = [trained_by_hand(k, plan)[0] for k in range(3)]
    for name, array in arrays_of(result.arrays).items():
        models = np.stack([weights[name] for weights in alone]).astype(np.float64)
        expected = models.mean(0)
        if name == "1.running_var":  # pooled: the spread of the means comes on top
            expected += np.stack([weights["1.running_mean"] for weights in alone]).var(0)
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7, err_msg=name)


def rounds_of_one_epoch(keep, total=5):
    """Five rounds of one local epoch of one participant: its grid and the shared model."""
    grid = InProcessGrid(app_of(keep_optimizer=lambda context: keep), 1)
    strategy = CoLearn(
        1,
        local_epochs=1,
        learning_rate=ExponentialRate(0.1, 0.25, total),
        total_epochs=total,
        fraction_evaluate=0.0,
    )
    return grid, arrays_of(strategy.start(grid, shared_model()).arrays)


def test_a_kept_optimizer_makes_rounds_one_uninterrupted_training():
    plan = LocalPlan.of(ExponentialRate(0.1, 0.25, 5), 1, 5)
    uninterrupted, _ = trained_by_hand(0, plan)
    assert same(rounds_of_one_epoch(keep=True)[1], uninterrupted)
    assert not same(rounds_of_one_epoch(keep=False)[1], uninterrupted)


def test_momentum_stays_in_the_participants_state_if_asked_for():
    grid, _ = rounds_of_one_epoch(keep=True)
    trainer = trainer_of(0)
    plan = LocalPlan.of(ExponentialRate(0.1, 0.25, 5), 1, 5)
    follow(plan, trainer, derive_seed(SEED, 0))
    kept = arrays_of(grid.contexts[1].state[f"{OPTIMIZER}.after"])
    assert kept
    assert same(kept, trainer.get_optimizer_state())
    assert not rounds_of_one_epoch(keep=False)[0].contexts[1].state


def test_by_default_every_round_begins_with_a_new_optimizer():
    grid = InProcessGrid(app_of(), 1)
    first, second, third = replies(grid, 1, 2, 3)
    assert OPTIMIZER not in "".join(grid.contexts[1].state)
    # The same model and plan give other weights only if momentum is left from a round before.
    kept = replies(optimizers_kept(), 1, 2, 3)
    assert same(first, kept[0])
    assert not same(second, kept[1])
    assert same(second, replies(InProcessGrid(app_of(), 1), 2)[0])
    assert same(third, replies(InProcessGrid(app_of(), 1), 3)[0])


def optimizers_kept():
    return InProcessGrid(app_of(keep_optimizer=lambda context: True), 1)


def replies(grid, *rounds, session="a"):
    """The arrays of each reply; every message has the same model."""
    plans = [{**LocalPlan(each, 2, 0.1).to_config(), "session": session} for each in rounds]
    return [arrays_of(ask(grid, 1, **plan).content["arrays"]) for plan in plans]


def test_a_participant_that_lost_its_optimizer_goes_on_with_a_new_one(flower_log):
    grid = optimizers_kept()
    first, second = replies(grid, 1, 2)
    assert not same(first, second)
    assert "no state is stored" not in flower_log.text
    grid.contexts[1].state.clear()
    (again,) = replies(grid, 2)
    assert same(first, again)
    assert "no state is stored; round 2 starts with a new one" in flower_log.text


def test_a_round_that_is_repeated_begins_with_the_same_optimizer():
    first, once, again, third = replies(optimizers_kept(), 1, 2, 2, 3)
    assert same(once, again)
    assert not same(first, once)
    assert same(third, replies(optimizers_kept(), 1, 2, 3)[-1])


def test_another_training_begins_with_a_new_optimizer():
    grid = optimizers_kept()
    first, _ = replies(grid, 1, 2)
    (other,) = replies(grid, 3, session="b")
    assert same(first, other)


def test_a_participant_with_a_state_dir_goes_on_after_its_last_finished_epoch(tmp_path):
    trained = []

    class Failing(TorchTrainer):
        def train_epoch(self, learning_rate, seed):
            trained.append(seed)
            if len(trained) == 4:
                raise RuntimeError
            return super().train_epoch(learning_rate, seed)

    def build_failing(context):
        trainer = build(context)
        trainer.__class__ = Failing
        return trainer

    app = make_client_app(build_failing, seed=lambda context: SEED)
    grid = InProcessGrid(app, 1, node_configs=[{"state-dir": str(tmp_path), "partition-id": 0}])
    plan = LocalPlan(1, 5, 0.1)
    config = {**plan.to_config(), "session": "a"}
    assert ask(grid, 1, **config).has_error()
    reply = ask(grid, 1, **config)
    assert same(arrays_of(reply.content["arrays"]), trained_by_hand(0, plan)[0])
    assert len(trained) == 4 + 2
    assert [path.name[:12] for path in tmp_path.glob("*.epoch")] == ["partition-0-"]


def test_participants_of_all_sizes_train_the_steps_that_the_server_asks_for():
    """In a run of the strategy: sites of 3 and 30 mini-batches train 2 * 6 and then 4 * 6."""
    trained = {0: [], 1: []}

    class Counting:
        def __init__(self, k):
            self.k = k

        def get_weights(self):
            return {"w": np.ones(2, np.float32) * (1 + len(trained[self.k]))}

        def set_weights(self, weights):
            pass

        def batches_per_epoch(self):
            return 3 if self.k == 0 else 30

        def train_epoch(self, learning_rate, seed, steps=None):
            trained[self.k].append(steps or self.batches_per_epoch())
            return EpochResult(1.0, 1)

    app = make_client_app(lambda context: Counting(context.node_config["partition-id"]))
    strategy = CoLearn(
        2,
        local_epochs=IncreasingEpochs(2, epsilon=1e9, maximum=4),
        learning_rate=CyclicalRate(0.1),
        local_steps=6,
        fraction_evaluate=0.0,
        guard=None,
    )
    initial = ArrayRecord({"w": Array(np.ones(2, np.float32))})
    strategy.start(InProcessGrid(app, 2), initial, num_rounds=2)
    assert trained == {0: [3] * 4 + [3] * 8, 1: [12, 24]}
    assert strategy.history.epochs_path == [2, 4]
