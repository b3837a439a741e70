"""Arrays to and from Flower's records, in fewer copies than Flower's own and with its bytes."""

import tracemalloc

import numpy as np
import pytest
from flwr.app import Array

from flwr_colearn.errors import ColearnError
from flwr_colearn.records import Outgoing, data_bytes, to_record, view

ARRAYS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "strided": np.arange(10, dtype=np.float16)[::2],
    "scalar": np.array(7),
    "empty": np.zeros((0, 3)),
    "flag": np.array([True, False]),
    "swapped": np.array([1.5, 2.5], ">f4"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_record_has_the_bytes_that_flower_gives_it(name):
    ours, flowers = to_record(ARRAYS)[name], Array(ARRAYS[name])
    assert ours.data == flowers.data
    assert (ours.dtype, ours.shape, ours.stype) == (flowers.dtype, flowers.shape, flowers.stype)


def test_a_view_is_the_array_and_no_copy():
    record = to_record(ARRAYS)
    for name, array in view(record).items():
        assert array.dtype == ARRAYS[name].dtype
        assert np.array_equal(array, ARRAYS[name])
        assert not array.flags.writeable
        if array.size:
            owner = np.frombuffer(record[name].data, np.uint8)
            assert np.shares_memory(array, owner)


@pytest.mark.parametrize("cut", [0, 5, 9, 10, 60, 127, 128, 151])
def test_a_cut_off_array_is_refused(cut):
    whole = to_record({"matrix": ARRAYS["matrix"]})["matrix"]
    assert len(whole.data) == 152
    record = to_record({"matrix": ARRAYS["matrix"]})
    record["matrix"] = Array(whole.dtype, whole.shape, whole.stype, whole.data[:cut])
    with pytest.raises(ColearnError, match="array 'matrix': expected a serialised numpy array"):
        view(record)


@pytest.mark.parametrize("name", ["matrix", "scalar", "empty", "flag", "swapped"])
def test_an_array_computed_in_its_record_has_the_bytes_that_flower_gives_it(name):
    outgoing = Outgoing()
    array = outgoing.empty(name, ARRAYS[name])
    array[...] = ARRAYS[name]
    record = outgoing.record({name: array})
    assert record[name].data == Array(ARRAYS[name]).data
    assert (record[name].dtype, record[name].shape) == (str(array.dtype), array.shape)
    assert np.shares_memory(array, view(record)[name]) == bool(array.size)


def test_a_record_takes_arrays_that_were_made_elsewhere_or_replaced():
    outgoing = Outgoing()
    unused = outgoing.empty("matrix", ARRAYS["matrix"])
    arrays = dict(ARRAYS)
    record = outgoing.record(arrays)
    assert arrays == {}
    assert list(record) == list(ARRAYS)
    for name, array in view(record).items():
        assert np.array_equal(array, ARRAYS[name])
        assert not np.shares_memory(array, unused)


def test_a_model_computed_in_its_record_is_in_memory_once():
    like = np.zeros(1 << 20, np.float32)
    tracemalloc.start()
    outgoing = Outgoing()
    arrays = {name: outgoing.empty(name, like) for name in "abc"}
    record = outgoing.record(arrays)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * data_bytes(record)
