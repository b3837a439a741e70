"""Legacy clients behind a Message API app, beside Flower's own way of serving them."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import (
    Code,
    EvaluateRes,
    FitRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import ServerAppComponents, ServerConfig
from flwr.serverapp import ServerApp

from flwr_colearn import (
    CoLearn,
    Compression,
    CyclicalRate,
    Float16,
    IncreasingEpochs,
    InProcessGrid,
    Int8,
    LocalPlan,
    Recovery,
    legacy,
    numpy_client_app,
    participant_mod,
)
from flwr_colearn.aggregation import echo_of
from tests import small_net
from tests.small_net import NAMES, K

MODEL = {
    "z.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.bias": np.array([0.5, -0.5]),
    "scale": np.array(2, np.float16),
    "m.counter": np.array(7),
    "m.empty": np.zeros((0, 3), np.float32),
}
OK = Status(Code.OK, "")


class Recorder(NumPyClient):
    """A client that keeps what it is given, and returns what it is told to."""

    def __init__(self, metrics=None, arrays=None):
        self.metrics, self.arrays, self.calls = metrics or {}, arrays, []

    def fit(self, parameters, config):
        self.calls.append((parameters, config))
        return parameters if self.arrays is None else self.arrays, 12, self.metrics

    def evaluate(self, parameters, config):
        self.calls.append((parameters, config))
        return 0.25, 12, self.metrics


def ask(client_fn, kind="train", mods=(), records=None, **config):
    """Send one message to the app of a `client_fn` (or of one client), and return the reply."""
    if not callable(client_fn):
        client = client_fn
        client_fn = lambda context: client  # noqa: E731
    grid = InProcessGrid(numpy_client_app(client_fn, mods), 1)
    if records is None:
        arrays = ArrayRecord({name: Array(array) for name, array in MODEL.items()})
        records = {"arrays": arrays, "config": ConfigRecord(config)}
    [reply] = grid.send_and_receive([Message(RecordDict(records), 1, kind)])
    return reply


def same(first, second):
    return [(a.dtype, a.shape, a.tobytes()) for a in first] == [
        (a.dtype, a.shape, a.tobytes()) for a in second
    ]


# One message -------------------------------------------------------------------------------------


def test_fit_gets_arrays_and_config_and_its_result_keeps_the_names():
    client = Recorder({"loss": 0.5})
    config = {"server-round": 3, "lr": 0.1, "on": True, "tag": "x", "learning-rates": [0.1, 0.2]}
    reply = ask(client, **config)
    [(arrays, found)] = client.calls
    assert type(arrays) is list
    assert same(arrays, MODEL.values())
    assert type(found) is dict
    assert found == config
    assert list(reply.content["arrays"]) == list(MODEL)
    assert same(reply.content["arrays"].to_numpy_ndarrays(), MODEL.values())
    assert dict(reply.content["metrics"]) == {"loss": 0.5, "num-examples": 12}


def test_the_reply_has_the_records_that_flower_would_make_of_the_arrays():
    returned = [np.asfortranarray(MODEL["z.weight"] + 1), *list(MODEL.values())[1:]]
    reply = ask(Recorder(arrays=returned))
    wanted = {name: Array(a) for name, a in zip(MODEL, returned, strict=True)}
    for name, array in reply.content["arrays"].items():
        found = (array.dtype, tuple(array.shape), array.stype, array.data)
        other = wanted[name]
        assert found == (other.dtype, tuple(other.shape), other.stype, other.data), name
    assert same(reply.content["arrays"].to_numpy_ndarrays(), returned)


def flags_of(arrays):
    return [(type(a), a.dtype, a.shape, a.flags.writeable, a.flags.c_contiguous) for a in arrays]


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_arrays_are_as_flowers_legacy_path_hands_them(kind):
    clients = Recorder(), Recorder()
    ask(clients[0], kind)
    ins = "fitins" if kind == "train" else "evaluateins"
    records = {
        f"{ins}.parameters": ArrayRecord(
            {str(i): Array(array) for i, array in enumerate(MODEL.values())}
        ),
        f"{ins}.config": ConfigRecord(),
    }
    grid = InProcessGrid(ClientApp(client_fn=lambda context: clients[1].to_client()), 1)
    grid.send_and_receive([Message(RecordDict(records), 1, kind)])
    [(found, _)], [(wanted, _)] = clients[0].calls, clients[1].calls
    assert flags_of(found) == flags_of(wanted)
    assert all(array.flags.writeable for array in found)


def test_what_a_client_writes_into_its_arrays_stays_its_own():
    class Overwriting(Recorder):
        def evaluate(self, parameters, config):
            for array in parameters:
                array[...] = 0
            return super().evaluate(parameters, config)

    arrays = ArrayRecord({name: Array(array) for name, array in MODEL.items()})
    ask(Overwriting(), "evaluate", records={"arrays": arrays})
    assert same(arrays.to_numpy_ndarrays(), MODEL.values())


@pytest.mark.parametrize("write", [LocalPlan.to_config, LocalPlan.to_fit_config])
def test_the_config_is_a_plan(write):
    client = Recorder()
    plan = LocalPlan(3, 2, 0.1, [0.05, 0.025], epochs_done=4, time_limit=9.0)
    ask(client, **write(plan))
    assert LocalPlan.from_config(client.calls[0][1]) == plan


def test_without_a_config_it_is_empty_and_among_several_it_is_that_of_the_round():
    client = Recorder()
    arrays = ArrayRecord({"w": Array(np.ones(2))})
    configs = {"other": ConfigRecord({"a": 1}), "config": ConfigRecord({"server-round": 2})}
    for records in ({}, configs):
        ask(client, records={"arrays": arrays, **records})
    assert [config for _, config in client.calls] == [{}, {"server-round": 2}]


def test_numbers_of_all_kinds_travel_as_plain_ones():
    metrics = {
        "int": 3,
        "float": 0.5,
        "bool": True,
        "numpy bool": np.bool_(False),
        "int64": np.int64(4),
        "float32": np.float32(0.25),
        "float64": np.float64(0.1),
    }
    expected = {
        "int": 3,
        "float": 0.5,
        "bool": 1,
        "numpy bool": 0,
        "int64": 4,
        "float32": 0.25,
        "float64": 0.1,
    }
    trained = ask(Recorder(metrics)).content["metrics"]
    evaluated = ask(Recorder(metrics), "evaluate").content["metrics"]
    assert dict(trained) == {**expected, "num-examples": 12}
    assert dict(evaluated) == {**expected, "num-examples": 12, "loss": 0.25}
    assert {type(value) for value in [*trained.values(), *evaluated.values()]} == {int, float}


def test_the_loss_of_a_client_may_be_a_numpy_number():
    loss = ask(OwnClient(), "evaluate").content["metrics"]["loss"]
    assert (type(loss), loss) == (float, 0.5)


def test_the_clients_own_entries_do_not_hide_loss_and_number_of_examples():
    metrics = {"loss": 9.0, "num-examples": 99}
    assert dict(ask(Recorder(metrics)).content["metrics"]) == {"loss": 9.0, "num-examples": 12}
    evaluated = ask(Recorder(metrics), "evaluate").content["metrics"]
    assert dict(evaluated) == {"loss": 0.25, "num-examples": 12}


def test_other_metrics_are_left_out_with_one_warning_for_each(flower_log):
    client = Recorder({"site": "Genoa", "accuracy": 0.5, "key": b"k", "all": [1, 2], "none": None})
    app = numpy_client_app(lambda context: client)
    grid = InProcessGrid(app, 1)
    arrays = ArrayRecord({"w": Array(np.ones(2))})
    for _ in range(2):
        for kind in ("train", "evaluate"):
            [reply] = grid.send_and_receive([Message(RecordDict({"arrays": arrays}), 1, kind)])
            assert reply.content["metrics"]["accuracy"] == 0.5
            assert not {"site", "key", "all", "none"} & set(reply.content["metrics"])
    client.metrics = {"site": "Genoa", "device": "cpu"}
    grid.send_and_receive([Message(RecordDict({"arrays": arrays}), 1, "train")])
    warnings = [r.getMessage() for r in flower_log.records if r.levelname == "WARNING"]
    assert warnings == [
        "Metrics ['all', 'key', 'none', 'site'] are left out of the reply: expected numbers, found "
        "NoneType, bytes, list, str",
        "Metrics ['device'] are left out of the reply: expected numbers, found str",
    ]


# Errors ------------------------------------------------------------------------------------------


class OwnClient(Client):
    """A client of the API below NumPyClient."""

    def __init__(self, status=OK, examples=12, tensors=None):
        self.status, self.examples, self.tensors = status, examples, tensors

    def fit(self, ins):
        tensors = ins.parameters.tensors if self.tensors is None else self.tensors
        parameters = Parameters(tensors, "numpy.ndarray")
        return FitRes(self.status, parameters, self.examples, {"loss": 0.5})

    def evaluate(self, ins):
        return EvaluateRes(self.status, np.float32(0.5), self.examples, {})


class NothingAtAll(NumPyClient):
    pass


class Failing(Recorder):
    def fit(self, parameters, config):
        raise OSError("disk on fire")


REFUSED = Status(Code.FIT_NOT_IMPLEMENTED, "not today")
ERRORS = {
    "one array less": (
        Recorder(arrays=list(MODEL.values())[:-1]),
        "train",
        "ColearnError: fit: expected the 5 arrays of the model that it received, .* found 4",
    ),
    "one array more": (
        Recorder(arrays=[*MODEL.values(), np.ones(1)]),
        "train",
        "ColearnError: fit: expected the 5 arrays .* found 6",
    ),
    "no fit": (
        NothingAtAll(),
        "train",
        "ColearnError: fit of the client: expected the status OK, .*does not implement `fit`",
    ),
    "no evaluate": (
        NothingAtAll(),
        "evaluate",
        "ColearnError: evaluate of the client: expected the status OK, .*not implement `evaluate`",
    ),
    "no fit of a Client": (Client(), "train", "ColearnError: fit .*does not implement `fit`"),
    "a status": (OwnClient(REFUSED), "train", "fit .*the status OK, found 'not today'"),
    "a status of evaluate": (OwnClient(REFUSED), "evaluate", "evaluate .* OK, found 'not today'"),
    "not a number of examples": (
        OwnClient(examples=2.5),
        "train",
        "num_examples of fit: expected a whole number of at least 0, found 2.5",
    ),
    "not a number of examples of evaluate": (
        OwnClient(examples=None),
        "evaluate",
        "num_examples of evaluate: expected a whole number of at least 0, found None",
    ),
    "bytes of another format": (
        OwnClient(tensors=[b"torch"] * 5),
        "train",
        "array 'z.weight': expected a serialised numpy array",
    ),
    "a tuple of arrays": (
        Recorder(arrays=tuple(MODEL.values())),
        "train",
        "ParticipantError: TypeError: ",
    ),
    "an exception": (Failing(), "train", "ParticipantError: OSError: "),
    "no client": (
        lambda context: "client",
        "train",
        "client_fn: expected a NumPyClient or a Client in return, found 'client'",
    ),
}


@pytest.mark.parametrize(("client", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_an_error_is_a_reply_that_says_what_is_wrong(client, kind, message):
    reply = ask(client, kind)
    assert reply.has_error()
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        raise AssertionError(reply.error.reason)


@pytest.mark.parametrize("names", [[], ["arrays", "more"]])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_message_without_exactly_one_model_is_refused(kind, names):
    records = {name: ArrayRecord({"w": Array(np.ones(2))}) for name in names}
    reply = ask(Recorder(), kind, records=records)
    assert "message: expected one ArrayRecord, which is the model" in reply.error.reason
    assert reply.error.reason.endswith(f"found {names}")


def test_an_array_that_is_none_is_refused_by_name():
    broken = Array("float32", (2,), "numpy.ndarray", b"nothing")
    reply = ask(Recorder(), records={"arrays": ArrayRecord({"w": broken})})
    assert "array 'w': expected a serialised numpy array" in reply.error.reason


# Mods --------------------------------------------------------------------------------------------


def test_the_app_names_its_participant():
    echo = echo_of(ask(Recorder(), **{"server-round": 3}))
    assert (echo["server-round"], echo["participant"]) == (3, "partition-0")


def test_further_mods_see_what_the_clients_see():
    seen = []

    def mod(message, context, call_next):
        reply = call_next(message, context)
        seen.append((message.metadata.message_type, echo_of(reply)))
        return reply

    for kind in ("train", "evaluate"):
        assert not ask(Recorder(), kind, [mod], **{"server-round": 1}).has_error()
    assert seen == [("train", {}), ("evaluate", {})]


# Whole runs --------------------------------------------------------------------------------------

ARGUMENTS = {
    "local_epochs": IncreasingEpochs(1, epsilon=0.07),
    "learning_rate": CyclicalRate(0.5),
}


class Participant(small_net.Participant):
    """The participant of `small_net`, which evaluates as well."""

    def evaluate(self, parameters, config):
        return float(self.k), 1 + self.k, {"accuracy": small_net.accuracy(parameters, self.k)}


class BelowNumPy(Client):
    """The same participant, without NumPyClient."""

    def __init__(self, k):
        self.inner = Participant(k, examples=64)

    def fit(self, ins):
        trained, examples, metrics = self.inner.fit(
            parameters_to_ndarrays(ins.parameters), ins.config
        )
        return FitRes(OK, ndarrays_to_parameters(trained), examples, metrics)

    def evaluate(self, ins):
        arrays = parameters_to_ndarrays(ins.parameters)
        return EvaluateRes(OK, *self.inner.evaluate(arrays, ins.config))


def partition(context: Context):
    return context.node_config["partition-id"]


CLIENTS = {
    "NumPyClient": lambda context: Participant(partition(context), examples=64),
    "to_client": lambda context: Participant(partition(context), examples=64).to_client(),
    "Client": lambda context: BelowNumPy(partition(context)),
}


def run(app, rounds=5, **arguments):
    strategy = CoLearn(K, **ARGUMENTS, **arguments)
    initial = small_net.named(small_net.initial())
    return strategy, strategy.start(InProcessGrid(app, K), initial, num_rounds=rounds)


@pytest.mark.parametrize("client_fn", CLIENTS.values(), ids=CLIENTS)
@pytest.mark.parametrize("compression", [Compression(), Compression(Int8(), Float16())], ids=str)
def test_training_has_the_bits_of_the_message_api(client_fn, compression):
    arguments = {"fraction_evaluate": 0.0, "compression": compression}
    wanted_strategy, wanted = run(small_net.message_app(participant_mod), **arguments)
    strategy, result = run(numpy_client_app(client_fn), **arguments)
    assert list(result.arrays) == list(NAMES)
    assert same(result.arrays.to_numpy_ndarrays(), wanted.arrays.to_numpy_ndarrays())
    assert not same(result.arrays.to_numpy_ndarrays(), small_net.initial())
    assert strategy.history.epochs_path == wanted_strategy.history.epochs_path
    assert len(set(strategy.history.epochs_path)) > 1


def test_training_has_the_bits_of_flowers_legacy_server_and_the_same_evaluation():
    shared = []
    strategy = legacy.CoLearn(
        K,
        **ARGUMENTS,
        initial_parameters=ndarrays_to_parameters(small_net.initial()),
        evaluate_fn=lambda round_, arrays, config: shared.append(arrays),
        evaluate_metrics_aggregation_fn=lambda pairs: {
            "accuracy": sum(n * m["accuracy"] for n, m in pairs) / sum(n for n, _ in pairs)
        },
    )
    components = ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=5))
    app = ClientApp(client_fn=CLIENTS["to_client"])
    ServerApp(server_fn=lambda context: components)(
        InProcessGrid(app, K), Context(1, 0, {}, RecordDict(), {})
    )
    found, result = run(numpy_client_app(CLIENTS["to_client"]))
    assert same(result.arrays.to_numpy_ndarrays(), shared[-1])
    wanted = [record.evaluate_metrics for record in strategy.history]
    assert [set(record.evaluate_metrics) for record in found.history] == [{"loss", "accuracy"}] * 5
    for record, metrics in zip(found.history, wanted, strict=True):
        assert record.evaluate_metrics == pytest.approx(metrics)


def test_a_client_that_fails_is_restarted_by_its_name_in_the_same_round():
    attempts = []

    def client_fn(context):
        attempts.append(partition(context))
        if attempts.count(2) == 2 and partition(context) == 2:
            return Failing()
        return Participant(partition(context), examples=64)

    recovery = Recovery(pause=0.0)
    arguments = {"rounds": 2, "fraction_evaluate": 0.0}
    strategy, result = run(numpy_client_app(client_fn), recovery=recovery, **arguments)
    _, wanted = run(small_net.message_app(), **arguments)
    assert same(result.arrays.to_numpy_ndarrays(), wanted.arrays.to_numpy_ndarrays())
    [restart] = strategy.history.records[1].restarts
    assert restart["participant"] == "partition-2"
    assert "ParticipantError: OSError" in restart["reason"]


def test_a_client_may_keep_what_it_likes_in_its_context():
    class Counting(Recorder):
        def __init__(self, context):
            super().__init__()
            self.state = context.state

        def fit(self, parameters, config):
            count = self.state["mine"]["rounds"] + 1 if "mine" in self.state else 1
            self.state["mine"] = MetricRecord({"rounds": count})
            self.metrics = {"rounds": count}
            return super().fit(parameters, config)

    grid = InProcessGrid(numpy_client_app(Counting), 1)
    for round_ in (1, 2, 3):
        arrays = ArrayRecord({"w": Array(np.ones(2))})
        [reply] = grid.send_and_receive([Message(RecordDict({"arrays": arrays}), 1, "train")])
        assert reply.content["metrics"]["rounds"] == round_
