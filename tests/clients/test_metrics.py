import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from clients.metrics import mean_roc_auc
from flwr_colearn import ColearnError


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    # Label 0: positives 3, 1 against negatives 2, 0: 3 of 4 pairs; label 1: one tie and one right.
    outputs = np.array([[3.0, 5], [2, 5], [1, 4], [0, 4]], np.float32)
    targets = np.array([[1, 1], [0, 0], [1, 0], [0, 0]], np.float32)
    expected = (0.75 + 2.5 / 3) / 2
    assert mean_roc_auc(outputs, targets) == {
        "roc-auc": pytest.approx(expected),
        "labels-evaluated": 2.0,
    }


def test_it_is_scikit_learns_macro_average():
    rng = np.random.default_rng(0)
    targets = (rng.random((500, 6)) < 0.2).astype(np.float32)
    outputs = (rng.standard_normal((500, 6)) + targets).astype(np.float32)
    theirs = roc_auc_score(targets, outputs, average="macro")
    assert mean_roc_auc(outputs, targets)["roc-auc"] == pytest.approx(theirs)


def test_labels_of_one_class_are_left_out_and_counted():
    rng = np.random.default_rng(1)
    outputs = rng.standard_normal((50, 4)).astype(np.float32)
    targets = (rng.random((50, 4)) < 0.5).astype(np.float32)
    targets[:, 1], targets[:, 3] = 0, 1
    theirs = np.mean([roc_auc_score(targets[:, i], outputs[:, i]) for i in (0, 2)])
    assert mean_roc_auc(outputs, targets) == {
        "roc-auc": pytest.approx(theirs),
        "labels-evaluated": 2.0,
    }


def test_without_any_label_to_judge_it_is_no_number():
    found = mean_roc_auc(np.zeros((3, 2)), np.zeros((3, 2)))
    assert math.isnan(found["roc-auc"])
    assert found["labels-evaluated"] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_of_a_model_that_has_diverged_are_refused(value):
    outputs = np.array([[0.0], [value]])
    with pytest.raises(ColearnError, match="outputs: expected finite numbers, found others"):
        mean_roc_auc(outputs, np.array([[0], [1]]))
