"""``clients.alone``: a site's own model beside the shared one."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from clients.alone import ALONE, AloneState, CompareAlone
from clients.app import app, compared_on
from clients.client_app import make_client_app
from clients.local_training import site_seed
from clients.settings import ParticipantSettings
from clients.tasks.registry import server_trainer
from clients.torch.trainer import TorchTrainer
from clients.trainer import derive_seed
from flwr_colearn import (
    CoLearn,
    ColearnError,
    ConstantRate,
    CyclicalRate,
    FixedEpochs,
    History,
    InProcessGrid,
    LocalPlan,
    SynchronousSGD,
    run,
)
from simulations import server_app
from simulations.server_app import to_record
from simulations.settings import RunSettings

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

SEED, K = 4, 3
DOC = Path(__file__).resolve().parents[2] / "docs" / "own-data.md"


@pytest.fixture(autouse=True, scope="module")
def _cpu():
    """Without a GPU, runs repeat themselves bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def trainer_of(k, seed=None):
    """The trainer of site k; with dropout, so that random numbers matter."""
    torch.manual_seed(100 + k if seed is None else seed)
    layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.ReLU(), nn.Linear(6, 3)
    generator = torch.Generator().manual_seed(k)
    labels = torch.arange(20 + k) % 3
    inputs = torch.randn(20 + k, 4, generator=generator) + labels[:, None]
    train, held_out = TensorDataset(inputs, labels), TensorDataset(inputs + 0.1, labels)
    return TorchTrainer(nn.Sequential(*layers), train, held_out, batch_size=8, device="cpu")


def app_of(compare=None, **options):
    kept = {}

    def build(context):
        k = context.node_config["partition-id"]
        return kept.setdefault(k, trainer_of(k))

    return make_client_app(
        build, seed=lambda context: SEED, compare=lambda context: compare, **options
    )


def initial():
    return to_record(trainer_of(0, seed=0))


def trained(app, rounds=3, grid=None, schedule=CyclicalRate(0.1), **options):  # noqa: B008
    """The grid, and the arrays of the shared model, after rounds of two local epochs."""
    grid = grid or InProcessGrid(app, K)
    history = History()
    strategy = CoLearn(
        K,
        local_epochs=FixedEpochs(2),
        learning_rate=schedule,
        fraction_evaluate=1.0,
        history=history,
        wait_for_participants=0.0,
        **options,
    )
    result = strategy.start(grid, initial(), num_rounds=rounds)
    return grid, {name: array.numpy() for name, array in result.arrays.items()}, history


def state_of_site(grid, k):
    context = grid.contexts[sorted(grid.contexts)[k]]
    return AloneState.of(context, str(context.state[ALONE]["session"]))


def assert_same(first, second):
    assert list(first) == list(second)
    for name, array in first.items():
        assert np.array_equal(array, second[name], equal_nan=True), name


@pytest.mark.parametrize("keep_optimizer", [False, True])
def test_the_shared_model_is_the_same_to_the_bit_with_and_without_the_comparison(keep_optimizer):
    options = {"keep_optimizer": lambda context: keep_optimizer}
    _, plain, _ = trained(app_of(**options))
    grid, compared, _ = trained(app_of(CompareAlone(), **options))
    assert_same(plain, compared)
    assert state_of_site(grid, 0).epochs == 6


@pytest.mark.parametrize("own", [None, ConstantRate(0.02)])
def test_the_own_model_is_the_one_of_a_training_without_a_server(own):
    grid, _, _ = trained(app_of(CompareAlone(learning_rate=own)))
    for k in range(K):
        trainer = trainer_of(k)
        trainer.set_weights({name: array.numpy() for name, array in initial().items()})
        seed = site_seed(SEED, Context(1, 1, {"partition-id": k}, RecordDict(), {}))
        for epoch in range(1, 7):
            # Eq. 3 with r = 1/4: two epochs a round, at eta / 2 and eta / 4.
            rate = 0.02 if own else (0.05, 0.025)[(epoch - 1) % 2]
            trainer.train_epoch(pytest.approx(rate).expected, derive_seed(seed, epoch))
        kept = state_of_site(grid, k).arrays
        for name, array in trainer.get_weights().items():
            assert np.allclose(array, kept[f"weights/{name}"], rtol=0, atol=1e-6), name


def test_both_models_are_evaluated_and_the_difference_is_the_shared_model_s(flower_log):
    grid, shared, history = trained(app_of(CompareAlone()), rounds=2)
    trainer = trainer_of(1)
    trainer.set_weights(shared)
    together = trainer.evaluate()["loss"]
    weights = {
        name.removeprefix("weights/"): array
        for name, array in state_of_site(grid, 1).arrays.items()
        if name.startswith("weights/")
    }
    trainer.set_weights(weights)
    alone = trainer.evaluate()["loss"]
    row = rf"own\s+loss\s+{alone:.4f}\s+{together:.4f}\s+\+?{re.escape(f'{together - alone:.4f}')}"
    assert re.search(row, flower_log.text)
    assert "round 2 (4 local epochs alone)" in flower_log.text
    # By default nothing of the comparison leaves the sites.
    for record in history:
        assert {name for site in record.site_metrics.values() for name in site} == {
            "accuracy",
            "loss",
            "num-examples",
        }


def test_the_comparison_leaves_a_site_only_as_far_as_its_node_config_lists_it():
    app = app_of(CompareAlone())
    grid = InProcessGrid(app, K)
    first, second, _ = sorted(grid.contexts)
    grid.contexts[first].node_config["share-metrics"] = "accuracy, alone-accuracy"
    grid.contexts[second].node_config["share-metrics"] = "alone-*"
    _, _, history = trained(app, grid=grid)
    sites = history.records[-1].site_metrics
    found = [set(sites[f"partition-{k}"]) for k in range(K)]
    assert found[0] == {"accuracy", "alone-accuracy", "num-examples"}
    assert found[1] == {"alone-accuracy", "alone-loss", "alone-epochs", "num-examples"}
    assert found[2] == {"accuracy", "loss", "num-examples"}


def plan_message(grid, number, done, kind="train", session="s"):
    plan = LocalPlan(number, 2, 0.05, epochs_done=done, session=session).to_config()
    content = RecordDict({"arrays": initial(), "config": ConfigRecord(plan)})
    [reply] = grid.send_and_receive([Message(content, sorted(grid.contexts)[0], kind)])
    return reply


def test_a_repeated_round_is_trained_once_and_a_later_one_goes_on(monkeypatch):
    grid = InProcessGrid(app_of(CompareAlone()), K)
    calls = count_epochs(monkeypatch)
    plan_message(grid, 1, 0)
    assert len(calls) == 4  # two of the shared model, two of the own one
    before = state_of_site(grid, 0)
    plan_message(grid, 1, 0)
    assert len(calls) == 6
    assert_same(before.arrays, state_of_site(grid, 0).arrays)
    plan_message(grid, 2, 2)
    assert len(calls) == 10
    assert state_of_site(grid, 0).epochs == 4


def count_epochs(monkeypatch):
    calls, train = [], TorchTrainer.train_epoch

    def counted(self, rate, seed, steps=None):
        calls.append(seed)
        return train(self, rate, seed, steps)

    monkeypatch.setattr(TorchTrainer, "train_epoch", counted)
    return calls


def test_with_a_state_dir_the_own_model_survives_a_restart_and_an_interruption(
    tmp_path, monkeypatch
):
    def grid_of():
        grid = InProcessGrid(app_of(CompareAlone()), K)
        for context in grid.contexts.values():
            context.node_config["state-dir"] = str(tmp_path)
        return grid

    plain = InProcessGrid(app_of(CompareAlone()), K)
    for number, done in ((1, 0), (2, 2)):
        plan_message(plain, number, done)
    plan_message(grid_of(), 1, 0)
    # The second epoch of the own model in round 2 is interrupted: the process ends.
    train, calls = TorchTrainer.train_epoch, []

    def interrupted(self, rate, seed, steps=None):
        calls.append(seed)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(self, rate, seed, steps)

    with monkeypatch.context() as patch:
        patch.setattr(TorchTrainer, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            plan_message(grid_of(), 2, 2)
    after = grid_of()
    again = count_epochs(monkeypatch)
    plan_message(after, 2, 2)
    assert again == [calls[1], calls[3]]  # of either model its last epoch only
    assert_same(state_of_site(plain, 0).arrays, state_of_site(after, 0).arrays)


def test_a_site_without_its_own_model_says_so_and_trains_all_the_same(flower_log):
    grid = InProcessGrid(app_of(CompareAlone()), K)
    reply = plan_message(grid, 3, 4)
    assert not reply.has_error()
    assert "expected this site's own model of the rounds before round 3" in flower_log.text
    plan_message(grid, 3, 4, "evaluate")
    assert "no comparison in round 3, since there is no own model" in flower_log.text


def test_the_own_model_of_another_training_is_not_compared():
    grid = InProcessGrid(app_of(CompareAlone()), K)
    grid.contexts[1].node_config["share-metrics"] = "alone-*"
    plan_message(grid, 1, 0)
    assert "alone-loss" in plan_message(grid, 1, 0, "evaluate").content["metrics"]
    other = plan_message(grid, 1, 0, "evaluate", session="another")
    assert "alone-loss" not in other.content["metrics"]


def test_an_own_model_with_more_epochs_than_the_shared_one_is_not_compared():
    grid = InProcessGrid(app_of(CompareAlone()), K)
    grid.contexts[1].node_config["share-metrics"] = "alone-*"
    plan_message(grid, 1, 0)
    plan_message(grid, 2, 2)
    assert "alone-loss" not in plan_message(grid, 1, 0, "evaluate").content["metrics"]
    assert "alone-loss" in plan_message(grid, 2, 2, "evaluate").content["metrics"]


def test_a_failure_of_the_own_training_costs_no_round(monkeypatch, flower_log):
    grid = InProcessGrid(app_of(CompareAlone()), K)
    train, calls = TorchTrainer.train_epoch, []

    def failing(self, rate, seed, steps=None):
        calls.append(seed)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return train(self, rate, seed, steps)

    monkeypatch.setattr(TorchTrainer, "train_epoch", failing)
    assert not plan_message(grid, 1, 0).has_error()
    assert "training of this site's own model failed" in flower_log.text


def test_off_it_costs_nothing(monkeypatch):
    grid = InProcessGrid(app_of(), K)
    calls = count_epochs(monkeypatch)
    plan_message(grid, 1, 0)
    assert len(calls) == 2
    assert ALONE not in grid.contexts[1].state


def test_a_strategy_without_local_epochs_is_refused():
    grid = InProcessGrid(app_of(CompareAlone()), K)
    roles = trainer_of(0).roles()
    strategy = SynchronousSGD(K, learning_rate=ConstantRate(0.1), total_steps=2, roles=roles)
    with pytest.raises(ColearnError, match="expected a strategy with local epochs"):
        run(strategy, grid, initial(), num_rounds=1)


# The app ----------------------------------------------------------------------------------------


def digits(folder, number, seed):
    """A site's folder with random examples of two classes of 8 x 8 images."""
    generator = np.random.default_rng(seed)
    labels = np.arange(number) % 2
    images = generator.uniform(0, 16, (number, 8, 8)) / (1 + labels[:, None, None])
    folder.mkdir()
    np.savez(folder / "train.npz", x=images, y=labels)
    return str(folder)


def sets_of(run_config=None, **node_config):
    config = ParticipantSettings(**(run_config or {})).to_config()
    return compared_on(Context(1, 1, node_config, RecordDict(), config))


def test_a_site_compares_on_what_it_holds_out_and_on_a_common_test(tmp_path):
    own, common = digits(tmp_path / "own", 40, 0), digits(tmp_path / "common", 30, 1)
    tests = sets_of(**{"data-dir": own, "common-test": common})
    counts = {name: trainer.evaluate()["num-examples"] for name, trainer in tests.items()}
    assert counts == {"own": 4, "common": 30}
    assert list(sets_of(**{"data-dir": own})) == ["own"]


def test_nobody_compares_on_examples_that_were_trained_on(tmp_path):
    own = digits(tmp_path / "own", 40, 0)
    assert sets_of({"held_out": 0.0}, **{"data-dir": own}) == {}
    simulated = sets_of(**{"partition-id": 0, "num-partitions": 5})
    assert {n: t.evaluate()["num-examples"] for n, t in simulated.items()} == {"common": 500}


def test_a_common_test_without_examples_is_refused(tmp_path):
    own = digits(tmp_path / "own", 40, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ColearnError, match=r"'common-test': expected examples in .*empty"):
        sets_of(**{"data-dir": own, "common-test": str(tmp_path / "empty")})


def test_the_app_compares_if_the_run_config_says_so(tmp_path):
    settings = ParticipantSettings(compare_alone=True, seed=77)
    grid = InProcessGrid(app, 1, run_config=settings.to_config())
    grid.contexts[1].node_config = {
        "name": "utrecht",
        "data-dir": digits(tmp_path / "own", 40, 0),
        "common-test": digits(tmp_path / "common", 30, 1),
        "share-metrics": "*",
    }
    arrays = to_record(server_trainer(settings))
    plan = ConfigRecord(LocalPlan(1, 2, 0.05).to_config())
    for kind in ("train", "evaluate"):
        content = RecordDict({"arrays": arrays, "config": plan})
        [reply] = grid.send_and_receive([Message(content, 1, kind)])
    metrics = reply.content["metrics"]
    # The shared model of this message is the initial one, so its training alone has helped.
    assert metrics["alone-common-loss"] < metrics["common-loss"]
    assert metrics["alone-loss"] < metrics["loss"]
    assert metrics["alone-epochs"] == 2


@pytest.mark.slow
def test_the_table_of_the_docs_is_that_of_two_sites_with_digits(tmp_path, flower_log):
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    parts = {"utrecht": order[:120], "delft": order[120:240], "common": order[240:]}
    for name, part in parts.items():
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "train.npz", x=bunch.images[part], y=bunch.target[part])
    run_settings = RunSettings(
        num_participants=2, total_epochs=24, initial_epochs=3, epsilon="auto", fraction_evaluate=1.0
    )
    own = ParticipantSettings(compare_alone=True, held_out=0.2)
    config = {**own.to_config(), **run_settings.to_config(), "output-dir": str(tmp_path / "run")}
    grid = InProcessGrid(app, 2, run_config=config)
    for name, context in zip(parts, grid.contexts.values(), strict=False):
        folders = {"data-dir": str(tmp_path / name), "common-test": str(tmp_path / "common")}
        context.node_config = {"name": name, **folders}
    server_app.main(grid, Context(1, 0, {}, RecordDict(), config))
    rows = re.compile(r"(own|common) +(loss|accuracy) +([\d.]+) +([\d.]+)")
    documented = rows.findall(DOC.read_text())
    # The last round's tables are those of utrecht, then of delft.
    for found, wanted in zip(rows.findall(flower_log.text)[-8:-4], documented, strict=True):
        assert found[:2] == wanted[:2]
        # Other processors round otherwise, and one of 24 examples is 0.04.
        assert [*map(float, found[2:])] == pytest.approx([*map(float, wanted[2:])], abs=0.09)
