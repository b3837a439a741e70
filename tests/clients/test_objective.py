import numpy as np
import torch

from clients.objective import CLASSES, Objective


def test_the_loss_of_probabilities_is_torchs_loss_of_logits():
    generator = np.random.default_rng(0)
    logits, classes = generator.normal(0, 3, (50, 4)), generator.integers(0, 4, 50)
    labels = (generator.random((50, 4)) < 0.3).astype(np.float32)
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(classes))
    found = CLASSES.loss(CLASSES.probabilities(logits), classes)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    several = Objective(multi_label=True)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits), torch.tensor(labels).double()
    )
    found = several.loss(several.probabilities(logits), labels)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_loss_of_an_impossible_class_is_finite():
    assert CLASSES.loss(np.array([[1.0, 0.0]]), np.array([1])) > 700
