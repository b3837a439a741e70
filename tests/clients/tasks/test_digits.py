import numpy as np
from sklearn.datasets import load_digits

from clients.tasks import digits


def as_rows(images):
    return {tuple(row) for row in images.reshape(len(images), -1)}


def test_it_is_scikit_learns_data_split_into_1297_and_500():
    task = digits.load()
    train, test = task.train_set, task.test_set
    assert (train.inputs.shape, test.inputs.shape) == ((1297, 8, 8, 1), (500, 8, 8, 1))
    assert (train.inputs.dtype, train.labels.dtype) == (np.float32, np.int64)
    assert (train.inputs.min(), train.inputs.max()) == (0.0, 1.0)
    images, labels = load_digits(return_X_y=True)
    together = np.concatenate([train.inputs, test.inputs]).reshape(-1, 64) * 16
    order, theirs = (np.lexsort(rows.T) for rows in (together, images))
    np.testing.assert_array_equal(together[order], images[theirs])
    our_labels = np.concatenate([train.labels, test.labels])
    np.testing.assert_array_equal(our_labels[order], labels[theirs])


def test_no_test_image_is_a_training_image():
    task = digits.load()
    assert not as_rows(task.train_set.inputs) & as_rows(task.test_set.inputs)


def test_classes_are_balanced_in_both_parts_and_in_the_first_examples():
    task = digits.load()
    for labels, expected in (
        (task.train_set.labels, 129.7),
        (task.test_set.labels, 50),
        (task.train_set.labels[:500], 50),  # the first ones are a random subset
    ):
        assert np.all(np.abs(np.bincount(labels) - expected) < 0.4 * expected)
