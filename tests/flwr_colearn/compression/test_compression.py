import logging
import math
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flwr_colearn import (
    BFloat16,
    CoLearn,
    ColearnError,
    Compression,
    Float16,
    InProcessGrid,
    Int8,
    LocalPlan,
    PackedCodec,
    RecoveringGrid,
    Recovery,
    Transport,
    Uncompressed,
    legacy,
    participant_mod,
    register,
)
from flwr_colearn import run as run_any
from flwr_colearn.compression import AGREEMENT, CompressionGrid, codec_named, compressed
from flwr_colearn.compression.agreement import VERSION
from flwr_colearn.compression.residuals import RESIDUAL
from flwr_colearn.records import data_bytes
from tests.faults import FaultyGrid, numpy_of, outcome, participants, record_of
from tests.faults import strategy_of as faults_strategy_of

CODECS = [Float16(), BFloat16(), Int8(), Int8(0), Int8(-1)]
INT8 = [Int8(), Int8(0), Int8(-1)]
each_codec = pytest.mark.parametrize("codec", CODECS, ids=str)
each_int8 = pytest.mark.parametrize("codec", INT8, ids=str)
FLOATS = st.sampled_from([np.float16, np.float32, np.float64])


@pytest.fixture(autouse=True, scope="module")
def _identity():
    InProcessGrid(ClientApp(), 1)  # without which Flower lets nobody make a Message


@pytest.fixture(autouse=True)
def quiet_log(monkeypatch, request):
    if "flower_log" not in request.fixturenames:
        monkeypatch.setattr(logging.getLogger("flwr"), "level", logging.CRITICAL)


def bits(arrays):
    return {name: (a.dtype, a.shape, np.asarray(a).tobytes()) for name, a in arrays.items()}


def random_model(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "conv.weight": rng.normal(0, 0.1, (8, 4, 3, 3)).astype(dtype),
        "bn.weight": rng.normal(size=8).astype(dtype),
        "bn.running_mean": rng.normal(size=8).astype(dtype),
        "bn.num_batches_tracked": np.array(7),
        "fc.weight": rng.normal(0, 1, (10, 72)).astype(dtype),
        "fc.bias": rng.normal(size=10).astype(dtype),
        "table": np.arange(6).reshape(2, 3),
    }


def trained_from(model, seed=1, step=0.01):
    rng = np.random.default_rng(seed)
    return {
        name: (a + rng.normal(0, step, a.shape)).astype(a.dtype) if a.dtype.kind == "f" else a + 1
        for name, a in model.items()
    }


def through(codec, model, reference=None, residual=None):
    """What arrives of a model; and that the sender knows exactly what does."""
    travelling, arriving = codec.encode(record_of(model), reference, residual)
    arrived = codec.decode(travelling, reference)
    assert list(travelling) == list(arrived) == list(model)
    assert bits(arriving) == bits(arrived)
    return arrived


# Number formats ---------------------------------------------------------------------------------


def float32_of(patterns):
    return np.array(patterns, np.uint32).view(np.float32).reshape(1, -1)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1))
def test_bfloat16_is_torchs(patterns):
    torch = pytest.importorskip("torch")
    values = float32_of(patterns)
    data = memoryview(BFloat16().pack(values))
    found = BFloat16().unpack(data, values.shape)
    wanted = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    assert len(data) == 2 * values.size
    np.testing.assert_array_equal(found, wanted)  # NaN where torch has NaN


@pytest.mark.parametrize(
    ("pattern", "upper"),
    [
        (0x3F808000, 0x3F80),  # halfway: to even, downwards
        (0x3F818000, 0x3F82),  # halfway: to even, upwards
        (0x3F808001, 0x3F81),
        (0x7F7FFFFF, 0x7F80),  # the largest float32 rounds to infinity
        (0xFF800000, 0xFF80),
        (0x80000000, 0x8000),
    ],
)
def test_bfloat16_rounds_to_the_nearest_even(pattern, upper):
    assert BFloat16().pack(float32_of([pattern])) == struct.pack("<H", upper)


@pytest.mark.parametrize("pattern", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFF8000])
def test_bfloat16_keeps_every_nan_a_nan(pattern):
    data = memoryview(BFloat16().pack(float32_of([pattern])))
    assert np.isnan(BFloat16().unpack(data, (1, 1))).all()


@given(hnp.arrays(np.float32, (2, 3), elements=st.floats(-65000, 65000, width=32)))
def test_float16_is_numpys(values):
    found = through(Float16(), {"w": values})["w"]
    np.testing.assert_array_equal(found, values.astype(np.float16).astype(np.float32))


def test_int8_by_hand():
    shared = np.array([[1.0, 1.0], [2.0, 2.0]], np.float32)
    trained = shared + np.array([[1.27, -0.635], [0.0254, 0.004]], np.float32)
    travelling, _ = Int8().encode(record_of({"w": trained}), {"w": shared})
    payload = travelling["w"].data[4:]
    assert struct.unpack("<f", payload[:4])[0] == pytest.approx(0.01)  # 1.27 / 127
    assert list(np.frombuffer(payload[4:], np.int8)) in ([127, -63, 3, 0], [127, -64, 3, 0])
    rows, _ = Int8(0).encode(record_of({"w": trained}), {"w": shared})
    payload = rows["w"].data[4:]
    assert struct.unpack("<2f", payload[:8]) == pytest.approx([0.01, 0.0254 / 127], rel=1e-4)
    assert list(np.frombuffer(payload[8:], np.int8)[2:]) == [127, 20]
    columns, _ = Int8(-1).encode(record_of({"w": trained}), {"w": shared})
    payload = columns["w"].data[4:]
    assert struct.unpack("<2f", payload[:8]) == pytest.approx([0.01, 0.005], rel=1e-4)
    assert list(np.frombuffer(payload[8:], np.int8)) == [127, -127, 3, 1]


@each_int8
@given(data=st.data(), dtype=st.sampled_from([np.float32, np.float64]))
def test_int8_is_within_half_a_step_of_the_difference_and_what_was_left_over(codec, data, dtype):
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=4, max_side=4))
    numbers = hnp.arrays(dtype, shape, elements=st.floats(-100, 100, width=32))
    shared, delta, left = (data.draw(numbers) for _ in range(3))
    trained = shared + delta
    found = through(codec, {"w": trained}, {"w": shared}, {"w": left})["w"]
    wanted = trained.astype(float) - shared + left
    others = {None: None, 0: tuple(range(1, len(shape))), -1: tuple(range(len(shape) - 1))}
    step = np.abs(wanted).max(axis=others[codec.channel_axis], keepdims=True) / 127
    rounding = 1e-6 * (np.abs(wanted) + np.abs(shared))
    assert (np.abs(found.astype(float) - shared - wanted) <= 0.5001 * step + rounding + 1e-40).all()


def test_differences_of_nothing_and_next_to_nothing():
    shared = np.zeros((2, 2), np.float32)
    for size in (0.0, 1e-45, 1e-44, 1e-40, 1e-38):
        trained = np.array([[size, -size], [0, size]], np.float32)
        found = through(Int8(), {"w": trained}, {"w": shared})["w"]
        np.testing.assert_allclose(found, trained, atol=2e-43, rtol=0.01)


# What is compressed, and what is not --------------------------------------------------------------


@each_codec
@given(data=st.data())
def test_a_model_arrives_with_its_names_order_shapes_and_types(codec, data):
    models = st.dictionaries(
        st.text(min_size=1),
        st.tuples(
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
            st.sampled_from(["f2", "f4", "f8", ">f4", "i8", "?", "u1"]),
        ),
        max_size=4,
    )
    numbers = {"elements": {"min_value": 0, "max_value": 1}}
    model = {}
    for name, (shape, dtype) in data.draw(models).items():
        model[name] = data.draw(hnp.arrays(dtype, shape, **({} if dtype == "?" else numbers)))
    reference = {name: np.zeros_like(array) for name, array in model.items()}
    arrived = through(codec, model, reference)
    for name, array in model.items():
        assert (arrived[name].dtype, arrived[name].shape) == (array.dtype, array.shape)
        np.testing.assert_allclose(
            arrived[name].astype(float), array.astype(float), rtol=2**-8, atol=1 / 250
        )


@each_codec
def test_only_floats_of_two_dimensions_or_more_are_touched(codec):
    model = random_model()
    record = record_of(model)
    travelling, _ = codec.encode(record, trained_from(model))
    assert {array.stype for array in travelling.values()} == {f"colearn.{codec}", "colearn.exact"}
    touched = [name for name in model if travelling[name].stype != "colearn.exact"]
    assert touched == ["conv.weight", "fc.weight"]
    arrived = codec.decode(travelling, trained_from(model))
    for name, array in travelling.items():
        assert (array.dtype, array.shape) == (str(model[name].dtype), model[name].shape)
        assert (bits(arrived)[name] == bits(model)[name]) == (name not in touched)


def test_narrow_floats_are_not_made_wider():
    model = {"half": np.ones((2, 2), np.float16), "double": np.ones((2, 2))}
    for codec in (Float16(), BFloat16()):
        travelling, _ = codec.encode(record_of(model))
        assert travelling["half"].data[4:] == model["half"].tobytes()
        assert len(travelling["double"].data) == 4 + 2 * 4
    assert through(Int8(), model, model)["half"].dtype == np.float16


@pytest.mark.parametrize(
    ("codec", "share"),
    [(Uncompressed(), 1.0), (Float16(), 0.5), (BFloat16(), 0.5), (Int8(), 0.26), (Int8(0), 0.263)],
    ids=str,
)
def test_bytes_of_a_small_residual_network(codec, share):
    models = pytest.importorskip("clients.torch.models.small", exc_type=ImportError)
    model = {name: tensor.numpy() for name, tensor in models.resnet8().state_dict().items()}
    record = record_of(model)
    travelling, _ = codec.encode(record, model)
    assert share - 0.01 < data_bytes(travelling) / data_bytes(record) <= share


@pytest.mark.parametrize(
    ("codec", "value"),
    [(Float16(), 65520.0), (BFloat16(), np.finfo(np.float32).max), (Int8(), 3e38)],
    ids=str,
)
def test_an_array_beyond_the_range_travels_as_it_is_and_the_log_names_it(codec, value, flower_log):
    model = {"large": np.full((2, 2), value, np.float32), "w": np.ones((2, 2), np.float32)}
    reference = {"large": np.full((2, 2), -3e38, np.float32), "w": np.zeros((2, 2), np.float32)}
    travelling, _ = codec.encode(record_of(model), reference)
    assert travelling["large"].stype == "colearn.exact"
    assert travelling["w"].stype == f"colearn.{codec}"
    assert bits(through(codec, model, reference))["large"] == bits(model)["large"]
    assert f"beyond the range of {codec}, sent as they are: ['large']" in flower_log.text


@each_codec
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_arrives_as_nan(codec, value, flower_log):
    model = {"w": np.array([[1, value]], np.float32)}
    arrived = through(codec, model, {"w": np.zeros((1, 2), np.float32)})["w"]
    np.testing.assert_array_equal(arrived, model["w"])
    assert "beyond the range" not in flower_log.text


def test_int8_leaves_alone_what_does_not_fit_the_shared_model():
    model = {"w": np.ones((2, 2)), "v": np.ones((2, 2)), "u": np.ones((2, 2))}
    shared = {"w": np.ones((2, 3)), "v": np.ones((2, 2), np.float32)}
    travelling, _ = Int8().encode(record_of(model), shared)
    assert all(travelling[name].data[4:] == model[name].tobytes() for name in model)


def test_fortran_order_is_no_different():
    shared = random_model()["fc.weight"]
    trained = trained_from({"w": shared})["w"]
    for codec in CODECS:
        in_c = through(codec, {"w": trained}, {"w": shared})["w"]
        in_f = through(codec, {"w": np.asfortranarray(trained)}, {"w": shared})["w"]
        np.testing.assert_array_equal(in_c, in_f)


# Damage -----------------------------------------------------------------------------------------


def encoded(codec):
    model = random_model()
    return codec.encode(record_of(trained_from(model)), model)[0], model


def with_array(record, name, **changes):
    fields = {key: getattr(record[name], key) for key in ("dtype", "shape", "stype", "data")}
    return ArrayRecord({**record, name: Array(**{**fields, **changes})})


@each_codec
@given(data=st.data())
def test_damaged_bytes_are_refused(codec, data):
    record, model = encoded(codec)
    name = data.draw(st.sampled_from(list(record)))
    sound = record[name].data
    where = data.draw(st.integers(0, len(sound) - 1))
    damage = st.sampled_from(["flip", "truncate", "insert", "swap"])
    match data.draw(damage):
        case "flip":
            byte = bytes([sound[where] ^ data.draw(st.integers(1, 255))])
            damaged = sound[:where] + byte + sound[where + 1 :]
        case "truncate":
            damaged = sound[:where]
        case "insert":
            damaged = sound[:where] + data.draw(st.binary(min_size=1)) + sound[where:]
        case "swap":
            damaged = record["conv.weight" if name == "fc.weight" else "fc.weight"].data
    with pytest.raises(ColearnError, match=f"array '{name}': expected one .* as {codec}"):
        codec.decode(with_array(record, name, data=damaged), model)


def checked(payload):
    return zlib.crc32(payload).to_bytes(4, "little") + payload


@each_codec
@given(
    damage=st.fixed_dictionaries(
        {},
        optional={
            "shape": st.lists(st.integers(-3, 2**70)).map(tuple) | st.just((72, 10)),
            "dtype": st.text()
            | st.sampled_from(["float16", "float32", "float64", ">f4", "int8", "O"]),
            "stype": st.text() | st.sampled_from(["numpy.ndarray", "colearn.exact"]),
            "data": st.binary() | st.binary().map(checked),
        },
    ),
    fill=st.integers(0, 255),
)
@example(damage={}, fill=1)
@example(damage={"shape": (72, 10)}, fill=1)
def test_whatever_arrives_is_the_models_or_refused(codec, damage, fill):
    record, model = encoded(codec)
    # A payload of the right length, unless it is damaged: without one nothing is ever decoded.
    payload = bytes([fill]) * (len(record["fc.weight"].data) - 4)
    damaged = with_array(record, "fc.weight", **{"data": checked(payload), **damage})
    for reference in (model, *([] if codec.differential else [None])):
        try:
            arrived = codec.decode(damaged, reference)["fc.weight"]
        except ColearnError:
            assert damage
            continue
        wanted = damaged["fc.weight"] if reference is None else model["fc.weight"]
        assert arrived.shape == wanted.shape
        assert arrived.dtype == np.dtype(wanted.dtype)


@each_codec
@given(st.binary())
def test_sealed_bytes_of_any_content_decode_to_the_right_shape_or_are_refused(codec, payload):
    """A participant may compute a checksum over nonsense: length and shape are checked as well."""
    record, model = encoded(codec)
    length = len(record["fc.weight"].data) - 4
    record["fc.weight"] = Array("float32", (10, 72), f"colearn.{codec}", checked(payload))
    assume(len(payload) != length)
    with pytest.raises(ColearnError, match=f"array 'fc.weight': expected one .* as {codec}"):
        codec.decode(record, model)
    payload = (payload + bytes(length))[:length]
    record["fc.weight"] = Array("float32", (10, 72), f"colearn.{codec}", checked(payload))
    assert codec.decode(record, model)["fc.weight"].shape == (10, 72)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (72, 10)},
        {"shape": (720,)},
        {"dtype": "float64"},
        {"dtype": "complex64"},
        {"stype": "colearn.float8"},
        {"data": b""},
        {"data": bytes(4)},
    ],
)
@each_codec
def test_another_shape_type_or_codec_is_refused(codec, changes):
    record, model = encoded(codec)
    with pytest.raises(ColearnError, match=r"array 'fc\.weight'"):
        codec.decode(with_array(record, "fc.weight", **changes), model)


def test_an_encoded_array_of_an_unknown_name_is_refused():
    record, model = encoded(Float16())
    record["x"] = record["fc.weight"]
    with pytest.raises(ColearnError, match="array 'x'"):
        Float16().decode(record, model)


def test_flower_itself_does_not_read_encoded_arrays():
    """A ClientApp without the mod fails loudly instead of training on other numbers."""
    record, _ = encoded(BFloat16())
    with pytest.raises(TypeError, match=r"colearn\.bfloat16"):
        record["fc.weight"].numpy()


def test_encoded_arrays_travel_as_flower_sends_them():
    record, _ = encoded(Int8())
    for array in record.values():
        arrived = Array.inflate(array.deflate(), array.children)
        for field in ("dtype", "shape", "stype", "data"):
            assert getattr(arrived, field) == getattr(array, field)


# Names and settings -----------------------------------------------------------------------------


def test_codecs_have_names():
    names = ["float32", "float16", "bfloat16", "int8", "int8-first-axis", "int8-last-axis"]
    codecs = [Uncompressed(), Float16(), BFloat16(), Int8(), Int8(0), Int8(-1)]
    assert [codec_named(name) for name in names] == codecs
    assert [codec.name for codec in codecs] == [str(codec) for codec in codecs] == names
    for name in ("float8", None, 8, "", ["int8"]):
        with pytest.raises(ColearnError, match="codec: expected one of float32, float16"):
            codec_named(name)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: Compression(up="int8"),
            r"Compression\(up=...\): expected a codec such as Float16\(\)",
        ),
        (lambda: Compression(down=None), r"Compression\(down=...\): expected a codec"),
        (
            lambda: Compression(down=Int8()),
            r"Compression\(down=...\): expected a codec of whole models",
        ),
        (lambda: Int8(1), "channel_axis: expected 0, -1 or None, found 1"),
        (
            lambda: strategy_of(compression=Int8()),
            r"compression: expected a Compression, such as Compression\(up=Int8\(\)",
        ),
    ],
)
def test_what_is_no_codec_is_refused(make, match):
    with pytest.raises(ColearnError, match=match):
        make()


def test_the_legacy_api_refuses_with_the_reason():
    with pytest.raises(ColearnError, match="compression: expected none, since the legacy API"):
        legacy.CoLearn(3, local_epochs=1, learning_rate=0.1, compression=Compression(up=Float16()))


def test_the_summary_says_what_participants_need(flower_log):
    strategy_of(compression=Compression(up=Int8(), down=Float16())).summary()
    assert (
        "Compression: int8 up, float16 down; participants need participant_mod" in flower_log.text
    )
    flower_log.clear()
    strategy_of().summary()
    assert "Compression" not in flower_log.text


# The mod ----------------------------------------------------------------------------------------


def message_of(shared, kind="train", server_round=3):
    config = ConfigRecord({"server-round": server_round})
    return Message(RecordDict({"arrays": record_of(shared), "config": config}), 7, kind)


def answer_with(arrays):
    def answer(message, context):
        content = {"arrays": record_of(arrays), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    return answer


class Link(InProcessGrid):
    """The one participant of node 7, as a function of what the mod gives it.

    `spoil` changes what the participant sent; `sent` and `received` are what travelled.
    """

    def __init__(self, context, answer, spoil=lambda reply: None):
        super().__init__(lambda message, context: compressed(message, context, answer), 1)
        self.contexts, self.spoil = {7: context}, spoil

    def _call(self, message):
        self.sent = message
        self.received = super()._call(message)
        self.spoil(self.received)
        return self.received


class Participant:
    """One participant: what the server receives from it, decoded."""

    def __init__(self):
        self.context = SimpleNamespace(state=RecordDict(), node_config={})

    def reply(self, compression, server_round, shared, trained, spoil=lambda reply: None):
        grid = CompressionGrid(Link(self.context, answer_with(trained), spoil), compression)
        [reply] = grid.send_and_receive([message_of(shared, server_round=server_round)])
        if reply.has_error():
            raise ColearnError(reply.error.reason)
        assert AGREEMENT not in reply.content
        return numpy_of(reply.content["arrays"])


@pytest.mark.parametrize("kind", ["train", "train.by_name", "evaluate"])
@pytest.mark.parametrize("down", [Uncompressed(), Float16(), BFloat16()], ids=str)
def test_both_sides_see_ordinary_arrays_and_no_trace_of_the_compression(kind, down):
    shared = random_model(dtype=np.float64)
    seen = []

    def answer(message, context):
        seen.append((numpy_of(message.content["arrays"]), list(message.content)))
        return answer_with(shared)(message, context)

    link = Link(Participant().context, answer)
    message = message_of(shared, kind)
    [reply] = CompressionGrid(link, Compression(Int8(), down)).send_and_receive([message])
    [(arrays, records)] = seen
    assert records == list(message.content) == ["arrays", "config"]
    assert bits(arrays) == bits(through(down, shared))
    for name, array in shared.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_allclose(arrays[name], array, rtol=2**-8, atol=1e-7)
    assert AGREEMENT in link.sent.content
    assert list(reply.content) == ["arrays", "metrics"]
    assert reply.metadata.reply_to_message_id == message.metadata.message_id


def test_one_model_is_encoded_once_for_all_messages_that_carry_it():
    calls = []

    class Counting(Float16):
        def encode(self, model, reference=None, residual=None):
            calls.append(model)
            return super().encode(model, reference, residual)

    shared = record_of(random_model())
    messages = [
        Message(RecordDict({"arrays": shared, "c": ConfigRecord({"server-round": r})}), 1, "train")
        for r in (1, 1, 1)
    ]
    grid = CompressionGrid(InProcessGrid(client_app(), 1), Compression(down=Counting()))
    grid.push_messages(messages)
    assert len(calls) == 1
    shared["fc.bias"] = Array(np.ones(10, np.float32))  # in place, as some strategies do
    grid.push_messages(messages[:1])
    assert len(calls) == 2


@pytest.mark.parametrize(
    "compression",
    [
        Compression(Float16()),
        Compression(down=Float16()),
        Compression(Int8(), BFloat16()),
        Compression(Int8(0)),
    ],
    ids=str,
)
def test_there_and_back(compression):
    shared = random_model()
    trained = trained_from(shared)
    arrived = Participant().reply(compression, 3, shared, trained)
    assert list(arrived) == list(trained)
    for name, array in trained.items():
        if array.ndim < 2 or array.dtype.kind != "f" or compression.up == Uncompressed():
            np.testing.assert_array_equal(arrived[name], array)
        else:  # within half a step of float16, or of int8 of a difference of at most 0.05
            np.testing.assert_allclose(arrived[name], array, rtol=2**-11, atol=0.05 / 127 / 2)


def test_without_a_request_the_mod_does_nothing():
    message = message_of(random_model())
    message.metadata.__dict__["_message_id"] = "sent"
    content = dict(message.content)
    answered = []

    def answer(message, context):
        answered.append(dict(message.content))
        return answer_with({"w": np.ones(2)})(message, context)

    reply = compressed(message, Participant().context, answer)
    assert answered == [content]
    assert list(reply.content) == ["arrays", "metrics"]


def test_errors_pass_as_they_are():
    def fail(message, context):
        return Message(Error(2, "no data"), reply_to=message)

    grid = CompressionGrid(Link(Participant().context, fail), Compression(Int8()))
    [reply] = grid.send_and_receive([message_of(random_model())])
    assert (reply.error.code, reply.error.reason) == (2, "no data")


def test_messages_without_a_model_pass_as_they_are():
    link = Link(Participant().context, lambda message, _: Message(RecordDict(), reply_to=message))
    message = Message(RecordDict({"colearn": ConfigRecord({"ask": "name"})}), 7, "train")
    [reply] = CompressionGrid(link, Compression(Int8(), Float16())).send_and_receive([message])
    assert list(link.sent.content) == ["colearn"]
    assert not reply.has_error()


def asked_of_a_participant():
    """A message as it arrives at a participant."""
    compression = Compression(Int8(), Float16())
    link = Link(Participant().context, answer_with(random_model()))
    CompressionGrid(link, compression).push_messages([message_of(random_model())])
    [message] = link._pushed.values()
    return message


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 2}, "compression: expected version 3, found 2; is flwr-colearn the same"),
        ({"version": "3"}, "compression: expected version 3"),
        ({"up": "int4"}, "codec: expected one of .*, found 'int4'; is flwr-colearn the same"),
        ({"down": "int4"}, "codec: expected one of .*, found 'int4'; is flwr-colearn the same"),
    ],
)
def test_a_participant_refuses_what_it_does_not_know(change, match):
    message = asked_of_a_participant()
    message.content[AGREEMENT].update(change)
    with pytest.raises(ColearnError, match=match):
        compressed(message, Participant().context, lambda *_: pytest.fail("called"))


def test_a_participant_refuses_a_damaged_model():
    message = asked_of_a_participant()
    array = message.content["arrays"]["fc.weight"]
    array.data = array.data[:-1]
    with pytest.raises(ColearnError, match=r"array 'fc\.weight'"):
        compressed(message, Participant().context, lambda *_: pytest.fail("called"))


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (None, "arrays sent as int8 by flwr_colearn.participant_mod, found none; add"),
        ({}, "arrays sent as asked for"),
        ({"version": VERSION + 1}, r"asked for, \{'version': 3, 'up': 'int8', 'down': 'float32'"),
        ({"round": 2}, r"asked for, .*'round': 3.*\}, found .*'round': 2"),
        ({"up": "float16"}, r"found .*'up': 'float16'"),
    ],
)
def test_the_server_refuses_a_reply_that_says_something_else(said, match):
    def spoil(reply):
        agreed = dict(reply.content.pop(AGREEMENT))
        if said is not None:
            reply.content[AGREEMENT] = ConfigRecord({**agreed, **said} if said else {})

    shared = random_model()
    with pytest.raises(ColearnError, match=match):
        Participant().reply(Compression(up=Int8()), 3, shared, shared, spoil)


def test_the_server_takes_only_the_codec_that_it_asked_for():
    def spoil(reply):
        reply.content["arrays"] = Float16().encode(record_of(random_model()))[0]

    shared = random_model()
    with pytest.raises(ColearnError, match=r"colearn\.float16"):
        Participant().reply(Compression(up=Int8()), 3, shared, shared, spoil)


class Tenths(PackedCodec):
    """A codec of a user's own: whole tenths in 16 bits."""

    name = "tenths"
    itemsize = 2

    def pack(self, values):
        return np.rint(values * 10).astype("<i2").tobytes()

    def unpack(self, data, shape):
        return (np.frombuffer(data, "<i2").reshape(shape) / 10).astype(np.float32)


def test_a_codec_of_ones_own_is_registered_by_its_name():
    register(Tenths())
    register(Tenths())  # an equal one again, as when a module is imported twice
    assert isinstance(codec_named("tenths"), Tenths)
    shared = {"w": np.zeros((1, 3), np.float32)}
    trained = {"w": np.array([[0.123, -0.26, 0.4]], np.float32)}
    arrived = Participant().reply(Compression(Tenths(), Tenths()), 1, shared, trained)
    np.testing.assert_allclose(arrived["w"], [[0.1, -0.3, 0.4]], rtol=1e-6)
    for wrong, match in ((Tenths, "an object of a subclass of Codec"), ("tenths", "an object")):
        with pytest.raises(ColearnError, match=match):
            register(wrong)


def test_a_codec_with_the_name_of_another_is_refused():
    class Other(Tenths):
        name = "float16"

    with pytest.raises(ColearnError, match="codec float16: expected a name that no other codec"):
        register(Other())


# Error feedback ---------------------------------------------------------------------------------

WEIGHTS = {"w": np.zeros((1, 3), np.float32)}
STEP = np.array([[1.0, 0.003, -0.001]], np.float32)  # beside 1.0, a step of int8 is 0.0079


def rounds_of(participant, compression, rounds, forget=False):
    """The shared model after so many rounds of the one participant, each a STEP further."""
    shared = WEIGHTS
    for server_round in range(1, rounds + 1):
        if forget:
            participant.context.state = RecordDict()
        shared = participant.reply(compression, server_round, shared, {"w": shared["w"] + STEP})
    return shared["w"]


@each_int8
def test_what_is_rounded_away_is_made_up_for_in_later_rounds(codec):
    compression = Compression(up=codec)
    arrived = rounds_of(Participant(), compression, 50)
    step = 1.01 / 127
    np.testing.assert_allclose(arrived, 50 * STEP, atol=step)
    if codec.channel_axis != -1:  # else every number has a scale of its own
        lost = rounds_of(Participant(), compression, 50, forget=True)
        np.testing.assert_allclose(lost, [[50, 0, 0]], atol=1e-4)  # safe, but standing still


def test_a_repeated_round_gives_the_same_bits():
    compression, participant = Compression(Int8(), Float16()), Participant()
    shared = random_model()
    for server_round in (1, 2, 3, 7):
        trained = trained_from(shared, seed=server_round)
        first, *repeated = [
            bits(participant.reply(compression, server_round, shared, trained)) for _ in range(3)
        ]
        assert repeated == [first, first]
    new = bits(Participant().reply(compression, 7, shared, trained))
    assert new != first  # what was left over does make a difference


def test_a_failed_attempt_that_differed_leaves_no_trace():
    """An attempt whose reply never arrived may have trained on other data."""
    compression, shared = Compression(Int8()), random_model()
    one, other = Participant(), Participant()
    for participant in (one, other):
        participant.reply(compression, 1, shared, trained_from(shared, 1))
    one.reply(compression, 2, shared, trained_from(shared, 99))
    replies = [bits(p.reply(compression, 2, shared, trained_from(shared, 2))) for p in (one, other)]
    assert replies[0] == replies[1]
    replies = [bits(p.reply(compression, 3, shared, trained_from(shared, 3))) for p in (one, other)]
    assert replies[0] == replies[1]


def test_a_run_that_begins_again_begins_with_nothing():
    compression, shared, participant = Compression(Int8()), random_model(), Participant()
    for server_round in (1, 2, 3):
        participant.reply(compression, server_round, shared, trained_from(shared, server_round))
    trained = trained_from(shared, 9)
    again = participant.reply(compression, 1, shared, trained)
    assert bits(again) == bits(Participant().reply(compression, 1, shared, trained))


def _clear(state):
    for key in list(state):
        del state[key]


def _truncate(state):
    for record in state.array_records.values():
        for array in record.values():
            array.data = array.data[:-1]


@pytest.mark.parametrize(
    ("damage", "logged"),
    [
        (_clear, None),
        (_truncate, "is lost: ColearnError"),
        (lambda state: state.pop(f"{RESIDUAL}.after"), "is lost: KeyError"),
        (lambda state: state[RESIDUAL].update(round="two"), "is lost: TypeError"),
        (lambda state: state[RESIDUAL].pop("round"), "is lost: KeyError"),
        (lambda state: state.update({RESIDUAL: ArrayRecord()}), "is lost: KeyError"),
    ],
)
def test_a_lost_or_damaged_residual_is_as_none(damage, logged, flower_log):
    compression, shared, participant = Compression(Int8()), random_model(), Participant()
    participant.reply(compression, 1, shared, trained_from(shared, 1))
    damage(participant.context.state)
    trained = trained_from(shared, 2)
    arrived = participant.reply(compression, 2, shared, trained)
    assert bits(arrived) == bits(Participant().reply(compression, 2, shared, trained))
    assert (logged or "") in flower_log.text
    assert ("is lost" in flower_log.text) == (logged is not None)


def test_a_residual_of_another_model_is_dropped_where_it_does_not_fit(flower_log):
    compression, participant = Compression(Int8()), Participant()
    shared = {name: np.zeros((9, 9), np.float32) for name in ("same", "wider", "gone")}
    participant.reply(compression, 1, shared, trained_from(shared))
    shared = {"same": np.zeros((9, 9), np.float32), "wider": np.zeros((9, 10), np.float32)}
    trained = trained_from(shared, 2)
    arrived = participant.reply(compression, 2, shared, trained)
    new = Participant().reply(compression, 2, shared, trained)
    assert bits(arrived)["wider"] == bits(new)["wider"]
    assert bits(arrived)["same"] != bits(new)["same"]
    assert "residuals of another shape are dropped: ['wider', 'gone']" in flower_log.text


def test_the_state_is_kept_in_half_the_bytes_of_the_model_for_each_of_two_rounds():
    compression, shared, participant = Compression(Int8()), random_model(), Participant()
    for server_round in (1, 2):
        participant.reply(compression, server_round, shared, trained_from(shared, server_round))
    kept = sum(data_bytes(record) for record in participant.context.state.array_records.values())
    weights = sum(a.size for a in shared.values() if a.ndim > 1 and a.dtype.kind == "f")
    assert kept == 2 * (2 * weights + 2 * 4)


def test_codecs_of_whole_models_keep_nothing():
    participant = Participant()
    participant.reply(Compression(Float16(), Float16()), 1, random_model(), random_model(1))
    assert not participant.context.state


# Whole runs -------------------------------------------------------------------------------------

K = 3


def strategy_of(**kwargs):
    return CoLearn(K, local_epochs=1, learning_rate=0.1, **kwargs)


def descend(k, plan, arrays):
    """Towards the participant's own optimum; statistics and counters move as well."""
    target = random_model(100 + k)
    rate = np.float32(plan.learning_rate)
    return {
        name: a + rate * (target[name] - a) if a.dtype.kind == "f" else a + 1
        for name, a in arrays.items()
    }


def client_app(mods=(participant_mod,), train=descend, seen=None):
    app = ClientApp(mods=list(mods))

    @app.train()
    def _(message, context):
        k = context.node_config["partition-id"]
        arrays = numpy_of(message.content["arrays"])
        model = train(k, LocalPlan.from_config(message.content["config"]), arrays)
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": record_of(model), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def _(message, context):
        arrays = numpy_of(message.content["arrays"])
        if seen is not None:
            seen.append(arrays)
        metrics = MetricRecord({"num-examples": 1, "norm": float(np.sum(arrays["fc.weight"]))})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def run(compression, rounds=5, app=None, model=None, **kwargs):
    strategy = strategy_of(compression=compression, **kwargs)
    grid = InProcessGrid(app or client_app(), K)
    initial = record_of(random_model() if model is None else model)
    result = strategy.start(grid, initial, num_rounds=rounds)
    return numpy_of(result.arrays), strategy


def test_nothing_changes_unless_it_is_asked_for():
    plain, _ = run(Compression(), app=client_app(mods=[]))
    with_mod, _ = run(Compression())
    explicit, _ = run(Compression(Uncompressed(), Uncompressed()))
    assert bits(plain) == bits(with_mod) == bits(explicit)


@pytest.mark.parametrize(
    ("compression", "tolerance"),
    [
        (Compression(Float16(), Float16()), 4e-3),
        (Compression(BFloat16(), BFloat16()), 4e-2),
        (Compression(Int8(), Uncompressed()), 2e-3),
        (Compression(Int8(0), Float16()), 3e-3),
    ],
    ids=str,
)
def test_a_compressed_run_ends_close_to_an_uncompressed_one(compression, tolerance):
    exact, _ = run(Compression(), rounds=10)
    found, strategy = run(compression, rounds=10)
    assert not any(record.refusals or record.restarts for record in strategy.history)
    for name, array in exact.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_allclose(found[name], array, atol=tolerance, err_msg=name)
    assert bits(found) != bits(exact)


@pytest.mark.parametrize("recovery", [None, Recovery()])
@pytest.mark.parametrize(
    "compression",
    [
        Compression(),
        Compression(Int8(), Float16()),
        Compression(BFloat16()),
        Compression(down=Float16()),
    ],
    ids=str,
)
def test_the_history_counts_what_travelled(compression, recovery):
    moved = {"down": 0, "up": 0}

    def measure(message, context, call_next):
        train = message.metadata.message_type == "train"
        moved["down"] += train * sum(map(data_bytes, message.content.array_records.values()))
        reply = call_next(message, context)
        moved["up"] += train * sum(map(data_bytes, reply.content.array_records.values()))
        return reply

    app = client_app(mods=[measure, participant_mod])
    _, strategy = run(compression, rounds=2, app=app, recovery=recovery, fraction_evaluate=1.0)
    assert sum(record.bytes_down for record in strategy.history) == moved["down"]
    assert sum(record.bytes_up for record in strategy.history) == moved["up"]
    full = 2 * K * data_bytes(record_of(random_model()))
    assert (moved["up"] < full) == (compression.up != Uncompressed())
    assert (moved["down"] < full) == (compression.down != Uncompressed())


def test_participants_evaluate_the_model_that_they_would_train():
    seen = []
    app = client_app(seen=seen)
    final, _ = run(Compression(Int8(), Float16()), rounds=1, app=app, fraction_evaluate=1.0)
    arrived = through(Float16(), final)
    assert [bits(each) for each in seen] == [bits(arrived)] * K


@pytest.mark.parametrize("recovery", [None, Recovery(max_restarts=0)])
def test_a_participant_without_the_mod_is_refused_by_the_mods_name(recovery):
    with pytest.raises(ColearnError, match=r"by flwr_colearn\.participant_mod, found none"):
        run(Compression(Int8()), app=client_app(mods=[]), recovery=recovery)


def test_without_the_mod_a_compressed_model_is_not_trained():
    recovery = Recovery(max_restarts=0)
    for each in (None, recovery):
        with pytest.raises(ColearnError, match=r"by flwr_colearn\.participant_mod, found none"):
            run(Compression(down=Float16()), app=client_app(mods=[]), recovery=each)


def test_nan_in_a_compressed_reply_is_refused_as_such():
    def train(k, plan, arrays):
        return {**arrays, "fc.weight": arrays["fc.weight"] * np.float32(np.nan if k else 1)}

    for codec in CODECS:
        _, strategy = run(Compression(codec), 1, app=client_app(train=train), recovery=None)
        [record] = strategy.history
        assert len(record.participants) == 1
        reasons = {refusal["reason"] for refusal in record.refusals}
        assert reasons == {"array 'fc.weight': expected finite numbers, found NaN or Inf"}


def test_a_users_own_recovering_grid_decodes_too():
    strategy = strategy_of(compression=Compression(Int8(), Float16()))
    grid = RecoveringGrid(InProcessGrid(client_app(), K))
    result = strategy.start(grid, record_of(random_model()), num_rounds=5)
    assert bits(numpy_of(result.arrays)) == bits(run(Compression(Int8(), Float16()))[0])


class FaultyWireGrid(FaultyGrid):
    """Participants that compress, and fail to order."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.client_app = participants(mods=[self._spoil])


SURVIVED = [  # those in which the participant's state survives
    "raises",
    "lost",
    "code 0",
    "code 8",
    "not accepted",
    "duplicate",
    "NaN",
    "wrong type",
    "truncated bytes",
    "no examples",
    "wrong round",
]


def test_recovered_faults_leave_no_trace_in_a_run_of_int8(monkeypatch):
    from tests.faults import MODEL, Clock

    outcomes = []
    for faults in (
        {},
        {(1 + i % 5, i % 4, i // 20): kind for i, kind in enumerate(SURVIVED)},
        {(1 + (2 * i) % 5, (3 * i) % 4, 0): kind for i, kind in enumerate(SURVIVED)},
    ):
        grid = FaultyWireGrid(Clock(monkeypatch), faults)
        strategy = faults_strategy_of(compression=Compression(Int8(), Float16()))
        result = strategy.start(grid, record_of(MODEL), num_rounds=6, timeout=60)
        assert len(grid.injected) == len(faults)
        outcomes.append(outcome(strategy, result))
    assert outcomes[1] == outcomes[0]
    assert outcomes[2] == outcomes[0]


# Differential privacy ---------------------------------------------------------------------------

# Flower's own arithmetic takes no integers.
OF_FLOATS = {name: array for name, array in random_model().items() if array.dtype.kind == "f"}


def test_flowers_privacy_mod_clips_the_model_before_it_is_compressed():
    private = LocalDpMod(clipping_norm=0.01, sensitivity=0.0, epsilon=1.0, delta=0.1)
    app = client_app(mods=[participant_mod, private])
    found, strategy = run(Compression(Int8(), Float16()), rounds=1, app=app, model=OF_FLOATS)
    [record] = strategy.history
    assert not record.refusals
    start = through(Float16(), OF_FLOATS)
    moved = [found[name].astype(float) - start[name] for name in start]
    assert math.sqrt(sum(float((each**2).sum()) for each in moved)) < 0.011


def test_under_a_wrapper_only_the_way_down_is_compressed():
    def private(compression):
        return DifferentialPrivacyServerSideFixedClipping(
            strategy_of(compression=compression), 0.0, 1.0, K
        )

    grid = InProcessGrid(client_app(), K)
    initial = record_of(OF_FLOATS)
    with pytest.raises(ColearnError, match=r"under a wrapper.*Transport.*found 'int8 up"):
        private(Compression(Int8())).start(grid, initial, num_rounds=1)
    up = Transport(compression=Compression(up=Int8()))
    refused = r"compression under differential privacy: expected up=Uncompressed\(\).*'int8 up"
    with pytest.raises(ColearnError, match=refused):
        private(Compression()).start(up.connect(grid), initial, num_rounds=1)
    with pytest.raises(ColearnError, match=refused):
        run_any(private(Compression(up=Int8())), grid, initial, 1)
    down = Transport(compression=Compression(down=Float16()))
    wrapped = private(Compression())
    wrapped.start(down.connect(grid), initial, num_rounds=2)
    sent = data_bytes(Float16().encode(initial)[0])
    assert [record.bytes_down for record in wrapped.strategy.history] == [K * sent] * 2
    assert [len(record.participants) for record in wrapped.strategy.history] == [K, K]


def test_other_strategies_are_not_affected():
    grid = RecoveringGrid(InProcessGrid(client_app(), K))
    strategy = FedAvg(fraction_evaluate=0.0)
    config = ConfigRecord({"local-epochs": 1, "learning-rate": 0.1})
    result = strategy.start(grid, record_of(OF_FLOATS), num_rounds=1, train_config=config)
    assert list(result.arrays) == list(OF_FLOATS)
