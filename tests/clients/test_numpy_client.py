import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.serverapp import ServerApp
from torch import nn
from torch.utils.data import TensorDataset

from clients.client_app import make_client_app
from clients.numpy_client import OPTIMIZER, TrainerClient, make_numpy_client_app
from clients.torch.trainer import TorchTrainer, roles_of
from clients.trainer import derive_seed, follow
from flwr_colearn import CoLearn, ColearnError, CyclicalRate, InProcessGrid, LocalPlan, legacy
from simulations.server_app import to_record

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

SEED = 4
PLAN = LocalPlan.of(CyclicalRate(0.1, 0.25), 2, 3, 5)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def trainer_of(k, seed=0):
    """The trainer of participant k, with data of its own."""
    generator = torch.Generator().manual_seed(k)
    labels = torch.arange(20 + k) % 3
    data = TensorDataset(torch.randn(20 + k, 4, generator=generator) + labels[:, None], labels)
    return TorchTrainer(network(seed), data, data, batch_size=8, device="cpu")


def build(context):
    return trainer_of(context.node_config["partition-id"], seed=100)


def shared_model():
    return list(trainer_of(0).get_weights().values())


def context_of(k):
    return Context(1, k + 1, {"partition-id": k, "num-partitions": 3}, RecordDict(), {})


def client_of(k, context=None, **options):
    context = context or context_of(k)
    return TrainerClient(trainer_of(k, seed=100), context=context, seed=SEED, **options)


def same(first, second):
    return all(
        a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("k", [0, 2])
def test_fit_gives_the_weights_and_metrics_of_the_message_api(k):
    weights, examples, metrics = client_of(k).fit(shared_model(), PLAN.to_config())
    grid = InProcessGrid(make_client_app(build, seed=lambda context: SEED), 3)
    content = RecordDict({"arrays": to_record(trainer_of(0)), "config": ConfigRecord()})
    content["config"].update(PLAN.to_config())
    [reply] = grid.send_and_receive([Message(content, k + 1, "train")])
    assert same(weights, reply.content["arrays"].to_numpy_ndarrays())
    assert {"num-examples": examples, **metrics} == dict(reply.content["metrics"])
    assert (examples, type(examples)) == (20 + k, int)


def test_evaluate_gives_loss_number_of_examples_and_metrics():
    expected = trainer_of(2).evaluate()
    loss, examples, metrics = client_of(2).evaluate(shared_model(), {})
    assert (loss, examples) == (expected["loss"], expected["num-examples"])
    assert metrics == {"accuracy": expected["accuracy"]}


def test_parameters_come_in_the_models_order():
    client = client_of(0)
    assert same(client.get_parameters({}), [t.numpy() for t in network(100).state_dict().values()])


@pytest.mark.parametrize("change", [lambda arrays: arrays[:-1], lambda arrays: arrays * 2])
def test_another_number_of_parameters_is_refused(change):
    with pytest.raises(ColearnError, match="expected"):
        client_of(0).fit(change(shared_model()), PLAN.to_config())


def test_a_config_without_a_plan_is_refused():
    with pytest.raises(ColearnError, match="expected the key 'local-epochs'"):
        client_of(0).fit(shared_model(), {"server-round": 1})


def test_a_kept_optimizer_goes_on_and_a_fresh_one_does_not():
    def two_rounds(keep):
        context = context_of(0)
        weights = shared_model()
        for plan in (LocalPlan(1, 2, 0.1), LocalPlan(2, 2, 0.1, epochs_done=2)):
            client = client_of(0, context, keep_optimizer=keep)  # a new one for every message
            weights, _, _ = client.fit(weights, plan.to_config())
        return weights, context.state

    trainer = trainer_of(0)
    follow(LocalPlan(1, 4, 0.1), trainer, derive_seed(SEED, 0))
    uninterrupted = list(trainer.get_weights().values())
    weights, state = two_rounds(keep=True)
    assert same(weights, uninterrupted)
    assert same(state[OPTIMIZER].to_numpy_ndarrays(), trainer.get_optimizer_state().values())
    weights, state = two_rounds(keep=False)
    assert not same(weights, uninterrupted)
    assert not state


@pytest.mark.parametrize("keep", [False, True])
def test_flowers_legacy_server_reaches_the_model_of_the_message_api(keep):
    arguments = {"local_epochs": 2, "learning_rate": CyclicalRate(0.1)}
    roles = roles_of(network())
    shared = []
    strategy = legacy.CoLearn(
        3,
        **arguments,
        roles=list(roles.values()),
        initial_parameters=ndarrays_to_parameters(shared_model()),
        evaluate_fn=lambda round_, arrays, config: shared.append(arrays),
    )
    components = ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))
    legacy_app = make_numpy_client_app(build, SEED, keep_optimizer=keep)
    ServerApp(server_fn=lambda context: components)(
        InProcessGrid(legacy_app, 3), Context(1, 0, {}, RecordDict(), {})
    )
    app = make_client_app(build, lambda context: SEED, keep_optimizer=lambda context: keep)
    result = CoLearn(3, **arguments, roles=roles, fraction_evaluate=0.0).start(
        InProcessGrid(app, 3), to_record(trainer_of(0)), num_rounds=2
    )
    assert same(shared[-1], result.arrays.to_numpy_ndarrays())
    assert not same(shared[-1], shared[0])
