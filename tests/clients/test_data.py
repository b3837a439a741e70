from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.data import Examples, Task, shuffled_batches, with_validation
from clients.metrics import validation_and_test
from clients.objective import Objective
from flwr_colearn import ColearnError


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_an_epoch_sees_every_example_once_but_for_a_single_left_over_one(n, size, seed):
    batches = shuffled_batches(n, size, seed)
    seen = np.concatenate(batches)
    left_out = n > size > 1 and n % size == 1
    assert len(seen) == len(set(seen)) == n - left_out
    assert all(len(batch) == size for batch in batches[:-1])
    assert 0 < len(batches[-1]) <= size


def test_the_seed_decides_the_order():
    first, again, other = (np.concatenate(shuffled_batches(50, 8, s)) for s in (1, 1, 2))
    assert list(first) == list(again) != list(other)
    assert sorted(first) == list(range(50))
    assert list(first) != list(range(50))


def test_examples_are_taken_and_chunked_with_their_labels():
    examples = Examples(np.arange(10).reshape(5, 2), np.arange(5))
    taken = examples.take(np.array([3, 1]))
    assert (taken.inputs.tolist(), taken.labels.tolist()) == ([[6, 7], [2, 3]], [3, 1])
    chunks = list(examples.chunks(2))
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    assert np.concatenate([chunk.inputs for chunk in chunks]).tolist() == examples.inputs.tolist()


def test_taken_examples_are_copies():
    examples = Examples(np.zeros((5, 2)), np.arange(5))
    examples.take(np.arange(5)).inputs[:] = 1
    assert not examples.inputs.any()


def test_every_input_has_a_label():
    with pytest.raises(ColearnError, match="a label for each of 3 inputs, found 2 labels"):
        Examples(np.zeros((3, 2)), np.zeros(2))


def test_the_last_training_examples_are_the_validation_part():
    task = Task(Examples(np.arange(10), np.arange(10)), Examples(np.arange(3), np.arange(3)))
    split = with_validation(task, 4)
    assert split.train_set.inputs.tolist() == [0, 1, 2, 3, 4, 5]
    assert split.test_set.labels.tolist() == [6, 7, 8, 9]


def test_a_validation_part_is_evaluated_by_the_objective_for_other_data():
    own, test_only = (
        Objective(),
        Objective(metrics=partial(validation_and_test, validation=1, test=2)),
    )
    task = Task(Examples(np.arange(10), np.arange(10)), objective=test_only, own_objective=own)
    assert with_validation(task, 4).objective is own
    assert with_validation(replace(task, own_objective=None), 4).objective is test_only


@pytest.mark.parametrize("size", [-1, 0, 10, 11])
def test_a_validation_part_leaves_examples_to_train_on(size):
    task = Task(Examples(np.arange(10), np.arange(10)))
    with pytest.raises(ColearnError, match=f"validation-examples.*10 training.*found {size}"):
        with_validation(task, size)
