import io
import logging
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flwr_colearn import CoLearn, ColearnError, InProcessGrid, Quorum, Recovery
from flwr_colearn.aggregation.replies import (
    arrays_of,
    check_train_reply,
    echo_of,
    examples_of,
    failure_of,
)
from tests.faults import BAD_REPLIES, EXPLOSIONS, MODEL, Bomb, bits, numpy_of, record_of, serialised

SMALL = {
    "w": np.ones(3),
    "running_mean": np.ones((), np.float32),
    "running_var": np.ones((), np.float32),
    "n": np.array(1),
}


@pytest.fixture(autouse=True)
def quiet_log(monkeypatch):
    monkeypatch.setattr(logging.getLogger("flwr"), "level", logging.CRITICAL)


@pytest.fixture(autouse=True, scope="module")
def _identity():
    InProcessGrid(ClientApp(), 1)  # without which Flower lets nobody make a Message


def sent(message_type="train", model=MODEL, **config):
    content = RecordDict({"arrays": record_of(model), "config": ConfigRecord(config)})
    message = Message(content, 1, message_type)
    message.metadata.__dict__["_message_id"] = "sent"
    return message


def good(model=MODEL, **echo):
    metrics = MetricRecord({"num-examples": 3, "loss": 0.5})
    content = RecordDict({"arrays": record_of(model), "metrics": metrics})
    if echo:
        content["colearn"] = ConfigRecord(echo)
    return content


def check(content, message=None, **kwargs):
    message = message or sent(**{"server-round": 2})
    check_train_reply(message, Message(content, reply_to=message), **kwargs)


# The check of train replies -------------------------------------------------------------------


@pytest.mark.parametrize("echo", [{}, {"participant": "a"}, {"server-round": 2}])
def test_a_good_reply_passes(echo):
    check(good(**echo))


@pytest.mark.parametrize("kind", BAD_REPLIES)
def test_a_bad_reply_is_refused_with_the_reason(kind):
    spoil, reason = BAD_REPLIES[kind]
    content = good(**{"server-round": 2})
    spoil(content)
    with pytest.raises(ColearnError, match=reason):
        check(content)


def with_metrics(**metrics):
    content = good()
    content["metrics"] = MetricRecord(metrics)
    return content


@pytest.mark.parametrize("examples", [-1, 0, 0.0, -0.5, math.nan, math.inf, -math.inf, [3]])
def test_an_impossible_number_of_examples_is_refused(examples):
    match = "'num-examples' in the reply: expected a positive number"
    with pytest.raises(ColearnError, match=match):
        check(with_metrics(**{"num-examples": examples}))


def test_the_number_of_examples_is_read_from_the_users_key():
    content = with_metrics(images=4)
    check(content, weighted_by_key="images")
    with pytest.raises(ColearnError, match="found None"):
        check(content)


def without(name):
    content = good()
    del content[name]
    return content


def doubled(name):
    content = good()
    content["again"] = content[name]
    return content


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lambda: without("arrays"), "exactly one ArrayRecord, found 0"),
        (lambda: doubled("arrays"), "exactly one ArrayRecord, found 2"),
        (lambda: without("metrics"), "exactly one MetricRecord, found 0"),
        (lambda: doubled("metrics"), "exactly one MetricRecord, found 2"),
        (lambda: RecordDict(), "exactly one MetricRecord, found 0"),
    ],
)
def test_records_are_neither_missing_nor_doubled(content, match):
    with pytest.raises(ColearnError, match=match):
        check(content())


@pytest.mark.parametrize("echoed", [1, 3, "2", 2.5, [2]])
def test_a_reply_to_another_round_is_refused(echoed):
    with pytest.raises(ColearnError, match="round echoed in the reply: expected 2, found"):
        check(good(**{"server-round": echoed}))


def test_a_message_without_a_round_takes_any():
    check(good(**{"server-round": 7}), sent())


def test_replies_to_other_messages_are_not_judged():
    check(RecordDict(), sent("evaluate"))
    with pytest.raises(ColearnError, match="exactly one MetricRecord, found 0"):
        check(RecordDict(), sent("train.by_name"))


# Unpickling would run anybody's code ------------------------------------------------------------


def header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def npy(descr="'<f8'", order="False", shape="(3,)", data=bytes(24)):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}\n"
    return header(text) + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff{",
        b"\x93NUMPY\x09\x09" + bytes(50),
        npy()[:-1],
        header("("),
        header("{'descr': '<f8'"),
        header("(" * 5000),
        header(" \n  x\n y\n"),
        npy(descr="()"),
        npy(descr="'<f999'"),
        npy(descr="'V0'"),
        npy(shape=f"({10**30},)"),
        npy(shape=f"({2**62}, {2**62})"),
        npy(shape="(-1, -1)"),
        npy(shape="3"),
        npy(descr="'|O'"),
        npy(descr="[('a', '|O')]"),
        serialised(np.array([Bomb()] * 3), allow_pickle=True),
    ],
    ids=lambda data: repr(data[:40]),
)
def test_bytes_that_are_no_array_are_refused_and_never_unpickled(data):
    content = good()
    content["arrays"]["fc.bias"] = Array("float64", (3,), "numpy.ndarray", data)
    with pytest.raises(ColearnError, match=r"array 'fc\.bias': expected a serialised"):
        check(content)
    assert EXPLOSIONS == []


def test_the_bomb_is_live(monkeypatch):
    explosions = []
    monkeypatch.setattr("tests.faults.EXPLOSIONS", explosions)
    data = serialised(np.array([Bomb()] * 3), allow_pickle=True)
    np.load(io.BytesIO(data), allow_pickle=True)
    assert explosions


@pytest.mark.parametrize("stype", ["", "torch.tensor", "pickle"])
def test_another_serialisation_is_refused(stype):
    content = good()
    content["arrays"]["fc.bias"] = Array("float64", (3,), stype, serialised(np.zeros(3)))
    with pytest.raises(ColearnError, match="expected a serialised numpy array"):
        check(content)


def test_what_an_array_says_of_itself_is_not_believed():
    content = good()
    content["arrays"]["fc.bias"] = Array("float64", (3,), "numpy.ndarray", serialised(np.zeros(4)))
    with pytest.raises(ColearnError, match=r"found float64 of shape \(4,\)"):
        check(content)


# The parts --------------------------------------------------------------------------------------


def reply_of(content):
    return Message(content, reply_to=sent())


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (None, "no reason"),
        (" \n", "no reason"),
        ("Flower's own words", "Flower's own words"),
        ("Traceback ...\nIndexError: x\n\nTraceback ...\n  z\nValueError: y\n", "ValueError: y"),
        ("KeyError: a\n\n  • inputs=3\n", "KeyError: a • inputs=3"),
        ("a.b.OddError: " + "n" * 1000, "a.b.OddError: " + "n" * 286),
    ],
)
def test_a_failure_is_told_in_one_line(reason, told):
    failure = failure_of(reply_of(Error(8, reason)))
    assert failure == f"the participant failed (code 8): {told}"


def test_a_reply_with_content_is_no_failure():
    assert failure_of(reply_of(RecordDict())) is None


def test_examples_and_arrays_of_a_reply():
    reply = reply_of(good())
    assert examples_of(reply, "num-examples") == 3
    assert bits(arrays_of(reply)) == bits(record_of(MODEL))
    with pytest.raises(ColearnError, match="the participant failed"):
        examples_of(reply_of(Error(0)), "num-examples")


def test_the_echo_of_a_reply():
    assert echo_of(reply_of(good(participant="a"))) == {"participant": "a"}
    assert echo_of(reply_of(good())) == {}
    assert echo_of(reply_of(Error(2))) == {}
    assert echo_of(reply_of(RecordDict({"colearn": MetricRecord({"participant": 1})}))) == {}


# Whatever a participant replies, the model stays finite and only ColearnErrors come out ----------


def run(answers, policy=None, initial=SMALL, evaluation=None, k=2, bad=(2,), **kwargs):
    """Rounds in which the nodes `bad` answer as told; the shared model is checked after each."""
    app = ClientApp()

    @app.train()
    def _(message, context):
        round_ = message.content["config"]["server-round"]
        content = answers[round_ - 1]
        if context.node_id not in bad:
            arrays = numpy_of(message.content["arrays"])
            content = good({n: np.clip(a, 0, 1, dtype=a.dtype) for n, a in arrays.items()})
        return Message(content, reply_to=message)

    @app.evaluate()
    def _(message, context):
        return Message(evaluation or RecordDict(), reply_to=message)

    recovery = Recovery(max_restarts=0, pause=0.0, policy=policy or Quorum(1))
    strategy = CoLearn(k, local_epochs=1, learning_rate=0.1, recovery=recovery, **kwargs)
    result = strategy.start(
        InProcessGrid(app, k),
        record_of(initial),
        num_rounds=len(answers),
        evaluate_fn=lambda _, arrays: check_finite(arrays, initial),
    )
    return strategy, result


def check_finite(record, like):
    arrays = numpy_of(record)
    assert {name: (a.dtype, a.shape) for name, a in arrays.items()} == {
        name: (a.dtype, a.shape) for name, a in like.items()
    }
    assert all(np.isfinite(array).all() for array in arrays.values())


NAMES = st.sampled_from(["w", "b", "n", "arrays", "metrics", "colearn"]) | st.text(max_size=3)
NUMBERS = st.floats() | st.integers(-(2**63), 2**63 - 1)
TEXTS = st.text(max_size=5) | st.sampled_from(["partition-0", "1", "2"])


def numbers(like):
    """Arrays of any bits, or of extreme numbers that pass every check, or almost."""
    if like.dtype.kind == "f":
        most = np.finfo(like.dtype).max
        extremes = [0, 1, most, -most, most / 2, np.nan, np.inf, -np.inf]
    else:
        extremes = [0, 1, 2**63 - 1, -(2**63), 2**62]
    full = st.sampled_from(extremes).map(lambda number: np.full(like.shape, number, like.dtype))
    raw = st.binary(min_size=like.nbytes, max_size=like.nbytes)
    return full | raw.map(lambda data: np.frombuffer(data, like.dtype).reshape(like.shape))


@st.composite
def npy_bytes(draw, like):
    """A serialised array: a good one, or one of another type, or a damaged one."""
    array, kind = draw(numbers(like)), draw(st.integers(0, 9))
    if kind == 0:
        with np.errstate(all="ignore"):
            array = array.astype(draw(st.sampled_from(["<f2", ">f8", "<i4", "?", "<U2", "<c16"])))
    data = serialised(array)
    if kind in (1, 2, 3):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=4)) + data[at + draw(st.integers(0, 4)) :]
    return data


@st.composite
def array_records(draw):
    arrays = {
        name: Array(str(like.dtype), like.shape, "numpy.ndarray", draw(npy_bytes(like)))
        for name, like in SMALL.items()
    }
    if draw(st.integers(0, 3)) == 0:
        name = draw(NAMES)
        arrays.pop(name, None) or arrays.update({name: Array(np.ones(2))})
    if draw(st.integers(0, 5)) == 0:
        junk = Array(draw(TEXTS), (draw(st.integers(0, 9)),), draw(TEXTS), draw(st.binary()))
        arrays[draw(NAMES)] = junk
    return ArrayRecord(arrays)


METRICS = st.builds(
    lambda examples, more: MetricRecord({**more, "num-examples": examples}),
    st.sampled_from([1, 2, 0.5, 1e-300, 1e300, 2**53, 2**63 - 1]) | NUMBERS,
    st.dictionaries(NAMES, NUMBERS | st.lists(st.floats(), max_size=2), max_size=2),
)
ECHOES = st.dictionaries(
    st.sampled_from(["participant", "server-round"]) | NAMES,
    NUMBERS | TEXTS | st.booleans() | st.binary(max_size=3) | st.lists(TEXTS, max_size=2),
    max_size=3,
).map(ConfigRecord)
LIKELY = st.builds(
    lambda arrays, metrics: RecordDict({"arrays": arrays, "metrics": metrics}),
    array_records(),
    METRICS,
)
UNLIKELY = st.dictionaries(NAMES, array_records() | METRICS | ECHOES, max_size=4).map(RecordDict)
ECHOING = st.builds(lambda content, echo: RecordDict({**content, "colearn": echo}), LIKELY, ECHOES)
ERRORS = st.builds(Error, st.integers(-1, 999), st.none() | st.text(max_size=20))
REPLIES = st.one_of(LIKELY, LIKELY, ECHOING, UNLIKELY, ERRORS)


# Without shrinking, which takes minutes where a case is a whole run.
FUZZ = {"suppress_health_check": list(HealthCheck), "phases": [Phase.explicit, Phase.generate]}


@pytest.mark.slow
@given(
    answers=st.lists(REPLIES, min_size=10, max_size=10),
    weighting=st.sampled_from(["uniform", "weighted"]),
    bad=st.sampled_from([(1,), (2,)]),
)
@settings(max_examples=60, **FUZZ)
def test_no_reply_ends_a_run_in_which_it_may_be_left_out(answers, weighting, bad):
    """The honest participant alone is quorum enough, unless the other has taken its name."""
    strategy, _ = run(answers, weighting=weighting, bad=bad)
    assert len(strategy.history) == 10
    for record in strategy.history:
        assert 1 <= len(record.participants) <= 2
        assert len(record.participants) + len(record.refusals) + len(record.absences) >= 2


@pytest.mark.slow
@given(answers=st.lists(REPLIES, min_size=3, max_size=3), bad=st.sampled_from([(1,), (2,)]))
@settings(max_examples=150, **FUZZ)
def test_no_reply_makes_anything_but_a_colearn_error(answers, bad):
    try:
        strategy, _ = run(answers, policy="fail", bad=bad)
    except ColearnError as error:
        check_finite(error.result.arrays, SMALL)
    else:
        assert all(len(record.participants) == 2 for record in strategy.history)


@pytest.mark.slow
@given(content=REPLIES)
@settings(max_examples=120, **FUZZ)
def test_no_reply_to_an_evaluation_ends_a_run(content):
    strategy, _ = run([good(SMALL)], evaluation=content)
    assert len(strategy.history) == 1


@pytest.mark.slow
@given(data=npy_bytes(SMALL["w"]), stype=st.sampled_from(["numpy.ndarray"] * 9 + [""]))
@settings(max_examples=1500, **FUZZ)
def test_bytes_are_an_array_or_refused(data, stype):
    content = good(SMALL)
    content["arrays"]["w"] = Array("float64", (3,), stype, data)
    try:
        check(content, sent(model=SMALL))
    except ColearnError:
        return
    found = np.load(io.BytesIO(data), allow_pickle=False)  # numpy's own reader agrees
    assert (found.dtype, found.shape) == (np.float64, (3,))
    assert np.isfinite(found).all()


# Numbers that pass one by one and do not add up --------------------------------------------------


@pytest.mark.parametrize("answer", [2**63 - 1, -(2**63), 2**62])
@pytest.mark.parametrize("bad", [(1,), (2,), (3,), (1, 3)])
def test_counters_never_wrap_around(answer, bad):
    """The others count 1: the mean lies between that and the answer."""
    initial = {"w": np.ones(1), "n": np.array(1)}
    _, result = run([good({**initial, "n": np.array(answer)})], initial=initial, k=3, bad=bad)
    n = int(result.arrays["n"].numpy())
    assert min(answer, 1) <= n <= max(answer, 1)


@pytest.mark.parametrize("weighting", ["uniform", "weighted"])
@pytest.mark.parametrize("bad", [(1, 2), (2, 3)])
def test_huge_float64_weights_do_not_become_infinite(weighting, bad):
    huge = good({"w": np.full(2, np.finfo(np.float64).max)})
    run([huge] * 3, initial={"w": np.ones(2)}, weighting=weighting, k=3, bad=bad)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_distant_running_means_do_not_make_an_infinite_variance(dtype):
    initial = {"bn.running_mean": np.zeros(2, dtype), "bn.running_var": np.ones(2, dtype)}
    far = np.full(2, np.finfo(dtype).max)
    run([good({**initial, "bn.running_mean": far})] * 2, initial=initial)
