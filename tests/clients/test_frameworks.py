"""The three frameworks: what must be the same, what must not mix, what must not be imported."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.client import NumPyClient

import clients
import clients.app
from clients.client_app import make_client_app
from clients.data import Examples, Task
from clients.settings import ParticipantSettings
from clients.tasks.registry import framework, participant_trainer, server_trainer
from clients.trainer import derive_seed, follow
from flwr_colearn import (
    CoLearn,
    ColearnError,
    CyclicalRate,
    FixedEpochs,
    History,
    InProcessGrid,
    LocalPlan,
    Recovery,
    Role,
    numpy_client_app,
)
from simulations.server_app import to_record

ROOT = Path(clients.__file__).resolve().parent.parent
FRAMEWORKS = ["torch", "keras", "slim"]
PLAN = LocalPlan.of(CyclicalRate(0.05, 0.25), 2, 3, 5)

each_framework = pytest.mark.parametrize("name", FRAMEWORKS)


@pytest.fixture(scope="module")
def trainers():
    """A participant's trainer of each framework, on the digits."""
    return {
        name: participant_trainer(ParticipantSettings(framework=name, examples=200), 0, 5)
        for name in FRAMEWORKS
    }


def same(first, second):
    return list(first) == list(second) and all(
        a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
        for a, b in zip(first.values(), second.values(), strict=True)
    )


# What is the same


@each_framework
def test_a_pass_can_end_after_some_steps(name, trainers):
    """40 examples in batches of 32."""
    trainer = trainers[name]
    start = trainer.get_weights()
    ends = []
    for steps in (None, 2, 1):
        trainer.set_weights(start)
        result = trainer.train_epoch(0.05, 3, steps)
        ends.append((result.num_examples, trainer.get_weights()))
    assert trainer.batches_per_epoch() == 2
    assert [examples for examples, _ in ends] == [40, 40, 32]
    assert same(ends[0][1], ends[1][1])
    assert not same(ends[0][1], ends[2][1])
    plan = LocalPlan.of(CyclicalRate(0.05, 0.25), 1, 1, local_steps=3)
    metrics = follow(plan, trainer, seed=1)
    assert (metrics["num-examples"], metrics["learning-rate"]) == (40, 0.0125)


def test_the_same_plan_gives_the_same_rates_and_examples(trainers):
    metrics = [follow(PLAN, trainer, seed=1) for trainer in trainers.values()]
    assert {each["learning-rate"] for each in metrics} == {0.0125}
    assert {each["num-examples"] for each in metrics} == {40}
    assert {tuple(sorted(each)) for each in metrics} == {
        ("learning-rate", "num-examples", "train-loss")
    }


def test_the_digits_have_a_network_of_one_size(trainers):
    for name, trainer in trainers.items():
        roles, weights = trainer.roles(), trainer.get_weights()
        assert list(roles) == list(weights)
        sizes = dict.fromkeys(Role, 0)
        for array, role in roles.items():
            sizes[role] += weights[array].size
        assert sizes[Role.TRAINABLE] == 9_978, name
        assert sizes[Role.MEAN] == sizes[Role.VARIANCE] == 48
        assert sizes[Role.BUFFER] == 0


@each_framework
def test_the_seed_decides_the_initial_model(name, trainers):
    def initial(seed):
        settings = ParticipantSettings(framework=name, examples=200, seed=seed)
        return participant_trainer(settings, 0, 5).get_weights()

    first = initial(3)
    assert same(initial(3), first)
    assert not same(initial(4), first)


@each_framework
def test_message_api_and_numpy_clients_train_alike(name, trainers):
    trainer = trainers[name]
    start = trainer.get_weights()
    app = make_client_app(lambda context: trainer, seed=lambda context: 4)
    content = RecordDict({"arrays": to_record(trainer), "config": ConfigRecord(PLAN.to_config())})
    grid = InProcessGrid(app, 1)
    [reply] = grid.send_and_receive([Message(content, 1, "train")])
    assert not reply.has_error()
    trainer.set_weights(start)
    content = RecordDict({"arrays": to_record(trainer), "config": ConfigRecord(PLAN.to_config())})
    grid = InProcessGrid(numpy_client_app(lambda context: TrainerClient(trainer)), 1)
    [other] = grid.send_and_receive([Message(content, 1, "train")])
    first, second = (
        {key: array.numpy() for key, array in each.content["arrays"].items()}
        for each in (reply, other)
    )
    assert same(first, second)
    assert not same(start, first)
    assert dict(reply.content["metrics"]) == dict(other.content["metrics"])


class TrainerClient(NumPyClient):
    """A NumPyClient as a project would write it."""

    def __init__(self, trainer):
        self.trainer = trainer

    def fit(self, parameters, config):
        names = self.trainer.get_weights()
        self.trainer.set_weights(dict(zip(names, parameters, strict=True)))
        metrics = follow(LocalPlan.from_config(config), self.trainer, derive_seed(4, 0))
        weights = list(self.trainer.get_weights().values())
        return weights, metrics.pop("num-examples"), metrics


@pytest.mark.parametrize("name", ["keras", "slim"])
def test_settings_reach_the_trainer(name):
    settings = ParticipantSettings(
        framework=name,
        batch_size=7,
        momentum=0.0,
        weight_decay=0.01,
        clip_norm=2.0,
        devices="cpu",
        **({"precision": "bfloat16", "jit_compile": True} if name == "keras" else {}),
    )
    for trainer in (participant_trainer(settings, 0, 5), server_trainer(settings)):
        assert (trainer.batch_size, trainer.weight_decay, trainer.clip_norm) == (7, 0.01, 2.0)
        assert trainer.get_optimizer_state() == {}
        if name == "keras":
            assert trainer.precision == "bfloat16"
            assert trainer._train_step._jit_compile


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ParticipantSettings(framework="keras", workers=1), "'workers': expected 0.*'keras'"),
        (ParticipantSettings(framework="keras", channels_last=True), "'channels-last': expected F"),
        (ParticipantSettings(framework="keras", devices="cpu,cpu"), "device: expected one of"),
        (ParticipantSettings(framework="slim", precision="float16"), "'precision': expected 'fl"),
        (ParticipantSettings(framework="slim", jit_compile=True), "'jit-compile': expected False"),
        (ParticipantSettings(framework="slim", model="x"), "for task digits with slim"),
        (
            ParticipantSettings(framework="slim", normalization="batch-renorm"),
            "'normalization': expected average, pooled, .*'slim'.*found 'batch-renorm'",
        ),
        (
            ParticipantSettings(devices="cpu,cpu", normalization="frozen"),
            "other than frozen and recalibrated where a site trains on several devices",
        ),
        (
            ParticipantSettings(devices="cpu,cpu", normalization="batch-renorm"),
            "devices: expected one device for a network with batch renorm",
        ),
    ],
)
def test_what_a_framework_lacks_is_refused(settings, message):
    with pytest.raises(ColearnError, match=message):
        participant_trainer(settings, 0, 5)


@pytest.mark.parametrize("name", ["torch", "keras"])
def test_a_scheme_that_changes_the_network_does_so_on_both_sides(name):
    plain = ParticipantSettings(framework=name, examples=200)
    settings = ParticipantSettings(framework=name, examples=200, normalization="group-norm")
    start = server_trainer(plain).get_weights()
    statistics = [n for n in start if any(part in n for part in ("running", "moving", "tracked"))]
    assert len(statistics) == (6 if name == "torch" else 4)
    for trainer in (server_trainer(settings), participant_trainer(settings, 0, 5)):
        weights = trainer.get_weights()
        assert same(weights, {n: a for n, a in start.items() if n not in statistics})
        trainer.train_epoch(0.1, seed=0)
        assert not same(trainer.get_weights(), weights)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("name", ["keras", "slim"])
def test_cifar10_is_normalised_and_augmented_if_asked_for(name, augment):
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    settings = ParticipantSettings(framework=name, task="cifar10", augment=augment)
    data = Examples(images, np.arange(8))
    trainer = framework(settings).participant_trainer(settings, Task(data, data))
    first, again, other = ([], [], [])
    start = trainer.get_weights()
    for seed, weights in ((1, first), (1, again), (2, other)):
        trainer.set_weights(start)
        trainer.train_epoch(0.01, seed)  # one batch: only augmentation depends on the seed
        weights.append(trainer.get_weights())
    assert same(first[0], again[0])
    moved = [np.abs(first[0][key] - other[0][key]).max() for key in start]
    assert (max(moved) > 1e-3) == augment
    assert trainer.predict()[0].shape == (8, 10)


# What must not mix


def mixed(build_for):
    """Run one round of a torch server with a participant of another framework, by name."""
    app = make_client_app(lambda context: build_for(context.node_config["partition-id"]))
    strategy = CoLearn(
        2,
        local_epochs=1,
        learning_rate=CyclicalRate(0.1),
        recovery=Recovery(max_restarts=0),
        fraction_evaluate=0.0,
    )
    settings = ParticipantSettings(examples=200)
    strategy.start(InProcessGrid(app, 2), to_record(server_trainer(settings)), num_rounds=1)


@pytest.mark.parametrize(
    ("name", "differs"),
    [("keras", r"'conv2d/kernel'.*unknown \['0.weight'"), ("slim", r"'Conv/weights'.*'0.weight'")],
)
def test_a_participant_of_another_framework_is_named_with_what_differs(trainers, name, differs):
    with pytest.raises(ColearnError, match=rf"partition-1: .*weights: expected.*{differs}"):
        mixed([trainers["torch"], trainers[name]].__getitem__)


def test_a_reply_with_another_frameworks_arrays_is_refused_with_what_differs(trainers):
    class Stubborn:
        """A Keras participant that trains its own model, whatever it is sent."""

        def __getattr__(self, attribute):
            return getattr(trainers["keras"], attribute)

        def set_weights(self, weights):
            pass

    with pytest.raises(
        ColearnError, match=r"participant partition-1: .*14 missing \['0.weight'.*12 unknown"
    ):
        mixed([trainers["torch"], Stubborn()].__getitem__)


# What is imported

SCRIPT = """
import json, sys
import clients.app, simulations.server_app, simulations.study.__main__
from clients.settings import ParticipantSettings
from clients.tasks.registry import participant_trainer, server_trainer
for name in sys.argv[1:]:
    settings = ParticipantSettings(framework=name, examples=100)
    participant_trainer(settings, 0, 5).train_epoch(0.1, 0)
    server_trainer(settings).evaluate()
print(json.dumps(sorted({"torch", "torchvision", "tensorflow", "tf_slim"} & set(sys.modules))))
"""


@pytest.mark.parametrize(
    ("names", "imported"),
    [
        (["torch"], ["torch"]),  # torchvision comes with the networks that need it
        (["keras", "slim"], ["tensorflow", "tf_slim"]),  # in one process: each start takes seconds
    ],
    ids=str,
)
def test_a_framework_brings_itself_and_no_other(names, imported):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == imported


# A site's own model beside the shared one


@each_framework
def test_the_comparison_with_an_own_model_changes_no_bit_of_the_shared_one(name):
    """Two participants of the app, on the digits."""
    settings = ParticipantSettings(framework=name, examples=150, seed=31)
    runs = {}
    for compared in (False, True):
        config = {**settings.to_config(), "compare-alone": compared}
        grid = InProcessGrid(clients.app.app, 2, run_config=config)
        for context in grid.contexts.values():
            context.node_config["share-metrics"] = "alone-*,common-*"
        history = History()
        strategy = CoLearn(
            2,
            local_epochs=FixedEpochs(2),
            learning_rate=CyclicalRate(0.05),
            fraction_evaluate=float(compared),
            wait_for_participants=0.0,
            history=history,
        )
        result = strategy.start(grid, to_record(server_trainer(settings)), num_rounds=2)
        runs[compared] = {n: a.numpy() for n, a in result.arrays.items()}, history.records[-1]
    assert same(runs[False][0], runs[True][0])
    site = runs[True][1].site_metrics["partition-0"]
    assert site["alone-epochs"] == 4
    # The common test set has 500 digits: the shared model's accuracy on it is that of any trainer.
    judge = server_trainer(settings)
    judge.set_weights(runs[True][0])
    assert site["common-accuracy"] == pytest.approx(judge.evaluate()["accuracy"], abs=1e-6)
    assert 0.3 < site["alone-common-accuracy"] <= 1
