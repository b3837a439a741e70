import os

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from flwr_colearn import InProcessGrid
from flwr_colearn._flwr import assume_identity
from flwr_colearn.grids.parcels import Frozen, Reader, created, removed, size_of, written
from tests.flwr_colearn.grids.workers_app import echoing

DTYPES = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(endianness="<"),
    npst.integer_dtypes(endianness=">"),
    npst.unsigned_integer_dtypes(endianness="<"),
    npst.unsigned_integer_dtypes(endianness=">"),
    npst.floating_dtypes(endianness="<"),
    npst.floating_dtypes(endianness=">"),
    npst.complex_number_dtypes(endianness="<"),
    npst.complex_number_dtypes(endianness=">"),
    npst.datetime64_dtypes(),
    npst.timedelta64_dtypes(),
    npst.byte_string_dtypes(max_len=5),
    npst.unicode_string_dtypes(max_len=5),
    st.just(np.dtype([("a", "<i2"), ("b", ">f4", (2,))])),
)
SHAPES = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
LAYOUTS = {
    "as it is": lambda array: array,
    "transposed": lambda array: array.T,
    "Fortran": np.asfortranarray,
    "every second": lambda array: array[..., ::2] if array.ndim else array,
    "backwards": lambda array: array[::-1] if array.ndim else array,
    "broadcast": lambda array: np.broadcast_to(array, (2, *array.shape)),
    "read-only": lambda array: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape),
}


@st.composite
def arrays(draw):
    """Arrays of all types, shapes and layouts, with all bit patterns: NaNs with their payload."""
    dtype, shape = draw(DTYPES), draw(SHAPES)
    size = int(np.prod(shape)) * dtype.itemsize
    if dtype.kind in "iufc":
        array = np.frombuffer(bytearray(draw(st.binary(min_size=size, max_size=size))), dtype)
        array = array.reshape(shape)
    else:
        array = draw(npst.arrays(dtype, shape))
    return LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](array)


@pytest.fixture(scope="module")
def segment():
    assume_identity()
    found = created(2**20)
    yield found
    removed([found])


@settings(max_examples=200)
@given(st.lists(arrays(), max_size=4), st.integers(1, 3))
def test_arrays_of_every_type_pass_bit_for_bit(segment, sent, messages):
    record = ArrayRecord({str(i): Array(array) for i, array in enumerate(sent)})
    content = RecordDict({"arrays": record, "of-one": ArrayRecord({"b": Array(np.array(1))})})
    frozen = [Frozen.of(Message(content, node, "train")) for node in range(messages)]
    assert size_of(frozen) <= segment.size
    parcels, reader = written(frozen, segment), Reader()
    assert parcels[-1].start + parcels[-1].size <= size_of(frozen)
    for node, parcel in enumerate(parcels):
        message = reader.read(parcel, batch=0).thawed()
        assert message.metadata.dst_node_id == node
        received = message.content["arrays"]
        assert list(received) == list(record)
        for name, array in enumerate(sent):
            before, after = record[str(name)], received[str(name)]
            assert type(after.data) is bytes
            assert vars(after) == vars(before)
            numbers = after.numpy()
            assert (numbers.dtype, numbers.shape) == (array.dtype, array.shape)
            assert numbers.tobytes() == array.tobytes()
    reader.segment(segment.name).close()


DESCRIBED = st.tuples(
    st.text(), st.lists(st.integers(0, 9)).map(tuple), st.text(), st.binary()
)  # fmt: skip


@settings(max_examples=50)
@given(st.lists(DESCRIBED, max_size=4))
def test_arrays_of_foreign_serialisations_pass_as_they_are(segment, described):
    record = ArrayRecord({str(i): Array(*each) for i, each in enumerate(described)})
    [parcel] = written([Frozen.of(record)], segment)
    reader = Reader()
    received = reader.read(parcel).thawed()
    assert {name: vars(a) for name, a in received.items()} == {
        n: vars(a) for n, a in record.items()
    }
    reader.segment(segment.name).close()


KINDS = ["?", "<i1", ">i2", "<u4", ">u8", "<f2", ">f4", "<f8", ">c8", "<c16", "<M8[s]", "S3", "<U2"]


def test_a_participant_in_a_worker_gets_and_sends_arrays_of_every_type():
    numbers = np.arange(12).reshape(3, 4)
    sent = {kind: numbers.astype(kind) for kind in KINDS}
    sent |= {f"{kind} transposed": array.T for kind, array in sent.items()}
    sent |= {"none": np.zeros((0, 3), ">f4"), "one": np.array(np.pi), "nan": np.float32([np.nan])}
    record = ArrayRecord({name: Array(array) for name, array in sent.items()})
    content = RecordDict(
        {
            "arrays": record,
            "config": ConfigRecord({"text": "ä", "data": b"\0\xff", "list": [1, 2], "flag": True}),
            "metrics": MetricRecord({"number": 0.1, "numbers": [1e300, float("inf")]}),
        }
    )
    with InProcessGrid(echoing, 2, processes=2) as grid:
        for _ in range(2):  # what the participant keeps from the first comes back with the second
            replies = grid.send_and_receive([Message(content, node, "train") for node in (1, 2)])
    for node, reply in zip((1, 2), replies, strict=True):
        assert not reply.has_error()
        kept = grid.contexts[node].state["arrays"]
        assert (reply.content["config"], reply.content["metrics"]) == (
            content["config"], content["metrics"]
        )  # fmt: skip
        for name, array in sent.items():
            for record_ in (reply.content["arrays"], reply.content["kept"], kept):
                found = record_[name].numpy()
                assert (found.dtype, found.shape) == (array.dtype, array.shape)
                assert found.tobytes() == array.tobytes()


def test_segments_are_named_after_the_process_that_made_them():
    one = created(10)
    try:
        assert one.name.startswith(f"colearn-{os.getpid()}-")
    finally:
        removed([one])
