import math
import pickle
from functools import partial

import numpy as np
import pytest

from clients.metrics import audio_tagging, validation_and_test
from flwr_colearn import ColearnError


def test_three_clips_of_two_classes_by_hand():
    outputs = np.array([[9.0, -2.0], [8.0, -1.0], [-1.0, 5.0]], np.float32)
    targets = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    # Class 0: positives at ranks 1 and 3, (1 + 2/3) / 2, one of two pairs in order.
    # Class 1: its positive at rank 2, 1/2, one of two pairs in order.
    metrics = audio_tagging(outputs, targets)
    assert metrics == pytest.approx({"map": (5 / 6 + 1 / 2) / 2, "auc": 0.5, "d-prime": 0.0})


def test_classes_count_where_they_have_what_a_metric_needs():
    outputs = np.array([[1, 1, 1], [2, 2, 2], [0, 3, 3]], np.float32)
    targets = np.array([[0, 1, 0], [1, 1, 0], [0, 1, 0]], np.float32)
    # The second class is always there (precision 1, no AUC), the third never.
    metrics = audio_tagging(outputs, targets)
    assert (metrics["map"], metrics["auc"], metrics["d-prime"]) == (1.0, 1.0, math.inf)
    assert all(map(math.isnan, audio_tagging(outputs[:, 2:], targets[:, 2:]).values()))


@pytest.mark.parametrize(
    ("auc", "published"), [(964, 2.536), (960, 2.471), (968, 2.612), (959, 2.456), (966, 2.574)]
)
def test_d_prime_is_the_published_one_of_a_published_auc(auc, published):
    def d_prime(below):
        # One clip has the tag; so many of 10,000 others are ranked below it.
        outputs = np.arange(10_001, dtype=np.float32)[:, None]
        targets = (outputs == below).astype(np.float32)
        metrics = audio_tagging(outputs, targets)
        assert metrics["auc"] == pytest.approx(below / 10_000)
        return metrics["d-prime"]

    # The published AUC is rounded to three digits.
    assert d_prime(10 * auc - 5) - 0.0005 <= published <= d_prime(10 * auc + 5) + 0.0005


def test_validation_and_test_accuracy_are_of_their_own_parts():
    metrics = partial(validation_and_test, validation=2, test=3)
    outputs = np.eye(3, dtype=np.float32)[[0, 1, 2, 2, 2]]
    targets = np.array([0, 1, 2, 1, 0])
    expected = {"accuracy": 1 / 3, "validation-accuracy": 1.0}
    assert metrics(outputs, targets) == pytest.approx(expected)
    assert pickle.loads(pickle.dumps(metrics))(outputs, targets) == pytest.approx(expected)
    with pytest.raises(ColearnError, match="expected 2 validation and 3 test examples, found 4"):
        metrics(outputs[:4], targets[:4])
