import numpy as np
import torch
from sklearn.datasets import load_digits

from clients.tasks import digits


def as_rows(images):
    return {tuple(row) for row in images.reshape(len(images), -1)}


def test_it_is_scikit_learns_data_split_into_1297_and_500():
    task = digits.load()
    (train_x, train_y), (test_x, test_y) = task.train_set.tensors, task.test_set.tensors
    assert (train_x.shape, test_x.shape) == ((1297, 1, 8, 8), (500, 1, 8, 8))
    assert (train_x.dtype, train_y.dtype) == (torch.float32, torch.int64)
    assert (float(train_x.min()), float(train_x.max())) == (0.0, 1.0)
    images, labels = load_digits(return_X_y=True)
    together = torch.cat([train_x, test_x]).numpy().reshape(-1, 64) * 16
    order, theirs = (np.lexsort(rows.T) for rows in (together, images))
    np.testing.assert_array_equal(together[order], images[theirs])
    np.testing.assert_array_equal(torch.cat([train_y, test_y])[order], labels[theirs])


def test_no_test_image_is_a_training_image():
    task = digits.load()
    train, test = (as_rows(data.tensors[0].numpy()) for data in (task.train_set, task.test_set))
    assert not train & test


def test_classes_are_balanced_in_both_parts_and_in_the_first_examples():
    task = digits.load()
    for labels, expected in (
        (task.train_set.tensors[1], 129.7),
        (task.test_set.tensors[1], 50),
        (task.train_labels[:500], 50),  # the first ones are a random subset
    ):
        assert np.all(np.abs(torch.bincount(labels).numpy() - expected) < 0.4 * expected)
